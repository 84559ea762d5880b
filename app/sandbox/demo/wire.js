// Watches the page's own requests: client.js sends them with `fetch`, like anybody else.

const watchers = [];
const send = globalThis.fetch;
let sent = 0;

/** Calls `listener(exchange)` when a request is sent, and again when it is answered or has failed. */
export function watch(listener) {
  watchers.push(listener);
}

globalThis.fetch = async function fetch(input, init = {}) {
  const url = new URL(input instanceof Request ? input.url : input, document.baseURI);
  const exchange = {
    number: ++sent,
    method: init.method ?? "GET",
    path: url.pathname + url.search,
    headers: Object.entries(init.headers ?? {}),
    body: init.body ?? null,
    status: null, // null: on its way; 0: no answer
    answer: null, // the Response's headers and text
    took: 0,
  };
  const began = performance.now();
  const tell = (changes) => {
    Object.assign(exchange, changes, { took: Math.round(performance.now() - began) });
    for (const each of watchers) each(exchange);
  };
  tell({});
  try {
    const answer = await send.call(globalThis, input, init);
    const isStream = answer.headers.get("Content-Type")?.startsWith("text/event-stream");
    const copy = isStream ? null : answer.clone();
    Promise.resolve(copy?.text() ?? "").then(
      (text) => tell({ status: answer.status, answer: { headers: answer.headers, text } }),
      () => {}, // aborted
    );
    return answer;
  } catch (error) {
    if (!init.signal?.aborted) tell({ status: 0 });
    throw error;
  }
};

export const isEvents = ({ path }) => path.endsWith("/events");
export const isSession = ({ path }) => path === "/session";

/** The slug of the problem that an exchange was answered with, or "". */
export function slugOf({ answer }) {
  try {
    return JSON.parse(answer.text).type.split("/").at(-1);
  } catch {
    return "";
  }
}

/** Says whether OneInbox was asked for this session: each problem that is not OneInbox's was found before. */
export function reachedOneInbox(exchange) {
  const slug = slugOf(exchange);
  return exchange.status === 201
    ? exchange.answer.headers.get("Idempotency-Replayed") === null
    : slug.startsWith("upstream-") && slug !== "upstream-busy";
}
