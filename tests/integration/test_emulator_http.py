"""The emulated OneInbox over real sockets: connection faults and webhooks."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
import respx

from app.sandbox import faults, webhooks
from app.sandbox.calls import Call
from app.sandbox.emulator import EmulatorOptions
from app.sandbox.faults import (
    BigBody,
    BrokenJson,
    Drip,
    Drop,
    EndlessBody,
    Fault,
    GzipBomb,
    Hang,
    HeaderFlood,
    Latency,
    NotUtf8,
    Redirect,
    Status,
    Truncated,
)
from app.sandbox.schemas import RegisterWebhook, StartCall
from app.sandbox.server import RunningEmulator, emulator_server, running_emulator

START = {"agent_id": "agt_sandbox"}
KEY = {"Authorization": "Bearer oi_sk_sandbox"}
QUICK = EmulatorOptions(queued=0.01, initiated=0.01, in_progress=0.01, transcript_delay=0.01)

# Stopping a uvicorn server takes 0.2 s: the tests share two.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def default_server() -> AsyncIterator[RunningEmulator]:
    async with running_emulator() as emulator:
        yield emulator


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def quick_server() -> AsyncIterator[RunningEmulator]:
    async with running_emulator(QUICK) as emulator:
        yield emulator


def emptied(server: RunningEmulator) -> RunningEmulator:
    emulator = server.emulator
    emulator.faults.clear()
    emulator.requests.clear()
    for call in list(emulator.calls):
        emulator.calls.delete(call)
    for webhook in list(emulator.webhooks):
        emulator.webhooks.remove(webhook.id)
    return server


@pytest.fixture
def running(default_server: RunningEmulator) -> RunningEmulator:
    return emptied(default_server)


@pytest.fixture
def quick(quick_server: RunningEmulator) -> RunningEmulator:
    return emptied(quick_server)


@pytest_asyncio.fixture(loop_scope="module")
async def client(running: RunningEmulator) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=running.url, headers=KEY, timeout=2, trust_env=False) as client:
        yield client


async def start(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/v1/calls/web", json=START)


async def test_complete_answers_keep_the_connection(client: httpx.AsyncClient, running: RunningEmulator) -> None:
    running.emulator.faults.add(Status(operation="start", status=503, times=1), Latency(operation="start", seconds=0))

    answers = [await start(client) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [503, 201, 201]
    assert len({answer.extensions["network_stream"].get_extra_info("client_addr") for answer in answers}) == 1


@pytest.mark.parametrize("takes_effect", [False, True])
async def test_drop_cuts_the_connection_before_any_answer(
    client: httpx.AsyncClient, running: RunningEmulator, caplog: pytest.LogCaptureFixture, takes_effect: bool
) -> None:
    running.emulator.faults.add(Drop(operation="start", times=1, takes_effect=takes_effect))

    with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
        await start(client)

    assert len(running.emulator.calls) == takes_effect
    assert (await start(client)).status_code == 201
    assert caplog.records == []


async def test_truncated_cuts_the_connection_mid_answer(
    client: httpx.AsyncClient, running: RunningEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    running.emulator.faults.add(Truncated(operation="start"))

    with pytest.raises(httpx.RemoteProtocolError, match="complete message body"):
        await start(client)

    assert len(running.emulator.calls) == 1
    assert caplog.records == []


@pytest.mark.parametrize("takes_effect", [False, True])
async def test_hang_ends_when_the_client_leaves(
    client: httpx.AsyncClient, running: RunningEmulator, takes_effect: bool
) -> None:
    running.emulator.faults.add(Hang(operation="start", takes_effect=takes_effect))

    with pytest.raises(httpx.ReadTimeout):
        await client.post("/v1/calls/web", json=START, timeout=0.05)

    assert len(running.emulator.calls) == takes_effect


async def test_endless_faults_are_cut_in_the_end(
    client: httpx.AsyncClient, running: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "LONGEST_SECONDS", 0)
    running.emulator.faults.add(Hang(operation="start", times=1), EndlessBody(operation="start"))

    with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
        await start(client)
    with pytest.raises(httpx.RemoteProtocolError, match="complete message body"):
        await start(client)


@pytest.mark.parametrize("fault", [Hang(operation="get"), Latency(operation="get", seconds=100)])
async def test_shutdown_does_not_wait_for_faults(fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    async with httpx.AsyncClient(headers=KEY, trust_env=False) as client:
        async with running_emulator() as running:
            call = running.emulator.calls.start(StartCall(agent_id="agt_sandbox"))
            running.emulator.faults.add(fault)
            asked = asyncio.create_task(client.get(f"{running.url}/v1/calls/{call.id}"))
            while not running.emulator.requests:
                await asyncio.sleep(0)

        with pytest.raises(httpx.RemoteProtocolError):
            await asked

    assert caplog.records == []


async def test_latency_delays_the_answer(client: httpx.AsyncClient, running: RunningEmulator) -> None:
    running.emulator.faults.add(Latency(operation="start", seconds=0.05))

    answer = await start(client)

    assert answer.status_code == 201
    assert answer.elapsed.total_seconds() >= 0.05


async def test_latency_takes_effect_though_the_client_leaves(
    client: httpx.AsyncClient, running: RunningEmulator
) -> None:
    running.emulator.faults.add(Latency(operation="start", seconds=100))

    with pytest.raises(httpx.ReadTimeout):
        await client.post("/v1/calls/web", json=START, timeout=0.05)

    assert len(running.emulator.calls) == 1


async def test_broken_bodies_cannot_be_parsed(client: httpx.AsyncClient, running: RunningEmulator) -> None:
    running.emulator.faults.add(BrokenJson(operation="start", times=1), NotUtf8(operation="start", times=1))

    broken, odd = await start(client), await start(client)

    assert (broken.status_code, odd.status_code) == (201, 201)
    with pytest.raises(json.JSONDecodeError):
        json.loads(broken.content)
    with pytest.raises(UnicodeDecodeError):
        json.loads(odd.content)
    assert len(running.emulator.calls) == 2


async def test_redirect_starts_no_call(client: httpx.AsyncClient, running: RunningEmulator) -> None:
    running.emulator.faults.add(Redirect(operation="start", status=302, location="http://127.0.0.1:1/"))

    answer = await start(client)

    assert (answer.status_code, answer.headers["location"]) == (302, "http://127.0.0.1:1/")
    assert len(running.emulator.calls) == 0


async def test_header_flood_keeps_the_answer(client: httpx.AsyncClient, running: RunningEmulator) -> None:
    running.emulator.faults.add(HeaderFlood(operation="start", count=50, size=100))

    answer = await start(client)

    assert answer.json()["type"] == "web"
    assert sum(len(value) for name, value in answer.headers.items() if name.startswith("x-flood-")) == 5_000


async def test_big_body_is_valid_json(client: httpx.AsyncClient, running: RunningEmulator) -> None:
    running.emulator.faults.add(BigBody(operation="start", megabytes=1))

    answer = await start(client)

    assert int(answer.headers["content-length"]) == len(answer.content) > 1024 * 1024
    assert answer.json()["type"] == "web"


@pytest.mark.parametrize("fault", [BigBody(operation="start"), EndlessBody(operation="start")])
async def test_endless_bodies_stop_when_the_client_leaves(
    client: httpx.AsyncClient, running: RunningEmulator, fault: Fault
) -> None:
    running.emulator.faults.add(fault)

    async with client.stream("POST", "/v1/calls/web", json=START) as answer:
        received = 0
        async for piece in answer.aiter_raw():
            received += len(piece)
            if received > 1024 * 1024:
                break

    assert answer.status_code == 201
    assert (await client.get("/v1/calls")).json()["total"] == 1


async def test_drip_sends_byte_by_byte(
    client: httpx.AsyncClient, running: RunningEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.emulator.faults.add(Drip(operation="start", interval=0.0001))

    async with client.stream("POST", "/v1/calls/web", json=START) as answer:
        pieces = [piece async for piece in answer.aiter_raw()]

    assert json.loads(b"".join(pieces))["type"] == "web"
    assert len(pieces) > 50

    monkeypatch.setattr(faults, "LONGEST_SECONDS", 0)
    with pytest.raises(httpx.RemoteProtocolError, match="complete message body"):
        await start(client)


async def test_gzip_bomb_unpacks_to_valid_json(client: httpx.AsyncClient, running: RunningEmulator) -> None:
    running.emulator.faults.add(GzipBomb(operation="start", megabytes=2))

    async with client.stream("POST", "/v1/calls/web", json=START) as answer:
        packed = b"".join([piece async for piece in answer.aiter_raw()])

    assert answer.headers["content-encoding"] == "gzip"
    assert len(packed) < 10_000
    unpacked = gzip.decompress(packed)
    assert len(unpacked) > 2 * 1024 * 1024
    assert json.loads(unpacked).keys() == {"padding"}
    assert zlib.crc32(unpacked)


async def test_emulator_server_is_quiet() -> None:
    server = emulator_server(EmulatorOptions(api_key="k"), port=9123)

    assert (server.config.host, server.config.port, server.config.access_log) == ("127.0.0.1", 9123, False)


class Receiver:
    """A loopback server for webhooks; answers `statuses` in turn, then 200."""

    def __init__(self, *statuses: int) -> None:
        self._statuses = list(statuses)
        self._arrived: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def __aenter__(self) -> "Receiver":
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/hook"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length:" in line)
        self._arrived.put_nowait(json.loads(await reader.readexactly(length)))
        status = self._statuses.pop(0) if self._statuses else 200
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
        await writer.drain()
        writer.close()

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(2):
            return await self._arrived.get()

    @property
    def empty(self) -> bool:
        return self._arrived.empty()


ALL = ["call.started", "call.ended", "call.failed", "call.recording.available", "transcript.final"]


async def test_webhooks_report_each_event_of_a_call(quick: RunningEmulator) -> None:
    async with Receiver() as receiver, httpx.AsyncClient(base_url=quick.url, headers=KEY, trust_env=False) as client:
        await client.post("/v1/webhooks", json={"name": "n", "url": receiver.url, "events": ALL})

        call_id = (await start(client)).json()["id"]
        events = [await receiver.next() for _ in range(4)]

    assert sorted(event["event"] for event in events) == sorted(set(ALL) - {"call.failed"})
    assert {event["call_id"] for event in events} == {call_id}
    ended = next(event for event in events if event["event"] == "call.ended")
    assert ended.keys() == {"event", "call_id", "agent_id", "status", "duration_seconds", "created_at"}
    assert (ended["agent_id"], ended["status"], ended["duration_seconds"]) == ("agt_sandbox", "completed", 0)


async def test_webhooks_report_only_chosen_and_later_events(
    client: httpx.AsyncClient, running: RunningEmulator
) -> None:
    async with Receiver() as receiver:
        old, new, gone = [(await start(client)).json()["id"] for _ in range(3)]
        await client.post(f"/v1/calls/{old}/stop")
        body = {"name": "n", "url": receiver.url, "events": ["call.failed", "call.ended"]}
        webhook = (await client.post("/v1/webhooks", json=body)).json()

        await client.post(f"/v1/calls/{old}/stop")
        await client.post(f"/_emulator/calls/{gone}", json={"status": "in_progress"})
        await client.delete(f"/v1/calls/{gone}")
        await client.post(f"/_emulator/calls/{new}", json={"status": "failed"})
        received = await receiver.next()
        await client.delete(f"/v1/webhooks/{webhook['id']}")
        await start(client)

        assert (received["event"], received["call_id"], received["status"]) == ("call.failed", new, "failed")
        assert receiver.empty


def start_followed(server: RunningEmulator, url: str, *events: str) -> Call:
    server.emulator.webhooks.register(RegisterWebhook(name="n", url=url, events=list(events)))
    call = server.emulator.calls.start(StartCall(agent_id="agt_sandbox"))
    server.emulator.webhooks.follow(call)
    return call


async def test_webhooks_are_retried_until_2xx(quick: RunningEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "RETRY_DELAYS", (0, 0, 0))
    async with Receiver(500, 302, 404) as receiver:
        start_followed(quick, receiver.url, "call.ended")
        tries = [await receiver.next() for _ in range(4)]

    assert tries == tries[:1] * 4


async def test_webhooks_are_dropped_after_the_last_retry(
    quick: RunningEmulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(webhooks, "RETRY_DELAYS", (0, 0, 0))
    async with Receiver(500, 500, 500, 500) as receiver:
        start_followed(quick, receiver.url, "transcript.final", "call.analyzed")
        received = [(await receiver.next())["event"] for _ in range(5)]

    assert received == [*["transcript.final"] * 4, "call.analyzed"]
    assert "webhook not delivered: transcript.final" in caplog.text


async def test_only_loopback_urls_are_called(quick: RunningEmulator) -> None:
    received: asyncio.Queue[str] = asyncio.Queue()

    def answer(request: httpx.Request) -> httpx.Response:
        received.put_nowait(request.url.host)
        return httpx.Response(200)

    with respx.mock:
        respx.route().mock(side_effect=answer)
        for url in ("http://192.0.2.1/", "https://example.com/", "http://127.0.0.1@example.com/"):
            quick.emulator.webhooks.register(RegisterWebhook(name="n", url=url, events=["call.ended"]))
        start_followed(quick, "http://localhost:1/", "call.ended")
        async with asyncio.timeout(2):
            hosts = {await received.get()}

    assert hosts == {"localhost"}
    assert received.empty()
