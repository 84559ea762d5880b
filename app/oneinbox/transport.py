"""Send requests to one host: OneInbox's as bytes made ready beforehand, others' as an httpx transport."""

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import httpx

from app.config.surroundings import proxy_for
from app.oneinbox.dialer import Dialer
from app.oneinbox.http1 import Connection, Fields
from app.oneinbox.pool import Pool
from app.telemetry.metrics import Metrics

NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)


@dataclass(slots=True, eq=False)
class Outgoing:
    """A request. httpx's own costs more to make than everything that the broker decides about a session.

    `target`: path and query. `fields`: header lines as `header_lines` makes them. `content`: None for a request without
    a body. `connect_timeout`: seconds. `before_sending`: called right before it is written; if it raises, it is not.
    `sent`: whether it may have left this machine.
    """

    method: str
    target: str
    fields: bytes
    content: bytes | None
    connect_timeout: float | None
    before_sending: Callable[[], None] | None = None
    sent: bool = False

    def encode(self) -> bytes:
        """Return the request as it is written (RFC 9112, section 3)."""
        content = self.content or b""
        length = b"" if self.method == "GET" else b"content-length: %d\r\n" % len(content)
        return b"%b %b HTTP/1.1\r\n%b%b\r\n%b" % (
            self.method.encode(), self.target.encode(), self.fields, length, content
        )  # fmt: skip


class Answer(NamedTuple):
    """An answer. `body`: empty, which is not JSON, if it is encoded or larger than asked for."""

    status: int
    fields: Fields
    body: bytes

    def field(self, name: bytes) -> str | None:
        """Return a header field's value. `name`: in lower case."""
        return _field(self.fields, name)


class Upstream(Protocol):
    """Sends OneInbox's requests."""

    async def exchange(self, request: Outgoing, limit: int) -> Answer:
        """Send a request; return the answer, with a body of at most `limit` bytes. Raises only httpx.TransportError."""

    async def aclose(self) -> None:
        """Close all idle connections."""


def header_lines(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return header fields as they are written. Raises httpx.LocalProtocolError for a line break in one."""
    lines = [name + b": " + value + b"\r\n" for name, value in fields]
    if any(line.count(b"\r") + line.count(b"\n") > 2 for line in lines):
        raise httpx.LocalProtocolError("a line break in a header field")
    return b"".join(lines)


def surely_not_sent(request: httpx.Request, error: BaseException) -> bool:
    """Return whether a request that failed with `error` certainly never left this machine."""
    if "sent" in request.extensions:
        return not request.extensions["sent"]
    return isinstance(error, NEVER_SENT)


def open_transport(
    base_url: str, *, pool_size: int, warm: int = 0, metrics: Metrics | None = None
) -> "PooledTransport":
    """Return a transport to the host of a URL. Call it inside the event loop.

    `pool_size`, `warm`: most connections, and those kept ready. `metrics`: counts handshakes. Raises SettingsError if
    the surroundings name a proxy that cannot be used.
    """
    url = httpx.URL(base_url)
    pool = Pool(Dialer(url, proxy_for(base_url)), size=pool_size, warm=warm, metrics=metrics)
    return PooledTransport(url, pool, metrics)


class PooledTransport(httpx.AsyncBaseTransport):
    """Send requests to the host of `url` through its pool, and to no other.

    Of a request's timeouts only `connect` counts; the caller bounds the whole. It follows no redirect, keeps no cookie
    and decodes nothing. Just before a request is written, `before_sending` of its extensions is called, if there is
    one, and the request is marked as `sent` in them. Only a GET is written twice, if its reused connection had ended.
    `metrics`: counts POSTs that waited for a handshake.
    """

    def __init__(self, url: httpx.URL, pool: Pool, metrics: Metrics | None = None) -> None:
        self._origin = (url.raw_scheme, url.raw_host, url.port)
        self._pool = pool
        self._metrics = metrics

    async def exchange(self, request: Outgoing, limit: int) -> Answer:
        """Send a request; return the answer. Raises httpx.TransportError, and what `before_sending` raises."""
        connection, status, fields = await self._send(request)
        try:
            body = await _read(connection, limit)
        finally:
            self._pool.leave(connection)
        return Answer(status, fields, b"" if _is_encoded(fields) else body)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request of httpx. `before_sending` and `sent` are in its extensions."""
        url, extensions = request.url, request.extensions
        extensions["sent"] = False
        if (url.raw_scheme, url.raw_host, url.port) != self._origin:
            raise httpx.UnsupportedProtocol("not the host of this transport")
        outgoing = Outgoing(
            request.method,
            url.raw_path.decode(),
            header_lines(field for field in request.headers.raw if field[0].lower() != b"content-length"),
            await request.aread(),
            extensions.get("timeout", {}).get("connect"),
            extensions.get("before_sending"),
        )
        try:
            connection, status, fields = await self._send(outgoing)
        finally:
            extensions["sent"] = outgoing.sent
        return httpx.Response(status, headers=fields, stream=_Body(self._pool, connection))

    async def aclose(self) -> None:
        """Close all idle connections."""
        await self._pool.aclose()

    async def _send(self, request: Outgoing) -> tuple[Connection, int, Fields]:
        """Return the connection, whose body is to be read, and the answer's status and header fields."""
        message = request.encode()
        await self._pool.enter()
        try:
            kept = self._pool.reuse()
            if kept is None and request.method == "POST" and self._metrics is not None:
                self._metrics.count_cold_post()
            try:
                return await self._send_on(kept, request, message)
            except httpx.ReadError:
                if kept is None or kept.has_answered or request.method != "GET":
                    raise
                return await self._send_on(None, request, message)
        except BaseException:
            self._pool.leave()
            raise

    async def _send_on(
        self, kept: Connection | None, request: Outgoing, message: bytes
    ) -> tuple[Connection, int, Fields]:
        connection = kept or await self._pool.connect(request.connect_timeout)
        try:
            if request.before_sending is not None:
                request.before_sending()
        except BaseException:
            self._pool.put_back(connection)
            raise
        try:
            request.sent = True
            connection.send(message)
            return connection, *await connection.head()
        except BaseException:
            connection.abort()
            raise


@dataclass(frozen=True, repr=False, eq=False)
class HttpxUpstream:
    """Sends OneInbox's requests through any transport of httpx. `origin`: scheme, host and port of the URL."""

    origin: str
    transport: httpx.AsyncBaseTransport

    async def exchange(self, request: Outgoing, limit: int) -> Answer:
        """Send a request; return the answer. Raises httpx.TransportError, and what `before_sending` raises."""
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), request.connect_timeout)
        extensions = {"timeout": timeouts, "before_sending": request.before_sending}
        fields = [tuple(line.split(b": ", 1)) for line in request.fields.splitlines()]
        made = httpx.Request(
            request.method,
            self.origin + request.target,
            headers=fields,  # type: ignore[arg-type]  # tuples of two
            content=request.content,
            extensions=extensions,
        )
        try:
            response = await self.transport.handle_async_request(made)
            request.sent = True
            try:
                return Answer(response.status_code, response.headers.raw, await read_body(response, limit))
            finally:
                await response.aclose()
        except BaseException as error:
            request.sent = not surely_not_sent(made, error)
            raise

    async def aclose(self) -> None:
        """Close the transport."""
        await self.transport.aclose()


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

    pool: Pool
    connection: Connection | None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self.connection is not None and (piece := await self.connection.read()):
            yield piece

    async def aclose(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            self.pool.leave(connection)


async def _read(connection: Connection, limit: int) -> bytes:
    """Return the rest of an answer; empty if it is larger than `limit`."""
    piece = await connection.read()
    if connection.is_read:
        return piece if len(piece) <= limit else b""
    body = bytearray(piece)
    while piece and len(body) <= limit:
        piece = await connection.read()
        body += piece
    return bytes(body) if len(body) <= limit else b""


def _is_encoded(fields: Fields) -> bool:
    return (_field(fields, b"content-encoding") or "identity") != "identity"


def _field(fields: Fields, name: bytes) -> str | None:
    values = [value.decode("latin-1") for each, value in fields if len(each) == len(name) and each.lower() == name]
    return ", ".join(values) if values else None
