"""The emulated agent in a stand-in for LiveKit's room: what it does at which event."""

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.needs import cannot

PATIENCE = 10
LOUD = array("h", [9_000, -9_000] * 480)
QUIET = array("h", [0] * 960)


@pytest.fixture
def voice() -> Any:
    if find_spec("livekit") is None:
        cannot("livekit is not installed: pip install -e '.[voice]'")
    from app.sandbox import voice

    return voice


@dataclass
class Room:
    """LiveKit's room and its local participant, as far as the agent uses them."""

    refuses: BaseException | None = None
    remote_participants: dict[str, Any] = field(default_factory=dict)
    handlers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)
    streams: list[tuple[str | None, str, str]] = field(default_factory=list)
    """Sender, text, and if it is final."""
    packets: list[tuple[str, str, bool]] = field(default_factory=list)
    """Sender, text, and if it is final."""
    left: bool = False
    subscribed: asyncio.Event = field(default_factory=asyncio.Event)
    identity: str = "agent-1"

    @property
    def local_participant(self) -> "Room":
        return self

    def on(self, event: str, handler: Callable[..., Any]) -> None:
        self.handlers[event] = handler

    async def connect(self, url: str, token: str, options: Any) -> None:
        if self.refuses:
            raise self.refuses

    async def publish_track(self, track: Any, options: Any) -> Any:
        return SimpleNamespace(sid="TR_agent", wait_for_subscription=self.subscribed.wait)

    async def set_attributes(self, attributes: dict[str, str]) -> None:
        self.states.append(attributes["lk.agent.state"])

    async def stream_text(self, *, topic: str, attributes: dict[str, str], sender_identity: str | None = None) -> Any:
        assert topic == "lk.transcription"
        written: list[str] = []

        async def write(text: str) -> None:
            written.append(text)

        async def aclose(attributes: dict[str, str] = attributes) -> None:
            self.streams.append((sender_identity, "".join(written), attributes["lk.transcription_final"]))

        return SimpleNamespace(write=write, aclose=aclose)

    async def publish_transcription(self, given: Any) -> None:
        self.packets += [(given.participant_identity, part.text, part.final) for part in given.segments]

    async def disconnect(self) -> None:
        self.left = True

    def join(self, identity: str = "user-1") -> Any:
        participant = SimpleNamespace(identity=identity, disconnect_reason=None)
        self.remote_participants[identity] = participant
        self.handlers["participant_connected"](participant)
        self.subscribed.set()
        return participant

    def leave(self, participant: Any, reason: Any) -> None:
        participant.disconnect_reason = reason
        del self.remote_participants[participant.identity]
        self.handlers["participant_disconnected"](participant)


class Stream:
    """A caller's sound: frames, then silence for ever."""

    def __init__(self, frames: "list[array[int]]") -> None:
        self.frames = frames

    async def __aiter__(self) -> AsyncIterator[Any]:
        for frame in self.frames:
            yield SimpleNamespace(frame=SimpleNamespace(data=frame))
            await asyncio.sleep(0.001)
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        pass


@dataclass
class Source:
    """The agent's voice: the frames it played."""

    played: list[Any] = field(default_factory=list)
    closed: bool = False

    async def capture_frame(self, frame: Any) -> None:
        self.played.append(frame)
        await asyncio.sleep(0)

    async def wait_for_playout(self) -> None:
        pass

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class Conversation:
    room: Room
    source: Source
    met: list[bool] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)
    agent: Any = None

    def begin(self, silence_timeout: float = PATIENCE) -> "asyncio.Task[str]":
        self.agent = self._make("Hello you", silence_timeout, lambda: self.met.append(True), self._on_said)
        return asyncio.create_task(self.agent.run("ws://127.0.0.1:7880", "a token"))

    _make: Any = None

    def _on_said(self, role: str, text: str) -> None:
        self.said.append((role, text))

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.001)


@pytest.fixture
async def conversation(voice: Any, monkeypatch: pytest.MonkeyPatch) -> Conversation:
    room, source = Room(), Source()
    monkeypatch.setattr(voice.rtc, "Room", lambda: room)
    monkeypatch.setattr(voice.rtc, "AudioSource", lambda *_, **__: source)
    monkeypatch.setattr(voice.rtc.LocalAudioTrack, "create_audio_track", lambda *_: "a track")
    monkeypatch.setattr(voice, "ECHO_DELAY", 0.01)
    monkeypatch.setattr(voice, "_PAUSE", 0.01)
    monkeypatch.setattr(voice, "_RETURN", 0.05)
    return Conversation(room, source, _make=voice.Agent)


async def test_agent_greets_when_it_is_heard(voice: Any, conversation: Conversation) -> None:
    talking = conversation.begin()
    room = conversation.room
    await conversation.until(lambda: room.states == ["listening"])
    assert conversation.met == []

    caller = room.join()
    await conversation.until(lambda: room.states == ["listening", "speaking", "listening"])
    room.leave(caller, voice.rtc.DisconnectReason.CLIENT_INITIATED)

    assert await talking == "user_hangup"
    assert conversation.met == [True]
    assert conversation.said == [("agent", "Hello you")]
    assert room.streams == [(None, "Hello you ", "true")]
    assert room.packets == [("agent-1", "Hello", False), ("agent-1", "Hello you", True)]
    assert conversation.source.played == list(voice.greeting())
    assert (room.left, conversation.source.closed) == (True, True)


async def test_agent_repeats_and_transcribes_what_it_hears(
    voice: Any, conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, source = conversation.room, conversation.source
    monkeypatch.setattr(voice.rtc.AudioStream, "from_track", lambda **_: Stream([LOUD] * 20 + [QUIET] * 40))
    talking = conversation.begin()
    await conversation.until(lambda: room.states)
    caller = room.join()
    await conversation.until(lambda: len(room.states) == 3)
    source.played.clear()

    track = SimpleNamespace(kind=voice.rtc.TrackKind.KIND_AUDIO, sid="TR_caller")
    room.handlers["track_subscribed"](track, None, caller)
    await conversation.until(lambda: len(room.packets) == 4)
    room.handlers["disconnected"](None)

    assert await talking == "room_closed"
    assert any(frame.data is LOUD for frame in source.played)
    (_, first, is_final), (who, last, is_final_too) = room.packets[2:]
    assert (first, is_final, who, is_final_too) == ("…", False, "user-1", True)
    assert last.endswith("s of sound]")
    assert conversation.said[1:] == [("user", last)]


async def test_silence_ends_the_call(conversation: Conversation) -> None:
    talking = conversation.begin(silence_timeout=0.05)
    await conversation.until(lambda: conversation.room.states)
    conversation.room.join()

    assert await talking == "silence_timeout"


async def test_lost_caller_may_return(voice: Any, conversation: Conversation) -> None:
    room = conversation.room
    talking = conversation.begin()
    await conversation.until(lambda: room.states)
    first = room.join()
    room.leave(first, voice.rtc.DisconnectReason.DUPLICATE_IDENTITY)
    second = room.join()
    assert not (await asyncio.wait([talking], timeout=0.1))[0]

    room.leave(second, voice.rtc.DisconnectReason.SIGNAL_CLOSE)

    assert await talking == "user_hangup"


async def test_room_that_cannot_be_joined_is_told_without_the_token(voice: Any, conversation: Conversation) -> None:
    conversation.room.refuses = voice.rtc.ConnectError("invalid token: eyJ.a.token")

    with pytest.raises(ConnectionError) as refused:
        await conversation.begin()

    assert "eyJ" not in str(refused.value)
    assert refused.value.__suppress_context__
    assert conversation.source.closed
