"""One HTTP/1.1 connection to an upstream, with every part of an answer bounded (RFC 9112).

httptools parses, as in the server. A client library's connection costs more per request than the rest of the broker
(redirects, cookies, tracing, decoding: none is needed here), and says less about what was sent.
"""

import asyncio
import re
import select
import socket
from collections.abc import Callable
from typing import cast

import httptools
import httpx

MAX_FIELDS = 200
MAX_OVERHEAD = 64 * 1024
"""Most bytes of an answer besides its body: head, interim answers, chunk sizes, trailers."""
OVERHEAD_PER_BYTE = 8
"""This many more per byte of the body: a chunk of one byte takes six."""
MAX_INTERIM = 20
"""Most interim answers (1xx)."""
KEEP_ALIVE = re.compile(rb"(?:^|,)\s*timeout\s*=\s*([0-9]{1,5})")
PROBES = (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", 3))
"""A peer that vanished silently is noticed within 32 s, and NATs keep the connection."""
BUFFERED = 64 * 1024
"""Bytes of unread body above which reading from the wire pauses."""

Fields = list[tuple[bytes, bytes]]


class Connection(asyncio.Protocol):
    """A connection for one exchange at a time: `send`, then `head`, then `read` until it is empty. It has no timeouts.

    Failures are httpx.ReadError (the connection ended) and httpx.RemoteProtocolError (not a valid answer).
    `address`: the peer's; empty if it has none. `idle_since`: the event loop's time. `has_carried`: true once a request
    was answered on it. `on_lost`: called once when the connection ends.
    """

    def __init__(self) -> None:
        self.address = ""
        self.idle_since = 0.0
        self.has_carried = False
        self.on_lost: Callable[[Connection], None] | None = None
        self.loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._failure: httpx.TransportError | None = None
        self._busy = False
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._fields: Fields = []
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._body = 0
        self._received = 0
        self._interim = 0
        self._answered = False
        self._complete = False
        self._paused = False

    @property
    def is_reusable(self) -> bool:
        """True when another request may be sent: open, and the last answer is complete and allows it."""
        return (
            self._transport is not None
            and self._failure is None
            and (self._complete or not self._busy)
            and not self._transport.is_closing()
        )

    @property
    def is_read(self) -> bool:
        """True when the answer is complete, and all of it was read."""
        return self._complete and not self._pieces

    @property
    def has_answered(self) -> bool:
        """True when any byte has come since the request was sent."""
        return self._received > 0

    @property
    def transport(self) -> asyncio.Transport:
        """The open transport below. Raises httpx.ReadError if it has ended."""
        if self._transport is None:
            raise self._failure or httpx.ReadError("connection closed")
        return self._transport

    def has_news(self) -> bool:
        """Return whether the kernel holds something for an idle connection: mostly, that the peer has closed it."""
        if not hasattr(select, "poll"):  # Windows
            return False
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def keep_alive_seconds(self) -> float | None:
        """Return how long the last answer says that an idle connection is kept (RFC 2068, section 19.7.1)."""
        for name, value in self._fields:
            if name.lower() == b"keep-alive" and (stated := KEEP_ALIVE.search(value.lower())):
                return float(stated[1])
        return None

    def send(self, request: bytes) -> None:
        """Write a whole request. Raises httpx.ReadError, with nothing sent, if the connection has ended."""
        transport = self.transport
        if self._busy:
            self._begin()
        self._busy = True
        transport.write(request)

    async def head(self) -> tuple[int, Fields]:
        """Return status and header fields of the answer, names as received."""
        while not self._answered:
            await self._wait()
        return self._status, self._fields

    async def read(self) -> bytes:
        """Return the next part of the body, waiting for some; empty at its end."""
        while not self._pieces:
            if self._complete:
                return b""
            await self._wait()
        piece = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._buffered = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return piece

    def abort(self) -> None:
        """Close at once, even during an exchange."""
        if self._transport is not None:
            self._transport.abort()

    # --- from the wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):  # not a Unix socket's
            self.address = str(peer[0])
            _send_probes(transport.get_extra_info("socket"))

    def connection_lost(self, exc: Exception | None) -> None:
        """End the answer. That is regular if only the connection's end delimits it (RFC 9112, 6.3)."""
        self._transport = None
        if self._answered and not self._complete and self._ends_with_connection():
            self._complete = True
            self._failure = httpx.ReadError("connection closed")  # for the next request
            self._wake()
        else:
            self._fail(httpx.ReadError("connection closed"))
        on_lost, self.on_lost = self.on_lost, None
        if on_lost is not None:
            on_lost(self)

    def data_received(self, data: bytes) -> None:
        if not self._busy or self._complete:
            self._fail(httpx.RemoteProtocolError("an answer without a request"))
            return
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(httpx.RemoteProtocolError("not an HTTP answer, or too large"))
            return
        if self._received - self._body > MAX_OVERHEAD + OVERHEAD_PER_BYTE * self._body:
            self._fail(httpx.RemoteProtocolError("too large an answer"))
            return
        if self._buffered > BUFFERED and not self._complete and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    # --- from the parser, which turns exceptions of these into HttpParserError

    def on_message_begin(self) -> None:
        """Refuse a second answer."""
        if self._complete:
            raise ValueError("more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header field; ignore a trailer."""
        if not self._answered:
            self._fields.append((name, value))
            if len(self._fields) > MAX_FIELDS:
                raise ValueError("too many fields")

    def on_headers_complete(self) -> None:
        """Mark the head as complete, unless it is an interim answer's."""
        self._status = self._parser.get_status_code()
        if self._status >= 200:
            self._answered = True
            return
        self._fields = []
        self._interim += 1
        if self._interim > MAX_INTERIM:
            raise ValueError("too many interim answers")

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._buffered += len(piece)
        self._body += len(piece)

    def on_message_complete(self) -> None:
        """Mark the answer as complete, unless it is an interim one."""
        if self._answered:
            self._complete = True
            if not self._parser.should_keep_alive():
                self._failure = httpx.ReadError("connection closed")  # for the next request

    def _ends_with_connection(self) -> bool:
        return not any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in self._fields)

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _fail(self, failure: httpx.TransportError) -> None:
        self._failure = self._failure or failure
        self.abort()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _send_probes(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
