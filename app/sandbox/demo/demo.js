// The sandbox's page: the element of client.js, and around it what happens on the wire. Nothing here is private.

import { Broker } from "/client.js";
import { readBudget, showBudget } from "./budget.js";
import { clearEvents, showCode, showEvent, showExchange, showExpiry, showToken } from "./inspector.js";
import { fromCdn } from "./livekit.js";
import { $, clock, element, seconds } from "./page.js";
import { isEvents, isSession, reachedOneInbox, watch } from "./wire.js";

const LIVE = new Set(["asking", "connecting", "talking", "hangingUp"]);
const GIVEN_UP = 10_000; // milliseconds without a broker after which the page ends its call
const MOST_CALLS = 40; // started by "ask too often", in case there is no limit

const caller = $("call");
const lines = new Map(); // of the transcript, by id
let began = null;
let ended = null;
let lostAt = null;
let retryAt = null;
let phase = "idle";

// --- What to ask for

function wanted() {
  const { agent, variable, value } = Object.fromEntries(new FormData($("inputs")));
  return { ...(agent && { agent }), ...(variable && { variables: { [variable]: value } }) };
}

function readInputs() {
  const { agent, variables } = wanted();
  for (const [name, value] of Object.entries({ agent, variables: variables && JSON.stringify(variables) })) {
    if (value) caller.setAttribute(name, value);
    else caller.removeAttribute(name);
  }
  showCode(wanted());
}

$("inputs").addEventListener("input", readInputs);
$("inputs").addEventListener("submit", (event) => event.preventDefault());

// --- The call

// Refused, this page says so at once, where a shop's page had better wait for its turn.
caller.broker = new Broker({ patience: 0 });
caller.options = {
  microphone: Boolean(navigator.mediaDevices), // a page of plain http may only listen
  livekit: document.body.dataset.livekitClient && fromCdn(document.body.dataset),
};

caller.addEventListener("phase", ({ detail }) => {
  const isNew = LIVE.has(detail) && !LIVE.has(phase) && phase !== "resumable";
  phase = document.body.dataset.state = detail;
  if (isNew) clear();
  if (phase === "talking") began ??= Date.now();
  if (phase === "ended") ended ??= Date.now();
  for (const button of [$("too-often"), $("bad-request")]) button.setAttribute("aria-disabled", String(LIVE.has(phase)));
});

function clear() {
  began = ended = lostAt = retryAt = null;
  say("");
  $("provoked").textContent = "";
  lines.clear();
  showWords();
  clearEvents();
}

caller.addEventListener("oneinbox-error", ({ detail: error }) => {
  if (error.slug === "livekit-missing") {
    say(
      "LiveKit’s client comes from a CDN. Without a network: npm install livekit-client, and start the sandbox with " +
        "BROKER_LIVEKIT_CLIENT=node_modules/livekit-client/dist/livekit-client.umd.js",
    );
  }
  // Here OneInbox is simulated: it needs no microphone. A real call had better not start.
  if (!error.slug.startsWith("microphone-")) return;
  caller.options = { ...caller.options, microphone: false };
  say("Talk again to listen without one.");
});

for (const name of ["change", "ending", "end"]) {
  caller.addEventListener(`oneinbox-${name}`, ({ detail }) => {
    began ??= Date.now();
    showEvent(name, detail, Date.now() - began);
    for (const wire of ["wire-oneinbox", "wire-broker"]) pulse(wire);
    if (detail?.status) $("oneinbox-knows").textContent = `the agent, and the call: ${detail.status.replaceAll("_", " ")}`;
    if (detail?.transcript && !lines.size) {
      for (const [place, line] of detail.transcript.entries()) lines.set(place, { ...line, final: true });
      showWords();
    }
  });
}

caller.addEventListener("oneinbox-speech", ({ detail: line }) => {
  lines.set(line.id, line);
  showWords();
});

function showWords() {
  $("no-words").hidden = lines.size > 0;
  $("words").hidden = lines.size === 0;
  $("words").replaceChildren(
    ...[...lines.values()].map(({ role, content, final }) =>
      element("li", { className: `${role}${final ? "" : " now"}` }, element("b", { textContent: role === "agent" ? "Agent" : "You" }), content),
    ),
  );
  $("words").scrollTop = $("words").scrollHeight;
}

function say(text) {
  $("trouble").textContent = text;
}

function draw() {
  const { call } = caller;
  $("orb").style.setProperty("--agent", call && !call.ended ? call.level("agent").toFixed(2) : "0");
  requestAnimationFrame(draw);
}

// --- The wire

watch((exchange) => {
  showExchange(exchange);
  showWire(exchange);
  if (isEvents(exchange)) hearBroker(exchange.status);
  if (!isSession(exchange) || !exchange.answer) return;
  readBudget(exchange);
  if (exchange.status !== 201) return;
  const expires = showToken(JSON.parse(exchange.answer.text).participant_token);
  $("page-knows").textContent = `a token for one room, until ${new Date(expires).toLocaleTimeString([], { timeStyle: "short" })}`;
});

function showWire(exchange) {
  const { method, path, status, took, answer } = exchange;
  const isBad = status === 0 || status >= 400;
  if (isEvents(exchange) && !isBad) return; // its events pulse, the last request stays in words
  const short = path.replace(/^\/calls\/[^/]+/, "/calls/…");
  pulse("wire-broker", [`${method} ${short}`, status === null ? "…" : status === 0 ? "no answer" : `${status} · ${took} ms`], isBad);
  if (!isSession(exchange)) {
    if (answer && !isBad) pulse("wire-oneinbox", [`${method} /v1${short}`, "200"]);
  } else if (answer && reachedOneInbox(exchange)) {
    pulse("wire-oneinbox", ["POST /v1/calls/web", status === 201 ? "201" : "asked; no call"]);
  } else {
    rest("wire-oneinbox", ["POST /v1/calls/web", status === null ? "…" : "not asked"]);
  }
}

function pulse(id, words, isBad = false) {
  rest(id, words, isBad);
  void $(id).offsetWidth; // so that the animation starts again
  $(id).classList.add("pulse");
}

function rest(id, words, isBad = false) {
  const wire = $(id);
  if (words) [wire.firstElementChild.textContent, wire.lastElementChild.textContent] = words;
  wire.classList.toggle("bad", isBad);
  wire.classList.remove("pulse");
}

function hearBroker(status) {
  if (status === null || phase !== "talking") return;
  if (status === 0 || status >= 500) {
    lostAt ??= Date.now();
  } else {
    lostAt = null;
    say(status < 400 ? "" : "The broker no longer knows this call.");
  }
}

function showLoss() {
  if (lostAt === null || phase !== "talking") return;
  const left = lostAt + GIVEN_UP - Date.now();
  if (left > 0) return say(`The broker does not answer. This call ends in ${seconds(left)} unless it comes back.`);
  lostAt = null;
  say("The broker is gone. Is the sandbox still running?");
  caller.hangUp();
}

// --- Refusals

async function refused(ask) {
  retryAt = null;
  $("provoked").textContent = "";
  try {
    await ask();
    $("provoked").textContent = "It was not refused.";
  } catch (error) {
    retryAt = error.retryAfter ? Date.now() + error.retryAfter * 1000 : null;
    const next = error.retryAfter ? `Try again in ${error.retryAfter} s.` : "The answer says what is wrong.";
    $("provoked").textContent = `${error.message}. ${next}`;
  }
}

function showRetry() {
  if (retryAt === null || Date.now() < retryAt) return;
  retryAt = null;
  $("provoked").textContent = "You can call again now.";
}

async function askTooOften() {
  const broker = new Broker({ patience: 0 });
  const calls = [];
  try {
    while (calls.length < MOST_CALLS) {
      calls.push(await broker.start(wanted()));
      await new Promise((resolve) => setTimeout(resolve, 80)); // slow enough to see the budget shrink
    }
  } finally {
    await Promise.all(calls.map((call) => call.hangUp()));
  }
}

const sendBadRequest = () => new Broker({ patience: 0 }).start({ variables: { customer_name: "{{secret}}" } });

function onClick(button, action) {
  button.addEventListener("click", async () => {
    if (button.getAttribute("aria-disabled") === "true") return;
    button.setAttribute("aria-disabled", "true"); // not `disabled`, which would take the focus away
    await action();
    button.setAttribute("aria-disabled", "false");
  });
}

onClick($("too-often"), () => refused(askTooOften));
onClick($("bad-request"), () => refused(sendBadRequest));

setInterval(() => {
  $("clock").textContent = began === null ? "" : clock((ended ?? Date.now()) - began);
  showBudget();
  showExpiry();
  showRetry();
  showLoss();
}, 250);
readInputs();
draw();
