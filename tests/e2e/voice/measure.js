// Runs before a page's own scripts: hears every remote audio track, however the page plays it.
// heard: one entry each 20 ms: when, how loud (RMS), and the loudest frequency.
window.heard = [];
const Native = window.RTCPeerConnection;
window.RTCPeerConnection = class extends Native {
  constructor(...given) {
    super(...given);
    this.addEventListener("track", ({ track }) => track.kind === "audio" && listen(track));
  }
};

function listen(track) {
  const stream = new MediaStream([track]);
  // Web Audio hears a remote track only while an element plays it.
  window.player = new Audio();
  window.player.srcObject = stream;
  window.player.play().catch(() => {});
  const audio = new AudioContext();
  const ear = new AnalyserNode(audio, { fftSize: 8192, smoothingTimeConstant: 0 });
  audio.createMediaStreamSource(stream).connect(ear);
  const samples = new Float32Array(ear.fftSize);
  const bins = new Float32Array(ear.frequencyBinCount);
  const recent = 1024; // samples, 23 ms
  const listening = setInterval(() => {
    if (track.readyState === "ended") clearInterval(listening);
    ear.getFloatTimeDomainData(samples);
    ear.getFloatFrequencyData(bins);
    const rms = Math.hypot(...samples.subarray(-recent)) / Math.sqrt(recent);
    const loudest = bins.reduce((best, level, bin) => (level > bins[best] ? bin : best), 0);
    window.heard.push({ at: performance.now(), rms, hertz: (loudest * audio.sampleRate) / ear.fftSize });
  }, 20);
}
