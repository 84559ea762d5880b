// The demo page: what a frontend does with the broker, without a build step or a library. Use it as an example.

const TERMINAL = new Set(["completed", "failed", "no_answer", "no-answer", "busy", "canceled", "cancelled"]);
const STEPS = [
  ["queued", "Queued", "OneInbox has accepted the call"],
  ["initiated", "Starting", "the agent is joining"],
  ["in_progress", "In conversation", "the agent is talking and listening"],
  ["completed", "Ended", "no more minutes are used"],
];
const MOST_CALLS = 40; // started by "Exceed the limit", in case there is no limit

const $ = (id) => document.getElementById(id);
const livekitClient = document.body.dataset.livekitClient;

let call = null; // { url, events, startedAt, endedAt } of the call on the page
let budget = null; // { name, quota, window, back: [the time at which each used call is available again] }
let expires = null;
let retryAt = null;
let joining = null; // join.js, if there is a LiveKit server
const spentAt = []; // the times at which this page's own calls were counted

// --- Requests to the broker

async function startCall(body) {
  const headers = { "Idempotency-Key": freshKey() };
  if (body) headers["Content-Type"] = "application/json";
  const request = { method: "POST", headers, body: body && JSON.stringify(body) };
  const answer = await send("/session", request);
  if (!answer) return null;
  if (answer.status === 201) spentAt.push(Date.now());
  readBudget(answer);
  if (!answer.ok) {
    await showProblem(answer, request.body);
    return null;
  }
  const url = new URL(answer.headers.get("Location"), answer.url);
  return { request, answer, url, session: await answer.json() };
}

async function stopCall(url) {
  const answer = await send(`${url}/stop`, { method: "POST" });
  if (answer && !answer.ok) await showProblem(answer);
}

async function send(url, options) {
  try {
    return await fetch(url, options);
  } catch {
    showError({
      title: "The broker does not answer",
      detail: "The request got no answer. Is the sandbox still running?",
      remedy: "Start it again: `oneinbox-broker sandbox`",
    });
    return null;
  }
}

function freshKey() {
  // crypto.randomUUID exists only on HTTPS and loopback.
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// --- The buttons

async function talk() {
  clearError();
  const started = await startCall();
  if (!started) return;
  showExchange(started);
  showToken(started.session.participant_token);
  follow(started.url);
  joining?.offer(started.session);
}

async function askTooOften() {
  clearError();
  const unused = [];
  while (unused.length < MOST_CALLS) {
    const started = await startCall();
    if (!started) break;
    unused.push(started.url);
    await new Promise((resolve) => setTimeout(resolve, 80)); // slow enough to see the meter empty
  }
  await Promise.all(unused.map(stopCall));
}

async function badRequest() {
  clearError();
  await startCall({ colour: "green", variables: "Ada" });
}

function onClick(button, action) {
  button.addEventListener("click", async () => {
    if (button.getAttribute("aria-disabled") === "true") return;
    // Not `disabled`, which would take the focus away.
    button.setAttribute("aria-disabled", "true");
    button.setAttribute("aria-busy", "true");
    try {
      await action();
    } finally {
      button.removeAttribute("aria-busy");
      button.setAttribute("aria-disabled", "false");
      showButtons();
    }
  });
}

function showButtons() {
  const live = call !== null && call.endedAt === null;
  if (!$("talk").hasAttribute("aria-busy")) $("talk").setAttribute("aria-disabled", String(live));
  $("talk-label").textContent = live ? "On a call" : "Talk";
  $("talk").classList.toggle("live", live);
  if (!$("hang-up").hasAttribute("aria-busy")) $("hang-up").setAttribute("aria-disabled", String(!live));
}

// --- The call

function follow(url) {
  call?.events.close(); // the previous call may still be waiting for its transcript
  const events = new EventSource(`${url}/events`);
  const followed = { url, events, startedAt: Date.now(), endedAt: null };
  call = followed;
  showTimeline(STEPS.map(([status, label, about]) => ({ status, label, about, at: null })));
  showTranscript(null, "It appears when the call has ended.");
  say("Call requested.");

  events.addEventListener("call", (event) => showCall(followed, JSON.parse(event.data)));
  events.addEventListener("end", () => {
    events.close();
    if ($("transcript").hidden) showTranscript(null, "This call has no transcript.");
  });
  events.addEventListener("error", () => {
    if (events.readyState !== EventSource.CLOSED) return; // it reconnects by itself
    followed.endedAt ??= Date.now();
    say("The call’s state is no longer available.");
    showButtons();
  });
  showButtons();
}

function showCall(followed, state) {
  const step = steps.find((each) => each.status === state.status);
  const over = TERMINAL.has(state.status);
  const changed = state.status !== followed.status;
  followed.status = state.status;
  if (changed) {
    const at = (Date.now() - followed.startedAt) / 1000;
    if (step) {
      step.at = at;
    } else {
      // An unexpected final status replaces the last step; any other unknown status means the call still runs.
      steps.splice(steps.length - 1, over ? 1 : 0, { status: state.status, label: state.status, about: "", at });
    }
    showTimeline(steps, state.status);
    const label = steps.find((each) => each.status === state.status).label;
    const talked = state.duration_seconds ?? 0;
    const length = `${talked} ${talked === 1 ? "second" : "seconds"} of talk`;
    say(over ? `${label} after ${length}.` : `${label}.`);
  }
  if (over && followed.endedAt === null) {
    followed.endedAt = Date.now();
    joining?.withdraw();
    showTranscript(null, "The transcript is being written …");
  }
  if (state.transcript) showTranscript(state.transcript);
  showButtons();
}

let steps = [];

function showTimeline(shown, current) {
  steps = shown;
  $("timeline").replaceChildren(
    ...steps.map((step) => {
      const item = element("li", { className: step.at === null ? "" : "reached" });
      const when = step.at === null ? "–" : `${step.at.toFixed(1)} s`;
      item.append(
        element("span", { className: "label", textContent: step.label }),
        element("span", { className: "about", textContent: step.about }),
        element("span", { className: "when", textContent: when }),
      );
      if (step.status === current) item.setAttribute("aria-current", "step");
      return item;
    }),
  );
}

function showTranscript(lines, meanwhile = "") {
  $("no-transcript").textContent = meanwhile;
  $("no-transcript").hidden = lines !== null;
  $("ghosts").hidden = lines !== null;
  $("transcript").hidden = lines === null;
  $("transcript").replaceChildren(
    ...(lines ?? []).map((line) => {
      const item = element("li", { className: line.role });
      item.append(
        element("span", { className: "who", textContent: line.role === "agent" ? "Agent" : "You" }),
        element("span", { className: "said", textContent: line.content }),
      );
      return item;
    }),
  );
}

function say(text) {
  $("call-state").textContent = text;
}

// --- Request and answer

function showExchange({ request, answer, session }) {
  $("no-exchange").hidden = true;
  $("exchange").hidden = false;
  $("request").textContent = ["POST /session", ...Object.entries(request.headers).map((header) => header.join(": "))].join("\n");
  const shown = ["Location", "RateLimit-Policy", "RateLimit", "X-Request-ID"];
  $("response").textContent = [
    `${answer.status} ${answer.statusText}`,
    ...shown.map((name) => `${name}: ${answer.headers.get(name)}`),
  ].join("\n");
  $("server-url").textContent = session.server_url;
  $("token").replaceChildren(
    ...session.participant_token.split(".").flatMap((part, place) => [
      place ? "." : "",
      element("span", { className: ["header", "payload", "signature"][place], textContent: part }),
    ]),
  );
}

function showToken(token) {
  const [header, claims] = token.split(".").slice(0, 2).map(decode);
  expires = claims.exp * 1000;
  $("no-token").hidden = true;
  $("decoded").hidden = false;
  $("claims").replaceChildren(...rows(header, "header"), ...rows(claims, "claim"));
}

function decode(part) {
  const binary = atob(part.replaceAll("-", "+").replaceAll("_", "/"));
  return JSON.parse(new TextDecoder().decode(Uint8Array.from(binary, (letter) => letter.charCodeAt(0))));
}

function rows(members, kind, prefix = "") {
  return Object.entries(members).flatMap(([name, value]) => {
    if (value !== null && typeof value === "object") return rows(value, kind, `${prefix}${name}.`);
    const row = element("div", { className: kind });
    const time = ["exp", "nbf", "iat"].includes(name) ? ` (${new Date(value * 1000).toLocaleTimeString()})` : "";
    row.append(
      element("dt", { textContent: prefix + name }),
      element("dd", { textContent: `${value}${time}` }),
    );
    return [row];
  });
}

// --- Calls left: RateLimit-Policy: "name";q=10;w=30 and RateLimit: "name";r=9;t=30, the closest limit first

function readBudget({ status, headers }) {
  if (status !== 201 && status !== 429) return; // refused before calls are counted: the headers name another limit
  const state = /"([^"]+)";r=(\d+);t=(\d+)/.exec(headers.get("RateLimit") ?? "");
  const policy = state && new RegExp(`"${state[1]}";q=(\\d+);w=(\\d+)`).exec(headers.get("RateLimit-Policy") ?? "");
  if (!policy || (status === 429 && budget && budget.name !== state[1])) return;
  const [remaining, reset] = [Number(state[2]), Number(state[3])];
  const [quota, window] = [Number(policy[1]), Number(policy[2])];
  const now = Date.now();
  const spent = quota - remaining;
  // A moving window: each call counts for `w` seconds. Of calls that others on this address started, only the
  // first to expire is known, in `t` seconds.
  const own = spentAt.map((at) => at + window * 1000).filter((back) => back > now).slice(-spent || Infinity);
  const others = Array(Math.max(0, spent - own.length)).fill(now + reset * 1000);
  budget = { name: state[1], quota, window, back: [...others, ...own] };
  $("no-budget").hidden = true;
  $("budget").hidden = false;
  $("meter").setAttribute("aria-valuemax", String(quota));
  while ($("meter").childElementCount < quota) $("meter").append(element("i"));
  showBudget();
}

function showBudget() {
  const now = Date.now();
  const back = budget.back.filter((at) => at > now);
  const left = budget.quota - back.length;
  const text = `${left} of ${budget.quota} left`;
  $("budget-figure").textContent = text;
  $("meter").setAttribute("aria-valuenow", String(left));
  $("meter").setAttribute("aria-valuetext", text);
  [...$("meter").children].forEach((pip, place) => {
    const full = place < left;
    const waited = full ? 1 : 1 - (back[place - left] - now) / (budget.window * 1000);
    pip.classList.toggle("full", full);
    pip.style.setProperty("--level", Math.min(1, Math.max(0, waited)).toFixed(3));
  });
  const every = `${budget.quota} calls in any ${budget.window} seconds.`;
  $("budget-text").textContent = back.length
    ? `${every} The next one is available in ${seconds(back[0] - now)}.`
    : `${every} All are available.`;
}

// --- Errors: RFC 9457 problem details, for people

async function showProblem(answer, sent) {
  const problem = await answer.json();
  const page = new URL(problem.type, answer.url);
  const slug = page.pathname.split("/").at(-1);
  const retryAfter = answer.headers.get("Retry-After");
  const explained = await send(page, { headers: { Accept: "application/json" } });
  const remedy = explained?.ok ? (await explained.json()).remedy : "";
  showError({ ...problem, slug, page, remedy, sent, retryAfter: retryAfter && Number(retryAfter) });
}

function showError({ status, slug, title, detail, errors, remedy, sent, retryAfter, page, request_id: requestId }) {
  $("problem").hidden = false;
  $("problem-status").textContent = status ?? "";
  $("problem-slug").textContent = slug ?? "";
  $("problem-title").textContent = title;
  $("problem-detail").replaceChildren(...prose(detail));
  $("problem-sent").hidden = !sent;
  $("problem-sent").textContent = sent ?? "";
  $("problem-places").hidden = !errors;
  $("problem-places").replaceChildren(
    ...(errors ?? []).map(({ loc, msg }) => {
      const item = element("li", { textContent: `: ${msg}` });
      item.prepend(element("code", { textContent: loc.join(" › ") }));
      return item;
    }),
  );
  $("problem-remedy").replaceChildren(...prose(remedy));
  $("problem-link").textContent = slug ? `What ${slug} means` : "";
  if (page) $("problem-link").href = page;
  $("problem-request").textContent = requestId ? `Request ${requestId}` : "";
  retryAt = retryAfter ? Date.now() + retryAfter * 1000 : null;
  $("problem-retry").hidden = retryAt === null;
  showRetry();
  $("announce").textContent = `${title}. ${detail}`;
}

function prose(text) {
  return text.split("`").map((part, place) => (place % 2 ? element("code", { textContent: part }) : part));
}

function clearError() {
  $("problem").hidden = true;
  $("announce").textContent = "";
  retryAt = null;
}

function showRetry() {
  if (retryAt === null) return;
  const wait = retryAt - Date.now();
  $("problem-retry").textContent = wait > 0 ? `Try again in ${seconds(wait)}.` : "You can try again now.";
}

// --- Time

function tick() {
  if (call) $("timer").textContent = clock((call.endedAt ?? Date.now()) - call.startedAt);
  if (expires !== null) $("expiry").textContent = `expires in ${clock(Math.max(0, expires - Date.now()))}`;
  if (budget) showBudget();
  showRetry();
}

function seconds(milliseconds) {
  return `${Math.max(1, Math.ceil(milliseconds / 1000))} s`;
}

function clock(milliseconds) {
  const whole = Math.floor(milliseconds / 1000);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

function element(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}

onClick($("talk"), talk);
onClick($("hang-up"), () => stopCall(call.url));
onClick($("too-often"), askTooOften);
onClick($("bad-request"), badRequest);
showTimeline(STEPS.map(([status, label, about]) => ({ status, label, about, at: null })));
setInterval(tick, 250);
if (livekitClient) {
  const { offerToJoin } = await import("/demo/join.js");
  joining = offerToJoin($, document.body.dataset);
}
