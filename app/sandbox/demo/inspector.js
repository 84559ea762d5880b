// The inspector: code to copy, and the latest request, token and events.

import { LANGUAGES, asCurl } from "./code.js";
import { $, clock, element } from "./page.js";
import { isEvents, isSession, reachedOneInbox, slugOf } from "./wire.js";

const TABS = ["code", "request", "token", "events"];
const SHOWN = ["Location", "Idempotency-Replayed", "Retry-After", "RateLimit-Policy", "RateLimit", "X-Request-ID"];

const COPIED = { request: () => asCurl(latest), answer: () => latest.answer?.text }; // where it is not the text shown

let language = "tag";
let wanted = {};
let chosen = false; // by the user: then no request moves the tabs
let latest = null;
let expires = null;
let events = 0;
let previous = {};

// --- Tabs and copy buttons

function show(name) {
  for (const each of TABS) {
    const on = each === name;
    $(`tab-${each}`).setAttribute("aria-selected", String(on));
    $(`tab-${each}`).tabIndex = on ? 0 : -1;
    $(`panel-${each}`).hidden = !on;
  }
}

for (const [place, name] of TABS.entries()) {
  const tab = $(`tab-${name}`);
  tab.addEventListener("click", () => {
    chosen = name !== "request";
    show(name);
  });
  tab.addEventListener("keydown", ({ key }) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -place, End: TABS.length - 1 - place }[key];
    if (step === undefined) return;
    const next = $(`tab-${TABS[(place + step + TABS.length) % TABS.length]}`);
    next.click();
    next.focus();
  });
}

for (const button of document.querySelectorAll(".copy")) {
  const label = button.textContent;
  button.addEventListener("click", async () => {
    const source = $(button.dataset.copies);
    const text = COPIED[button.dataset.copies]?.() ?? source.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      source.textContent = text; // no clipboard over plain http: select it instead
      getSelection().selectAllChildren(source);
      button.textContent = "Selected: press Ctrl+C";
    }
    $("announce").textContent = button.textContent;
    setTimeout(() => (button.textContent = label), 2000);
  });
}

// --- Code

/** Shows the code for what the page asks for. */
export function showCode(now = wanted) {
  wanted = now;
  const [write, about] = LANGUAGES[language];
  $("code").textContent = write(wanted);
  $("about-code").textContent = about;
}

$("languages").addEventListener("click", ({ target }) => {
  if (!target.dataset.language) return;
  language = target.dataset.language;
  for (const each of $("languages").children) each.setAttribute("aria-pressed", String(each === target));
  showCode();
});

// --- Request and answer

const isShown = (exchange) => !isEvents(exchange) || exchange.status === 0 || exchange.status >= 400;

/** Shows the latest request; not the stream of events, which has a tab of its own. */
export function showExchange(exchange) {
  if (!isShown(exchange) || exchange.number < (latest?.number ?? 0)) return;
  latest = exchange;
  const { method, path, headers, body, status, answer, took } = exchange;
  $("no-request").hidden = true;
  $("exchange").hidden = false;
  $("request").textContent = [`${method} ${path}`, ...headers.map((header) => header.join(": ")), ...(body ? ["", body] : [])].join("\n");
  const isError = status === 0 || status >= 400;
  $("status").hidden = status === null;
  $("status").textContent = status === 0 ? "lost" : status;
  $("status").classList.toggle("bad", isError);
  $("took").textContent = status ? `${status} · ${took} ms` : "";
  $("took").className = `badge num${isError ? " bad" : ""}`;
  $("took").hidden = !status;
  $("answer").textContent = answer
    ? [...SHOWN.map((name) => [name, answer.headers.get(name)]).filter(([, value]) => value !== null).map((header) => header.join(": ")), "", pretty(answer.text)].join("\n")
    : status === 0 ? "No answer." : "…";
  $("remark").replaceChildren(...remark(exchange));
  if (!chosen) show("request");
}

function remark(exchange) {
  const { status } = exchange;
  if (status === 0) return ["The broker does not answer. Is the sandbox still running?"];
  if (status === null || !isSession(exchange)) return [];
  if (status === 201) return ["Two fields, and nothing else of OneInbox’s answer. The same key and body would get this answer again, and no second call."];
  const asked = reachedOneInbox(exchange) ? "OneInbox was asked." : "Nothing was spent: OneInbox was not asked.";
  const slug = slugOf(exchange);
  return [asked, " ", element("a", { href: `/problems/${slug}`, textContent: `What ${slug} means` })];
}

function pretty(text) {
  try {
    const short = (name, value) => (name === "participant_token" ? `${value.slice(0, 24)}…` : value);
    return JSON.stringify(JSON.parse(text, short), null, 2);
  } catch {
    return text;
  }
}

// --- Token

/** Shows a participant token and what it holds; returns when it expires, in milliseconds. */
export function showToken(token) {
  const parts = token.split(".");
  const [header, claims] = parts.slice(0, 2).map(decode);
  expires = claims.exp * 1000;
  $("no-token").hidden = true;
  $("decoded").hidden = false;
  const classes = ["header", "payload", "signature"];
  $("token").replaceChildren(
    ...parts.flatMap((part, place) => [place ? "." : "", element("span", { className: classes[place], textContent: part })]),
  );
  $("claims").replaceChildren(...rows(header, "header"), ...rows(claims, "payload"));
  return expires;
}

function decode(part) {
  const binary = atob(part.replaceAll("-", "+").replaceAll("_", "/"));
  return JSON.parse(new TextDecoder().decode(Uint8Array.from(binary, (letter) => letter.charCodeAt(0))));
}

function rows(members, part, prefix = "") {
  return Object.entries(members).flatMap(([name, value]) => {
    if (value !== null && typeof value === "object") return rows(value, part, `${prefix}${name}.`);
    const time = ["exp", "nbf", "iat"].includes(name) ? ` (${new Date(value * 1000).toLocaleTimeString()})` : "";
    const row = element("div", { className: part });
    row.append(element("dt", { textContent: prefix + name }), element("dd", { textContent: `${value}${time}` }));
    return [row];
  });
}

/** Counts down to the token's end. */
export function showExpiry() {
  if (expires !== null) $("expiry").textContent = `Expires in ${clock(Math.max(0, expires - Date.now()))}.`;
}

// --- Events

/** Begins the list for a new call. */
export function clearEvents() {
  events = 0;
  previous = {};
  $("events").textContent = "";
  $("count").hidden = true;
}

/** Adds an event, `at` milliseconds after the call began, with the fields that have changed. */
export function showEvent(name, data, at) {
  $("no-events").hidden = true;
  $("told").hidden = false;
  $("count").hidden = false;
  $("count").textContent = ++events;
  const changed = Object.entries(data ?? {}).filter(([field, value]) => JSON.stringify(value) !== JSON.stringify(previous[field] ?? null));
  previous = { ...previous, ...data };
  const fields = changed.map(([field, value]) => `\n  ${field}: ${field === "id" ? shortened(value) : JSON.stringify(value)}`);
  $("events").textContent += `${events > 1 ? "\n\n" : ""}+${(at / 1000).toFixed(1)} s  ${name}${fields.join("")}`;
}

const shortened = (id) => `"${id.slice(0, 18)}…"`; // it holds the call's key
