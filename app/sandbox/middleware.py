"""Middleware in front of the emulated API: records every request and applies the faults."""

import json
import re
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.sandbox.faults import Faults, Operation
from app.sandbox.http_exchange import Answer, HttpExchange

CONTROL = "/_emulator"
"""Path prefix of the control surface. Its requests are not recorded and meet no faults."""

MAX_REQUESTS = 10_000
MAX_BODY = 1024 * 1024

_OPERATIONS: tuple[tuple[str, re.Pattern[str], Operation], ...] = (
    ("POST", re.compile(r"/v1/calls/web"), "start"),
    ("POST", re.compile(r"/v1/calls/[^/]+/stop"), "stop"),
    ("GET", re.compile(r"/v1/calls(/cursor)?"), "list"),
    ("GET", re.compile(r"/v1/calls/[^/]+"), "get"),
    ("GET", re.compile(r"/v1/usage"), "usage"),
    ("GET", re.compile(r"/v1/agents/[^/]+"), "agent"),
)


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """A request as it arrived."""

    at: float
    """When it had arrived in full, by the emulator's clock."""
    method: str
    path: str
    query: str
    headers: Headers
    json: Any
    """The parsed body; None if it is empty or not JSON."""

    @property
    def operation(self) -> Operation | None:
        """The operation it asks for, of those that faults apply to."""
        for method, path, operation in _OPERATIONS:
            if method == self.method and path.fullmatch(self.path):
                return operation
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the control surface's record; headers as pairs, since some come twice."""
        return {
            "at": self.at,
            "method": self.method,
            "path": self.path,
            "query": self.query,
            "headers": self.headers.items(),
            "json": self.json,
        }


@dataclass(frozen=True, slots=True)
class RecordingMiddleware:
    """Record each request, then let a fault or the API answer it."""

    app: ASGIApp
    faults: Faults
    requests: deque[RecordedRequest]
    now: Callable[[], float]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(CONTROL):
            await self.app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        request = RecordedRequest(
            at=self.now(),
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"].decode("latin-1"),
            headers=Headers(raw=list(scope["headers"])),
            json=_parse(body),
        )
        self.requests.append(request)
        with closing(HttpExchange(self.app, scope, receive, send, body)) as exchange:
            operation = request.operation
            fault = self.faults.take(operation) if operation else None
            if len(body) > MAX_BODY:
                await exchange.answer(Answer.of(413, {"detail": "Request body too large"}, [(b"connection", b"close")]))
            elif fault is None:
                await exchange.forward()
            elif fault.needs_socket and not exchange.on_socket:
                raise RuntimeError(f"{type(fault).__name__} needs a connection: use running_emulator, not the bare app")
            else:
                await fault.apply(exchange)


async def _read(receive: Receive) -> bytes | None:
    """Return the body, cut off once it is over MAX_BODY; None if the client disconnected."""
    body = bytearray()
    while len(body) <= MAX_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return bytes(body)


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:  # also raised for bad UTF-8
        return None
