"""uvicorn's HTTP/1.1 connection, with bounds on what httptools leaves open.

What is refused here is refused before it is a request to the application: an answer without a body, and the connection
is closed. Lengths, chunks and line ends are httptools' business: it refuses what request smuggling is made of.
"""

import asyncio
import re
from collections import deque
from typing import Any

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

log = structlog.get_logger(__name__)

MAX_FRAMING = 32 * 1024
"""Bytes of a request that are not its body: head, chunk extensions, trailers; give or take a PIECE."""
MAX_FIELDS = 100
MAX_WAITING = MAX_FRAMING
"""Bytes of pipelined requests that may wait behind an unanswered one; give or take a PIECE."""
PIECE = 4096
"""Bytes that the parser gets at once: it cannot be stopped in the middle of them."""
CHUNK_ALLOWANCE = 16
"""Framing bytes that every chunk of a body may have."""

HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")
"""RFC 3986, section 3.2, without the user part; empty is no host of http (RFC 9110, section 4.2.1)."""

_REFUSALS = {
    status: b"HTTP/1.1 %d %s\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % (status, reason)
    for status, reason in {
        400: b"Bad Request",
        408: b"Request Timeout",
        431: b"Request Header Fields Too Large",
    }.items()
}


class _RefusedError(Exception):
    """Ends the parser's work; args: the status."""


class GuardedHttp(HttpToolsProtocol):
    """One connection. `uvicorn.Config(http=GuardedHttp)`; works on uvloop and on asyncio's own loop.

    A request, head and body, has to be there ARRIVAL_SECONDS after its first byte; a new connection has as long for its
    first request. Between requests uvicorn's `timeout_keep_alive` counts. How long an answer takes is nobody's
    business here.
    """

    ARRIVAL_SECONDS = 10.0
    LINGER_SECONDS = 2.0
    """How long a client may go on sending what nobody reads, so that it finds the answer instead of a reset."""

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
        self._hang_up()  # uvicorn would tell only the newest of several pipelined requests
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        view = memoryview(data)
        for start in range(0, len(data), PIECE):
            if self._refused or self.transport.is_closing():
                return
            if self._answer_is_due():
                # Read, so that a hang-up is seen, but not parsed: each parsed request would cost a hundredfold.
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
            # No upgrade is offered: the request is answered as if it asked for none (RFC 9110, section 7.8).
            self._feed(piece[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause.args[0] if isinstance(cause, _RefusedError) else 400)
            return
        if self._framing > MAX_FRAMING:
            self._refuse(431)

    def _answer_is_due(self) -> bool:
        """Whether a request that arrived whole waits for its answer."""
        return bool(self._unanswered) and not self._unanswered[0].more_body

    # The parser's calls

    def on_message_begin(self) -> None:
        self._in_message = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._check_head()
        super().on_headers_complete()
        if self.pipeline:
            self.flow.resume_reading()  # uvicorn reads no further here, and would see no hang-up
        self._in_body = True
        self._unanswered.append(self.cycle)
        # What the parser finds from here on are trailers: never to be mixed with the head (RFC 9110, section 6.5.1).
        self.headers = []

    def on_chunk_header(self) -> None:
        """A chunk begins."""
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
            self.flow.resume_reading()  # the same after a large body that nobody has asked for yet
        else:
            self._rest()  # answered before its end

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
                # Other codings are not understood, and HTTP/1.0 has none (RFC 9112, section 6.1).
                if value.lower() != b"chunked" or version != "1.1":
                    raise _RefusedError(400)
                has_body = True
            elif name == b"content-length":
                has_body = value != b"0"
        # RFC 9112, section 3.2: exactly one Host since HTTP/1.1. The parser takes 0.9 and 2.0 as well.
        if version not in ("1.1", "1.0") or hosts > 1 or (version == "1.1" and not hosts):
            raise _RefusedError(400)
        if has_body and self.parser.should_upgrade():
            raise _RefusedError(400)  # the parser would take the body for the next request

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

    def _rest(self) -> None:
        """Wait for the next request, as uvicorn does after an answer."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _refuse(self, status: int) -> None:
        """Answer what is unanswered, if no answer has begun, and close."""
        begun = any(cycle.response_started for cycle in self._unanswered)
        self._hang_up()
        self._waiting.clear()
        self._refused = True
        log.info("request_refused", status=status)
        if not begun:
            self.transport.write(_REFUSALS[status])
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._arm(self.LINGER_SECONDS)

    def _hang_up(self) -> None:
        """Tell every request of this connection that nobody is waiting any more."""
        self.pipeline.clear()
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        self._unanswered.clear()

    # The clock

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
        # Browsers open connections in advance: an unused one is closed without a word.
        if self._in_message and not self._refused and (self._unanswered or not self._in_body):
            self._refuse(408)
        else:
            self.transport.close()
