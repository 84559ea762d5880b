"""Calls on a LiveKit server, whose API is canned here: their states and their rooms."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import jwt
import pytest
import respx

from app.sandbox import rooms
from app.sandbox.calls import Call, Calls, record
from app.sandbox.emulator import Emulator, EmulatorOptions, create_emulator
from app.sandbox.schemas import StartCall

LIVEKIT = "http://127.0.0.1:7880/twirp/livekit.RoomService"
START = {"agent_id": "agt_sandbox"}
PATIENCE = 10


@dataclass
class Clock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += seconds


def start(calls: Calls) -> Call:
    return calls.start(StartCall.model_validate(START))


def test_call_is_initiated_until_its_caller_meets_the_agent() -> None:
    clock = Clock()
    calls = Calls(EmulatorOptions(now=clock, voice="agent"))
    call = start(calls)
    clock.forward(30)
    before = calls.state(call)

    calls.meet(call)
    clock.forward(100)
    calls.meet(call)  # again, as after a lost connection
    after = calls.state(call)

    assert (before.status, before.started_at) == ("initiated", None)
    assert (after.status, after.started_at) == ("in_progress", call.created_at + 30)


@pytest.mark.parametrize(
    ("meets", "after", "ending"),
    [
        (False, 60, ("failed", "no_participant", 0)),
        (True, 600, ("completed", "max_duration", 600)),
        (True, 4_000, ("completed", "max_duration", 600)),
    ],
)
def test_call_ends_by_the_clock(meets: bool, after: float, ending: tuple[str, str, int]) -> None:
    clock = Clock()
    calls = Calls(EmulatorOptions(now=clock, voice="agent"))
    call = start(calls)
    if meets:
        calls.meet(call)

    clock.forward(after - 1)
    running = calls.state(call).running
    clock.forward(1)
    state = calls.state(call)

    assert running is (after <= 600)
    assert (state.status, state.end_reason, state.duration) == ending


def test_ended_call_cannot_be_joined() -> None:
    calls = Calls(EmulatorOptions(voice="agent"))
    call = start(calls)
    calls.stop(call)

    calls.meet(call)

    assert (calls.state(call).status, calls.state(call).duration) == ("completed", 0)


def test_transcript_is_what_was_said_in_the_room() -> None:
    clock = Clock()
    options = EmulatorOptions(now=clock, voice="agent")
    calls = Calls(options)
    call = start(calls)
    calls.meet(call)
    call.said.append({"role": "agent", "content": "Hello"})
    calls.stop(call, "user_hangup")
    clock.forward(3)

    assert record(call, calls.state(call), options)["transcript"] == "Agent: Hello"


@dataclass
class LiveKit:
    """The server's API: the rooms it was asked to make and to delete."""

    made: list[dict[str, Any]] = field(default_factory=list)
    deleted: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    grants: list[dict[str, Any]] = field(default_factory=list)

    def create(self, request: httpx.Request) -> httpx.Response:
        self._check(request)
        self.made.append(json.loads(request.content))
        return httpx.Response(200, json={})

    def delete(self, request: httpx.Request) -> httpx.Response:
        self._check(request)
        self.deleted.put_nowait(json.loads(request.content)["room"])
        return httpx.Response(404, json={"code": "not_found"})

    def _check(self, request: httpx.Request) -> None:
        token = request.headers["authorization"].removeprefix("Bearer ")
        self.grants.append(jwt.decode(token, "s" * 32, ["HS256"])["video"])


@pytest.fixture
def livekit(respx_mock: respx.MockRouter) -> LiveKit:
    server = LiveKit()
    respx_mock.post(f"{LIVEKIT}/CreateRoom").mock(side_effect=server.create)
    respx_mock.post(f"{LIVEKIT}/DeleteRoom").mock(side_effect=server.delete)
    return server


@dataclass
class OneInbox:
    http: httpx.AsyncClient
    emulator: Emulator

    async def start(self) -> dict[str, Any]:
        answer = await self.http.post("/v1/calls/web", json=START)
        assert answer.status_code == 201, answer.text
        started: dict[str, Any] = answer.json()
        return started


@pytest.fixture
async def oneinbox() -> AsyncIterator[OneInbox]:
    options = EmulatorOptions(livekit_secret="s" * 32, voice="rooms", queued=0, initiated=0, in_progress=0.3)
    app = create_emulator(options)
    http = httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://oneinbox",
        headers={"Authorization": "Bearer oi_sk_sandbox"},
    )
    async with http, app.router.lifespan_context(app):
        yield OneInbox(http, app.state.emulator)


async def test_room_is_made_before_its_token_is_handed_out(oneinbox: OneInbox, livekit: LiveKit) -> None:
    started = await oneinbox.start()

    [made] = livekit.made
    assert made["name"] == started["room_name"]
    assert livekit.grants == [{"roomCreate": True}]


@pytest.mark.parametrize("how", ["stop", "delete", "control", "time", "end of the emulator"])
async def test_room_is_deleted_when_its_call_ends(how: str, oneinbox: OneInbox, livekit: LiveKit) -> None:
    started = await oneinbox.start()
    path = f"/v1/calls/{started['id']}"
    match how:
        case "stop":
            await oneinbox.http.post(f"{path}/stop")
        case "delete":
            await oneinbox.http.delete(path)
        case "control":
            await oneinbox.http.post(f"/_emulator/calls/{started['id']}", json={"status": "failed"})
        case "end of the emulator":
            assert oneinbox.emulator.rooms is not None
            await oneinbox.emulator.rooms.aclose()

    async with asyncio.timeout(PATIENCE):
        assert await livekit.deleted.get() == started["room_name"]


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), httpx.Response(500), httpx.Response(401)])
async def test_calls_go_on_without_livekits_server(
    failure: Exception | httpx.Response,
    oneinbox: OneInbox,
    respx_mock: respx.MockRouter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    respx_mock.post(url__startswith=LIVEKIT).mock(
        side_effect=failure if isinstance(failure, Exception) else [failure] * 4
    )

    with caplog.at_level(logging.WARNING):
        started = await oneinbox.start()

    assert started["room_name"]
    assert any("CreateRoom" in entry.message for entry in caplog.records)


async def test_more_calls_than_rooms_are_refused(
    oneinbox: OneInbox, livekit: LiveKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "MAX_ROOMS", 1)
    await oneinbox.start()

    answer = await oneinbox.http.post("/v1/calls/web", json=START)

    assert (answer.status_code, len(livekit.made)) == (429, 1)
