"""The emulated agent: joins a call's room, greets, and repeats what it hears one second later.

Needs the extra `voice`, LiveKit's real-time SDK; nothing else imports it.
"""

import array
import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

from livekit import rtc

RATE = 48_000
ECHO_DELAY = 1.0
"""Seconds from a sound to its echo."""

_FRAME = RATE // 50  # 20 ms
_NOTES = (523.25, 659.25, 783.99)
"""Of the greeting, in Hz."""
_NOTE_LENGTH = 0.5
_LOUD = 650
"""Peak of a 16-bit frame that counts as sound: -34 dB, above what noise suppression leaves of a quiet room."""
_PAUSE = 0.7
"""Seconds of silence that end an utterance."""
_LATE = 0.3
"""Seconds after which a frame is dropped, instead of making all later ones late."""
_LEAVING = 2.0
"""Seconds to leave the room in an orderly way."""
_RETURN = 3.0
"""Seconds for a caller whose connection was lost, or replaced by another with the same token, to be back."""
_UNHEARD = 2.0
"""Seconds that the greeting waits for the caller to subscribe to it."""
_MAX_MESSAGES = 200
_FINAL = {"lk.transcription_final": "true"}

_logger = logging.getLogger(__name__)
# It tells URLs and each step of a connection, and calls every room's end an error.
logging.getLogger("livekit").setLevel(logging.CRITICAL)


class Agent:
    """An agent for one call.

    `met` is called when it and the caller are in the room, `said` with role and text of each message spoken.
    """

    def __init__(
        self, greeting: str, silence_timeout: float, met: Callable[[], None], said: Callable[[str, str], None]
    ) -> None:
        self._greeting = greeting
        self._silence_timeout = silence_timeout
        self._met = met
        self._said = said
        self._room = rtc.Room()
        self._source = rtc.AudioSource(RATE, 1, queue_size_ms=200)
        self._heard: asyncio.Queue[tuple[float, Any]] = asyncio.Queue(int((ECHO_DELAY + 1) * RATE / _FRAME))
        """Frames, each with the time of its echo."""
        self._over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._track_sid = ""
        self._joined = asyncio.Event()
        self._last_sound = 0.0
        self._messages = 0

    async def run(self, url: str, token: str) -> str:
        """Talk until the call is over. Return its end reason. Raises ConnectionError if the room cannot be joined."""
        # Before connecting, so that no event is missed.
        self._room.on("track_subscribed", self._on_track)
        self._room.on("participant_connected", self._on_joined)
        self._room.on("participant_disconnected", self._on_left)
        self._room.on("disconnected", lambda _: self._end("room_closed"))
        connecting = asyncio.ensure_future(self._room.connect(url, token, rtc.RoomOptions(connect_timeout=5.0)))
        try:
            await asyncio.shield(connecting)
        except rtc.ConnectError:
            await self._source.aclose()
            raise ConnectionError("the room cannot be joined") from None  # the error's own text may hold the token
        except asyncio.CancelledError:
            with suppress(rtc.ConnectError):
                await connecting  # LiveKit's SDK goes on all the same: leave as soon as it is in
            await self._room.disconnect()
            await self._source.aclose()
            raise
        try:
            track = rtc.LocalAudioTrack.create_audio_track("agent", self._source)
            options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
            publication = await self._room.local_participant.publish_track(track, options)
            self._track_sid = publication.sid
            await self._be("listening")
            self._spawn(self._speak(publication))
            if self._room.remote_participants:
                self._meet()
            return await self._over
        finally:
            for task in self._tasks:
                task.cancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LEAVING):
                    await self._room.disconnect()
            await self._source.aclose()

    def _end(self, reason: str) -> None:
        if not self._over.done():
            self._over.set_result(reason)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _logger.warning("the agent stumbled: %s", type(error).__name__)

    def _on_joined(self, _: Any) -> None:
        if self._track_sid:
            self._meet()

    def _meet(self) -> None:
        self._joined.set()
        self._met()

    def _on_left(self, participant: Any) -> None:
        if self._room.remote_participants:
            return
        if participant.disconnect_reason == rtc.DisconnectReason.CLIENT_INITIATED:
            self._end("user_hangup")
        else:
            self._spawn(self._wait_for_return())

    async def _wait_for_return(self) -> None:
        await asyncio.sleep(_RETURN)
        if not self._room.remote_participants:
            self._end("user_hangup")

    def _on_track(self, track: Any, _: Any, participant: Any) -> None:
        if track.kind == rtc.TrackKind.KIND_AUDIO:
            self._spawn(self._hear(track, participant.identity))

    async def _be(self, state: str) -> None:
        await self._room.local_participant.set_attributes({"lk.agent.state": state})

    async def _speak(self, publication: Any) -> None:
        await self._joined.wait()
        with suppress(TimeoutError):  # the SDK may miss a subscription that comes with the publication's own answer
            async with asyncio.timeout(_UNHEARD):
                await publication.wait_for_subscription()  # else no one hears the first note
        await self._be("speaking")
        await self._greet()
        await self._be("listening")
        self._last_sound = time.monotonic()
        self._spawn(self._end_silence())
        while True:
            due, frame = await self._heard.get()
            wait = due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            if wait > -_LATE:
                await self._source.capture_frame(frame)

    async def _greet(self) -> None:
        """Play the greeting, and publish its words meanwhile.

        As LiveKit's agents do, on two channels whose ids differ: one text stream of deltas, and packets that each hold
        the whole text so far.
        """
        segment = self._segment(self._track_sid)
        me = self._room.local_participant
        text = await me.stream_text(topic="lk.transcription", attributes=segment)
        words = self._greeting.split(" ")
        frames = greeting()
        written = 0
        for number, frame in enumerate(frames):
            due = math.ceil(len(words) * (number + 1) / len(frames))
            if due > written:
                await text.write("".join(f"{word} " for word in words[written:due]))
                await self._send_packet(segment, me.identity, " ".join(words[:due]), final=due == len(words))
                written = due
            await self._source.capture_frame(frame)  # waits while the queue is full: the pace of the sound
        await text.aclose(attributes=segment | _FINAL)
        self._tell("agent", self._greeting)
        await self._source.wait_for_playout()

    async def _hear(self, track: Any, identity: str) -> None:
        stream = rtc.AudioStream.from_track(track=track, sample_rate=RATE, num_channels=1, frame_size_ms=20)
        began: float | None = None
        segment: dict[str, str] = {}
        last = 0.0
        try:
            async for event in stream:
                now = time.monotonic()
                if self._heard.full():
                    self._heard.get_nowait()
                self._heard.put_nowait((now + ECHO_DELAY, event.frame))
                if max(event.frame.data) > _LOUD:
                    self._last_sound = last = now
                    if began is None:
                        began, segment = now, self._segment(track.sid)
                        self._spawn(self._transcribe("…", segment, identity, final=False))
                elif began is not None and now - last > _PAUSE:
                    heard = f"[{last - began:.1f} s of sound]"
                    self._spawn(self._transcribe(heard, segment, identity, final=True))
                    self._tell("user", heard)
                    began = None
        finally:
            await stream.aclose()

    async def _transcribe(self, text: str, segment: dict[str, str], identity: str, *, final: bool) -> None:
        """Publish what the caller said so far: a new text stream each time, with the caller as its sender."""
        writer = await self._room.local_participant.stream_text(
            topic="lk.transcription", attributes=segment | (_FINAL if final else {}), sender_identity=identity
        )
        await writer.write(text)
        await writer.aclose()
        await self._send_packet(segment, identity, text, final=final)

    async def _send_packet(self, segment: dict[str, str], identity: str, text: str, *, final: bool) -> None:
        """Publish a transcription packet, which LiveKit's clients know as the event `transcriptionReceived`."""
        part = rtc.TranscriptionSegment(f"{segment['lk.segment_id']}P", text, 0, 0, "", final)
        await self._room.local_participant.publish_transcription(
            rtc.Transcription(identity, segment["lk.transcribed_track_id"], [part])
        )

    async def _end_silence(self) -> None:
        left = self._silence_timeout
        while left > 0:
            await asyncio.sleep(left)
            left = self._last_sound + self._silence_timeout - time.monotonic()
        self._end("silence_timeout")

    def _tell(self, role: str, text: str) -> None:
        self._messages += 1
        if self._messages <= _MAX_MESSAGES:
            self._said(role, text)

    @staticmethod
    def _segment(track_sid: str) -> dict[str, str]:
        return {
            "lk.segment_id": f"SG_{uuid.uuid4().hex[:12]}",
            "lk.transcription_final": "false",
            "lk.transcribed_track_id": track_sid,
        }


@lru_cache(maxsize=1)
def greeting() -> tuple[Any, ...]:
    """Return the greeting's sound: three rising notes, cut into frames."""
    samples = array.array("h", (sample for hertz in _NOTES for sample in _note(hertz)))
    return tuple(
        rtc.AudioFrame(samples[start : start + _FRAME].tobytes(), RATE, 1, _FRAME)
        for start in range(0, len(samples), _FRAME)
    )


def _note(hertz: float) -> Iterator[int]:
    """Yield the samples of a sine with soft edges."""
    count, ramp = int(RATE * _NOTE_LENGTH), RATE // 50
    for i in range(count):
        edge = min(1.0, i / ramp, (count - i) / ramp)
        yield int(0.3 * 32767 * edge * math.sin(2 * math.pi * hertz * i / RATE))
