"""Exception handlers: every error of a route, FastAPI's own included, becomes problem details (RFC 9457)."""

import json
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from slowapi.errors import RateLimitExceeded
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from app.limits import Refused
from app.oneinbox.errors import Busy, NoSuchCall, OneInboxError
from app.problems import KINDS, MEDIA_TYPE, Problem, invalid_request

log = structlog.get_logger(__name__)


def problem_response(scope: Scope, problem: Problem) -> Response:
    """Return the response for a problem. `scope`: of its request, for the prefix and the request id."""
    kind = KINDS[problem.slug]
    body: dict[str, Any] = {
        "type": f"{scope.get('root_path', '')}/problems/{problem.slug}",
        "title": kind.title,
        "status": kind.status,
        "detail": problem.detail or kind.meaning,
        "request_id": scope.get("state", {}).get("request_id", ""),
    }
    if problem.errors:
        body["errors"] = list(problem.errors)
    scope.setdefault("state", {})["problem"] = problem.slug
    return Response(json.dumps(body), status_code=kind.status, headers=dict(problem.headers), media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Register the exception handlers."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(OneInboxError, _on_upstream_error)
    app.add_exception_handler(RateLimitExceeded, _on_refused)


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)  # noqa: S101 - registered for this class
    return problem_response(request.scope, error)


async def _on_upstream_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OneInboxError)  # noqa: S101 - registered for this class
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Busy) else {}
    if not isinstance(error, NoSuchCall):
        # A misconfiguration needs the operator; the rest passes by itself.
        level = "error" if error.slug == "upstream-misconfigured" else "warning"
        getattr(log, level)(
            "upstream_failed", problem=error.slug, reason=error.reason, request_id=request.scope["state"]["request_id"]
        )
    return problem_response(request.scope, Problem(error.slug, headers=headers))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class
    return problem_response(request.scope, invalid_request(error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
    slug = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "internal-error")
    return problem_response(request.scope, Problem(slug, headers=error.headers or {}))


async def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)  # noqa: S101 - registered for this class
    return problem_response(request.scope, error.problem)
