"""Innermost middleware: exceptions become responses."""

import asyncio
from dataclasses import dataclass

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import problem_response, response_to
from app.api.middleware.response_head import head_of
from app.problems import Problem, retry_later

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ErrorResponses:
    """Turn exceptions into problem responses, with the headers of every response. What no route should raise is logged.

    A request cancelled by the server's shutdown gets `at-capacity`.
    """

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            await self.app(scope, receive, send)
        except ClientDisconnect:
            pass  # there is no one to answer
        except asyncio.CancelledError:
            if head_of(scope).status is not None:
                raise
            # The server is shutting down and has waited long enough.
            problem = retry_later("at-capacity", 1, "The broker is shutting down.")
            await problem_response(scope, problem)(scope, receive, send)
        except Exception as error:
            response = response_to(error, scope)
            if response is None:
                log.exception("unhandled_error", request_id=scope["state"]["request_id"])
                response = problem_response(scope, Problem("internal-error"))
            if head_of(scope).status is not None:
                raise  # the response is incomplete: the server closes the connection
            await response(scope, receive, send)
