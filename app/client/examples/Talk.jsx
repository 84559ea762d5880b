import { Broker } from "oneinbox-broker-client";
import { useCall } from "oneinbox-broker-client/react";

const broker = new Broker({ url: "http://127.0.0.1:8000" }); // one for the page, outside of components

export function Talk() {
  const { start, hangUp, state, secondsLeft, error } = useCall(broker);
  if (state === "running") return <button onClick={hangUp}>Hang up {secondsLeft !== null && secondsLeft <= 60 && `(${secondsLeft} s)`}</button>;
  return (
    <>
      <button disabled={state === "starting"} onClick={() => start({ variables: { customer_name: "Ada" } })}>Talk</button>
      <p role="alert">{error?.message}</p>
    </>
  );
}
