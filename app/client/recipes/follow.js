import { login } from "./broker.js";

/** Call `onCall` on each change, `onLost` if the broker refuses (GET {call} says why). Returns how to stop. */
export function follow(call, onCall, onLost = console.error) {
  const events = new EventSource(`${call}/events`, { withCredentials: login.credentials === "include" });
  events.addEventListener("call", (event) => onCall(JSON.parse(event.data)));
  events.addEventListener("end", () => events.close());
  events.addEventListener("error", (event) => {
    if (events.readyState === EventSource.CLOSED) onLost(event); // else the browser reconnects
  });
  return () => events.close();
}
