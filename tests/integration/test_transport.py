"""Connections to OneInbox over real sockets: kept, bounded, through proxies and TLS, and exact about what was sent."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from app.api.app import create_app
from app.config.settings import SettingsError
from app.oneinbox import OneInbox
from app.oneinbox import pool as pools
from app.oneinbox.transport import PooledTransport, open_transport, surely_not_sent
from tests.support.certificates import Authority
from tests.support.harness import settings

pytestmark = pytest.mark.every_loop

PATIENCE = 10
HELD: list[socket.socket] = []
"""Connections that a server holds and never answers."""
Answer = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


class Upstream:
    """A server that reads whole requests and answers as a test has it. `requests`, `connections`: what came."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.requests: list[bytes] = []
        self.connections = 0
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"\r\ncontent-length: ([0-9]+)", head)
                request = head + await reader.readexactly(int(length[1]) if length else 0)
                self.requests.append(request)
                if not await self._answer(request, reader, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


async def fine(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    writer.write(OK)
    return True


def says(*pieces: bytes, stays: bool = False) -> Answer:
    """Answer with these bytes, then close."""

    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return stays

    return answer


@asynccontextmanager
async def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Upstream, str]]:
    upstream = Upstream(answer)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0, ssl=tls)
    host, port = server.sockets[0].getsockname()[:2]
    try:
        yield upstream, f"http{'s' if tls else ''}://{host}:{port}"
    finally:
        server.close()
        await until(lambda: upstream.open == 0)
        await server.wait_closed()


@asynccontextmanager
async def pool(url: str, *, size: int = 10, warm: int = 0) -> AsyncIterator[PooledTransport]:
    transport = open_transport(url, pool_size=size, warm=warm)
    try:
        yield transport
    finally:
        await transport.aclose()
        await asyncio.sleep(0)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.005)


def request(url: str, method: str = "GET", content: bytes = b"", **headers: str) -> httpx.Request:
    host = httpx.URL(url).netloc.decode()
    extensions = {"timeout": {"connect": 3.0}}
    return httpx.Request(
        method, url + "/x", headers={"host": host, **headers}, stream=httpx.ByteStream(content), extensions=extensions
    )


async def ask(transport: PooledTransport, asked: httpx.Request) -> tuple[int, bytes]:
    async with asyncio.timeout(PATIENCE):
        response = await transport.handle_async_request(asked)
        try:
            return response.status_code, b"".join([piece async for piece in response.stream])  # type: ignore[union-attr]
        finally:
            await response.aclose()


async def test_one_connection_carries_one_request_after_the_other() -> None:
    async with serving(fine) as (upstream, url), pool(url) as transport:
        for _ in range(5):
            assert await ask(transport, request(url, "POST", b"{}")) == (200, b"{}")

        assert upstream.connections == 1
        assert upstream.requests[0].startswith(b"POST /x HTTP/1.1\r\nhost: 127.0.0.1")
        assert upstream.requests[0].endswith(b"content-length: 2\r\n\r\n{}")


async def test_a_post_without_a_body_says_so() -> None:
    async with serving(fine) as (upstream, url), pool(url) as transport:
        await ask(transport, request(url, "POST"))

        assert b"content-length: 0\r\n" in upstream.requests[0]


async def test_there_are_no_more_connections_than_the_pool_has_room_for() -> None:
    async with serving(fine) as (upstream, url), pool(url, size=3) as transport:
        answers = await asyncio.gather(*(ask(transport, request(url)) for _ in range(60)))

        assert {status for status, _ in answers} == {200}
        assert upstream.connections == 3


@pytest.mark.parametrize("connected", [False, True], ids=["on-a-new-connection", "on-a-kept-one"])
async def test_what_is_not_wanted_any_more_is_not_sent_and_costs_no_connection(connected: bool) -> None:
    class NotWantedError(Exception):
        pass

    def refuse() -> None:
        raise NotWantedError

    async with serving(fine) as (upstream, url), pool(url, size=1) as transport:
        if connected:
            await ask(transport, request(url))
        unwanted = request(url, "POST", b"{}")
        unwanted.extensions["before_sending"] = refuse
        for _ in range(3):
            with pytest.raises(NotWantedError):
                await ask(transport, unwanted)
            assert surely_not_sent(unwanted, NotWantedError())

        assert await ask(transport, request(url)) == (200, b"{}")
        assert [each.split()[0] for each in upstream.requests] == [b"GET"] * (1 + connected)
        assert upstream.connections == 1


async def test_callers_who_were_cancelled_leave_their_places() -> None:
    silent = asyncio.Event()

    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await silent.wait()
        writer.write(OK)
        return True

    async with serving(answer) as (_, url), pool(url, size=2) as transport:
        asked = [asyncio.create_task(ask(transport, request(url))) for _ in range(20)]
        await asyncio.sleep(0.05)  # some wait for an answer, the rest for a place; any mix will do
        for each in asked:
            each.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        silent.set()

        assert await ask(transport, request(url)) == (200, b"{}")


NO_STARTS: dict[str, Callable[[OneInbox], Awaitable[object]]] = {
    "read": lambda client: client.get_call("call_1"),
    "list": lambda client: client.list_calls(),
    "usage": lambda client: client.usage(),
    "webhooks": lambda client: client.list_webhooks(),
    "stop": lambda client: client.stop_call("call_1"),
    "register": lambda client: client.register_webhook(name="broker", url="https://broker.example", events=["x"]),
    "remove": lambda client: client.remove_webhook("wh_1"),
}


@pytest.mark.parametrize("kind", NO_STARTS)
async def test_requests_that_hang_never_take_the_place_of_a_start(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OneInbox answers starts, and nothing else."""
    monkeypatch.setattr("app.oneinbox.client.READS_AT_ONCE", 2)
    monkeypatch.setattr("app.oneinbox.client.OTHERS_AT_ONCE", 2)
    call = json.dumps({"id": "call_2", "server_url": "wss://voice.example", "participant_token": "t"}).encode()

    async def answer(request: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if request.startswith(b"POST /v1/calls/web "):
            writer.write(b"HTTP/1.1 201 Created\r\ncontent-length: %d\r\n\r\n" % len(call) + call)
        return True

    async with serving(answer) as (_, url), pool(url, size=3) as transport:
        client = OneInbox(url, SecretStr("key"), transport, timeout=PATIENCE, connect_timeout=PATIENCE)
        hanging = [asyncio.ensure_future(NO_STARTS[kind](client)) for _ in range(20)]
        await asyncio.sleep(0)  # each has asked for its place
        try:
            start = client.start_web_call(agent_id="agt", variables={}, overrides={}, metadata={})
            assert (await asyncio.wait_for(start, PATIENCE / 2)).id == "call_2"
        finally:
            for each in hanging:
                each.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)


async def test_what_is_idle_for_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "IDLE_SECONDS", 0.05)
    async with serving(fine) as (upstream, url), pool(url) as transport:
        await ask(transport, request(url))
        await until(lambda: upstream.open == 0)

        assert await ask(transport, request(url)) == (200, b"{}")
        assert upstream.connections == 2


BODIES = {
    "length": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 1),
    "chunked": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", 1),
    "interim first": (b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", 1),
    "asked to close": (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello", 2),
    "old": (b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello", 2),
}


@pytest.mark.parametrize("name", BODIES)
async def test_bodies(name: str) -> None:
    said, connections = BODIES[name]
    async with serving(says(said, stays=True)) as (upstream, url), pool(url) as transport:
        assert await ask(transport, request(url)) == (200, b"hello")
        assert await ask(transport, request(url)) == (200, b"hello")

        assert upstream.connections == connections


async def test_a_body_may_end_with_its_connection() -> None:
    async with serving(says(b"HTTP/1.1 200 OK\r\n\r\n", b"hello")) as (_, url), pool(url) as transport:
        assert await ask(transport, request(url)) == (200, b"hello")


async def test_a_large_body_waits_to_be_read() -> None:
    size = 8 * 1024 * 1024
    written = 0

    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _piece in range(size // 65536):
            writer.write(b"x" * 65536)
            await writer.drain()
            written += 65536
        return True

    async with serving(answer) as (_, url), pool(url) as transport:
        response = await transport.handle_async_request(request(url))
        before = -1
        while written != before:  # until the server is stuck
            before = written
            await asyncio.sleep(0.1)  # no sign tells that a writer is stuck, but that nothing moves
        assert written < size

        body = b"".join([piece async for piece in response.stream])  # type: ignore[union-attr]
        await response.aclose()

        assert len(body) == size


NO_ANSWERS = {
    "nonsense": (b"hello\r\n\r\n", httpx.RemoteProtocolError),
    "cut head": (b"HTTP/1.1 200 OK\r\nconte", httpx.ReadError),
    "cut body": (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhe", httpx.ReadError),
    "cut chunk": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhe", httpx.ReadError),
    "two lengths": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        httpx.RemoteProtocolError,
    ),
    "another protocol": (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", httpx.TransportError),
    "many fields": (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 300 + b"\r\n", httpx.RemoteProtocolError),
    "a long field": (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, httpx.RemoteProtocolError),
    "long trailers": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 20_000,
        httpx.RemoteProtocolError,
    ),
    "long chunk extensions": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1;%s\r\nx\r\n" % (b"e" * 100_000),
        httpx.RemoteProtocolError,
    ),
    "many interim answers": (b"HTTP/1.1 102 Wait\r\n\r\n" * 1000, httpx.RemoteProtocolError),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
async def test_what_is_no_answer_or_beyond_all_bounds(name: str) -> None:
    said, error = NO_ANSWERS[name]
    async with serving(says(said)) as (upstream, url), pool(url) as transport:
        asked = request(url, "POST", b"{}")
        with pytest.raises(error):
            await ask(transport, asked)

        assert not surely_not_sent(asked, error(""))
        assert len(upstream.requests) == 1


async def test_an_answer_too_many_meets_nobody() -> None:
    async with serving(says(OK + OK, stays=True)) as (upstream, url), pool(url) as transport:
        with contextlib.suppress(httpx.RemoteProtocolError):  # it depends on what arrives together
            await ask(transport, request(url))
        with contextlib.suppress(httpx.RemoteProtocolError):
            await ask(transport, request(url))

        assert upstream.connections == 2


async def close_instead(_: bytes, __: asyncio.StreamReader, ___: asyncio.StreamWriter) -> bool:
    return False


def once_then_close() -> Answer:
    """The first request of a connection is answered, the second one meets its end."""
    served: set[asyncio.StreamWriter] = set()

    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if writer in served:
            return False
        served.add(writer)
        writer.write(OK)
        return True

    return answer


async def test_a_read_that_meets_the_end_of_a_kept_connection_is_sent_again() -> None:
    async with serving(once_then_close()) as (upstream, url), pool(url) as transport:
        await ask(transport, request(url))

        assert await ask(transport, request(url)) == (200, b"{}")
        assert (upstream.connections, len(upstream.requests)) == (2, 3)


async def test_a_start_that_meets_the_end_of_a_kept_connection_is_never_sent_again() -> None:
    async with serving(once_then_close()) as (upstream, url), pool(url) as transport:
        await ask(transport, request(url, "POST"))

        asked = request(url, "POST")
        with pytest.raises(httpx.ReadError) as lost:
            await ask(transport, asked)

        assert not surely_not_sent(asked, lost.value)
        assert len(upstream.requests) == 2


async def test_a_connection_that_the_server_closed_while_it_was_idle_is_not_used() -> None:
    async with serving(says(OK)) as (upstream, url), pool(url) as transport:
        await ask(transport, request(url, "POST"))
        await until(lambda: upstream.open == 0)
        await asyncio.sleep(0.05)  # the end travels

        assert await ask(transport, request(url, "POST")) == (200, b"{}")
        assert len(upstream.requests) == 2


async def test_a_fresh_read_that_is_not_answered_is_not_repeated() -> None:
    async with serving(close_instead) as (upstream, url), pool(url) as transport:
        with pytest.raises(httpx.ReadError):
            await ask(transport, request(url))

        assert len(upstream.requests) == 1


async def test_nobody_listens() -> None:
    async with pool("http://127.0.0.1:9") as transport:
        asked = request("http://127.0.0.1:9", "POST")
        with pytest.raises(httpx.ConnectError) as refused:
            await ask(transport, asked)

        assert surely_not_sent(asked, refused.value)


async def test_a_name_that_nobody_has() -> None:
    url = "http://nobody.invalid"
    async with pool(url) as transport:
        asked = [request(url) for _ in range(3)]
        errors = await asyncio.gather(*(ask(transport, each) for each in asked), return_exceptions=True)

        assert {type(error) for error in errors} == {httpx.ConnectError}
        assert all(surely_not_sent(each, httpx.ConnectError("")) for each in asked)


async def test_the_key_goes_to_no_other_host() -> None:
    async with serving(fine) as (_, url), serving(fine) as (other, another), pool(url) as transport:
        with pytest.raises(httpx.UnsupportedProtocol):
            await ask(transport, request(another))

        assert other.requests == []


async def test_a_line_break_makes_no_header_of_its_own() -> None:
    async with serving(fine) as (upstream, url), pool(url) as transport:
        with pytest.raises(httpx.LocalProtocolError):
            await ask(transport, request(url, authorization="Bearer a\r\nx: y"))

        assert upstream.requests == []


# --- TLS and proxies


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def test_tls_with_an_authority_of_ones_own(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    async with serving(fine, authority.server) as (upstream, url), pool(url) as transport:
        for _ in range(3):
            assert await ask(transport, request(url, "POST", b"{}")) == (200, b"{}")

        assert upstream.connections == 1


async def test_a_certificate_that_nobody_vouches_for(authority: Authority) -> None:
    async with serving(fine, authority.server) as (upstream, url), pool(url) as transport:
        asked = request(url, "POST")
        with pytest.raises(httpx.ConnectError) as refused:
            await ask(transport, asked)

        assert surely_not_sent(asked, refused.value)
        assert upstream.requests == []


async def test_a_certificate_of_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Authority(tmp_path, "192.0.2.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(other.certificate))
    async with serving(fine, other.server) as (upstream, url), pool(url) as transport:
        with pytest.raises(httpx.ConnectError):
            await ask(transport, request(url))

        assert upstream.requests == []


async def tunnel(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """A proxy's CONNECT."""
    host, _, port = head.split(b" ")[1].decode().rpartition(":")
    far_reader, far_writer = await asyncio.open_connection(host, int(port))
    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await source.read(65536):
                sink.write(piece)
                await sink.drain()
        sink.close()

    await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))
    return False


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback, which is never proxied, counts as another machine."""
    monkeypatch.setattr("app.config.surroundings.is_loopback", lambda host: False)


@pytest.mark.usefixtures("far_away")
async def test_https_goes_through_a_proxy(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    async with serving(fine, authority.server) as (upstream, url), serving(tunnel) as (proxy, proxy_url):
        monkeypatch.setenv("HTTPS_PROXY", proxy_url.replace("://", "://ann:se%20cret@"))
        async with pool(url) as transport:
            for _ in range(2):
                assert await ask(transport, request(url, "POST", b"{}", authorization="Bearer key")) == (200, b"{}")
        target = url.removeprefix("https://").encode()

        assert proxy.requests == [
            b"CONNECT %b HTTP/1.1\r\nHost: %b\r\nProxy-Authorization: Basic YW5uOnNlIGNyZXQ=\r\n\r\n" % (target, target)
        ]
        assert len(upstream.requests) == 2
        assert all(b"roxy" not in each and b"Bearer key" in each for each in upstream.requests)


@pytest.mark.usefixtures("far_away")
async def test_no_proxy_where_none_is_wanted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with serving(fine, authority.server) as (_, url), pool(url) as transport:
        assert await ask(transport, request(url)) == (200, b"{}")


@pytest.mark.usefixtures("far_away")
async def test_a_proxy_that_is_spoken_to_over_tls(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    async with serving(fine, authority.server) as (upstream, url), serving(tunnel, authority.server) as (_, proxy_url):
        monkeypatch.setenv("HTTPS_PROXY", proxy_url)
        async with pool(url) as transport:
            for _ in range(2):
                assert await ask(transport, request(url, "POST", b"{}")) == (200, b"{}")

        assert len(upstream.requests) == 2


# --- warm connections; tests/unit/test_warm_connections.py shows how long they last


async def test_a_warm_connection_is_there_before_the_first_request(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    async with serving(fine, authority.server) as (upstream, url), pool(url, warm=1) as transport:
        await until(lambda: upstream.open == 1)

        assert await ask(transport, request(url, "POST", b"{}")) == (200, b"{}")
        assert upstream.connections == 1


@pytest.mark.usefixtures("far_away")
async def test_a_proxys_tunnel_is_kept_warm_too(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    async with serving(fine, authority.server) as (upstream, url), serving(tunnel) as (proxy, proxy_url):
        monkeypatch.setenv("HTTPS_PROXY", proxy_url)
        async with pool(url, warm=1) as transport:
            await until(lambda: upstream.open == 1)

            assert await ask(transport, request(url, "POST", b"{}")) == (200, b"{}")
            assert len(proxy.requests) == upstream.connections == 1


async def test_a_post_does_not_go_out_on_a_connection_whose_end_has_reached_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "LOOK_SECONDS", 0.0)
    writers: list[asyncio.StreamWriter] = []

    async def answer(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writers.append(writer)
        writer.write(OK)
        return True

    async with serving(answer) as (upstream, url), pool(url) as transport:
        await ask(transport, request(url, "POST", b"{}"))
        shut_down(writers[0])  # without a turn of the event loop, which is not told

        assert await ask(transport, request(url, "POST", b"{}")) == (200, b"{}")
        assert (upstream.connections, len(upstream.requests)) == (2, 2)


def shut_down(writer: asyncio.StreamWriter) -> None:
    """Send the end of a connection at once, which closing it would leave to the event loop."""
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as copy:
        copy.shutdown(socket.SHUT_WR)


@asynccontextmanager
async def accepting(treat: Callable[[socket.socket], None]) -> AsyncIterator[tuple[list[float], str]]:
    """Accept connections and treat each in some bad way. Yield the times of connects, and the URL."""
    loop = asyncio.get_running_loop()
    times: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)

        async def accept() -> None:
            while True:
                connection, _ = await loop.sock_accept(listener)
                times.append(loop.time())
                treat(connection)

        task = asyncio.create_task(accept())
        yield times, f"https://127.0.0.1:{listener.getsockname()[1]}"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def say_no_tls(connection: socket.socket) -> None:
    connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    connection.close()


@pytest.mark.parametrize(
    "treat", [socket.socket.close, reset, say_no_tls, HELD.append], ids=["closes", "resets", "no TLS", "is silent"]
)
async def test_a_server_that_never_speaks_tls_meets_no_storm(
    treat: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST_PAUSE", "CONNECT_SECONDS"):
        monkeypatch.setattr(pools, name, 0.05)
    async with accepting(treat) as (times, url), pool(url, warm=1):
        await until(lambda: len(times) >= 4)
    for connection in HELD:
        connection.close()
    HELD.clear()
    pauses = [b - a for a, b in itertools.pairwise(times)]

    early = 0.002  # the event loops' timers count whole milliseconds
    assert pauses[0] >= 0.05 - early
    assert pauses[1] >= 0.1 - early
    assert pauses[2] >= 0.2 - early


@pytest.mark.parametrize("named", ["socks5://127.0.0.1:9", "http://", "http://[::1", "ftp://127.0.0.1"])
def test_another_kind_of_proxy(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", named)
    with pytest.raises(SettingsError) as refused:
        create_app(settings())

    assert refused.value.lines == ["HTTPS_PROXY: is not the URL of a proxy; takes an http:// or https:// URL"]


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n", b""], ids=["refuses", "closes"]
)
async def test_a_proxy_that_does_not_want_to(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(says(said)) as (_, proxy_url):
        monkeypatch.setenv("HTTPS_PROXY", proxy_url)
        async with pool("https://api.oneinbox.ai") as transport:
            asked = request("https://api.oneinbox.ai", "POST")
            with pytest.raises(httpx.ProxyError) as refused:
                await ask(transport, asked)

            assert surely_not_sent(asked, refused.value)
