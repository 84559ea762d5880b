import { Room, RoomEvent, TokenSource } from "livekit-client";
import { hangUp, startCall } from "./broker.js";

let call; // the address of the call that the source started last

const source = TokenSource.custom(async ({ agentName, participantAttributes }) => {
  const started = await startCall({ agent: agentName, variables: participantAttributes });
  call = started.call;
  return { serverUrl: started.server_url, participantToken: started.participant_token };
});

/** Start a new call on a click: `{ serverUrl, participantToken, call }`. */
export async function newCall(options = {}) {
  const given = await source.fetch(options, true); // without `true` it may return the last call's token
  return { ...given, call };
}

/** Start a call and join it. To hang up: `room.disconnect()`. */
export async function talk(options = {}) {
  const { serverUrl, participantToken, call } = await newCall(options);
  const end = () => hangUp(call).catch(console.error);
  const room = new Room();
  room.on(RoomEvent.TrackSubscribed, (track) => document.body.append(track.attach())); // to hear the agent
  room.once(RoomEvent.Disconnected, end);
  try {
    await room.connect(serverUrl, participantToken);
    await room.localParticipant.setMicrophoneEnabled(true);
  } catch (error) {
    await room.disconnect();
    await end();
    if (error instanceof DOMException) throw error; // no microphone
    throw new Error("The call could not be joined."); // LiveKit's own message may repeat the token
  }
  return { room, call };
}
