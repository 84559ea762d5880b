"""uvicorn's HTTP/1.1 connection, with limits that httptools does not have.

It limits oversized, excessive or slow connections before a full request arrives: they get a response without a body,
and the connection closes. httptools itself checks lengths, chunks and line ends, and refuses request smuggling.
"""

import asyncio
import re
import weakref
from collections import deque
from functools import partial
from typing import Any

import httptools
import structlog
from starlette.types import Message, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

log = structlog.get_logger(__name__)

MAX_FRAMING = 32 * 1024
"""Bytes of a request outside its body: head, chunk extensions, trailers; give or take a PIECE."""
MAX_FIELDS = 100
MAX_WAITING = MAX_FRAMING
"""Bytes of pipelined requests that may wait behind an unanswered one; give or take a PIECE."""
PIECE = 4096
"""Bytes that the parser gets at once; it cannot be stopped in between."""
CHUNK_ALLOWANCE = 16
"""Framing bytes that every chunk of a body may have."""

HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")
"""RFC 3986, section 3.2, without user information; http needs a host that is not empty (RFC 9110, section 4.2.1)."""

DISCONNECTED = "broker.disconnected"
"""In a scope's extensions: a function that returns whether the client has disconnected."""
_REFUSALS = {
    status: b"HTTP/1.1 %d %s\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % (status, reason)
    for status, reason in {
        400: b"Bad Request",
        408: b"Request Timeout",
        431: b"Request Header Fields Too Large",
    }.items()
}


class _RefusedError(Exception):
    """A refusal, which stops the parser; args: the status."""


class GuardedHttp(HttpToolsProtocol):
    """One connection, for `uvicorn.Config(http=GuardedHttp)`, on uvloop or asyncio's own loop.

    A request, head and body, must arrive within ARRIVAL_SECONDS of its first byte; a new connection has as long for its
    first request. Between requests uvicorn's `timeout_keep_alive` applies. The time to answer is not limited here.
    """

    ARRIVAL_SECONDS = 10.0
    LINGER_SECONDS = 2.0
    """How long a client may send data that is not read, so that it gets the response instead of a reset."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._in_message = False  # between a request's first byte and its last
        self._in_body = False
        self._framing = 0
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._waiting = bytearray()
        self._refused = False

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self._arm(self.ARRIVAL_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._disconnect()  # uvicorn would notify only the newest of several pipelined requests
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        view = memoryview(data)
        for start in range(0, len(data), PIECE):
            if self._refused or self.transport.is_closing():
                return
            if self._answer_is_due():
                # Read, to notice a disconnect, but not parsed: parsing costs a hundred times as much.
                self._waiting += view[start:]
                if len(self._waiting) > MAX_WAITING:
                    self._refuse(400)
                return
            self._feed(view[start : start + PIECE])
        resting = not self._in_message and self.timeout_keep_alive_task is not None
        if self._timer is None and not resting and not self._answer_is_due():
            self._arm(self.ARRIVAL_SECONDS)

    def _feed(self, piece: memoryview) -> None:
        self._framing += len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            # No upgrade is supported, so the request is answered without one (RFC 9110, section 7.8).
            self._feed(piece[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause.args[0] if isinstance(cause, _RefusedError) else 400)
            return
        if self._framing > MAX_FRAMING:
            self._refuse(431)

    def _answer_is_due(self) -> bool:
        """Return whether a complete request waits for its answer."""
        return bool(self._unanswered) and not self._unanswered[0].more_body

    # Called by the parser

    def on_message_begin(self) -> None:
        self._in_message = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._check_head()
        super().on_headers_complete()
        if self.pipeline:
            self.flow.resume_reading()  # uvicorn stops reading here, and would miss a disconnect
        self._in_body = True
        if self.parser.get_http_version() == "1.0":
            self.cycle.send = _without_chunks(weakref.ref(self.cycle))  # type: ignore[assignment,method-assign]
        self._unanswered.append(self.cycle)
        # Weak: a cycle that refers to itself would stay in memory until the garbage collector runs.
        extensions: Any = {DISCONNECTED: partial(_is_disconnected, weakref.ref(self.cycle))}  # not as in ASGI: dicts
        self.cycle.scope["extensions"] = extensions
        # From here on the parser finds trailers, which must not be merged into the head (RFC 9110, section 6.5.1).
        self.headers = []

    def on_chunk_header(self) -> None:
        """Allow a new chunk its framing bytes."""
        self._framing -= CHUNK_ALLOWANCE

    def on_body(self, body: bytes) -> None:
        self._framing -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_message = self._in_body = False
        self._framing = 0
        self._disarm()
        if self._unanswered:
            self.flow.resume_reading()  # likewise after a large body that the app has not read yet
        else:
            self._await_next()  # it was answered before it ended

    def _check_head(self) -> None:
        if len(self.headers) > MAX_FIELDS:
            raise _RefusedError(431)
        version = self.parser.get_http_version()
        hosts = 0
        has_body = False
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
                if not HOST.fullmatch(value):
                    raise _RefusedError(400)
            elif name == b"transfer-encoding":
                # Other codings are unsupported, and HTTP/1.0 has none (RFC 9112, section 6.1).
                if value.lower() != b"chunked" or version != "1.1":
                    raise _RefusedError(400)
                has_body = True
            elif name == b"content-length":
                has_body = value != b"0"
        # RFC 9112, section 3.2: exactly one Host since HTTP/1.1. The parser also accepts 0.9 and 2.0.
        if version not in ("1.1", "1.0") or hosts > 1 or (version == "1.1" and not hosts):
            raise _RefusedError(400)
        if has_body and self.parser.should_upgrade():
            raise _RefusedError(400)  # the parser would read the body as the next request

    # The answers

    def on_response_complete(self) -> None:
        super().on_response_complete()
        while self._unanswered and self._unanswered[0].response_complete:
            self._unanswered.popleft()
        if self.transport.is_closing() or self._answer_is_due():
            return
        if self._in_message:
            answered_early = self._in_body and not self._unanswered
            self._arm(self.LINGER_SECONDS if answered_early else self.ARRIVAL_SECONDS)
        if self._waiting:
            waiting = bytes(self._waiting)
            self._waiting.clear()
            self.data_received(waiting)

    def _await_next(self) -> None:
        """Wait for the next request, as uvicorn does after an answer."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _refuse(self, status: int) -> None:
        """Send a refusal, unless an answer has begun, and close."""
        begun = any(cycle.response_started for cycle in self._unanswered)
        self._disconnect()
        self._waiting.clear()
        self._refused = True
        log.info("request_refused", status=status)
        if not begun:
            self.transport.write(_REFUSALS[status])
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._arm(self.LINGER_SECONDS)

    def _disconnect(self) -> None:
        """Tell every request of this connection that its client is gone."""
        self.pipeline.clear()
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        self._unanswered.clear()

    # The timer

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._time_is_up)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_is_up(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        # Browsers open connections in advance: an unused one is closed without a response.
        if self._in_message and not self._refused and (self._unanswered or not self._in_body):
            self._refuse(408)
        else:
            self.transport.close()


def _is_disconnected(reference: weakref.ref[RequestResponseCycle]) -> bool:
    cycle = reference()
    return cycle is None or cycle.disconnected


def _without_chunks(reference: weakref.ref[RequestResponseCycle]) -> Send:
    """Return `send` of a request that came as HTTP/1.0, which has no chunks (RFC 9112, section 6.1).

    Content of unknown length ends with the connection: uvicorn closes it after every such request.
    """
    unknown_length = False

    async def send_without_chunks(message: Message) -> None:
        nonlocal unknown_length
        cycle = reference()
        if cycle is None:
            return  # the application has returned
        if message["type"] == "http.response.start":
            unknown_length = all(name.lower() != b"content-length" for name, _ in message["headers"])
            if unknown_length:
                cycle.chunked_encoding = False
        elif message["type"] == "http.response.body" and unknown_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await RequestResponseCycle.send(cycle, message)  # type: ignore[arg-type]

    return send_without_chunks
