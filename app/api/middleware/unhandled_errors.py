"""Innermost middleware: an unhandled exception becomes a logged `internal-error`."""

import asyncio
from dataclasses import dataclass

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import problem_response
from app.problems import Problem, retry_later

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class UnhandledErrors:
    """Turn unhandled exceptions into `internal-error`, with the headers of every response.

    A request cancelled by the server's shutdown gets `at-capacity`.
    """

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, note_start)
        except ClientDisconnect:
            pass  # there is no one to answer
        except asyncio.CancelledError:
            if started:
                raise
            # The server is shutting down and has waited long enough.
            problem = retry_later("at-capacity", 1, "The broker is shutting down.")
            await problem_response(scope, problem)(scope, receive, send)
        except Exception:
            log.exception("unhandled_error", request_id=scope["state"]["request_id"])
            if started:
                raise  # the response is incomplete: the server closes the connection
            await problem_response(scope, Problem("internal-error"))(scope, receive, send)
