"""The guard on uvicorn's protocol, on real sockets, with short times."""

import asyncio
import contextlib
import gc
import json
import logging
import re
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from app.server.protocol import DISCONNECTED, MAX_FIELDS, MAX_FRAMING, MAX_WAITING, PIECE, GuardedHttp
from tests.conftest import Logs

ARRIVAL, LINGER, KEEP_ALIVE = 0.2, 0.2, 0.5
SLACK = 5.0
"""Seconds that a busy machine may be late."""
STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")


class Quick(GuardedHttp):
    """The guard with short times."""

    ARRIVAL_SECONDS = ARRIVAL
    LINGER_SECONDS = LINGER


class Site:
    """An application for the tests, and the server it runs on.

    It answers with the head and the body it got; `/early` before it reads anything; `/deaf` so once `go_on` is set;
    `/wait` once `go_on` is set; `/stream` begins at once, and ends once `go_on` is set. `gone` is set when a hang-up
    was seen.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.in_memory: weakref.WeakSet[Any] = weakref.WeakSet()
        """uvicorn's objects of the requests, which hold all that belongs to them."""
        self.go_on = asyncio.Event()
        self.gone = asyncio.Event()
        self.failed: list[BaseException] = []
        self.state = ServerState()
        self.port = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope["path"])
        self.in_memory.add(cast("Any", receive).__self__)
        self.disconnected = cast("Callable[[], bool]", cast("Any", scope["extensions"])[DISCONNECTED])
        try:
            await self._answer(scope, receive, send)
        except BaseException as error:
            self.failed.append(error)
            raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/deaf":
            await self.go_on.wait()
        if scope["path"] in ("/early", "/deaf"):
            return await _send(send, b"early")
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
            await self._watch(receive)
            return await send({"type": "http.response.body", "body": b"the end"})
        if scope["path"] == "/wait":
            await self._watch(receive)
            return await _send(send, b"waited")
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.set()
                return None
            body += message["body"]
            if not message["more_body"]:
                break
        head = [[name.decode(), value[:20].decode()] for name, value in scope["headers"]]
        return await _send(send, json.dumps({"path": scope["path"], "head": head, "body": len(body)}).encode())

    async def _watch(self, receive: Receive) -> None:
        """Wait for `go_on`, and meanwhile for a hang-up."""

        async def until_gone() -> None:
            message: Message = {}
            while message.get("type") != "http.disconnect":
                message = await receive()
            self.gone.set()

        watching = asyncio.create_task(until_gone())
        await self.go_on.wait()
        watching.cancel()


async def _send(send: Send, body: bytes) -> None:
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def listening(app: ASGIApp, state: ServerState, guard: type[GuardedHttp]) -> AsyncIterator[int]:
    """Start a server on this event loop; gives its port."""
    config = uvicorn.Config(app, ws="none", access_log=False, lifespan="off", log_config=None)
    config.timeout_keep_alive = KEEP_ALIVE  # type: ignore[assignment]  # whole seconds are long to wait for
    config.load()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: guard(config, state, {}), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        async with asyncio.timeout(SLACK):
            while state.connections or state.tasks:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(guard: type[GuardedHttp]) -> AsyncIterator[Site]:
    """The site, behind this guard."""
    site = Site()
    async with listening(site, site.state, guard) as site.port:
        yield site
        site.go_on.set()
    assert not site.failed


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """Behind the guard as it is."""
    async with running(GuardedHttp) as site:
        yield site


@pytest.fixture
async def hurried_site() -> AsyncIterator[Site]:
    """Behind a guard with short times."""
    async with running(Quick) as site:
        yield site


@pytest.fixture(autouse=True)
def _no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No client makes the server log a warning."""
    with caplog.at_level(logging.INFO):
        yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


class Client:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        """Send, as far as the server reads."""
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """Return the status and body of the next answer, which has no chunks."""
        async with asyncio.timeout(ARRIVAL + LINGER + SLACK):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            assert length is not None
            match = STATUS.match(head)
            assert match is not None
            return int(match[1]), await self.reader.readexactly(int(length[1]))

    async def rest(self) -> bytes:
        """Read to the end of the connection."""
        async with asyncio.timeout(ARRIVAL + LINGER + KEEP_ALIVE + SLACK):
            return await self.reader.read()

    async def refused(self, status: int) -> None:
        """Expect a refusal without a body, and the end of the connection."""
        head, separator, body = (await self.rest()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), head
        assert b"connection: close" in head.lower()
        assert (separator, body) == (b"\r\n\r\n", b"")

    async def flood(self, data: bytes) -> int:
        """Send the same until the connection breaks; return the bytes sent."""
        sent = 0
        try:
            async with asyncio.timeout(ARRIVAL + LINGER + SLACK):
                while True:
                    await self.send(data)
                    sent += len(data)
        except ConnectionError:
            return sent


@asynccontextmanager
async def connected(site: Site) -> AsyncIterator[Client]:
    """A connection to the site."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


def get(path: str = "/echo", *fields: bytes) -> bytes:
    """A GET request."""
    head = [f"GET {path} HTTP/1.1".encode(), b"Host: broker.example", *fields]
    return b"\r\n".join([*head, b"", b""])


def post(*fields: bytes, body: bytes = b"", path: str = "/echo") -> bytes:
    """A POST request with these framing fields."""
    head = [f"POST {path} HTTP/1.1".encode(), b"Host: broker.example", *fields]
    return b"\r\n".join([*head, b"", body])


CHUNKED = b"Transfer-Encoding: chunked"


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    """One chunk."""
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


@asynccontextmanager
async def dripping(client: Client, data: bytes) -> AsyncIterator[None]:
    """Keep sending, often enough to extend any timer that restarts with each byte."""

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await asyncio.sleep(ARRIVAL / 10)
                await client.send(data)

    drips = asyncio.create_task(drip())
    yield
    drips.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await drips


async def until(holds: Callable[[], object]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(SLACK):
        while not holds():
            await asyncio.sleep(0.01)


async def took(waiting: Awaitable[object]) -> float:
    """Return the seconds until it is done."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await waiting
    return loop.time() - began


# Sizes


@pytest.mark.parametrize("size", [0, 8 * 1024, MAX_FRAMING - 200])
async def test_a_head_of_32_kib_is_taken(site: Site, size: int) -> None:
    async with connected(site) as client:
        await client.send(get("/echo", b"X: " + b"a" * size))
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize(
    "request_",
    [
        get("/echo", b"X: " + b"a" * (MAX_FRAMING + PIECE)),
        get("/echo", *[b"X-%d: %s" % (number, b"a" * 1000) for number in range(40)]),
        get("/echo?" + "a" * (MAX_FRAMING + PIECE)),
        get("/echo", b"a" * (MAX_FRAMING + PIECE) + b": b"),
        post(CHUNKED, body=chunk(b"abc", b";" + b"x" * (MAX_FRAMING + PIECE)) + chunk(b"")),
        post(CHUNKED, body=b"0\r\nX: " + b"a" * (MAX_FRAMING + PIECE) + b"\r\n\r\n"),
        post(CHUNKED, body=chunk(b"abc", b";" + b"x" * 1000) * 40 + chunk(b"")),
        b"\r\n" * (MAX_FRAMING // 2 + PIECE) + get(),
    ],
    ids=["header", "headers", "target", "name", "extension", "trailer", "extensions", "blank-lines"],
)
async def test_more_than_32_kib_that_are_no_body_are_refused(site: Site, request_: bytes, logs: Logs) -> None:
    async with connected(site) as client:
        await client.send(request_)
        await client.refused(431)
    assert [(entry["event"], entry["status"]) for entry in logs] == [("request_refused", 431)]


async def test_an_endless_header_is_refused_while_it_comes(site: Site) -> None:
    async with connected(site) as client:
        await client.send(b"GET / HTTP/1.1\r\nX: ")
        for _ in range(16):
            await client.send(b"a" * PIECE)
        assert (await client.answer()) == (431, b"")


async def test_a_refusal_is_found_by_a_client_that_is_still_sending(site: Site) -> None:
    async with connected(site) as client:
        await client.send(get("/echo", b"X: " + b"a" * 4_000_000))
        await client.refused(431)


async def test_a_client_that_sends_on_after_a_refusal_is_cut_off(hurried_site: Site) -> None:
    async with connected(hurried_site) as client:
        await client.send(b"GARBAGE\r\n\r\n")
        assert (await client.answer()) == (400, b"")
        assert await took(client.flood(b"a" * 65536)) < LINGER + SLACK


@pytest.mark.parametrize(("fields", "status"), [(MAX_FIELDS, 200), (MAX_FIELDS + 1, 431)])
async def test_a_hundred_fields_are_enough(site: Site, fields: int, status: int) -> None:
    async with connected(site) as client:
        await client.send(get("/echo", *[b"X: 1"] * (fields - 1)))  # and Host
        assert (await client.answer())[0] == status


async def test_bodies_are_not_limited_here(site: Site) -> None:
    async with connected(site) as client:
        for request in (
            post(b"Content-Length: 1000000", body=b"a" * 1_000_000),
            post(CHUNKED, body=chunk(b"a" * 100) * 10_000 + chunk(b"")),
        ):
            await client.send(request)
            status, body = await client.answer()
            assert (status, json.loads(body)["body"]) == (200, 1_000_000)


async def test_trailers_are_not_mixed_with_the_head(site: Site) -> None:
    async with connected(site) as client:
        await client.send(post(CHUNKED, body=b"3\r\nabc\r\n0\r\nX-Forwarded-User: admin\r\n\r\n"))
        status, body = await client.answer()
    assert status == 200
    assert [name for name, _ in json.loads(body)["head"]] == ["host", "transfer-encoding"]


# What is no request


@pytest.mark.parametrize(
    "host",
    [
        b"broker.example",
        b"broker.example:8000",
        b"127.0.0.1",
        b"[::1]:8000",
        b"[::ffff:127.0.0.1]",
        b"my_service",
        b"xn--bcher-kva.example.",
        b"broker.example:",
    ],
)
async def test_hosts(site: Site, host: bytes) -> None:
    async with connected(site) as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % host)
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nhost: b\r\n",
        b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n",
        *(
            b"GET / HTTP/1.1\r\nHost: %s\r\n" % host
            for host in (
                b"",
                b"a, b",
                b"a b",
                b"user@a",
                b"a/b",
                b"http://a",
                b"a:b",
                b"a:123456",
                b"a:80:80",
                b"::1",
                b"[::1",
                b"[evil]",
                b"a\xff",
                b"a?b",
                b"a#b",
                b"a\\b",
                b'a"b',
                b"<a>",
                b":80",
                b"a" * 256,
            )
        ),
    ],
)
async def test_no_host_two_or_a_malformed_one(site: Site, head: bytes) -> None:
    async with connected(site) as client:
        await client.send(head + b"\r\n")
        await client.refused(400)
    assert site.paths == []


async def test_http_1_0_needs_no_host(site: Site) -> None:
    async with connected(site) as client:
        await client.send(b"GET / HTTP/1.0\r\n\r\n")
        assert b'"path": "/"' in await client.rest()


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
BY_THE_PARSER = {
    "length-and-coding": post(b"Content-Length: 4", CHUNKED, body=b"0\r\n\r\n" + SMUGGLED),
    "coding-and-length": post(CHUNKED, b"Content-Length: 4", body=b"0\r\n\r\n" + SMUGGLED),
    "two-lengths": post(b"Content-Length: 4", b"Content-Length: 5", body=b"abcde"),
    "same-length-twice": post(b"Content-Length: 3", b"Content-Length: 3", body=b"abc"),
    "length-list": post(b"Content-Length: 3, 3", body=b"abc"),
    "length-sign": post(b"Content-Length: +3", body=b"abc"),
    "length-hex": post(b"Content-Length: 0x3", body=b"abc"),
    "length-empty": post(b"Content-Length:"),
    "length-overflow": post(b"Content-Length: 99999999999999999999"),
    "two-codings": post(CHUNKED, CHUNKED, body=b"0\r\n\r\n"),
    "chunked-not-last": post(b"Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n"),
    "coding-unknown": post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
    "coding-identity": post(b"Transfer-Encoding: identity", body=b"0\r\n\r\n"),
    "coding-parameter": post(b"Transfer-Encoding: chunked;a", body=b"0\r\n\r\n"),
    "bare-lf": b"GET / HTTP/1.1\nHost: a\n\n",
    "bare-lf-in-head": b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "bare-lf-in-chunk": post(CHUNKED, body=b"3\nabc\r\n0\r\n\r\n"),
    "bare-cr": get("/", b"X: b\rc"),
    "obs-fold": get("/", b"X: b", b" c"),
    "fold-of-the-first-line": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "space-before-colon": get("/", b"X : b"),
    "no-colon": get("/", b"X"),
    "no-name": get("/", b": b"),
    "nul": get("/", b"X: a\0b"),
    "control-character": get("/", b"X: a\x01b"),
    "chunk-size-overflow": post(CHUNKED, body=b"f" * 17 + b"\r\nabc\r\n0\r\n\r\n"),
    "chunk-size-hex": post(CHUNKED, body=b"0x3\r\nabc\r\n0\r\n\r\n"),
    "chunk-size-space": post(CHUNKED, body=b"3 \r\nabc\r\n0\r\n\r\n"),
    "chunk-without-end": post(CHUNKED, body=b"3\r\nabcX0\r\n\r\n"),
    "space-in-target": get("/a b"),
    "not-ascii": b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "tabs": b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n",
    "connect": b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    "http-2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
    "http-1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "garbage": b"GARBAGE\r\n\r\n",
}
BY_THE_GUARD = {
    "coding-list": post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "coding-of-1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "http-0.9": b"GET /\r\n\r\n",
    "http-0.9-said": b"GET / HTTP/0.9\r\nHost: a\r\n\r\n",
    "http-2-said": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "upgrade-with-length": post(
        b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED
    ),
    "upgrade-with-chunks": post(b"Connection: Upgrade", b"Upgrade: h2c", CHUNKED, body=chunk(SMUGGLED) + chunk(b"")),
}


@pytest.mark.parametrize("request_", (BY_THE_PARSER | BY_THE_GUARD).values(), ids=(BY_THE_PARSER | BY_THE_GUARD).keys())
@pytest.mark.parametrize("in_two", [False, True], ids=["whole", "in-two"])
async def test_what_could_be_read_in_two_ways_is_refused(site: Site, request_: bytes, in_two: bool) -> None:
    async with connected(site) as client:
        head, separator, body = request_.partition(b"\r\n\r\n")
        if in_two:
            await client.send(head + separator)
            await asyncio.sleep(0.01)  # two packets
        await client.send(body if in_two else request_)
        await client.refused(400)
    assert "/smuggled" not in site.paths


async def test_an_offered_upgrade_is_ignored(site: Site) -> None:
    async with connected(site) as client:
        offer = get("/echo", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA")
        await client.send(offer + get("/echo?next"))
        assert [(await client.answer())[0] for _ in range(2)] == [200, 200]
        await client.send(offer)
        assert (await client.answer())[0] == 200


# Times


async def test_an_unused_connection_is_closed_without_a_response(hurried_site: Site) -> None:
    async with connected(hurried_site) as client:
        assert await took(client.rest()) > ARRIVAL / 2
        assert await client.rest() == b""


HALVES = {
    "line": (b"GET /", b"a"),
    "head": (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"a"),
    "length": (post(b"Content-Length: 100000"), b"a"),
    "chunk": (post(CHUNKED, body=b"fffff\r\n"), b"a"),
    "chunks": (post(CHUNKED), b"1\r\na\r\n"),
    "unread": (post(b"Content-Length: 100000", path="/deaf"), b"a"),
}


@pytest.mark.parametrize("before", [0, 2], ids=["first", "third"])
@pytest.mark.parametrize(("begun", "drip"), HALVES.values(), ids=HALVES.keys())
async def test_a_request_that_does_not_arrive_is_cut(
    hurried_site: Site, begun: bytes, drip: bytes, before: int
) -> None:
    async with connected(hurried_site) as client:
        for _ in range(before):
            await client.send(get())
            assert (await client.answer())[0] == 200
        await client.send(begun)

        async with dripping(client, drip):
            assert ARRIVAL / 2 < await took(client.refused(408)) < ARRIVAL + SLACK
    await until(lambda: not hurried_site.state.connections)


async def test_blank_lines_keep_no_connection(hurried_site: Site) -> None:
    async with connected(hurried_site) as client:
        await client.send(get())
        await client.answer()
        async with dripping(client, b"\r\n"):
            with contextlib.suppress(ConnectionResetError):  # closed just as it sent
                assert await client.rest() == b""


async def test_an_idle_connection_is_kept_as_long_as_uvicorn_says(hurried_site: Site) -> None:
    async with connected(hurried_site) as client:
        await client.send(get())
        await client.answer()
        assert ARRIVAL < await took(client.rest()) < KEEP_ALIVE + SLACK


@pytest.mark.parametrize("path", ["/wait", "/stream"])
async def test_an_answer_may_take_its_time(hurried_site: Site, path: str) -> None:
    async with connected(hurried_site) as client:
        # Behind it, half of another request.
        await client.send(get(path) + b"GET /echo HT")
        await asyncio.sleep(max(ARRIVAL, LINGER, KEEP_ALIVE) + ARRIVAL)
        assert not hurried_site.gone.is_set()
        hurried_site.go_on.set()
        await client.reader.readuntil({"/wait": b"waited", "/stream": b"the end\r\n0\r\n\r\n"}[path])
        await client.refused(408)


@pytest.mark.parametrize("connection", [b"", b"Connection: keep-alive\r\n"], ids=["plain", "keep-alive"])
async def test_http_1_0_gets_no_chunks_and_ends_with_the_connection(site: Site, connection: bytes) -> None:
    async with connected(site) as client:
        await client.send(b"GET /stream HTTP/1.0\r\n" + connection + b"\r\n")
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert b"connection: close" in head.lower()
        assert await client.reader.readexactly(5) == b"begun"
        site.go_on.set()
        assert await client.rest() == b"the end"


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
async def test_http_1_0_is_told_the_length_where_it_is_known(site: Site, method: bytes) -> None:
    async with connected(site) as client:
        await client.send(method + b" /early HTTP/1.0\r\n\r\n")
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert b"content-length: 5" in head.lower()
        assert body == (b"early" if method == b"GET" else b"")


async def test_a_stream_whose_request_never_ends_is_cut(hurried_site: Site) -> None:
    async with connected(hurried_site) as client:
        await client.send(post(CHUNKED, path="/stream"))
        assert await took(client.flood(chunk(b"a" * 65536))) < ARRIVAL + SLACK
        await until(hurried_site.gone.is_set)


# Bodies that the application does not read


class OfFewWords(GuardedHttp):
    """A long time for requests, a short one for unread bodies."""

    LINGER_SECONDS = LINGER


async def test_an_endless_unread_body_is_cut_off() -> None:
    async with running(OfFewWords) as site, connected(site) as client:
        await client.send(post(CHUNKED, path="/early"))
        assert (await client.answer()) == (200, b"early")
        assert await took(client.flood(chunk(b"a" * 65536))) < LINGER + SLACK


async def test_a_connection_outlives_an_unread_body(site: Site) -> None:
    async with connected(site) as client:
        for _ in range(2):
            await client.send(post(b"Content-Length: 300000", path="/early"))
            assert (await client.answer()) == (200, b"early")
            await client.send(b"a" * 300_000)
        await client.send(get())
        assert (await client.answer())[0] == 200


async def test_after_an_unread_body_a_connection_is_kept_as_usual(hurried_site: Site) -> None:
    async with connected(hurried_site) as client:
        await client.send(post(b"Content-Length: 3", path="/early"))
        await client.answer()
        await client.send(b"abc")
        assert KEEP_ALIVE / 2 < await took(client.rest()) < KEEP_ALIVE + SLACK


async def test_expect_continue(site: Site) -> None:
    async with connected(site) as client:
        await client.send(post(b"Content-Length: 3", b"Expect: 100-continue"))
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"abc")
        status, body = await client.answer()
        assert (status, json.loads(body)["body"]) == (200, 3)
        # Not asked for by an application that does not read.
        await client.send(post(b"Content-Length: 3", b"Expect: 100-continue", path="/early"))
        assert (await client.answer()) == (200, b"early")


# Pipelining


@pytest.mark.parametrize("size", [0, 400])
async def test_fifty_pipelined_requests_are_answered_in_order(site: Site, size: int) -> None:
    async with connected(site) as client:
        await client.send(b"".join(get(f"/{number}", b"X: " + b"a" * size) for number in range(50)))
        for number in range(50):
            status, body = await client.answer()
            assert (status, json.loads(body)["path"]) == (200, f"/{number}")
    assert site.paths == [f"/{number}" for number in range(50)]


async def test_pipelined_bodies(site: Site) -> None:
    async with connected(site) as client:
        each = post(b"Content-Length: 9000", body=b"a" * 9000)
        await client.send(each * 3)
        for _ in range(3):
            status, body = await client.answer()
            assert (status, json.loads(body)["body"]) == (200, 9000)


async def test_what_waits_behind_an_answer_is_bounded(site: Site) -> None:
    async with connected(site) as client:
        await client.send(get("/wait"))
        small = get("/")
        await client.send(small * (MAX_WAITING // len(small)))
        (connection,) = site.state.connections
        assert isinstance(connection, GuardedHttp)
        await client.send(small * 200)
        await client.refused(400)
    assert site.gone.is_set()
    assert site.paths == ["/wait"]


async def test_a_flood_of_requests_in_one_packet_is_not_parsed_at_once(site: Site) -> None:
    async with connected(site) as client:
        await client.send(get("/wait") + get("/") * 500)
        await until(lambda: site.paths)
        (connection,) = site.state.connections
        assert isinstance(connection, GuardedHttp)
        assert len(connection.pipeline) <= PIECE // len(get("/"))
        site.go_on.set()
        for _ in range(501):
            assert (await client.answer())[0] == 200


BEHIND = {
    "nothing": (b"", b""),
    "one": (get("/"), b""),
    "half": (post(b"Content-Length: 100", body=b"a"), b""),
    "many": (get("/") * 200, b""),
    "later": (b"", get("/")),
    "many-later": (get("/"), get("/") * 200),
}


@pytest.mark.parametrize(("at_once", "later"), BEHIND.values(), ids=BEHIND.keys())
@pytest.mark.parametrize("path", ["/wait", "/stream"])
async def test_a_hang_up_is_seen_whatever_waits_behind(site: Site, path: str, at_once: bytes, later: bytes) -> None:
    async with connected(site) as client:
        await client.send(get(path) + at_once)
        await until(lambda: site.paths)
        await client.send(later)
        assert not site.disconnected()
    await until(site.gone.is_set)
    assert site.disconnected()
    # An answer to a client that is gone is no error, and nothing behind it is begun.
    site.go_on.set()
    await until(lambda: not site.state.tasks)
    assert site.paths == [path]
    assert not site.failed


@pytest.mark.parametrize(
    ("head", "packet"),
    [
        (post(b"Content-Length: 100000", path="/deaf"), b"a" * 100_000),
        (b"", get("/deaf") + post(b"Content-Length: 100", body=b"a")),
    ],
    ids=["large-body", "half-a-request"],
)
async def test_a_hang_up_is_seen_while_the_body_is_not_read(site: Site, head: bytes, packet: bytes) -> None:
    async with connected(site) as client:
        await client.send(head)
        await until(lambda: site.paths if head else site.state.connections)
        (connection,) = site.state.connections
        connection.data_received(packet)  # as one, which a socket may not give
    await until(lambda: not site.state.connections)


async def test_garbage_behind_a_request_ends_both(site: Site) -> None:
    async with connected(site) as client:
        await client.send(get("/wait") + b"GARBAGE\r\n\r\n")
        await client.refused(400)
    assert site.gone.is_set()


async def test_garbage_behind_half_an_answer_says_nothing_more(site: Site) -> None:
    async with connected(site) as client:
        await client.send(get("/stream"))
        await client.reader.readuntil(b"begun")
        await client.send(b"GARBAGE" * 10_000)
        assert b"HTTP/1.1" not in await client.rest()
    assert site.gone.is_set()


# The end


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    """Turn the garbage collector off."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "request_",
    [get(), b"GET /early HTTP/1.0\r\n\r\n", get() * 3, get("/stream"), get("/wait")],
    ids=["plain", "HTTP/1.0", "pipelined", "abandoned stream", "abandoned"],
)
@pytest.mark.usefixtures("no_garbage_collector")
async def test_a_request_leaves_memory_with_its_connection(site: Site, request_: bytes) -> None:
    async with connected(site) as client:
        await client.send(request_)
        await until(lambda: len(site.paths) == request_.count(b"HTTP/1"))
    site.go_on.set()
    await until(lambda: not site.state.connections and not site.state.tasks)
    await until(lambda: not site.in_memory)


async def test_the_last_answer_is_finished_at_the_end(site: Site) -> None:
    async with connected(site) as client:
        await client.send(get("/wait"))
        await until(lambda: site.paths)
        (connection,) = site.state.connections
        connection.shutdown()
        site.go_on.set()
        assert b"connection: close" in await client.reader.readuntil(b"\r\n\r\n")
        assert await client.rest() == b"waited"
    assert site.paths == ["/wait"]
