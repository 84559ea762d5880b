import type { OneInbox } from "@oneinbox/web-sdk";
import { hangUp, startCall } from "./broker.js";

/** Start a call and join it with OneInbox's Web SDK (`oi`). Returns the call's address, to follow it and to hang up. */
export async function talk(oi: OneInbox, request: object = {}): Promise<string> {
  const { server_url, participant_token, call } = await startCall(request);
  try {
    await oi.start({ token: participant_token, serverUrl: server_url });
  } catch (error) {
    await hangUp(call); // it was not joined: no microphone, for example
    throw error;
  }
  return call;
}
