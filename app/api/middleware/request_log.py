"""Outermost middleware: a request id, a log line and metrics for each request."""

import re
import secrets
import time
from dataclasses import dataclass, field

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import FilteringBoundLogger

from app.api.client import PATHS as CLIENT_PATHS
from app.api.middleware.response_head import ResponseHead
from app.api.middleware.root_path import route_path
from app.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
CLIENT_GONE = 499
"""Logged, as nginx does, if the client disconnected before a response was sent."""
QUIET_ROUTES = CLIENT_PATHS | {
    "/healthz",
    "/readyz",
    "/metrics",
    "/docs",
    "/docs/{asset}",
    "/openapi.json",
    "/problems/{slug}",
}


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class RequestLog:
    """Give each request an id (the client's, if it is a safe one), return it, and log the request.

    The other middlewares edit the response's head through `head_of`.

    Routes add fields through `scope["state"]`: `user` (a pseudonym), `call` (OneInbox's id), `problem` (a slug),
    `reason` (which limit refused, or what else), `trace` (its id); for the metrics, `outcome` of a session that is no
    problem.
    """

    app: ASGIApp
    # Bound once: binding for each line costs a quarter of the line.
    _log: FilteringBoundLogger = field(default_factory=log.bind, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = _request_id(scope)
        head = state["head"] = ResponseHead()

        async def send_edited(message: Message) -> None:
            if message["type"] == "http.response.start":
                head.status = message["status"]
                headers = message["headers"]
                for edit in head.edits:
                    edit(headers)
                headers.append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self.app(scope, receive, send_edited)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            status = CLIENT_GONE if head.status is None else head.status
            seconds = time.perf_counter() - started
            self._count(scope, route, status, seconds)
            (self._log.debug if route in QUIET_ROUTES else self._log.info)(
                "request",
                method=scope["method"],
                route=route,
                status=status,
                ms=round(seconds * 1000, 1),
                request_id=request_id,
                **{name: state[name] for name in ("user", "call", "problem", "reason", "trace") if state.get(name)},
            )

    @staticmethod
    def _count(scope: Scope, route: str, status: int, seconds: float) -> None:
        state = scope["state"]
        metrics: Metrics | None = state.get("metrics")
        if metrics is None:
            return  # no lifespan is running
        metrics.count_request(scope["method"], route, status, seconds)
        # By path: a request refused before routing counts as a session request, too.
        if scope["method"] == "POST" and route_path(scope) == "/session":
            metrics.count_session(state.get("problem") or state.get("outcome", "hung-up"), state.get("plan"))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return secrets.token_hex(8)
