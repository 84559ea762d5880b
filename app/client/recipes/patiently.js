import { startCall } from "./broker.js";

/** Start one call, however often it has to ask. Waits as the broker says, up to `patience` seconds at a time. */
export async function startCallPatiently(request = {}, { patience = 30, tries = 4 } = {}) {
  const key = crypto.randomUUID(); // one per click: the same key never starts a second call
  for (;;) {
    try {
      return await startCall(request, { "Idempotency-Key": key });
    } catch (error) {
      const lost = error instanceof TypeError; // fetch throws this when no answer came
      const wait = lost ? 1 : error.retryAfter; // 409, 429 and 503 carry Retry-After
      tries -= 1;
      if (!wait || wait > patience || tries === 0) throw error;
      await new Promise((resolve) => setTimeout(resolve, wait * 1000));
    }
  }
}
