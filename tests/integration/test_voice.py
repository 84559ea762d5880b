"""The emulator's calls on a real LiveKit server, with callers of LiveKit's Python SDK: who is there decides."""

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from app.sandbox.emulator import EmulatorOptions
from app.sandbox.rooms import GREETING
from app.sandbox.server import running_emulator
from tests.support.livekit import LiveKit, running_server

pytestmark = [pytest.mark.voice, pytest.mark.timeout(180, func_only=True)]  # the first test builds the server

PATIENCE = 20
"""Seconds for what takes less than one on an idle machine."""
EMPTY = 3
"""Seconds in which a room must be empty after its call has ended."""
RATE = 48_000


@pytest.fixture(scope="module")
def livekit() -> Iterator[LiveKit]:
    with running_server() as server:
        yield server


class Caller:
    """A participant, and what reaches it."""

    def __init__(self) -> None:
        from livekit import rtc

        self.rtc = rtc
        self.room = rtc.Room()
        self.source = rtc.AudioSource(RATE, 1)
        self.text: dict[str, str] = {}
        """What was written in text streams, by the sender's kind."""
        self.packets: list[tuple[str, bool]] = []
        """Texts of transcription packets, and if each was the last of its segment."""
        self.loudest = 0
        self.gone: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self.room.on("disconnected", self._on_disconnected)
        self.room.on("track_subscribed", lambda track, *_: self._spawn(self._listen(track)))
        self.room.on("transcription_received", self._on_packet)
        self.room.register_text_stream_handler(
            "lk.transcription", lambda reader, identity: self._spawn(self._read(reader, identity))
        )

    def _on_disconnected(self, reason: int) -> None:
        if not self.gone.done():
            self.gone.set_result(reason)

    def _on_packet(self, segments: list[Any], *_: Any) -> None:
        self.packets += [(segment.text, segment.final) for segment in segments]

    def _spawn(self, work: Any) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _listen(self, track: Any) -> None:
        async for event in self.rtc.AudioStream.from_track(track=track, sample_rate=RATE, num_channels=1):
            self.loudest = max(self.loudest, *event.frame.data)

    async def _read(self, reader: Any, identity: str) -> None:
        kind = identity.partition("-")[0]
        async for piece in reader:
            self.text[kind] = self.text.get(kind, "") + piece

    async def join(self, started: dict[str, Any]) -> None:
        await self.room.connect(started["server_url"], started["participant_token"])

    async def beep(self) -> None:
        """Speak for half a second."""
        track = self.rtc.LocalAudioTrack.create_audio_track("microphone", self.source)
        await self.room.local_participant.publish_track(track, self.rtc.TrackPublishOptions())
        loud, silent = (array("h", (9_000 * on * (-1) ** (i // 40) for i in range(480))).tobytes() for on in (1, 0))
        for frame in [loud] * 50 + [silent] * 100:
            await self.source.capture_frame(self.rtc.AudioFrame(frame, RATE, 1, 480))

    async def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self.room.disconnect()
        await self.source.aclose()


class OneInbox:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def start(self, **fields: Any) -> dict[str, Any]:
        answer = await self.http.post("/v1/calls/web", json={"agent_id": "agt_sandbox", **fields})
        assert answer.status_code == 201, answer.text
        started: dict[str, Any] = answer.json()
        return started

    async def call(self, started: dict[str, Any]) -> dict[str, Any]:
        call: dict[str, Any] = (await self.http.get(f"/v1/calls/{started['id']}")).json()
        return call

    async def stop(self, started: dict[str, Any]) -> None:
        (await self.http.post(f"/v1/calls/{started['id']}/stop")).raise_for_status()

    async def wait_for(self, started: dict[str, Any], condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The call, once the condition holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition(call := await self.call(started)):
            assert time.monotonic() < deadline, call
            await asyncio.sleep(0.05)
        return call


@asynccontextmanager
async def oneinbox_with(options: EmulatorOptions) -> AsyncIterator[OneInbox]:
    async with running_emulator(options) as emulator:
        headers = {"Authorization": f"Bearer {options.api_key}"}
        async with httpx.AsyncClient(base_url=emulator.url, headers=headers, timeout=PATIENCE) as http:
            yield OneInbox(http)


@pytest.fixture
async def caller(livekit: LiveKit) -> AsyncIterator[Caller]:
    caller = Caller()
    yield caller
    await caller.leave()


async def room_is_empty(livekit: LiveKit, room: str, within: float = EMPTY) -> bool:
    deadline = time.monotonic() + within
    while await asyncio.to_thread(livekit.participants, room):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


async def room_is_gone(livekit: LiveKit, room: str) -> bool:
    deadline = time.monotonic() + PATIENCE
    while await asyncio.to_thread(livekit.participants, room) is not None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


async def test_call_begins_when_its_caller_joins_and_is_greeted(livekit: LiveKit, caller: Caller) -> None:
    async with oneinbox_with(livekit.options(transcript_delay=0)) as oneinbox:
        started = await oneinbox.start()
        while "Sandbox agent" not in (await asyncio.to_thread(livekit.participants, started["room_name"]) or []):
            await asyncio.sleep(0.05)
        assert (await oneinbox.call(started))["status"] == "initiated"

        await caller.join(started)
        await oneinbox.wait_for(started, lambda call: call["status"] == "in_progress")
        await caller.beep()
        while not caller.text.get("user", "").endswith("s of sound]"):
            await asyncio.sleep(0.05)
        await oneinbox.stop(started)
        call = await oneinbox.wait_for(started, lambda call: call["transcript"])

    assert caller.text["agent"].strip() == GREETING
    assert caller.packets[0] == (GREETING.split(" ")[0], False)
    assert (GREETING, True) in caller.packets
    assert caller.packets[-1] == (caller.text["user"].removeprefix("…"), True)
    assert caller.loudest > 3_000
    assert call["transcript"].startswith(f"Agent: {GREETING}\nUser: [0.")


@pytest.mark.parametrize(
    ("end", "reason", "seen"),
    [
        ("the caller leaves", "user_hangup", "CLIENT_INITIATED"),
        ("api", "api_stop", "ROOM_DELETED"),
        ("silence", "silence_timeout", "ROOM_DELETED"),
        ("time", "max_duration", "ROOM_DELETED"),
        ("the emulator ends", None, "ROOM_DELETED"),
    ],
)
async def test_call_and_room_end_together(
    end: str, reason: str | None, seen: str, livekit: LiveKit, caller: Caller
) -> None:
    limits = {"silence": {"silence_timeout_seconds": 0.5}, "time": {"max_duration_seconds": 1.5}}.get(end, {})
    async with oneinbox_with(livekit.options(**limits)) as oneinbox:
        started = await oneinbox.start()
        await caller.join(started)
        await oneinbox.wait_for(started, lambda call: call["started_at"])
        match end:
            case "the caller leaves":
                await caller.room.disconnect()
            case "api":
                await oneinbox.stop(started)
        if reason is not None:
            call = await oneinbox.wait_for(started, lambda call: call["ended_at"])
            assert (call["status"], call["end_reason"]) == ("completed", reason)
            assert await room_is_empty(livekit, started["room_name"])

    assert await room_is_empty(livekit, started["room_name"])
    async with asyncio.timeout(EMPTY):
        assert await caller.gone == caller.rtc.DisconnectReason.Value(seen)


async def test_unjoined_call_fails_and_its_room_goes(livekit: LiveKit) -> None:
    async with oneinbox_with(livekit.options(join_timeout=1)) as oneinbox:
        started = await oneinbox.start()

        call = await oneinbox.wait_for(started, lambda call: call["ended_at"])

        assert (call["status"], call["end_reason"], call["duration_seconds"]) == ("failed", "no_participant", 0)
        assert await room_is_empty(livekit, started["room_name"])


async def test_second_use_of_a_token_takes_the_call_over(livekit: LiveKit, caller: Caller) -> None:
    async with oneinbox_with(livekit.options()) as oneinbox:
        started = await oneinbox.start()
        await caller.join(started)
        second = Caller()
        await second.join(started)

        async with asyncio.timeout(PATIENCE):
            assert await caller.gone == caller.rtc.DisconnectReason.DUPLICATE_IDENTITY
        await second.beep()
        while "user" not in second.text:
            await asyncio.sleep(0.05)
        assert (await oneinbox.call(started))["status"] == "in_progress"
        await second.leave()
        call = await oneinbox.wait_for(started, lambda call: call["ended_at"])

    assert call["end_reason"] == "user_hangup"


async def test_token_of_an_ended_call_opens_no_room(livekit: LiveKit, caller: Caller) -> None:
    async with oneinbox_with(livekit.options()) as oneinbox:
        started = await oneinbox.start()
        await oneinbox.stop(started)  # while the agent is on its way
        assert await room_is_gone(livekit, started["room_name"])

        with pytest.raises(caller.rtc.ConnectError):
            await caller.join(started)

        assert await room_is_gone(livekit, started["room_name"])


async def test_call_fails_where_no_server_answers(livekit: LiveKit) -> None:
    async with oneinbox_with(livekit.options(server_url="ws://127.0.0.1:9", join_timeout=2)) as oneinbox:
        started = await oneinbox.start()

        call = await oneinbox.wait_for(started, lambda call: call["ended_at"])

    assert (call["status"], call["end_reason"]) == ("failed", "no_participant")
