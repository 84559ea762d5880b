// Joins the call's room on a real LiveKit server, with LiveKit's own client: loaded from a CDN on the first click.

export function offerToJoin($, { livekitClient, livekitClientIntegrity }) {
  const button = $("join-room");
  let session = null;
  let room = null;

  $("join").hidden = false;
  $("emulated").hidden = true;
  button.addEventListener("click", async () => {
    if (button.getAttribute("aria-disabled") === "true") return;
    if (room) return leave("You left the room.");
    available(false);
    try {
      await join();
    } catch (error) {
      leave(`Could not join the room: ${error.message}`);
    }
    available(session !== null);
  });

  async function join() {
    say("Loading LiveKit’s client …");
    await load();
    const joined = new globalThis.LivekitClient.Room();
    joined.on("trackSubscribed", (track) => track.kind === "audio" && $("join-audio").append(track.attach()));
    joined.on("disconnected", () => room === joined && leave("The room was closed."));
    room = joined;
    say("Joining …");
    await joined.connect(session.server_url, session.participant_token);
    button.textContent = "Leave the room";
    say("You are in the room. Allow the browser to use the microphone …");
    try {
      await joined.localParticipant.setMicrophoneEnabled(true);
      say("You are in the room and can be heard.");
    } catch {
      say("You are in the room without a microphone: listening only.");
    }
  }

  function load() {
    if (globalThis.LivekitClient) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      Object.assign(script, { src: livekitClient, integrity: livekitClientIntegrity, crossOrigin: "anonymous" });
      script.onload = resolve;
      script.onerror = () => {
        script.remove(); // the next click tries again
        reject(new Error("LiveKit’s client did not load from its CDN. Are you online?"));
      };
      document.head.append(script);
    });
  }

  function leave(why) {
    const left = room;
    room = null;
    left?.disconnect();
    $("join-audio").replaceChildren();
    button.textContent = "Join the room";
    say(why);
  }

  function available(yes) {
    button.setAttribute("aria-disabled", String(!yes));
  }

  function say(text) {
    $("join-state").textContent = text;
  }

  return {
    offer(fresh) {
      session = fresh;
      available(true);
      say("The room is ready.");
    },
    withdraw() {
      session = null;
      available(false);
      leave("The call has ended.");
    },
  };
}
