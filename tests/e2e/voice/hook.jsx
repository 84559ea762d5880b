// useCall of app/client/react.js.
import * as livekit from "livekit-client";
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { Broker } from "./client.js";
import { useCall } from "./react.js";

const broker = new Broker({ url: "http://127.0.0.1:8000" });

function Talk() {
  const { start, hangUp, state, call, error } = useCall(broker);
  const why = call?.state?.stopped_because ?? "by me";
  return (
    <>
      <button id="talk" onClick={() => start({ livekit })}>Talk</button>
      <button id="end" onClick={hangUp}>Hang up</button>
      <p id="state">{error ? error.message : state === "running" ? "connected" : state === "ended" ? `ended: ${why}` : state}</p>
    </>
  );
}

createRoot(document.querySelector("main")).render(<StrictMode><Talk /></StrictMode>);
