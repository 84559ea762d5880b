"""Clients that break every rule, against the broker as its users run it, on uvloop and with the times it has.

What the guard does in each case is tested in tests/unit/test_http_guard.py; here, that every server has it, and that
the whole process bears it.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from app.sandbox.faults import Latency
from app.sandbox.server import RunningEmulator, running_emulator
from app.server.server import KEEP_ALIVE
from tests.support.brokers import (
    LONG_CALLS,
    BrokerProcess,
    asked,
    eventually,
    running_broker_process,
)
from tests.support.processes import running
from tests.support.shapes import assert_session
from tests.support.valkey import running_valkey

MEGABYTE = 1024 * 1024
ARRIVAL = 10
SLACK = 3
"""Seconds that a busy machine may be late."""
MANY = 1000
WEBHOOK_SECRET = "a-webhook-secret-of-the-tests"

pytestmark = [
    pytest.mark.process,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process' memory from /proc"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def oneinbox() -> AsyncIterator[RunningEmulator]:
    async with running_emulator(LONG_CALLS) as emulator:
        yield emulator


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker(oneinbox: RunningEmulator) -> AsyncIterator[BrokerProcess]:
    async with running_broker_process(oneinbox.url, BROKER_WEBHOOK_SECRET=WEBHOOK_SECRET) as process:
        for _ in range(20):  # all that is made once is made
            assert_session(await process.client.post("/session", json={}))
        yield process
        # Nothing that a client does is worth more than a line like any other.
        assert {entry["level"] for entry in process.logs if entry["event"] != "limits_in_memory"} <= {"info", "warning"}
        assert not [entry for entry in process.logs if "exception" in entry]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A raw connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def url_of(broker: BrokerProcess) -> str:
    """Where a broker listens."""
    return str(broker.client.base_url).rstrip("/")


async def said(url: str, *parts: bytes) -> tuple[bytes, float]:
    """All that is answered to these, to the end of the connection, and after how many seconds that came."""
    loop = asyncio.get_running_loop()
    async with connected(url) as (reader, writer):
        began = loop.time()
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await reader.read(), loop.time() - began


async def flood(broker: BrokerProcess, first: bytes, each: bytes) -> tuple[bytes, float]:
    """Send something, and then the same again and again until the connection breaks; what was answered, and when."""
    loop = asyncio.get_running_loop()
    async with connected(url_of(broker)) as (reader, writer):
        began = loop.time()
        answer = asyncio.create_task(reader.read())
        with contextlib.suppress(ConnectionError):
            writer.write(first)
            async with asyncio.timeout(ARRIVAL + SLACK):
                while True:
                    writer.write(each)
                    await writer.drain()
        with contextlib.suppress(ConnectionError):
            return await answer, loop.time() - began
        return b"", loop.time() - began


def refused(answer: bytes, status: int) -> bool:
    """Whether it is a refusal without a body and nothing else."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.startswith(b"HTTP/1.1 %d " % status) and b"\r\nConnection: close" in head and not body


HOST = b"Host: broker.example\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HOST
NO_HOST = b"GET /healthz HTTP/1.1\r\n\r\n"


async def a_thousand_idle_connections(broker: BrokerProcess) -> None:
    """They cost little, and are closed."""
    url, before = url_of(broker), broker.process.descriptors
    silent = [b"", b"GET /hea", GET]

    with broker.process.bounded_memory(peak=32 * MEGABYTE):
        async with contextlib.AsyncExitStack() as stack:
            readers = []
            for number in range(MANY):
                reader, writer = await stack.enter_async_context(connected(url))
                writer.write(silent[number % 3])
                readers.append(reader)
            assert broker.process.descriptors >= before + MANY
            assert (await broker.client.get("/healthz")).status_code == 200
            async with asyncio.timeout(ARRIVAL + SLACK):
                answers = await asyncio.gather(*(reader.read() for reader in readers))

    assert all(not answer or refused(answer, 408) for answer in answers)

    async def all_gone() -> bool:
        return broker.process.descriptors < before + 10  # others may be kept

    await eventually(all_gone, within=SLACK)


async def test_what_waits_too_long_and_what_may_take_its_time(broker: BrokerProcess, oneinbox: RunningEmulator) -> None:
    """All at once, as each takes its ten seconds."""
    url = url_of(broker)
    location = (await broker.client.post("/session", json={})).headers["location"]
    oneinbox.emulator.faults.add(Latency(operation="start", seconds=ARRIVAL + 2, times=1))
    slow = asyncio.create_task(broker.client.post("/session", json={}))

    async def arrived() -> bool:
        return len(asked(oneinbox.emulator, "start")) >= 22

    await eventually(arrived, within=5)

    async def stream() -> bytes:
        async with connected(url) as (reader, writer):
            writer.write(b"GET %s/events HTTP/1.1\r\n%s\r\n" % (location.encode(), HOST))
            await reader.readuntil(b'"status":"in_progress"')
            await asyncio.sleep(ARRIVAL + 1)
            await broker.client.post(f"{location}/stop")
            return await reader.readuntil(b'"status":"completed"')

    async def kept() -> bytes:
        async with connected(url) as (reader, writer):
            writer.write(GET + b"\r\n")
            await reader.readuntil(b'{"status":"ok"}')
            await asyncio.sleep(ARRIVAL + 1)
            writer.write(GET + b"Connection: close\r\n\r\n")
            return await reader.read()

    unfinished = b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    async with asyncio.TaskGroup() as group:
        silent = group.create_task(said(url))
        halves = [
            group.create_task(said(url, half))
            for half in (b"GET /hea", GET + b"X: ", b"POST /session HTTP/1.1\r\n" + HOST + unfinished)
        ]
        endless = b"GET %s/events HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n" % (location.encode(), HOST)
        endless_stream = group.create_task(said(url, endless))
        kept_answer = group.create_task(kept())
        events = group.create_task(stream())
        group.create_task(a_thousand_idle_connections(broker))

    assert silent.result()[0] == b""
    assert all(refused(half.result()[0], 408) for half in halves)
    assert b"event: call" in endless_stream.result()[0]
    for task in (silent, *halves, endless_stream):
        assert ARRIVAL - 1 < task.result()[1] < ARRIVAL + SLACK
    assert kept_answer.result().endswith(b'{"status":"ok"}')
    assert b"event: call" in events.result()
    assert_session(await slow)


POST = b"POST /session HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
BIG = b"a" * 65536
CHUNK = b"10000\r\n" + BIG + b"\r\n"
ENDLESS = {
    "header": (GET + b"X: ", BIG, 431),
    "headers": (GET, b"X: a\r\n" * 1000, 431),
    "target": (b"GET /", BIG, 431),
    "extension": (POST + CHUNKED + b"1;", BIG, 431),
    "extensions": (POST + CHUNKED, (b"1;" + b"a" * 500 + b"\r\na\r\n") * 100, None),
    "trailer": (POST + CHUNKED + b"2\r\n{}\r\n0\r\nX: ", BIG, None),
    "body": (POST + CHUNKED, CHUNK, 413),
    "body-of-a-get": (b"GET /calls/call_1 HTTP/1.1\r\n" + HOST + CHUNKED, CHUNK, 404),
    "body-of-no-route": (b"PUT /nowhere HTTP/1.1\r\n" + HOST + CHUNKED, CHUNK, 404),
    "body-of-a-webhook": (
        b"POST /webhooks/oneinbox/%s HTTP/1.1\r\n%s" % (WEBHOOK_SECRET.encode(), HOST) + CHUNKED,
        CHUNK,
        413,
    ),
    "small-chunks": (POST + CHUNKED, b"1\r\na\r\n" * 10_000, None),
    "blank-lines": (b"", b"\r\n" * 1000, 431),
    "requests": (GET + b"\r\n", (GET + b"\r\n") * 1000, None),
}


async def test_what_has_no_end_is_cut_and_costs_no_memory(broker: BrokerProcess) -> None:
    with broker.process.bounded_memory(peak=16 * MEGABYTE):
        floods = await asyncio.gather(*(flood(broker, first, each) for first, each, _ in ENDLESS.values()))

    for (name, (_, _, status)), (answer, seconds) in zip(ENDLESS.items(), floods, strict=True):
        assert seconds < ARRIVAL, f"{name} is cut when the time is up only"
        # A client that goes on sending may find a reset instead of its answer.
        assert status is None or not answer or answer.startswith(b"HTTP/1.1 %d " % status), name
    assert (await broker.client.get("/healthz")).status_code == 200


async def test_webhooks_of_a_megabyte_are_taken(broker: BrokerProcess) -> None:
    event = json.dumps({"event": "call.ended", "call_id": "call_unknown", "padding": ""})
    for content in (event + " " * (1_000_000 - len(event)), event):
        response = await broker.client.post(f"/webhooks/oneinbox/{WEBHOOK_SECRET}", content=content)
        assert response.status_code == 204
    larger = await broker.client.post(f"/webhooks/oneinbox/{WEBHOOK_SECRET}", content=b" " * 1_000_001)
    assert larger.status_code == 413


async def test_a_hang_up_is_seen_behind_pipelined_requests(broker: BrokerProcess, oneinbox: RunningEmulator) -> None:
    before = {call.id for call in oneinbox.emulator.calls}
    oneinbox.emulator.faults.add(Latency(operation="start", seconds=2, times=1))
    async with connected(url_of(broker)) as (_, writer):
        writer.write(POST + b"Content-Length: 2\r\n\r\n{}" + (GET + b"\r\n") * 50)

        async def arrived() -> bool:
            return len(oneinbox.emulator.calls) > len(before)

        await eventually(arrived, within=5)
    [call] = [call for call in oneinbox.emulator.calls if call.id not in before]

    async def stopped() -> bool:
        return any(call.id in request.path for request in asked(oneinbox.emulator, "stop"))

    await eventually(stopped, within=5)


async def test_a_trailer_is_no_login(oneinbox: RunningEmulator) -> None:
    user = {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "127.0.0.0/8"}
    async with running_broker_process(oneinbox.url, **user) as broker:
        answer, _ = await said(
            url_of(broker),
            b"GET /calls HTTP/1.1\r\nConnection: close\r\n" + HOST + CHUNKED + b"0\r\nX-Forwarded-User: admin\r\n\r\n",
        )
    assert answer.startswith(b"HTTP/1.1 401 ")


async def test_every_server_has_the_guard(oneinbox: RunningEmulator, tmp_path: Path) -> None:
    def sandbox() -> Iterator[str]:
        with running("sandbox", "--port", "0", cwd=tmp_path, environ={}) as process:
            [url] = re.findall(r"http://127\.0\.0\.1:\d+", process.wait_for("curl -i -X POST"))
            process.wait_for("Ctrl-C")
            yield url

    for url in sandbox():
        answer, _ = await said(url, NO_HOST)
        assert refused(answer, 400)
    with running_valkey() as valkey:
        workers = running_broker_process(oneinbox.url, "--workers", "2", BROKER_STORE_URL=valkey.url)
        async with workers as broker:
            answer, _ = await said(url_of(broker), NO_HOST)
            assert refused(answer, 400)


async def test_idle_connections_outlive_those_of_load_balancers() -> None:
    assert KEEP_ALIVE > 60
