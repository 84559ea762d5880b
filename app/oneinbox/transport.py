"""A connection pool to one upstream, as an httpx transport that marks each request when it is sent."""

import asyncio
import base64
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
from aiohappyeyeballs import AddrInfoType, start_connection

from app.config.surroundings import proxy_for, tls_context
from app.oneinbox.http1 import Connection

IDLE_SECONDS = 15
"""An unused connection is closed after this long: before servers close theirs."""
ADDRESS_SECONDS = 10
"""A resolved name is not resolved again for this long."""
NEXT_ADDRESS_SECONDS = 0.25
"""After this long without a connection the next address of a name is tried as well (RFC 8305, section 5)."""

NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)


def surely_not_sent(request: httpx.Request, error: Exception) -> bool:
    """Return whether a request that failed with `error` certainly never left this machine."""
    if "sent" in request.extensions:
        return not request.extensions["sent"]
    return isinstance(error, NEVER_SENT)


def open_transport(base_url: str, *, pool_size: int) -> "PooledTransport":
    """Return a transport to the host of a URL. Call it inside the event loop.

    `pool_size`: most connections. Raises SettingsError if the surroundings name a proxy that cannot be used.
    """
    return PooledTransport(httpx.URL(base_url), pool_size=pool_size, proxy=proxy_for(base_url))


class PooledTransport(httpx.AsyncBaseTransport):
    """Keep connections to one host open between requests, and send requests to no other.

    `url`: of the host. `pool_size`: most connections; further requests wait. `proxy`: an HTTP proxy to tunnel through
    (RFC 9110, section 9.3.6). Of a request's timeouts only `connect` counts; the caller bounds the whole. It follows no
    redirect, keeps no cookie and decodes nothing. Just before a request is written, `before_sending` of its extensions
    is called, if there is one, and the request is marked as `sent` in them. Only a GET is written twice, if its reused
    connection had ended.
    """

    def __init__(self, url: httpx.URL, *, pool_size: int, proxy: httpx.Proxy | None = None) -> None:
        self._origin = (url.raw_scheme, url.raw_host, url.port)
        self._host = url.raw_host.decode()
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = tls_context() if url.scheme == "https" else None
        self._proxy = proxy
        self._room = asyncio.Semaphore(pool_size)
        self._idle: list[Connection] = []
        self._loop = asyncio.get_running_loop()
        self._closing: asyncio.TimerHandle | None = None
        self._addresses: asyncio.Task[list[AddrInfoType]] | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request. Raises only httpx.TransportError, and what `before_sending` raises."""
        url = request.url
        request.extensions["sent"] = False
        if (url.raw_scheme, url.raw_host, url.port) != self._origin:
            raise httpx.UnsupportedProtocol("not the host of this transport")
        content = await request.aread()
        message = _head(request, len(content)) + content
        await self._room.acquire()
        try:
            kept = self._reuse()
            try:
                return await self._exchange(request, message, kept)
            except httpx.ReadError:
                if kept is None or kept.has_answered or request.method != "GET":
                    raise
                return await self._exchange(request, message, None)
        except BaseException:
            self._room.release()
            raise

    async def aclose(self) -> None:
        """Close all idle connections."""
        if self._closing is not None:
            self._closing.cancel()
        if self._addresses is not None:
            self._addresses.cancel()
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    def take_back(self, connection: Connection) -> None:
        """Keep a connection for the next request, or close it if it cannot take one."""
        self._room.release()
        self._keep(connection)

    def _keep(self, connection: Connection) -> None:
        if not connection.is_reusable:
            connection.abort()
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._closing is None:
            self._closing = self._loop.call_later(IDLE_SECONDS, self._close_idle)

    async def _exchange(self, request: httpx.Request, message: bytes, kept: Connection | None) -> httpx.Response:
        connection = kept or await self._connect(request.extensions.get("timeout", {}).get("connect"))
        try:
            if (before_sending := request.extensions.get("before_sending")) is not None:
                before_sending()
        except BaseException:
            self._keep(connection)
            raise
        try:
            request.extensions["sent"] = True
            connection.send(message)
            status, fields = await connection.head()
        except BaseException:
            connection.abort()
            raise
        return httpx.Response(status, headers=fields, stream=_Body(self, connection))

    def _reuse(self) -> Connection | None:
        """Return the last used connection that can still take a request."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
            connection.abort()
        return None

    def _close_idle(self) -> None:
        """Close connections idle for IDLE_SECONDS; the list begins with the oldest."""
        long_ago = self._loop.time() - IDLE_SECONDS
        stale = 0
        while stale < len(self._idle) and self._idle[stale].idle_since <= long_ago:
            self._idle[stale].abort()
            stale += 1
        del self._idle[:stale]
        self._closing = None
        if self._idle:
            self._closing = self._loop.call_later(self._idle[0].idle_since - long_ago, self._close_idle)

    async def _connect(self, seconds: float | None) -> Connection:
        try:
            async with asyncio.timeout(seconds):
                if self._proxy is None:
                    return await self._dial(self._host, self._port, self._tls)
                return await self._tunnel(self._proxy)
        except TimeoutError:
            raise httpx.ConnectTimeout("no connection in time") from None
        except (OSError, UnicodeError) as error:  # unknown or invalid name, refusal, wrong certificate
            raise httpx.ConnectError(type(error).__name__) from error

    async def _dial(self, host: str, port: int, tls: ssl.SSLContext | None) -> Connection:
        addresses = await self._resolve(host, port)
        name = host if tls else None
        if len(addresses) == 1:  # then the event loop connects at a fraction of the cost
            ((_, _, _, _, address),) = addresses
            _, connection = await self._loop.create_connection(
                Connection, str(address[0]), port, ssl=tls, server_hostname=name
            )
            return connection
        sock = await start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS, loop=self._loop)
        _, connection = await self._loop.create_connection(Connection, sock=sock, ssl=tls, server_hostname=name)
        return connection

    async def _tunnel(self, proxy: httpx.Proxy) -> Connection:
        """Connect through the proxy, which sees only the host's name."""
        # An https:// proxy has its own TLS, around that of the upstream.
        own = self._tls if proxy.url.scheme == "https" else None
        plain = await self._dial(proxy.url.raw_host.decode(), proxy.url.port or (443 if own else 80), own)
        try:
            host = f"[{self._host}]" if ":" in self._host else self._host
            target = f"{host}:{self._port}"
            lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
            if proxy.raw_auth is not None:
                lines.append("Proxy-Authorization: Basic " + base64.b64encode(b":".join(proxy.raw_auth)).decode())
            plain.send("\r\n".join([*lines, "", ""]).encode())
            status, _ = await plain.head()
            if not 200 <= status < 300:
                raise httpx.ProxyError(f"the proxy answered {status}")
            assert self._tls is not None  # noqa: S101 - only https goes through a proxy
            connection = Connection()
            below = await self._loop.start_tls(plain.transport, connection, self._tls, server_hostname=self._host)
            assert below is not None  # noqa: S101 - it raises, or there is one
            connection.connection_made(below)
        except httpx.ReadError as error:
            plain.abort()
            raise httpx.ProxyError("the proxy closed the connection") from error
        except BaseException:
            plain.abort()
            raise
        return connection

    async def _resolve(self, host: str, port: int) -> list[AddrInfoType]:
        """Return the addresses of a name; concurrent callers share one look-up."""
        if self._addresses is None:
            self._addresses = self._loop.create_task(self._look_up(host, port), name="addresses")
            self._addresses.add_done_callback(self._forget_addresses)
        return await asyncio.shield(self._addresses)

    async def _look_up(self, host: str, port: int) -> list[AddrInfoType]:
        found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return list(found)

    def _forget_addresses(self, done: asyncio.Task[list[AddrInfoType]]) -> None:
        def forget() -> None:
            self._addresses = None

        if done.cancelled() or done.exception() is not None:
            forget()
        else:
            self._loop.call_later(ADDRESS_SECONDS, forget)


async def read_body(response: httpx.Response, limit: int) -> bytes:
    """Return the whole body; empty, which is not JSON, if it is encoded or larger than `limit`."""
    if response.headers.get("content-encoding", "identity") != "identity":
        return b""
    body = bytearray()
    # httpx's readers would keep a second copy, and decode.
    stream = response.stream
    assert isinstance(stream, httpx.AsyncByteStream)  # noqa: S101 - of an async transport
    async for chunk in stream:
        body += chunk
        if len(body) > limit:
            return b""
    return bytes(body)


@dataclass(eq=False)
class _Body(httpx.AsyncByteStream):
    """An answer's body as a stream; closing it gives the connection back."""

    pool: PooledTransport
    connection: Connection | None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self.connection is not None and (piece := await self.connection.read()):
            yield piece

    async def aclose(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            self.pool.take_back(connection)


def _head(request: httpx.Request, length: int) -> bytes:
    """Return request line and header fields (RFC 9112, section 3). Raises httpx.LocalProtocolError for a line break."""
    lines = [request.method.encode() + b" " + request.url.raw_path + b" HTTP/1.1"]
    lines += [name + b": " + value for name, value in request.headers.raw]
    if request.method != "GET" and "content-length" not in request.headers:
        lines.append(b"content-length: %d" % length)
    head = b"\r\n".join([*lines, b"", b""])
    if head.count(b"\n") > len(lines) + 1:
        raise httpx.LocalProtocolError("a line break in a header field")
    return head
