// LiveKit's own client, for calls on a real LiveKit server: from its CDN, on the first click, checked by its hash.

/** Returns a function that loads it, for `livekit` of client.js. */
export function fromCdn({ livekitClient, livekitClientIntegrity }) {
  return () =>
    new Promise((resolve, reject) => {
      const script = document.createElement("script");
      Object.assign(script, { src: livekitClient, integrity: livekitClientIntegrity, crossOrigin: "anonymous" });
      script.onload = () => resolve(globalThis.LivekitClient);
      script.onerror = () => {
        script.remove(); // the next click tries again
        reject(new Error("LiveKit’s client did not load from its CDN. Are you online?"));
      };
      document.head.append(script);
    });
}
