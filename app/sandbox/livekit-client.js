/**
 * The sandbox's stand-in for livekit-client, where there is no LiveKit server. It joins nothing and plays nothing:
 * it sends the words of the emulator's transcript as they would be spoken, and lets the agent's level move with them.
 */

/** As `_messages` in calls.py. */
const SCRIPT = [
  ["agent", "Hello, this is the sandbox. How can I help you?"],
  ["user", "When do you open tomorrow?"],
  ["agent", "We open at nine."],
  ["user", "Thank you, goodbye."],
];
const USER = "user";
/** Milliseconds: until the first word, for a word, between two lines. */
const [GREETING, WORD, PAUSE] = [1500, 180, 700];
const LOUD = 0.3;

export class Room {
  #listeners = new Map();
  #timers = [];
  #voice = null;
  localParticipant = {
    identity: USER,
    audioTrackPublications: new Map(),
    publishTrack: async () => {},
  };

  on(event, listener) {
    this.#listeners.set(event, [...(this.#listeners.get(event) ?? []), listener]);
    return this;
  }

  async prepareConnection() {}

  async connect() {
    this.#voice = new Voice();
    this.#send("trackSubscribed", { kind: "audio", mediaStreamTrack: this.#voice.track, attach: () => new Audio() });
    let at = GREETING;
    for (const [line, [role, text]] of SCRIPT.entries()) {
      const words = text.split(" ");
      for (const count of words.keys()) {
        const final = count === words.length - 1;
        const segment = { id: `line-${line}`, text: words.slice(0, count + 1).join(" "), final };
        this.#at((at += WORD), () => {
          this.#voice.level = role === "agent" && !final ? LOUD * (0.5 + Math.random() / 2) : 0;
          this.#send("transcriptionReceived", [segment], { identity: role });
        });
      }
      at += PAUSE;
    }
  }

  async startAudio() {}

  async disconnect() {
    this.#timers.forEach(clearTimeout);
    this.#voice?.close();
    this.#voice = null;
    this.#send("disconnected", 1);
  }

  #at(milliseconds, act) {
    this.#timers.push(setTimeout(act, milliseconds));
  }

  #send(event, ...details) {
    for (const listener of this.#listeners.get(event) ?? []) listener(...details);
  }
}

/** A hum that an analyser hears and no loudspeaker plays. */
class Voice {
  #audio = new AudioContext();
  #gain = new GainNode(this.#audio, { gain: 0 });

  constructor() {
    const hum = new OscillatorNode(this.#audio, { frequency: 140 });
    const out = new MediaStreamAudioDestinationNode(this.#audio);
    hum.connect(this.#gain).connect(out);
    hum.start();
    [this.track] = out.stream.getAudioTracks();
  }

  set level(level) {
    this.#gain.gain.value = level;
  }

  close() {
    this.#audio.close();
  }
}
