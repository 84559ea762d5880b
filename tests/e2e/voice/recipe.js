// The LiveKit recipe of app/client, with two buttons and a line of text.
import { DisconnectReason, Room, RoomEvent } from "livekit-client";
import { follow } from "./follow.js";
import { talk } from "./livekit.js";

const [start, end, state] = document.querySelectorAll("#talk, #end, #state");

start.onclick = async () => {
  const { room, call } = await talk().catch((error) => (state.textContent = error.message, {}));
  if (!room) return;
  state.textContent = "connected";
  end.onclick = () => room.disconnect();
  room.once(RoomEvent.Disconnected, (reason) => {
    state.textContent = `disconnected: ${DisconnectReason[reason]}`;
    follow(call, ({ ended_at, stopped_because }) => {
      if (ended_at) state.textContent += `; ended: ${stopped_because ?? "by me"}`;
    });
  });
};

// A token that another page uses.
window.join = async (url, token) => {
  const room = new Room();
  await room.connect(url, token);
  await room.localParticipant.setMicrophoneEnabled(true);
};
