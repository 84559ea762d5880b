// @ts-check
/**
 * Start, join and follow calls through a OneInbox token broker: one ES module without dependencies.
 *
 * A broker serves it as `/client.js`; it then knows its broker by its own address, and brings `<oneinbox-call>`.
 */

/** @typedef {{ role: "agent" | "user", content: string }} Line */
/**
 * @typedef {object} CallState A call as `GET /calls/{call}` returns it; the last five where BROKER_EXPOSE names them.
 * @property {string} id
 * @property {string | null} agent
 * @property {string} status `queued`, `initiated`, `in_progress`, `completed`, `failed` or another
 * @property {string | null} created_at
 * @property {string | null} started_at
 * @property {string | null} ended_at
 * @property {number | null} duration_seconds
 * @property {string | null} end_reason
 * @property {string | null} ends_at the latest moment that the running call may last to
 * @property {string | null} stopped_because why the broker ended it
 * @property {Line[] | null} [transcript]
 * @property {Line[] | null} [messages]
 * @property {string | null} [recording_url]
 * @property {string | null} [summary]
 * @property {string | null} [outcome]
 */
/** @typedef {{ ends_at: string, seconds_left: number, reason: string }} Ending */
/** @typedef {Line & { id: string, final: boolean }} Speech What a side says, word by word: one `id` until it is `final`. */
/**
 * @typedef {object} CallEvents What a call's events hold as `event.detail`.
 * @property {CallState | null} change
 * @property {Ending} ending
 * @property {CallState | null} end
 * @property {BrokerError} error
 * @property {Speech} speech
 */
/**
 * @typedef {object} BrokerOptions
 * @property {string | URL} [url] the broker's address; not needed for a module that the broker itself served
 * @property {() => string | Promise<string>} [token] returns the user's login; called before each request
 * @property {RequestCredentials} [credentials] `include` where the login is a cookie
 * @property {number} [patience] seconds that `start` may spend on asking again (30)
 */
/**
 * @typedef {object} StartOptions
 * @property {string} [agent]
 * @property {Record<string, string | number | boolean>} [variables]
 * @property {Record<string, unknown>} [metadata]
 * @property {Record<string, unknown>} [overrides]
 * @property {string | (() => string | Promise<string>)} [challenge] a solved challenge, or a function that solves one: each works once
 * @property {AbortSignal} [signal] ends the attempt, and stops what it may have started
 */
/** @typedef {{ Room: new (options?: any) => any }} LiveKit The module `livekit-client`, as far as it is used here. */
/**
 * @typedef {object} JoinOptions
 * @property {LiveKit | (() => LiveKit | Promise<LiveKit>) | string | URL} [livekit] livekit-client, a function that imports it, or its address
 * @property {boolean | MediaTrackConstraints | MediaStream} [microphone] false: only listen
 * @property {(step: "asking" | "connecting") => void} [progress] called when the user is asked for the microphone, and when it was granted
 */
/**
 * @typedef {object} About
 * @property {number} [status]
 * @property {string} [slug]
 * @property {string} [title]
 * @property {string} [detail]
 * @property {number | null} [retryAfter]
 * @property {string | null} [requestId]
 * @property {{ loc: (string | number)[], msg: string, type: string }[]} [errors]
 * @property {unknown} [cause]
 */
/** @typedef {{ client: LiveKit, stream: MediaStream | null, audio: AudioContext | null }} Media */

const BROKER_OPTIONS = ["url", "token", "credentials", "patience"];
const START_OPTIONS = ["agent", "variables", "metadata", "overrides", "challenge", "signal"];
const JOIN_OPTIONS = ["livekit", "microphone", "progress"];
const TERMINAL = ["completed", "failed", "no_answer", "no-answer", "busy", "canceled", "cancelled"];
/** Milliseconds without a byte after which a stream is dead: the broker sends one every 15 s. */
const SILENCE = 40_000;
/** Seconds that a reloaded page has to come back to its call. */
const RETURN = 10;
const PROCESSING = { echoCancellation: true, noiseSuppression: true, autoGainControl: true };
const DUPLICATE_IDENTITY = 2; // LiveKit's reason: the same participant joined elsewhere
const HERE = homeOf(import.meta.url);

/** The broker that served this module; null for a copy in a bundle or in node_modules. @param {string} url */
function homeOf(url) {
  return /^https?:\/\/(?!.*\/node_modules\/).*\/client\.js(\?.*)?$/.test(url) ? new URL(".", url).href : null;
}

/**
 * An error whose `message` a user can be shown. `slug` is the broker's, or `unreachable`, `not-a-broker`, `login-failed`,
 * `challenge-failed`, `microphone-denied`, `microphone-missing`, `microphone-unavailable`, `livekit-missing`,
 * `not-joined` or, for a call that runs, `joined-elsewhere`.
 */
export class BrokerError extends Error {
  /** @param {string} message @param {About} [about] */
  constructor(message, about = {}) {
    super(message, "cause" in about ? { cause: about.cause } : undefined);
    this.name = "BrokerError";
    /** The answer's status; 0 if there was none. */
    this.status = about.status ?? 0;
    this.slug = about.slug ?? "";
    this.title = about.title ?? message;
    this.detail = about.detail ?? "";
    /** The invalid fields, where `detail` speaks of them. */
    this.errors = about.errors ?? [];
    /** Seconds. @type {number | null} */
    this.retryAfter = about.retryAfter ?? null;
    /** @type {string | null} */
    this.requestId = about.requestId ?? null;
  }
}

export class Broker {
  /** The broker's address, without a slash at its end. @type {string} */ url;
  /** Milliseconds that the broker's clock is ahead of this device's. @internal */ ahead = 0;
  #options;
  /** The last login: a page that is being closed cannot wait for a fresh one. @type {Record<string, string>} */ #login = {};

  /** @param {BrokerOptions} [options] */
  constructor(options = {}) {
    check("Broker", options, BROKER_OPTIONS);
    const given = options.url ?? HERE;
    if (!given) throw new TypeError('Broker: needs the broker\'s address: new Broker({ url: "https://…" })');
    /** @type {URL | undefined} */ let url;
    try {
      url = new URL(given, globalThis.document?.baseURI);
    } catch {}
    // "talk.example.com" would be a path of the page's own site.
    const clear = /^(https?:\/\/|[./])/i.test(String(given));
    if (!clear || !/^https?:$/.test(url?.protocol ?? "")) throw new TypeError(`Broker: url is not an http(s) address: ${given}`);
    this.url = /** @type {URL} */ (url).origin + /** @type {URL} */ (url).pathname.replace(/\/+$/, "");
    this.#options = { patience: 30, ...options };
  }

  /** Start one call. Asks again as Retry-After says and after a lost answer, with one key: never a second call.
   * @param {StartOptions} [options] @returns {Promise<Call>} */
  async start(options = {}) {
    check("start", options, START_OPTIONS);
    const { signal, challenge, ...request } = options;
    signal?.throwIfAborted();
    // The request itself goes on: its answer names the call to stop.
    return abortable(this.#ask(JSON.stringify(request), challenge, signal), signal, (call) => call.hangUp());
  }

  /** @param {string} body @param {StartOptions["challenge"]} challenge @param {AbortSignal | undefined} signal */
  async #ask(body, challenge, signal) {
    const key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    const until = Date.now() + this.#options.patience * 1000;
    for (let lost = 0; ; ) {
      try {
        const proof = await valueOf(challenge, "The check that you are human failed. Try again.", "challenge-failed");
        /** @type {Record<string, string>} */
        const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
        if (proof) headers["X-Challenge-Token"] = proof;
        // No `keepalive`: the broker would take a page that has gone for one that got its answer.
        const answer = await this.send("/session", { method: "POST", headers, body });
        const given = await json(answer);
        const location = answer.headers.get("Location");
        if (!location || !given?.participant_token) throw stranger(answer);
        return new Call(this, new URL(location, answer.url).href, given.server_url, given.participant_token);
      } catch (error) {
        if (!(error instanceof BrokerError)) throw error;
        const { slug, status, retryAfter } = error;
        const unanswered = slug === "unreachable" || (slug === "not-a-broker" && (status < 300 || status > 501));
        const wait = unanswered ? Math.min(2 ** lost++, 8) : [409, 429, 503].includes(status) && retryAfter;
        if (!wait || Date.now() + wait * 1000 > until) throw error;
        await pause(wait + Math.random() / 4, signal);
      }
    }
  }

  /** Open the microphone, start a call and join it. Call it in a click: nothing is billed before the microphone is granted.
   * @param {StartOptions & JoinOptions} [options] @returns {Promise<Call>} */
  async talk(options = {}) {
    check("talk", options, [...START_OPTIONS, ...JOIN_OPTIONS]);
    const { livekit, microphone, progress, ...start } = options;
    const { signal } = start;
    signal?.throwIfAborted();
    const media = await abortable(openMedia({ livekit, microphone, progress }, this.url), signal, closeMedia);
    /** @type {Call | undefined} */ let call;
    try {
      call = await this.start(start);
      await abortable(call.join(media), signal, () => {});
      return call;
    } catch (error) {
      closeMedia(media);
      await call?.hangUp().catch(() => {});
      throw error;
    }
  }

  /** Return the running call that this tab had before it was reloaded, or null. `call.rejoin()` joins it again.
   * @returns {Promise<Call | null>} */
  async resume() {
    const kept = keep(this.url);
    // Without `left` another page still has the call: this tab is a duplicate, with a copy of its storage.
    if (!kept?.left || Date.now() > kept.until) return null;
    // Before the request, which takes the stop back: the page may be left again before its answer.
    const call = new Call(this, kept.url, kept.serverUrl, kept.token);
    try {
      call.state = await json(await this.send(kept.url));
      if (!call.ended) return call;
      call.drop(null);
    } catch (error) {
      const gone = error instanceof BrokerError && error.status === 404;
      call.drop(gone ? null : kept);
      if (!gone) throw error;
    }
    return null;
  }

  /** Load what a click will need: livekit-client, and the way to the media server of the last call. @param {JoinOptions} [options] */
  async prepare(options = {}) {
    check("prepare", options, JOIN_OPTIONS);
    try {
      const client = await loadLiveKit(options.livekit, this.url);
      const server = keep("server", undefined, "localStorage");
      if (server) await new client.Room().prepareConnection?.(server);
    } catch {} // the click says what is wrong
  }

  /** Ask the broker. Raises BrokerError for anything but success. @internal
   * @param {string} path @param {RequestInit} [init] @returns {Promise<Response>} */
  async send(path, init = {}) {
    const { token, credentials = "same-origin" } = this.#options;
    const login = await valueOf(token, "You could not be signed in.", "login-failed");
    this.#login = login ? { Authorization: `Bearer ${login}` } : {};
    /** @type {Response} */ let answer;
    try {
      const headers = { ...this.#login, ...init.headers };
      answer = await fetch(path.startsWith("/") ? this.url + path : path, { ...init, credentials, headers });
    } catch (cause) {
      init.signal?.throwIfAborted();
      throw unreachable(cause);
    }
    const date = Date.parse(answer.headers.get("Date") ?? "");
    if (date) this.ahead = date - Date.now();
    if (answer.ok) return answer;
    const problem = await answer.json().catch(() => null);
    if (typeof problem?.type !== "string" || typeof problem.title !== "string") throw stranger(answer);
    throw new BrokerError(problem.title, {
      ...problem,
      status: answer.status,
      slug: problem.type.split("/").pop(),
      retryAfter: Number(answer.headers.get("Retry-After")) || null,
      requestId: answer.headers.get("X-Request-ID"),
    });
  }

  /** Stop a call soon, from a page that is being closed or reloaded. @internal @param {string} url */
  leave(url) {
    const { credentials } = this.#options;
    fetch(`${url}/stop?after=${RETURN}`, { method: "POST", keepalive: true, headers: this.#login, credentials }).catch(() => {});
  }
}

/** One call. It sends the events `change`, `ending`, `end`, `error` and `speech`. */
export class Call extends EventTarget {
  /** The last known state; null before the first. @type {CallState | null} */ state = null;
  /** LiveKit's room, once joined. @type {any} */ room = null;
  muted = false;
  #broker;
  /** @type {Media | null} */ #media = null;
  /** @type {Map<string, { node: AnalyserNode, data: Uint8Array<ArrayBuffer> }>} */ #ears = new Map();
  /** @type {HTMLMediaElement[]} */ #sounds = [];
  /** @type {AbortController | null} */ #following = null;
  /** @type {Promise<void> | null} */ #hangingUp = null;
  #over = false;
  #endsAt = 0;

  /** @internal @param {Broker} broker @param {string} url @param {string} serverUrl @param {string} participantToken */
  constructor(broker, url, serverUrl, participantToken) {
    super();
    this.#broker = broker;
    /** The call's own address. A secret in anonymous mode: anyone who has it can follow the call and hang up. */
    this.url = url;
    this.serverUrl = serverUrl;
    this.participantToken = participantToken;
    this.#remember(false);
    keep("server", serverUrl, "localStorage");
    globalThis.addEventListener?.("pagehide", this.#onPageHide);
    globalThis.addEventListener?.("pageshow", this.#onPageShow);
  }

  /** Listen, with types. Returns the function that stops listening.
   * @template {keyof CallEvents} K @param {K} type @param {(event: CustomEvent<CallEvents[K]>) => void} listener @returns {() => void} */
  on(type, listener) {
    this.addEventListener(type, /** @type {EventListener} */ (listener));
    return () => this.removeEventListener(type, /** @type {EventListener} */ (listener));
  }

  get ended() {
    return this.#over || TERMINAL.includes(this.state?.status ?? "");
  }

  /** Seconds that the call may still last; null if nothing bounds it. @returns {number | null} */
  get secondsLeft() {
    return this.#endsAt && !this.ended ? Math.max(0, Math.round((this.#endsAt - Date.now()) / 1000)) : null;
  }

  /** Send events for each change until the call has ended, through restarts, sleep and lost networks. Returns the function that stops it.
   * @returns {() => void} */
  follow() {
    if (!this.#following && !this.#over) {
      this.#following = new AbortController();
      this.#watch(this.#following.signal);
    }
    return () => this.#unfollow();
  }

  /** Hang up. Safe to repeat. @returns {Promise<void>} */
  hangUp() {
    this.#leaveRoom();
    return (this.#hangingUp ??= this.#stop().finally(() => (this.#hangingUp = null)));
  }

  /** @param {boolean} [muted] the opposite of now, if not given */
  mute(muted = !this.muted) {
    this.muted = muted;
    for (const track of this.#media?.stream?.getAudioTracks() ?? []) track.enabled = !muted;
    for (const { track } of this.room?.localParticipant?.audioTrackPublications?.values() ?? []) {
      (muted ? track?.mute() : track?.unmute())?.catch?.(() => {});
    }
    this.#tell("change", this.state);
  }

  /** How loud a side is, 0 to 1. @param {"agent" | "user"} side @returns {number} */
  level(side) {
    const ear = this.#ears.get(side);
    if (!ear || (side === "user" && this.muted)) return 0;
    ear.node.getByteTimeDomainData(ear.data);
    const square = ear.data.reduce((sum, at) => sum + (at - 128) ** 2, 0) / ear.data.length;
    return Math.min(1, Math.sqrt(square) / 40);
  }

  /** Join again after `resume()`. Call it in a click. @param {JoinOptions} [options] */
  async rejoin(options = {}) {
    check("rejoin", options, JOIN_OPTIONS);
    const media = await openMedia(options, this.#broker.url);
    try {
      await this.join(media);
    } catch (error) {
      closeMedia(media);
      throw error;
    }
  }

  /** @internal @param {Media} media */
  async join(media) {
    if (this.ended) throw new BrokerError("The call has ended.", { slug: "not-joined" });
    this.#media = media;
    const room = (this.room = new media.client.Room({ disconnectOnPageLeave: false }));
    room.on("trackSubscribed", (/** @type {any} */ track) => {
      if (track.kind !== "audio") return;
      this.#sounds.push(track.attach()); // Web Audio hears a remote track only while an element plays it
      this.#listen("agent", track.mediaStreamTrack);
    });
    room.on("transcriptionReceived", (/** @type {any[]} */ segments, /** @type {any} */ who) => {
      const role = who?.identity === room.localParticipant?.identity ? "user" : "agent";
      for (const { id, text, final } of segments) this.#tell("speech", { role, content: text, id, final });
    });
    room.on("disconnected", (/** @type {number} */ reason) => {
      if (this.room !== room) return;
      if (reason === DUPLICATE_IDENTITY) this.#end(new BrokerError("This call goes on in another window.", { slug: "joined-elsewhere" }));
      else this.hangUp().catch(() => {});
    });
    this.follow();
    try {
      await room.connect(this.serverUrl, this.participantToken);
      for (const track of media.stream?.getAudioTracks() ?? []) {
        await room.localParticipant.publishTrack(track, { source: "microphone" });
        this.#listen("user", track);
      }
      await room.startAudio?.();
    } catch (error) {
      this.#leaveRoom();
      // No `cause`: the message of LiveKit's error may repeat the token.
      const detail = /** @type {any} */ (error)?.reasonName ?? "";
      throw new BrokerError("The call could not be joined. Start a new one.", { slug: "not-joined", detail });
    }
  }

  async #stop() {
    for (let tries = 1; !this.ended; tries++) {
      try {
        this.#take(await json(await this.#broker.send(`${this.url}/stop`, { method: "POST", keepalive: true })));
      } catch (error) {
        if (!(error instanceof BrokerError)) throw error;
        if (error.status === 404) break;
        if (tries === 4 || (error.status && error.status < 500 && !error.retryAfter)) throw error;
        await pause(Math.min(error.retryAfter ?? tries, 10));
        continue;
      }
      break;
    }
    if (!this.#following) this.#end();
  }

  /** @param {AbortSignal} signal */
  async #watch(signal) {
    // No EventSource: it gives up for good on a proxy's 502, and cannot tell a dead connection from a quiet one.
    // No Last-Event-ID: it would cost a preflight, and the current state comes first anyhow.
    let wait = 1;
    let refused = 0;
    while (!signal.aborted) {
      const attempt = new AbortController();
      const cut = () => attempt.abort();
      let heard = Date.now();
      const watchdog = setInterval(() => Date.now() - heard > SILENCE && cut(), 5000);
      const onOnline = () => Date.now() - heard > 2000 && cut(); // the old network's connection is dead
      signal.addEventListener("abort", cut);
      globalThis.addEventListener?.("online", onOnline);
      try {
        const answer = await this.#broker.send(`${this.url}/events`, { signal: attempt.signal, cache: "no-store" });
        if (answer.status === 204) return this.#end();
        if (!answer.body || !/event-stream/.test(answer.headers.get("Content-Type") ?? "")) throw stranger(answer);
        const reader = answer.body.getReader();
        const decoder = new TextDecoder();
        for (let text = ""; ; ) {
          const piece = await reader.read();
          if (piece.done) break;
          heard = Date.now();
          wait = 1;
          refused = 0;
          const events = (text + decoder.decode(piece.value, { stream: true })).split(/\r?\n\r?\n/);
          text = events.pop() ?? "";
          for (const event of events) if (this.#receive(event)) return;
        }
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof BrokerError) {
          const { status, slug, retryAfter } = error;
          const final = slug !== "not-a-broker" && [400, 401, 403, 404, 422].includes(status);
          // Twice, but for a 404: a login may have expired a moment ago.
          if (final && ++refused > (status === 404 ? 0 : 1)) return this.#end(error);
          wait = retryAfter ?? wait;
        }
      } finally {
        clearInterval(watchdog);
        signal.removeEventListener("abort", cut);
        globalThis.removeEventListener?.("online", onOnline);
      }
      await pause(wait * (0.75 + Math.random() / 2), signal, ["online", "pageshow"]).catch(() => {});
      wait = Math.min(wait * 2, 15);
    }
  }

  /** Take one event of the stream. Returns true if it was the last. @param {string} event */
  #receive(event) {
    const field = (/** @type {string} */ name) => event.match(new RegExp(`^${name}: ?(.*)$`, "m"))?.[1];
    const kind = field("event");
    if (kind === "end") {
      this.#end();
      return true;
    }
    const data = kind && JSON.parse(field("data") ?? "null");
    if (kind === "call") this.#take(data);
    if (kind === "ending") {
      this.#endsAt = Date.now() + data.seconds_left * 1000;
      this.#tell("ending", data);
    }
    return false;
  }

  /** @param {CallState} state */
  #take(state) {
    const ends = Date.parse(state.ends_at ?? "");
    this.#endsAt = ends ? ends - this.#broker.ahead : 0;
    const news = JSON.stringify(state) !== JSON.stringify(this.state);
    this.state = state;
    if (this.ended) {
      this.#remember(null);
      this.#leaveRoom();
    }
    if (news) this.#tell("change", state);
  }

  /** @param {BrokerError} [error] */
  #end(error) {
    if (this.#over) return;
    this.#unfollow();
    this.#leaveRoom();
    this.drop(null);
    if (error) this.#tell("error", error);
    this.#tell("end", this.state);
  }

  /** Have no more to do with the page. @internal @param {any} kept what the next `resume()` finds */
  drop(kept) {
    this.#over = true;
    keep(this.#broker.url, kept);
    globalThis.removeEventListener?.("pagehide", this.#onPageHide);
    globalThis.removeEventListener?.("pageshow", this.#onPageShow);
  }

  /** @template {keyof CallEvents} K @param {K} type @param {CallEvents[K]} detail */
  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #unfollow() {
    this.#following?.abort();
    this.#following = null;
  }

  /** @param {"agent" | "user"} side @param {MediaStreamTrack} [track] */
  #listen(side, track) {
    const audio = this.#media?.audio;
    if (!audio || !track) return;
    const node = new AnalyserNode(audio, { fftSize: 512 });
    audio.createMediaStreamSource(new MediaStream([track])).connect(node);
    this.#ears.set(side, { node, data: new Uint8Array(node.fftSize) });
  }

  #leaveRoom() {
    const room = this.room;
    this.room = null;
    room?.disconnect();
    for (const sound of this.#sounds.splice(0)) sound.remove();
    this.#ears.clear();
    closeMedia(this.#media);
    this.#media = null;
  }

  // A page that is closed and one that is reloaded look the same here, so the stop can be taken back.
  #onPageHide = () => {
    if (this.ended) return;
    this.#remember(true);
    this.#unfollow();
    this.#broker.leave(this.url);
  };

  #onPageShow = (/** @type {PageTransitionEvent} */ event) => {
    if (!event.persisted || this.ended) return;
    this.#remember(false);
    this.follow();
  };

  /** Keep the answer, for `resume()`; not the key, which may start another call. @param {boolean | null} left null: forget it */
  #remember(left) {
    const { url, serverUrl, participantToken: token } = this;
    keep(this.#broker.url, left === null ? null : { url, serverUrl, token, until: expiryOf(token), left });
  }
}

/** Ask for all that a call needs at the same time, in the click. @param {JoinOptions} options @param {string} broker @returns {Promise<Media>} */
async function openMedia({ livekit, microphone = true, progress }, broker) {
  const audio = globalThis.AudioContext ? new AudioContext() : null; // made later, it would stay silent
  progress?.("asking");
  const [stream, client] = await Promise.allSettled([openMicrophone(microphone), loadLiveKit(livekit, broker)]);
  if (stream.status === "fulfilled" && client.status === "fulfilled") {
    audio?.resume().catch(() => {});
    progress?.("connecting");
    return { audio, stream: stream.value, client: client.value };
  }
  closeMedia({ audio, stream: stream.status === "fulfilled" ? stream.value : null });
  throw stream.status === "rejected" ? stream.reason : /** @type {PromiseRejectedResult} */ (client).reason;
}

/** @param {Pick<Media, "audio" | "stream"> | null} media */
function closeMedia(media) {
  for (const track of media?.stream?.getTracks() ?? []) track.stop();
  if (media?.audio && media.audio.state !== "closed") media.audio.close().catch(() => {});
}

/** @param {boolean | MediaTrackConstraints | MediaStream} wanted @returns {Promise<MediaStream | null>} */
async function openMicrophone(wanted) {
  if (!wanted) return null;
  if (globalThis.MediaStream && wanted instanceof MediaStream) return wanted;
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new BrokerError("This page may not use the microphone: it needs https.", { slug: "microphone-unavailable" });
  }
  try {
    const audio = wanted === true ? PROCESSING : /** @type {MediaTrackConstraints} */ (wanted);
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (cause) {
    const name = /** @type {DOMException} */ (cause).name;
    const [slug, words] =
      name === "NotAllowedError" ? ["denied", "The microphone is blocked. Allow it in the browser’s settings for this page."]
      : name === "NotFoundError" || name === "OverconstrainedError" ? ["missing", "No microphone was found."]
      : ["unavailable", "The microphone cannot be used. Another program may be using it."];
    throw new BrokerError(words, { slug: `microphone-${slug}`, cause });
  }
}

/** @param {JoinOptions["livekit"]} given @param {string} broker @returns {Promise<LiveKit>} */
async function loadLiveKit(given, broker) {
  let url = "";
  try {
    if (typeof given === "function") given = await given();
    if (given && typeof given === "object" && "Room" in given) return given;
    if (!given) {
      const present = /** @type {any} */ (globalThis).LivekitClient ?? (await ownLiveKit());
      if (present) return present;
    }
    url = new URL(given ?? `${broker}/livekit-client.js`, globalThis.document?.baseURI).href;
    const module = await import(/* @vite-ignore */ /* webpackIgnore: true */ url);
    const client = module.Room ? module : /** @type {any} */ (globalThis).LivekitClient; // a UMD file sets the global
    if (!client?.Room) throw new TypeError(`${url} is not livekit-client`);
    return client;
  } catch (cause) {
    if (url && !given) await checkBroker(url);
    throw new BrokerError("The audio software could not be loaded. Try again.", { slug: "livekit-missing", detail: url, cause });
  }
}

/** Ask for the file once more: an import does not say why it failed. Throw if no broker answers. @param {string} url */
async function checkBroker(url) {
  const answer = await fetch(url).catch((cause) => {
    throw unreachable(cause);
  });
  const isScript = answer.ok && /javascript/.test(answer.headers.get("Content-Type") ?? "");
  if (!isScript && !(await answer.json().catch(() => null))?.type) throw stranger(answer);
}

/** The page's own livekit-client, of its bundle or import map; null if it has none. @returns {Promise<any>} */
async function ownLiveKit() {
  try {
    return await import(/** @type {any} */ ("livekit-client")); // in `try`, so that bundlers take it for optional
  } catch {
    return null;
  }
}

/** Return what work gives, or reject once the signal aborts, and discard what it gives then.
 * @template T @param {Promise<T>} work @param {AbortSignal | undefined} signal @param {(late: T) => unknown} discard @returns {Promise<T>} */
function abortable(work, signal, discard) {
  if (!signal) return work;
  return new Promise((resolve, reject) => {
    const abort = () => {
      reject(signal.reason);
      work.then(discard).catch(() => {});
    };
    signal.addEventListener("abort", abort, { once: true });
    work.then(resolve, reject).finally(() => signal.removeEventListener("abort", abort));
  });
}

/** @param {string | undefined | (() => string | Promise<string>)} given @param {string} words @param {string} slug the error's, if it throws */
async function valueOf(given, words, slug) {
  try {
    return typeof given === "function" ? await given() : given;
  } catch (cause) {
    throw new BrokerError(words, { slug, cause });
  }
}

/** Milliseconds since 1970 at which a JWT expires; ten minutes from now if it does not say. @param {string} token */
function expiryOf(token) {
  try {
    return JSON.parse(atob(token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/"))).exp * 1000 || Date.now() + 600_000;
  } catch {
    return Date.now() + 600_000;
  }
}

/** Read a kept value (undefined), write it, or delete it (null). A browser may forbid storage.
 * @param {string} name @param {any} [value] @param {"sessionStorage" | "localStorage"} [where] */
function keep(name, value, where = "sessionStorage") {
  try {
    const key = `oneinbox ${name}`;
    if (value === undefined) return JSON.parse(globalThis[where].getItem(key) ?? "null");
    if (value === null) globalThis[where].removeItem(key);
    else globalThis[where].setItem(key, JSON.stringify(value));
  } catch {}
  return null;
}

/** @param {unknown} cause */
function unreachable(cause) {
  return new BrokerError("The service cannot be reached. Check your connection and try again.", { slug: "unreachable", cause });
}

/** @param {Response} answer */
function stranger(answer) {
  return new BrokerError("The service did not answer as expected. Try again later.", {
    slug: "not-a-broker",
    status: answer.status,
    detail: `${answer.url} answered ${answer.status}, not as a broker does`,
    requestId: answer.headers.get("X-Request-ID"),
  });
}

/** @param {Response} answer */
async function json(answer) {
  try {
    return await answer.json();
  } catch (cause) {
    throw cause instanceof SyntaxError ? stranger(answer) : unreachable(cause);
  }
}

/** @param {number} seconds @param {AbortSignal} [signal] @param {string[]} [early] events of the page that end it @returns {Promise<void>} */
function pause(seconds, signal, early = []) {
  return new Promise((resolve, reject) => {
    const done = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      for (const each of early) globalThis.removeEventListener?.(each, done);
      if (signal?.aborted) reject(signal.reason);
      else resolve();
    };
    const timer = setTimeout(done, seconds * 1000);
    signal?.addEventListener("abort", done);
    for (const each of early) globalThis.addEventListener?.(each, done);
    if (signal?.aborted) done();
  });
}

/** @param {string} what @param {object} options @param {string[]} known */
function check(what, options, known) {
  const unknown = Object.keys(options).filter((name) => !known.includes(name));
  if (unknown.length) throw new TypeError(`${what}: unknown option ${unknown.join(", ")}; known are ${known.join(", ")}`);
}

// One tag is enough on a page; a bundle imports the element itself. If it fails, the browser logs why.
if (HERE && globalThis.customElements) import(/* @vite-ignore */ /* webpackIgnore: true */ `${HERE}element.js`).catch(() => {});
