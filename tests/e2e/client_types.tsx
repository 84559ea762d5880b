/** Documented uses of the package, which TypeScript must accept, and wrong ones, which it must refuse. */
import { Broker, BrokerError, Call, type CallState } from "oneinbox-broker-client";
import { OneInboxCallElement } from "oneinbox-broker-client/element";
import { useCall } from "oneinbox-broker-client/react";

const broker = new Broker({ url: "https://voice.example.com", token: async () => "eyJ", credentials: "include", patience: 5 });
const elsewhere: Broker = new Broker({ url: new URL("https://voice.example.com") });

export async function talk(signal: AbortSignal): Promise<CallState | null> {
  const call: Call = await broker.talk({
    agent: "support",
    variables: { name: "Ada", age: 36, vip: true },
    metadata: { page: { path: "/" } },
    overrides: { first_message: "Hello" },
    challenge: async () => "token",
    signal,
    livekit: () => import("livekit-client"),
    microphone: { deviceId: "default" },
    progress: (step: "asking" | "connecting") => console.log(step),
  });
  const stop: () => void = call.on("ending", (event) => console.log(event.detail.seconds_left.toFixed(), event.detail.reason));
  call.on("speech", ({ detail }) => console.log(detail.role === "agent", detail.content, detail.final));
  call.on("error", ({ detail }) => console.log(detail.slug));
  stop();
  const left: number | null = call.secondsLeft;
  console.log(left, call.url, call.serverUrl, call.participantToken, call.level("agent") + 1, call.muted);
  call.mute(true);
  await call.hangUp();
  return call.state;
}

export async function again(): Promise<void> {
  const call = (await elsewhere.resume()) ?? (await elsewhere.start());
  const stop = call.follow();
  await call.rejoin({ microphone: false });
  stop();
}

export function words(error: unknown): string {
  if (!(error instanceof BrokerError)) return "";
  const wait: number | null = error.retryAfter;
  return [error.status.toFixed(), error.slug, error.title, error.detail, error.requestId ?? "", error.message, wait].join();
}

export function Talk() {
  const { start, hangUp, state, secondsLeft, error, call, status, muted } = useCall(broker);
  const ended: boolean = state === "ended" && call?.ended === true && muted;
  return (
    <>
      <button onClick={start} disabled={ended}>Talk {secondsLeft} {status}</button>
      <button onClick={() => start({ agent: "support" })}>Support</button>
      <button onClick={hangUp}>{error?.message}</button>
      <oneinbox-call agent="support" broker="https://voice.example.com" transcript label="Call us" />
    </>
  );
}

const element: OneInboxCallElement | null = document.querySelector("oneinbox-call");
if (element) {
  element.broker = broker;
  element.options = { variables: { name: "Ada" }, livekit: "/livekit-client.js" };
  element.strings = { talk: "Sprechen" };
}

export async function wrong(call: Call): Promise<void> {
  // @ts-expect-error: a typo
  new Broker({ ulr: "https://voice.example.com" });
  // @ts-expect-error: seconds are a number
  new Broker({ patience: "5" });
  // @ts-expect-error: a typo
  await broker.start({ agnet: "support" });
  // @ts-expect-error: a variable is a text, a number or a boolean
  await broker.start({ variables: { name: { first: "Ada" } } });
  // @ts-expect-error: of talk, not of start
  await broker.start({ microphone: true });
  // @ts-expect-error: not livekit-client
  await broker.talk({ livekit: { Raum: 1 } });
  // @ts-expect-error: no such event
  call.on("ended", () => {});
  // @ts-expect-error: no such field
  call.on("ending", (event) => event.detail.secondsLeft);
  // @ts-expect-error: may be null
  call.secondsLeft.toFixed();
  // @ts-expect-error: may be null
  call.state.status;
  // @ts-expect-error: no such side
  call.level("caller");
  // @ts-expect-error: it has none
  call.hangup();
  // @ts-expect-error: a broker, not its address
  useCall("https://voice.example.com");
  // @ts-expect-error: no such attribute
  <oneinbox-call agnet="support" />;
}
