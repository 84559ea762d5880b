import { login, problemOf } from "./broker.js";

/** Like follow.js, with a bearer token. Throws if the broker refuses, the network fails or `signal` aborts. */
export async function followWithToken(call, onCall, signal) {
  for (let last = ""; ; ) {
    const headers = { ...(await login.headers()), ...(last && { "Last-Event-ID": last }) };
    const answer = await fetch(`${call}/events`, { headers, signal });
    if (answer.status === 204) return; // the call has ended
    if (!answer.ok) throw await problemOf(answer);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (let piece; !(piece = await reader.read()).done; ) {
      const events = (text + piece.value).split("\n\n");
      text = events.pop(); // not complete yet
      for (const event of events) {
        const field = (name) => event.match(new RegExp(`^${name}: (.*)$`, "m"))?.[1];
        last = field("id") ?? last;
        if (field("event") === "call") onCall(JSON.parse(field("data")));
        if (field("event") === "end") return;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, 1000)); // closed early: reconnect with a fresh token
  }
}
