"""A connection pool to one upstream, as an httpx transport that marks each request when it is sent."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx

from app.oneinbox.dialer import Dialer, proxy_for
from app.oneinbox.http1 import Connection
from app.oneinbox.pool import Pool
from app.telemetry.metrics import Metrics

NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)


def surely_not_sent(request: httpx.Request, error: Exception) -> bool:
    """Return whether a request that failed with `error` certainly never left this machine."""
    if "sent" in request.extensions:
        return not request.extensions["sent"]
    return isinstance(error, NEVER_SENT)


def open_transport(
    base_url: str, *, pool_size: int, warm: int = 0, metrics: Metrics | None = None
) -> "PooledTransport":
    """Return a transport to the host of a URL. Call it inside the event loop.

    `pool_size`, `warm`: most connections, and those kept ready. `metrics`: counts handshakes. For https it respects
    HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE.
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

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request. Raises only httpx.TransportError, and what `before_sending` raises."""
        url = request.url
        request.extensions["sent"] = False
        if (url.raw_scheme, url.raw_host, url.port) != self._origin:
            raise httpx.UnsupportedProtocol("not the host of this transport")
        content = await request.aread()
        message = _head(request, len(content)) + content
        await self._pool.enter()
        try:
            kept = self._pool.reuse()
            if kept is None and request.method == "POST" and self._metrics is not None:
                self._metrics.count_cold_post()
            try:
                return await self._exchange(request, message, kept)
            except httpx.ReadError:
                if kept is None or kept.has_answered or request.method != "GET":
                    raise
                return await self._exchange(request, message, None)
        except BaseException:
            self._pool.leave()
            raise

    async def aclose(self) -> None:
        """Close all idle connections."""
        await self._pool.aclose()

    async def _exchange(self, request: httpx.Request, message: bytes, kept: Connection | None) -> httpx.Response:
        connection = kept or await self._pool.connect(request.extensions.get("timeout", {}).get("connect"))
        try:
            if (before_sending := request.extensions.get("before_sending")) is not None:
                before_sending()
        except BaseException:
            self._pool.put_back(connection)
            raise
        try:
            request.extensions["sent"] = True
            connection.send(message)
            status, fields = await connection.head()
        except BaseException:
            connection.abort()
            raise
        return httpx.Response(status, headers=fields, stream=_Body(self._pool, connection))


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
