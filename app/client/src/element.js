// @ts-check
/** `<oneinbox-call>`: one button that becomes the call. */
import { Broker, BrokerError } from "./client.js";

/** @typedef {import("./client.js").Call} Call */
/** @typedef {import("./client.js").CallEvents} CallEvents */
/** @typedef {import("./client.js").Line} Line */
/** @typedef {import("./client.js").Speech} Speech */
/** @typedef {import("./client.js").StartOptions} StartOptions */
/** @typedef {import("./client.js").JoinOptions} JoinOptions */
/** @typedef {"idle" | "asking" | "connecting" | "talking" | "hangingUp" | "ended" | "refused" | "resumable"} Phase */

/** Every word that the element shows; `strings` replaces any of them. @type {Record<string, string>} */
const WORDS = {
  // buttons
  talk: "Talk",
  cancel: "Cancel",
  hangUp: "Hang up",
  again: "Talk again",
  back: "Back to the call",
  mute: "Mute",
  // states
  asking: "Allow the microphone …",
  connecting: "Connecting …",
  talking: "You are connected.",
  muted: "You are muted.",
  hangingUp: "Hanging up …",
  ended: "The call has ended.",
  "ended-operator": "The call was ended by the service.",
  "ended-max-call-seconds": "The call has reached its longest time.",
  "ended-talk-minutes": "The call has ended: the time to talk is used up.",
  resumable: "Your call is still running.",
  // times
  left: "{time} left",
  ending: "The call ends in {time}.",
  waiting: "You can try again in {time}.",
  ready: "You can try again now.",
  seconds: "{n} s",
  minutes: "{n} min",
  hours: "{n} h",
  // the transcript
  transcript: "Transcript",
  agent: "Agent",
  user: "You",
  // errors by slug; any other is shown in the broker's words
  "rate-limited": "You have called too often for now.",
  "too-many-live-calls": "You are on another call. Hang up there first.",
  "talk-time-used-up": "Your time to talk is used up for now.",
  "at-capacity": "All lines are busy.",
  "upstream-busy": "All lines are busy.",
  unauthenticated: "Sign in to talk.",
  "forbidden-origin": "This page may not start calls.",
  blocked: "You may not start calls here.",
};

/** The main button's word in each phase. */
const LABELS = {
  idle: "talk",
  asking: "cancel",
  connecting: "cancel",
  talking: "hangUp",
  hangingUp: "hangUp",
  ended: "again",
  refused: "talk",
  resumable: "back",
};

const STYLE = `
:host {
  display: inline-block; max-width: 100%; font: var(--oneinbox-font, 500 1rem/1.4 system-ui, sans-serif);
  --a: var(--oneinbox-accent, light-dark(#0b6b57, #5bd3b3)); --on: var(--oneinbox-on-accent, light-dark(#fff, #06231c));
  --warn: var(--oneinbox-warn, light-dark(#8a4b00, #f0b35a));
  --soft: color-mix(in srgb, currentcolor 78%, transparent); --line: color-mix(in srgb, currentcolor 30%, transparent);
}
:host([hidden]) { display: none }
.box { display: grid; gap: .5rem; justify-items: start }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem .75rem }
button {
  display: inline-flex; align-items: center; gap: .625rem; min-height: 2.75rem; padding: .5rem 1.25rem; font: inherit;
  border: 1px solid var(--line); border-radius: var(--oneinbox-radius, 99px); background: transparent; color: inherit; cursor: pointer;
}
.main { background: var(--a); color: var(--on); border-color: transparent; font-weight: 650 }
[data-live] .main { background: transparent; color: inherit; border-color: currentcolor }
.mute[aria-pressed=true] { border-color: var(--warn) }
.mute[aria-pressed=true]::before { content: ""; width: .5rem; height: .5rem; border-radius: 50%; background: var(--warn) }
button:focus-visible, ol:focus-visible { outline: 3px solid var(--a); outline-offset: 2px }
.orb { width: .75rem; height: .75rem; border-radius: 50%; background: currentcolor; transform: scale(calc(.7 + .6 * var(--agent, 0))) }
[data-live] .orb { background: var(--a) }
.bar { flex: 1; min-width: 3rem; height: .375rem; border-radius: 9px; background: var(--line); overflow: hidden }
.bar::before { content: ""; display: block; height: 100%; background: var(--a); transform: scaleX(var(--user, 0)); transform-origin: left }
.bar:dir(rtl)::before { transform-origin: right }
.time { font-variant-numeric: tabular-nums; font-weight: 650 }
p, ol { margin: 0; padding: 0; overflow-wrap: anywhere }
.status { color: var(--soft) }
.error { padding-inline-start: .5rem; border-inline-start: .25rem solid var(--warn) }
p:empty { display: none }
ol { list-style: none; display: grid; gap: .25rem; max-height: 12rem; overflow: auto; width: 100% }
b { font-weight: 600; color: var(--soft) }
[hidden] { display: none }
button[hidden] { display: none }
@media (prefers-reduced-motion: no-preference) {
  .orb, .bar::before { transition: transform .1s linear }
  [data-busy] .orb { animation: busy 1s ease-in-out infinite alternate }
}
@keyframes busy { to { opacity: .3 } }
@media (forced-colors: active) {
  button { border-color: ButtonText }
  .bar::before, .orb { background: Highlight; forced-color-adjust: none }
}
`;

/** Seconds before the end from which the time left is shown. */
const SOON = 60;

/** Seconds of asking again before the visitor is told that there is no room, and when there may be. */
const PATIENCE = 5;

/** @type {CSSStyleSheet | undefined} */ let sheet;
const Base = globalThis.HTMLElement ?? /** @type {typeof HTMLElement} */ (/** @type {unknown} */ (class {})); // no page, on a server

/**
 * Attributes: `agent`, `broker` (its address), `livekit` (livekit-client's address), `variables`, `metadata` and `strings` (JSON),
 * `label` (the button's first word), `transcript` (show what is said). Parts: box, row, button, orb, label, mute, leave, bar, time,
 * status, error, retry, lines. Events: `phase`, and the call's own as `oneinbox-change`, `-ending`, `-end`, `-speech`, `-error`,
 * which bubble.
 */
export class OneInboxCallElement extends Base {
  static observedAttributes = ["broker", "strings", "label", "transcript"];
  /** @type {Call | null} */ call = null;
  /** @type {Phase} */ phase = "idle";
  /** @type {BrokerError | null} */ error = null;
  /** @type {Record<string, string>} */ #strings = {};
  /** @type {Broker | null} */ #broker = null;
  /** @type {StartOptions & JoinOptions} */ #options = {};
  /** @type {AbortController | null} */ #starting = null;
  /** @type {Record<string, HTMLElement>} */ #parts = {};
  /** @type {(Line & { id?: string })[]} */ #lines = [];
  #retryAt = 0;
  #frame = 0;
  /** @type {ReturnType<typeof setInterval> | undefined} */ #clock;

  constructor() {
    super();
    const root = this.attachShadow({ mode: "open", delegatesFocus: true });
    if (!sheet) (sheet = new CSSStyleSheet()).replaceSync(STYLE); // a <style> would need the page's CSP to allow it
    root.adoptedStyleSheets = [sheet];
    const make = (
      /** @type {string} */ tag,
      /** @type {string} */ name,
      /** @type {Record<string, string>} */ attributes = {},
      /** @type {HTMLElement[]} */ ...inside
    ) => {
      const made = document.createElement(tag);
      made.className = name;
      for (const [key, value] of Object.entries({ part: name, ...attributes })) made.setAttribute(key, value);
      made.append(...inside);
      return (this.#parts[name] = made);
    };
    const unseen = { "aria-hidden": "true" };
    const type = "button";
    const main = make("button", "main", { type, part: "button" }, make("span", "orb", unseen), make("span", "label"));
    const mute = make("button", "mute", { type, "aria-pressed": "false" });
    const leave = make("button", "leave", { type });
    root.append(
      make(
        "div",
        "box",
        {},
        make("div", "row", {}, main, mute, leave, make("span", "bar", unseen), make("span", "time")),
        make("p", "status", { role: "status" }),
        make("p", "error", { role: "alert" }),
        make("p", "retry"),
        make("ol", "lines", { tabindex: "0" }),
      ),
    );
    // Of a double click only the first counts; to ignore clicks by time would lose honest ones.
    main.addEventListener("click", (event) => event.detail < 2 && this.#press());
    main.addEventListener("pointerenter", () => this.phase === "idle" && this.#findBroker()?.prepare(this.#join()), { once: true });
    mute.addEventListener("click", () => this.call?.mute());
    leave.addEventListener("click", () => this.hangUp());
  }

  // Accessors, not fields: a field would overwrite what the page had set before this class was loaded.
  /** For logins: `element.broker = new Broker({ token })`. An address is taken, too: frameworks set it for the attribute.
   * @returns {Broker | null} */
  get broker() {
    return this.#broker;
  }
  /** @param {Broker | string | URL | null} given */
  set broker(given) {
    const isAddress = typeof given === "string" || given instanceof URL;
    this.#broker = isAddress ? null : given;
    if (isAddress) this.setAttribute("broker", String(given));
    else this.#offer();
  }

  /** What attributes cannot say. @type {StartOptions & JoinOptions} */
  get options() {
    return this.#options;
  }
  set options(given) {
    this.#options = given;
  }

  /** Words in place of the element's own; as JSON, too. @returns {Record<string, string>} */
  get strings() {
    return this.#strings;
  }
  /** @param {Record<string, string> | string | null} words */
  set strings(words) {
    this.#strings = (typeof words === "string" ? parsed("strings", words) : words) ?? {};
    this.#show();
  }

  connectedCallback() {
    for (const name of ["broker", "options", "strings"]) this.#adopt(name);
    this.#show();
    this.#clock = setInterval(() => this.#tick(), 500);
    this.#offer();
  }

  /** Offer the call that this tab had before it was reloaded. */
  #offer() {
    if (this.phase !== "idle" || !this.isConnected) return;
    this.#findBroker()?.resume().then(
      (call) => {
        if (this.phase === "idle" && call) this.#have(call, "resumable");
        else call?.hangUp().catch(() => {}); // another one was started meanwhile
      },
      () => {}, // the next reload tries again
    );
  }

  disconnectedCallback() {
    clearInterval(this.#clock);
    setTimeout(() => this.isConnected || this.hangUp()); // moved within the page, it is back by then
  }

  /** @param {string} name @param {string | null} _ @param {string | null} value */
  attributeChangedCallback(name, _, value) {
    if (name === "strings") this.strings = value;
    else this.#show();
    if (name === "broker") {
      this.#broker = null;
      this.#offer();
    }
  }

  /** Start a call, or go back to the running one, as a click on the button does. */
  async start() {
    if (["asking", "connecting", "talking", "hangingUp"].includes(this.phase)) return;
    const resumed = this.phase === "resumable" ? this.call : null;
    const { livekit, microphone, ...more } = { ...this.#options, ...this.#join() };
    const own = (this.#starting = new AbortController()).signal;
    const signal = more.signal ? AbortSignal.any([more.signal, own]) : own;
    this.error = null;
    this.#retryAt = 0;
    if (!resumed) this.#lines = [];
    const progress = (/** @type {"asking" | "connecting"} */ step) => {
      if (signal.aborted) return;
      this.#to(step);
      more.progress?.(step);
    };
    try {
      if (resumed) {
        await resumed.rejoin({ livekit, microphone, progress });
        if (!resumed.ended) this.#to("talking");
        return;
      }
      const agent = this.getAttribute("agent") ?? undefined;
      const [variables, metadata] = ["variables", "metadata"].map((name) => parsed(name, this.getAttribute(name)));
      const broker = /** @type {Broker} */ (this.#findBroker(true));
      const call = await broker.talk({ agent, variables, metadata, ...more, livekit, microphone, progress, signal });
      this.#have(call, "talking");
    } catch (error) {
      if (signal.aborted) return this.#to(resumed ? "ended" : "idle");
      this.error = error instanceof BrokerError ? error : new BrokerError(String(/** @type {Error} */ (error).message ?? error), { cause: error });
      this.#retryAt = this.error.retryAfter ? Date.now() + this.error.retryAfter * 1000 : 0;
      this.#to(resumed && !resumed.ended ? "resumable" : "refused");
      this.#send("error", this.error);
    }
  }

  /** Hang up, or stop trying. */
  async hangUp() {
    this.#starting?.abort();
    if (!this.call || this.call.ended) return;
    this.error = null;
    this.#to("hangingUp");
    const failure = await this.call.hangUp().catch((error) => error);
    if (this.phase !== "hangingUp") return;
    this.error = failure ?? null;
    this.#to(failure ? "resumable" : "ended");
    if (failure) this.#send("error", failure);
  }

  #press() {
    if (["asking", "connecting", "talking"].includes(this.phase)) this.hangUp();
    else this.start();
  }

  /** @param {boolean} [strict] raise what is wrong with the address */
  #findBroker(strict) {
    try {
      return (this.#broker ??= new Broker({ url: this.getAttribute("broker") ?? undefined, patience: PATIENCE }));
    } catch (error) {
      if (strict) throw error;
      return null;
    }
  }

  #join() {
    return { livekit: this.#options.livekit ?? this.getAttribute("livekit") ?? undefined };
  }

  /** @param {Call} call @param {Phase} phase */
  #have(call, phase) {
    this.call = call;
    for (const type of /** @type {const} */ (["change", "ending", "end", "speech"])) {
      call.on(type, ({ detail }) => {
        if (this.call !== call) return;
        if (type === "speech") this.#add(/** @type {Speech} */ (detail));
        if (call.ended && this.phase !== "ended") this.#to("ended");
        if (call.state?.transcript) this.#lines = call.state.transcript;
        if (type === "ending") this.#say("ending", { time: this.#span(/** @type {CallEvents["ending"]} */ (detail).seconds_left) });
        if (type === "change" && this.phase === "talking") this.#say(call.muted ? "muted" : "talking");
        this.#show();
        this.#send(type, detail);
      });
    }
    call.on("error", ({ detail }) => {
      if (this.call !== call) return;
      this.error = detail; // the end follows
      this.#send("error", detail);
    });
    call.follow();
    this.#to(call.ended ? "ended" : phase);
    cancelAnimationFrame(this.#frame);
    const draw = () => {
      if (call.ended || this.call !== call || !this.isConnected) return;
      this.#parts.box.style.setProperty("--agent", call.level("agent").toFixed(2));
      this.#parts.box.style.setProperty("--user", call.level("user").toFixed(2));
      this.#frame = requestAnimationFrame(draw);
    };
    draw();
  }

  /** @param {Speech} line */
  #add(line) {
    const at = this.#lines.findIndex(({ id }) => id === line.id);
    if (at < 0) this.#lines.push(line);
    else this.#lines[at] = line;
  }

  /** @param {Phase} phase */
  #to(phase) {
    this.phase = phase;
    this.#show();
    const why = `ended-${this.call?.state?.stopped_because}`;
    this.#say(phase === "ended" && this.#word(why) ? why : phase);
    this.dispatchEvent(new CustomEvent("phase", { detail: phase }));
  }

  /** @param {string} type @param {unknown} detail */
  #send(type, detail) {
    this.dispatchEvent(new CustomEvent(`oneinbox-${type}`, { detail, bubbles: true, composed: true }));
  }

  /** @param {string} name @param {Record<string, string | number>} [values] */
  #word(name, values = {}) {
    return (this.#strings[name] ?? WORDS[name] ?? "").replace(/\{(\w+)\}/g, (_, key) => String(values[key] ?? ""));
  }

  /** @param {number} seconds */
  #span(seconds) {
    const [name, n] = seconds < 100 ? ["seconds", seconds] : seconds < 5400 ? ["minutes", seconds / 60] : ["hours", seconds / 3600];
    return this.#word(String(name), { n: Math.round(Number(n)) });
  }

  /** Announce it. @param {string} name @param {Record<string, string>} [values] */
  #say(name, values) {
    write(this.#parts.status, this.#word(name, values));
  }

  #tick() {
    const left = this.phase === "talking" ? (this.call?.secondsLeft ?? Infinity) : Infinity;
    write(this.#parts.time, left <= SOON ? this.#word("left", { time: this.#span(left) }) : "");
    const wait = Math.ceil((this.#retryAt - Date.now()) / 1000);
    const waiting = this.phase === "refused" && this.#retryAt > 0;
    write(this.#parts.retry, !waiting ? "" : wait > 0 ? this.#word("waiting", { time: this.#span(wait) }) : this.#word("ready"));
  }

  #show() {
    const { box, label, mute, leave, bar, error, lines } = this.#parts;
    const { phase } = this;
    box.toggleAttribute("data-live", phase === "talking" || phase === "hangingUp");
    box.toggleAttribute("data-busy", phase === "asking" || phase === "connecting");
    write(label, (phase === "idle" && this.getAttribute("label")) || this.#word(LABELS[phase]));
    mute.hidden = bar.hidden = phase !== "talking";
    leave.hidden = phase !== "resumable";
    write(mute, this.#word("mute"));
    write(leave, this.#word("hangUp"));
    mute.setAttribute("aria-pressed", String(!!this.call?.muted));
    write(error, this.error ? this.#word(this.error.slug) || this.error.message : "");
    const seen = this.hasAttribute("transcript") ? this.#lines : [];
    lines.hidden = !seen.length;
    lines.setAttribute("aria-label", this.#word("transcript"));
    lines.replaceChildren(
      ...seen.map(({ role, content }) => {
        const item = document.createElement("li");
        const who = document.createElement("b");
        who.textContent = `${this.#word(role)}: `;
        item.append(who, content);
        return item;
      }),
    );
    lines.scrollTop = lines.scrollHeight;
    this.#tick();
  }

  /** Hand a property that was set before the class was loaded to its accessor. @param {string} name */
  #adopt(name) {
    if (!Object.hasOwn(this, name)) return;
    const self = /** @type {Record<string, unknown>} */ (/** @type {unknown} */ (this));
    const value = self[name];
    delete self[name];
    self[name] = value;
  }
}

/** Write a text if it is another one: a live region announces each write. @param {HTMLElement} part @param {string} text */
function write(part, text) {
  if (part.textContent !== text) part.textContent = text;
}

/** @param {string} name @param {string | null} text */
function parsed(name, text) {
  try {
    return text ? JSON.parse(text) : undefined;
  } catch {
    throw new TypeError(`<oneinbox-call>: ${name} is not JSON: ${text}`);
  }
}

if (globalThis.customElements && !customElements.get("oneinbox-call")) customElements.define("oneinbox-call", OneInboxCallElement);
