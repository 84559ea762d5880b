"""A OneInbox that breaks every rule, in front of it the broker as its users run it."""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from app.sandbox.faults import (
    BigBody,
    BrokenJson,
    Drip,
    Drop,
    EndlessBody,
    Fault,
    Fields,
    GzipBomb,
    Hang,
    HeaderFlood,
    NotUtf8,
    Redirect,
    Status,
    Truncated,
)
from app.sandbox.server import RunningEmulator, running_emulator
from tests.support.brokers import (
    LONG_CALLS,
    BrokerProcess,
    asked,
    eventually,
    outcomes,
    post_many,
    running_broker_process,
)
from tests.support.harness import TOKEN
from tests.support.shapes import assert_problem, assert_session, remaining

TIMEOUT = 2.0
PATIENCE = TIMEOUT + 1
MEGABYTE = 1024 * 1024
QUICK = {"ONEINBOX_TIMEOUT": str(TIMEOUT), "ONEINBOX_CONNECT_TIMEOUT": "0.5", "BROKER_MAX_WAITING": "100"}
COOLING = 5.0
"""Seconds that an unreachable OneInbox is left alone."""

pytestmark = [
    pytest.mark.process,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process' memory from /proc"),
]


async def start(broker: BrokerProcess) -> httpx.Response:
    """What a broker answers in time when a call is to be started."""
    async with asyncio.timeout(PATIENCE):
        return await broker.client.post("/session", json={})


async def left(broker: BrokerProcess) -> int:
    """Start a call, at once and without fault; how many are left to start."""
    response = await start(broker)
    assert_session(response)
    return remaining(response)


async def left_after_a_pause(broker: BrokerProcess) -> int:
    """The same once OneInbox is no longer left alone: after ten requests in a row without an answer it is for a while.

    What is refused meanwhile is not sent, and given back.
    """
    async with asyncio.timeout(COOLING + PATIENCE):
        while (response := await start(broker)).status_code == 503:
            assert_problem(response, "upstream-busy")
            await asyncio.sleep(0.1)
    assert_session(response)
    return remaining(response)


# The emulated OneInbox


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def oneinbox() -> AsyncIterator[RunningEmulator]:
    async with running_emulator(LONG_CALLS) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker(oneinbox: RunningEmulator) -> AsyncIterator[BrokerProcess]:
    async with running_broker_process(oneinbox.url, **QUICK) as running:
        for _ in range(20):  # all that is made once is made
            await left(running)
        yield running
        assert not [entry for entry in running.logs if "exception" in entry or entry["event"] == "unhandled_error"]


FAULTS: dict[str, tuple[Fault, str]] = {
    "300-megabytes": (BigBody(operation="start", megabytes=300, times=1), "upstream-invalid"),
    "endless": (EndlessBody(operation="start", times=1), "upstream-invalid"),
    "dripping": (Drip(operation="start", interval=0.1, times=1), "upstream-timeout"),
    "hanging": (Hang(operation="start", times=1), "upstream-timeout"),
    "gzip-bomb": (GzipBomb(operation="start", megabytes=50, times=1), "upstream-invalid"),
    "not-utf-8": (NotUtf8(operation="start", times=1), "upstream-invalid"),
    "redirect": (Redirect(operation="start", location="http://127.0.0.1:9/", times=1), "upstream-error"),
    "header-flood": (HeaderFlood(operation="start", times=1), "upstream-error"),
    "many-headers": (HeaderFlood(operation="start", count=100_000, size=1, times=1), "upstream-error"),
    "long-header": (HeaderFlood(operation="start", count=1, size=10 * MEGABYTE, times=1), "upstream-error"),
    "truncated": (Truncated(operation="start", times=1), "upstream-error"),
    "dropped-before": (Drop(operation="start", times=1), "upstream-error"),
    "dropped-after": (Drop(operation="start", takes_effect=True, times=1), "upstream-error"),
    "broken-json": (BrokenJson(operation="start", times=1), "upstream-invalid"),
    "no-token": (Fields(operation="start", remove=["participant_token"], times=1), "upstream-invalid"),
    "no-url": (Fields(operation="start", remove=["server_url"], times=1), "upstream-invalid"),
    "no-id": (Fields(operation="start", remove=["id"], times=1), "upstream-invalid"),
    "another-url": (Fields(operation="start", set={"server_url": "https://a.example"}, times=1), "upstream-invalid"),
    "wrong-types": (Fields(operation="start", set={"participant_token": ["a"]}, times=1), "upstream-invalid"),
}


@pytest.mark.parametrize(("fault", "slug"), FAULTS.values(), ids=FAULTS.keys())
async def test_each_fault_ends_in_time_in_its_problem(
    broker: BrokerProcess, oneinbox: RunningEmulator, fault: Fault, slug: str
) -> None:
    with broker.process.bounded_memory(growth=12 * MEGABYTE, peak=32 * MEGABYTE):
        before = await left(broker)
        oneinbox.emulator.faults.add(fault)
        assert_problem(await start(broker), slug)
        # Sent, and not refused: there may be a call, so it counts.
        assert before - await left(broker) == 2


@pytest.mark.parametrize(
    ("status", "slug", "counted"),
    [
        (400, "upstream-error", False),
        (401, "upstream-misconfigured", False),
        (404, "upstream-misconfigured", False),
        (422, "upstream-misconfigured", False),
        (408, "upstream-error", True),
        (500, "upstream-error", True),
        (503, "upstream-error", True),
    ],
)
async def test_what_oneinbox_refused_is_given_back(
    broker: BrokerProcess, oneinbox: RunningEmulator, status: int, slug: str, counted: bool
) -> None:
    before = await left(broker)
    oneinbox.emulator.faults.add(Status(operation="start", status=status, times=1))
    assert_problem(await start(broker), slug)
    assert before - await left(broker) == (2 if counted else 1)


async def test_fifty_answers_without_sense_at_once(broker: BrokerProcess, oneinbox: RunningEmulator) -> None:
    faults: list[Fault] = [
        fault.model_copy(update={"times": 10})
        for fault, _ in (FAULTS[name] for name in ("not-utf-8", "redirect", "gzip-bomb", "broken-json", "no-token"))
    ]
    before = await left(broker)
    oneinbox.emulator.faults.add(*faults)

    with broker.process.bounded_memory(growth=12 * MEGABYTE, peak=32 * MEGABYTE):
        async with asyncio.timeout(PATIENCE):
            responses = await post_many([broker], 50)

    assert outcomes(responses) == {"upstream-invalid": 40, "upstream-error": 10}
    assert before - await left(broker) == 51


async def test_fifty_endless_answers_at_once(broker: BrokerProcess, oneinbox: RunningEmulator) -> None:
    before = await left(broker)
    oneinbox.emulator.faults.add(EndlessBody(operation="start", times=50))

    with broker.process.bounded_memory(growth=32 * MEGABYTE, peak=64 * MEGABYTE):
        async with asyncio.timeout(PATIENCE):
            responses = await post_many([broker], 50)

    assert outcomes(responses) == {"upstream-invalid": 50}
    assert before - await left(broker) == 51


async def test_fifty_lost_connections_at_once(broker: BrokerProcess, oneinbox: RunningEmulator) -> None:
    before = await left(broker)
    oneinbox.emulator.faults.add(
        Hang(operation="start", times=20),
        Drop(operation="start", takes_effect=True, times=15),
        Truncated(operation="start", times=15),
    )

    async with asyncio.timeout(PATIENCE):
        responses = await post_many([broker], 50)
    oneinbox.emulator.faults.clear()

    counts = outcomes(responses)
    assert counts.keys() <= {"upstream-timeout", "upstream-error", "upstream-busy"}
    assert counts["upstream-timeout"] + counts["upstream-error"] >= 10
    assert before - await left_after_a_pause(broker) == 51 - counts["upstream-busy"]
    assert outcomes(await post_many([broker], 20)) == {"201": 20}


async def test_sixty_callers_that_hang_up_together(broker: BrokerProcess, oneinbox: RunningEmulator) -> None:
    before, started = await left(broker), len(asked(oneinbox.emulator, "start"))
    oneinbox.emulator.faults.add(Hang(operation="start", times=60))
    asking = [asyncio.create_task(broker.client.post("/session", json={})) for _ in range(60)]

    async def all_arrived() -> bool:
        return len(asked(oneinbox.emulator, "start")) == started + 60

    await eventually(all_arrived, within=5)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)

    # The broker still waits for their answers, to stop the calls; there are more places.
    async with asyncio.timeout(PATIENCE):
        assert outcomes(await post_many([broker], 20)) == {"201": 20}
    # The sixty were sent: they stay counted.
    assert before - await left_after_a_pause(broker) == 81


# What the emulator cannot do: bytes


Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def session(number: int) -> bytes:
    """A right answer."""
    body = {"id": f"call_{number}", "server_url": "wss://voice.example", "participant_token": f"{TOKEN}{number}"}
    return answer(json.dumps(body).encode())


def answer(body: bytes, head: bytes = b"HTTP/1.1 201 Created") -> bytes:
    """An answer with a body."""
    return b"%s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (head, len(body), body)


class RawUpstream:
    """Answers what scripts say, one per start, in turn; rightly where there is none. Finds no lost call."""

    def __init__(self) -> None:
        self.port = 0
        self.scripts: list[Script] = []
        self.started = 0
        self.served = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await self._serve(reader, writer)
        writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
        await reader.readexactly(int(length.partition(b":")[2]))
        if not head.startswith(b"POST /v1/calls/web "):
            writer.write(answer(b'{"items": []}', b"HTTP/1.1 200 OK"))
        elif self.scripts:
            self.started += 1
            await self.scripts.pop(0)(reader, writer)
        else:
            self.started += 1
            self.served += 1
            writer.write(session(self.served))
        await writer.drain()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def raw() -> AsyncIterator[RawUpstream]:
    upstream = RawUpstream()
    server = await asyncio.start_server(upstream, "127.0.0.1", 0)
    upstream.port = server.sockets[0].getsockname()[1]
    yield upstream
    server.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def raw_broker(raw: RawUpstream) -> AsyncIterator[BrokerProcess]:
    async with running_broker_process(f"http://127.0.0.1:{raw.port}", **QUICK) as running:
        for _ in range(20):
            await left(running)
        yield running
        assert not [entry for entry in running.logs if "exception" in entry or entry["event"] == "unhandled_error"]


def says(*parts: bytes) -> Script:
    """Send these, and keep the connection."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return script


def says_and_closes(*parts: bytes) -> Script:
    """Send these, and close."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await says(*parts)(reader, writer)
        writer.close()
        await writer.wait_closed()
        raise ConnectionResetError

    return script


def goes_on(first: bytes, each: bytes, interval: float = 0) -> Script:
    """Send something, and then the same again and again."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(each)
            await writer.drain()
            await asyncio.sleep(interval)
            if reader.at_eof():
                raise ConnectionResetError

    return script


def resets(*parts: bytes) -> Script:
    """Send these, and reset the connection."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await says(*parts)(reader, writer)
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        raise ConnectionResetError

    return script


RIGHT = session(0)
HEAD = b"HTTP/1.1 201 Created\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SCRIPTS: dict[str, tuple[Script, set[str]]] = {
    "flood-of-102": (goes_on(b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 1000), {"upstream-timeout", "upstream-error"}),
    "drip-of-102": (goes_on(b"", b"HTTP/1.1 102 Processing\r\n\r\n", 0.1), {"upstream-timeout"}),
    "endless-header": (goes_on(HEAD + b"X: ", b"a" * 65536), {"upstream-error"}),
    "endless-headers": (goes_on(HEAD, b"X: a\r\n" * 1000), {"upstream-error"}),
    "endless-status": (goes_on(b"HTTP/1.1 201 ", b"a" * 65536), {"upstream-error"}),
    "drip-of-a-header": (goes_on(HEAD + b"X: ", b"a", 0.1), {"upstream-timeout"}),
    "endless-small-chunks": (goes_on(CHUNKED, b"1\r\na\r\n" * 10_000), {"upstream-timeout", "upstream-invalid"}),
    "endless-extension": (goes_on(CHUNKED + b"1;", b"a" * 65536), {"upstream-error", "upstream-timeout"}),
    "endless-trailer": (goes_on(CHUNKED + b"0\r\nX: ", b"a" * 65536), {"upstream-error", "upstream-timeout"}),
    "endless-trailers": (goes_on(CHUNKED + b"0\r\n", b"X: a\r\n" * 1000), {"upstream-error", "upstream-timeout"}),
    "garbage": (goes_on(b"", b"\x00\xff garbage\r\n" * 1000), {"upstream-error"}),
    "tls": (says(b"\x15\x03\x01\x00\x02\x02\x46"), {"upstream-error", "upstream-timeout"}),
    "http-0.9": (says_and_closes(b'{"id": "call_1"}'), {"upstream-error"}),
    "http-2": (says(b"HTTP/2 201 Created\r\n\r\n"), {"upstream-error", "upstream-timeout"}),
    "no-answer": (says_and_closes(), {"upstream-error"}),
    "half-a-head": (says_and_closes(HEAD), {"upstream-error"}),
    "no-content": (says(b"HTTP/1.1 204 No Content\r\n\r\n"), {"upstream-invalid"}),
    "length-and-chunks": (
        says(HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + RIGHT),
        {"upstream-error"},
    ),
    "two-lengths": (says(HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} "), {"upstream-error"}),
    "negative-length": (says(HEAD + b"Content-Length: -1\r\n\r\n"), {"upstream-error"}),
    "huge-length": (goes_on(HEAD + b"Content-Length: 999999999999\r\n\r\n", b"a" * 65536), {"upstream-invalid"}),
    "short-body": (says_and_closes(RIGHT[:-5]), {"upstream-error"}),
    "reset-before": (resets(), {"upstream-error"}),
    "reset-in-head": (resets(HEAD), {"upstream-error"}),
    "reset-in-body": (resets(RIGHT[:-5]), {"upstream-error"}),
    "upgrade": (
        says(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: a\r\n\r\n"),
        {"upstream-error", "upstream-timeout"},
    ),
    "deep-json": (says(answer(b"[" * 60_000 + b"]" * 60_000)), {"upstream-invalid"}),
    "broken-gzip": (
        says(HEAD + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"),
        {"upstream-invalid"},
    ),
    "deflate-twice": (
        says(HEAD + b"Content-Encoding: identity\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"),
        {"upstream-invalid"},
    ),
}


@pytest.mark.parametrize(("script", "slugs"), SCRIPTS.values(), ids=SCRIPTS.keys())
async def test_each_breach_of_the_protocol_ends_in_time(
    raw: RawUpstream, raw_broker: BrokerProcess, script: Script, slugs: set[str]
) -> None:
    with raw_broker.process.bounded_memory(growth=12 * MEGABYTE, peak=32 * MEGABYTE):
        before, started = await left(raw_broker), raw.started
        raw.scripts.append(script)
        response = await start(raw_broker)
        slug = response.json()["type"].rpartition("/")[2]
        assert slug in slugs
        assert_problem(response, slug)
        assert before - await left(raw_broker) == 2
        assert raw.started - started == 2, "a start is never sent twice"


EXTRAS = {
    "garbage": b"garbage",
    "an-answer": session(666),
    "half-an-answer": session(666)[:-5],
    "an-interim-answer": b"HTTP/1.1 102 Processing\r\n\r\n",
    "line-ends": b"\r\n" * 10,
}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS.keys())
async def test_what_follows_an_answer_is_nobodys(raw: RawUpstream, raw_broker: BrokerProcess, extra: bytes) -> None:
    raw.scripts.append(says(session(665) + extra))

    first, *others = [await start(raw_broker) for _ in range(3)]

    # Where the two come as one packet that cannot be read, the answer is lost with it.
    if first.is_error:
        assert_problem(first, "upstream-error")
    else:
        assert first.json()["participant_token"] == f"{TOKEN}665"
    tokens = [response.json()["participant_token"] for response in others]
    assert tokens == [f"{TOKEN}{raw.served - 1}", f"{TOKEN}{raw.served}"]


async def test_a_connection_that_was_closed_meanwhile_is_not_used_again(
    raw: RawUpstream, raw_broker: BrokerProcess
) -> None:
    for _ in range(5):
        raw.scripts.append(says_and_closes(session(665)))
        assert_session(await start(raw_broker))
        await left(raw_broker)


async def test_fifty_breaches_at_once(raw: RawUpstream, raw_broker: BrokerProcess) -> None:
    names = ("flood-of-102", "endless-header", "garbage", "reset-in-body", "huge-length", "drip-of-a-header")
    before = await left(raw_broker)
    raw.scripts += [SCRIPTS[names[number % len(names)]][0] for number in range(50)]

    with raw_broker.process.bounded_memory(growth=12 * MEGABYTE, peak=48 * MEGABYTE):
        async with asyncio.timeout(PATIENCE):
            responses = await post_many([raw_broker], 50)
    raw.scripts.clear()

    assert outcomes(responses)["201"] == 0
    assert before - await left_after_a_pause(raw_broker) == 51 - outcomes(responses)["upstream-busy"]
    assert outcomes(await post_many([raw_broker], 20)) == {"201": 20}


async def test_what_surely_was_never_sent_is_given_back() -> None:
    upstream = RawUpstream()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as waiting:
        # Nobody is let in any more: a connection is neither made nor refused.
        for _ in range(2):
            full = waiting.enter_context(socket.socket())
            full.setblocking(False)
            full.connect_ex(listener.getsockname())
        # Without a warm connection, which would outlive the server.
        settings = {**QUICK, "BROKER_WARM_CONNECTIONS": "0"}
        async with running_broker_process(f"http://127.0.0.1:{listener.getsockname()[1]}", **settings) as broker:
            stuck = [await start(broker) for _ in range(2)]
            waiting.close()
            listener.setblocking(False)
            server = await asyncio.start_server(upstream, sock=listener)
            upstream.scripts.append(says_and_closes(session(1)))
            first = await left(broker)
            server.close()
            refused = [await start(broker) for _ in range(2)]

    for response in [*stuck, *refused]:
        assert_problem(response, "upstream-unreachable")
    assert [remaining(response) for response in stuck] == [first, first]
    assert [remaining(response) for response in refused] == [first - 1, first - 1]
    assert upstream.started == 1
