/**
 * An error whose `message` a user can be shown. `slug` is the broker's, or `unreachable`, `not-a-broker`, `login-failed`,
 * `challenge-failed`, `microphone-denied`, `microphone-missing`, `microphone-unavailable`, `livekit-missing`,
 * `not-joined` or, for a call that runs, `joined-elsewhere`.
 */
export class BrokerError extends Error {
    /** @param {string} message @param {About} [about] */
    constructor(message: string, about?: About);
    /** The answer's status; 0 if there was none. */
    status: number;
    slug: string;
    title: string;
    detail: string;
    /** The invalid fields, where `detail` speaks of them. */
    errors: {
        loc: (string | number)[];
        msg: string;
        type: string;
    }[];
    /** Seconds. @type {number | null} */
    retryAfter: number | null;
    /** @type {string | null} */
    requestId: string | null;
}
export class Broker {
    /** @param {BrokerOptions} [options] */
    constructor(options?: BrokerOptions);
    /** The broker's address, without a slash at its end. @type {string} */ url: string;
    /** Milliseconds that the broker's clock is ahead of this device's. @internal */ ahead: number;
    /** Start one call. Asks again as Retry-After says and after a lost answer, with one key: never a second call.
     * @param {StartOptions} [options] @returns {Promise<Call>} */
    start(options?: StartOptions): Promise<Call>;
    /** Open the microphone, start a call and join it. Call it in a click: nothing is billed before the microphone is granted.
     * @param {StartOptions & JoinOptions} [options] @returns {Promise<Call>} */
    talk(options?: StartOptions & JoinOptions): Promise<Call>;
    /** Return the running call that this tab had before it was reloaded, or null. `call.rejoin()` joins it again.
     * @returns {Promise<Call | null>} */
    resume(): Promise<Call | null>;
    /** Load what a click will need: livekit-client, and the way to the media server of the last call. @param {JoinOptions} [options] */
    prepare(options?: JoinOptions): Promise<void>;
    /** Ask the broker. Raises BrokerError for anything but success. @internal
     * @param {string} path @param {RequestInit} [init] @returns {Promise<Response>} */
    send(path: string, init?: RequestInit): Promise<Response>;
    /** Stop a call soon, from a page that is being closed or reloaded. @internal @param {string} url */
    leave(url: string): void;
    #private;
}
/** One call. It sends the events `change`, `ending`, `end`, `error` and `speech`. */
export class Call extends EventTarget {
    /** @internal @param {Broker} broker @param {string} url @param {string} serverUrl @param {string} participantToken */
    constructor(broker: Broker, url: string, serverUrl: string, participantToken: string);
    /** The last known state; null before the first. @type {CallState | null} */ state: CallState | null;
    /** LiveKit's room, once joined. @type {any} */ room: any;
    muted: boolean;
    /** The call's own address. A secret in anonymous mode: anyone who has it can follow the call and hang up. */
    url: string;
    serverUrl: string;
    participantToken: string;
    /** Listen, with types. Returns the function that stops listening.
     * @template {keyof CallEvents} K @param {K} type @param {(event: CustomEvent<CallEvents[K]>) => void} listener @returns {() => void} */
    on<K extends keyof CallEvents>(type: K, listener: (event: CustomEvent<CallEvents[K]>) => void): () => void;
    get ended(): boolean;
    /** Seconds that the call may still last; null if nothing bounds it. @returns {number | null} */
    get secondsLeft(): number | null;
    /** Send events for each change until the call has ended, through restarts, sleep and lost networks. Returns the function that stops it.
     * @returns {() => void} */
    follow(): () => void;
    /** Hang up. Safe to repeat. @returns {Promise<void>} */
    hangUp(): Promise<void>;
    /** @param {boolean} [muted] the opposite of now, if not given */
    mute(muted?: boolean): void;
    /** How loud a side is, 0 to 1. @param {"agent" | "user"} side @returns {number} */
    level(side: "agent" | "user"): number;
    /** Join again after `resume()`. Call it in a click. @param {JoinOptions} [options] */
    rejoin(options?: JoinOptions): Promise<void>;
    /** @internal @param {Media} media */
    join(media: Media): Promise<void>;
    /** Have no more to do with the page. @internal @param {any} kept what the next `resume()` finds */
    drop(kept: any): void;
    #private;
}
export type Line = {
    role: "agent" | "user";
    content: string;
};
/**
 * A call as `GET /calls/{call}` returns it; the last five where BROKER_EXPOSE names them.
 */
export type CallState = {
    id: string;
    agent: string | null;
    /**
     * `queued`, `initiated`, `in_progress`, `completed`, `failed` or another
     */
    status: string;
    created_at: string | null;
    started_at: string | null;
    ended_at: string | null;
    duration_seconds: number | null;
    end_reason: string | null;
    /**
     * the latest moment that the running call may last to
     */
    ends_at: string | null;
    /**
     * why the broker ended it
     */
    stopped_because: string | null;
    transcript?: Line[] | null | undefined;
    messages?: Line[] | null | undefined;
    recording_url?: string | null | undefined;
    summary?: string | null | undefined;
    outcome?: string | null | undefined;
};
export type Ending = {
    ends_at: string;
    seconds_left: number;
    reason: string;
};
/**
 * What a side says, word by word: one `id` until it is `final`.
 */
export type Speech = Line & {
    id: string;
    final: boolean;
};
/**
 * What a call's events hold as `event.detail`.
 */
export type CallEvents = {
    change: CallState | null;
    ending: Ending;
    end: CallState | null;
    error: BrokerError;
    speech: Speech;
};
export type BrokerOptions = {
    /**
     * the broker's address; not needed for a module that the broker itself served
     */
    url?: string | URL | undefined;
    /**
     * returns the user's login; called before each request
     */
    token?: (() => string | Promise<string>) | undefined;
    /**
     * `include` where the login is a cookie
     */
    credentials?: RequestCredentials | undefined;
    /**
     * seconds that `start` may spend on asking again (30)
     */
    patience?: number | undefined;
};
export type StartOptions = {
    agent?: string | undefined;
    variables?: Record<string, string | number | boolean> | undefined;
    metadata?: Record<string, unknown> | undefined;
    overrides?: Record<string, unknown> | undefined;
    /**
     * a solved challenge, or a function that solves one: each works once
     */
    challenge?: string | (() => string | Promise<string>) | undefined;
    /**
     * ends the attempt, and stops what it may have started
     */
    signal?: AbortSignal | undefined;
};
/**
 * The module `livekit-client`, as far as it is used here.
 */
export type LiveKit = {
    Room: new (options?: any) => any;
};
export type JoinOptions = {
    /**
     * livekit-client, a function that imports it, or its address
     */
    livekit?: string | URL | LiveKit | (() => LiveKit | Promise<LiveKit>) | undefined;
    /**
     * false: only listen
     */
    microphone?: boolean | MediaTrackConstraints | MediaStream | undefined;
    /**
     * called when the user is asked for the microphone, and when it was granted
     */
    progress?: ((step: "asking" | "connecting") => void) | undefined;
};
export type About = {
    status?: number | undefined;
    slug?: string | undefined;
    title?: string | undefined;
    detail?: string | undefined;
    retryAfter?: number | null | undefined;
    requestId?: string | null | undefined;
    errors?: {
        loc: (string | number)[];
        msg: string;
        type: string;
    }[] | undefined;
    cause?: unknown;
};
export type Media = {
    client: LiveKit;
    stream: MediaStream | null;
    audio: AudioContext | null;
};
