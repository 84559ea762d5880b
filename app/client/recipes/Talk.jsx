// Start a call on a click, then mount LiveKit's session for it.
import { RoomAudioRenderer, SessionProvider, useSession } from "@livekit/components-react";
import { TokenSource } from "livekit-client";
import { useEffect, useState } from "react";
import { hangUp } from "./broker.js";
import { newCall } from "./livekit.js";
import { useCall } from "./useCall.js";

export function Talk() {
  const [given, setGiven] = useState(null); // the running call
  const [message, setMessage] = useState("");
  const [asking, setAsking] = useState(false);

  async function start() {
    setAsking(true);
    setMessage("");
    try {
      setGiven(await newCall());
    } catch (error) {
      setMessage(error.message);
    }
    setAsking(false);
  }

  function end(text) {
    hangUp(given.call).catch(console.error);
    setMessage(text);
    setGiven(null);
  }

  if (given) return <Call key={given.call} given={given} onEnd={end} />;
  return (
    <>
      <button disabled={asking} onClick={start}>Talk</button>
      <p role="alert">{message}</p>
    </>
  );
}

function Call({ given, onEnd }) {
  // A literal: with a source that fetches, useSession takes a token when it mounts and another when it ends.
  const [source] = useState(() => TokenSource.literal(given));
  const session = useSession(source);
  const state = useCall(given.call);

  useEffect(() => {
    let here = true;
    // Not error.message: LiveKit repeats the token in it.
    session.start().catch(() => here && onEnd("The call could not be joined."));
    return () => { here = false; };
  }, []);
  useEffect(() => {
    if (state?.ended_at) onEnd("The call has ended.");
  }, [state]);

  return (
    <SessionProvider session={session}>
      <RoomAudioRenderer />
      <p>{state?.status ?? "starting"}</p>
      <button onClick={() => onEnd("")}>Hang up</button>
    </SessionProvider>
  );
}
