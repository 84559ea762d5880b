// @ts-check
/** A call as React state. React is the page's own: a peer dependency, or an import map's. */
import { useState, useSyncExternalStore } from "react";

/** @typedef {import("./client.js").Broker} Broker */
/** @typedef {import("./client.js").Call} Call */
/** @typedef {import("./client.js").BrokerError} BrokerError */
/** @typedef {import("./client.js").StartOptions & import("./client.js").JoinOptions} TalkOptions */
/**
 * @typedef {object} Snapshot
 * @property {"idle" | "starting" | "running" | "ended"} state
 * @property {Call | null} call
 * @property {string | null} status OneInbox's: `queued`, `in_progress` …
 * @property {number | null} secondsLeft
 * @property {boolean} muted
 * @property {BrokerError | Error | null} error
 */

/** @type {Snapshot} */
const IDLE = { state: "idle", call: null, status: null, secondsLeft: null, muted: false, error: null };

/** @param {Broker} broker @param {{ join?: boolean }} options */
function createStore(broker, { join = true }) {
  let snapshot = IDLE;
  /** @type {Set<() => void>} */ const listeners = new Set();
  /** @type {AbortController | null} */ let starting = null;
  const set = (/** @type {Partial<Snapshot>} */ news) => {
    snapshot = { ...snapshot, ...news };
    for (const each of listeners) each();
  };
  const hangUp = async () => {
    starting?.abort();
    await snapshot.call?.hangUp().catch((error) => set({ error }));
  };

  /** An event, as `onClick={start}` passes it, means no options. A failure is told in `error`.
   * @param {TalkOptions | { nativeEvent: Event }} [options] @returns {Promise<Call | null>} */
  const start = async (options = {}) => {
    if (snapshot.state === "starting" || snapshot.state === "running") return snapshot.call;
    const mine = (starting = new AbortController());
    set({ ...IDLE, state: "starting" });
    try {
      const given = /** @type {TalkOptions} */ ("nativeEvent" in options || options instanceof Event ? {} : options);
      const wanted = { ...given, signal: given.signal ? AbortSignal.any([given.signal, mine.signal]) : mine.signal };
      const call = await (join ? broker.talk(wanted) : broker.start(wanted));
      const show = () => {
        if (snapshot.call !== call) return;
        const { ended, muted, secondsLeft } = call;
        set({ state: ended ? "ended" : "running", status: call.state?.status ?? null, secondsLeft, muted });
      };
      for (const type of ["change", "ending", "end"]) call.addEventListener(type, show);
      call.on("error", (event) => snapshot.call === call && set({ error: event.detail }));
      const clock = setInterval(() => {
        if (call.ended) clearInterval(clock);
        else if (call.secondsLeft !== snapshot.secondsLeft) show();
      }, 500);
      set({ call });
      show();
      call.follow();
      return call;
    } catch (error) {
      set(mine.signal.aborted ? IDLE : { state: "idle", error: /** @type {Error} */ (error) });
      return null;
    } finally {
      if (starting === mine) starting = null;
    }
  };

  return {
    start,
    hangUp,
    get: () => snapshot,
    server: () => IDLE,
    /** @param {() => void} listener */
    subscribe(listener) {
      listeners.add(listener);
      return () => {
        listeners.delete(listener);
        setTimeout(() => listeners.size || hangUp()); // StrictMode removes the listener and adds it again at once
      };
    },
  };
}

/**
 * Start, show and end one call. It hangs up when the component is gone.
 * @param {Broker} broker one for the whole page, made outside of components
 * @param {{ join?: boolean }} [options] `join: false` where the page joins the room itself
 */
export function useCall(broker, options = {}) {
  const [store] = useState(() => createStore(broker, options));
  const snapshot = useSyncExternalStore(store.subscribe, store.get, store.server);
  return { ...snapshot, start: store.start, hangUp: store.hangUp };
}
