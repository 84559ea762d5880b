"""HEAD for every GET route (RFC 9110, section 9.3.2)."""

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.middleware.root_path import route_path


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class HeadAsGet:
    """Let the routes handle HEAD as GET. The server, whose scope still says HEAD, sends no body."""

    app: ASGIApp

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        if scope["type"] == "http" and scope["method"] == "HEAD" and not is_stream(scope):
            return self._answer(scope, receive, send)
        return self.app(scope, receive, send)  # type: ignore[return-value]  # every ASGI app is a coroutine function

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        routed = {**scope, "method": "GET"}
        try:
            await self.app(routed, receive, send)
        finally:
            scope["route"] = routed.get("route")  # for the log, metrics and traces


def is_stream(scope: Scope) -> bool:
    """Return whether the path is that of an event stream, which has no HEAD: it would have to be opened."""
    return route_path(scope).endswith("/events")
