// Calls left, as the answers' headers say: RateLimit-Policy: "name";q=10;w=30 and RateLimit: "name";r=9;t=30

import { $, element, seconds } from "./page.js";

let budget = null; // { name, quota, window, back: [when each used call is available again] }
const spentAt = []; // when this page's own calls were counted

/** Reads the answer of POST /session. */
export function readBudget({ status, answer: { headers } }) {
  if (status === 201) spentAt.push(Date.now());
  if (status !== 201 && status !== 429) return; // refused before calls are counted: the headers name another limit
  const state = /"([^"]+)";r=(\d+);t=(\d+)/.exec(headers.get("RateLimit") ?? "");
  const policy = state && new RegExp(`"${state[1]}";q=(\\d+);w=(\\d+)`).exec(headers.get("RateLimit-Policy") ?? "");
  if (!policy || (status === 429 && budget && budget.name !== state[1])) return;
  const [remaining, reset, quota, window] = [state[2], state[3], policy[1], policy[2]].map(Number);
  const now = Date.now();
  const spent = quota - remaining;
  // A moving window: each call counts for `w` seconds. Of calls that others on this address started, only the
  // first to expire is known, in `t` seconds.
  const own = spentAt.map((at) => at + window * 1000).filter((back) => back > now).slice(-spent || Infinity);
  const others = Array(Math.max(0, spent - own.length)).fill(now + reset * 1000);
  budget = { name: state[1], quota, window, back: [...others, ...own] };
  $("pips").hidden = false;
  $("pips").setAttribute("aria-valuemax", String(quota));
  while ($("pips").childElementCount < quota) $("pips").append(element("i"));
  showBudget();
}

/** Draws what is left now. */
export function showBudget() {
  if (!budget) return;
  const now = Date.now();
  const back = budget.back.filter((at) => at > now);
  const left = budget.quota - back.length;
  const text = `${left} of ${budget.quota} calls left`;
  $("pips").setAttribute("aria-valuenow", String(left));
  $("pips").setAttribute("aria-valuetext", text);
  [...$("pips").children].forEach((pip, place) => pip.classList.toggle("full", place < left));
  $("budget").textContent = back.length
    ? `${text} · next one back in ${seconds(back[0] - now)}`
    : `${text} in any ${budget.window} s`;
}
