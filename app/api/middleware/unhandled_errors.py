"""Innermost middleware: a bug becomes a logged `internal-error`."""

import asyncio
from dataclasses import dataclass

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import problem_response
from app.problems import Problem

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class UnhandledErrors:
    """Innermost middleware: a bug becomes a logged `internal-error`, with the headers that all answers carry.

    So does the server's own end become `at-capacity`, for a request that it waits for no longer.
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
            pass  # hung up in the middle of its body: nobody is left to answer
        except asyncio.CancelledError:
            if started:
                raise
            # The server is about to end, and has waited for long enough.
            going = Problem("at-capacity", "The broker is about to end.", {"Retry-After": "1"})
            await problem_response(scope, going)(scope, receive, send)
        except Exception:
            log.exception("unhandled_error", request_id=scope["state"]["request_id"])
            if started:
                raise  # half an answer cannot be mended: the server cuts the connection
            await problem_response(scope, Problem("internal-error"))(scope, receive, send)
