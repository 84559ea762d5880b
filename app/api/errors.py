"""Every error of a route, FastAPI's own included, becomes problem details (RFC 9457)."""

import json

import structlog
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from app.api.middleware.head import is_stream
from app.api.middleware.root_path import route_path
from app.limits import Refused
from app.oneinbox.errors import Busy, NoSuchCall, OneInboxError
from app.problems import MEDIA_TYPE, Problem, invalid_request, problem_body

log = structlog.get_logger(__name__)


def problem_response(scope: Scope, problem: Problem) -> Response:
    """Return the response for a problem. `scope`: of its request, for the prefix and the request id."""
    state = scope.setdefault("state", {})
    state["problem"], state["reason"] = problem.slug, problem.reason
    prefix = scope.get("root_path", "")
    body = problem_body(problem.slug, state.get("request_id", ""), detail=problem.detail, prefix=prefix)
    if problem.errors:
        body["errors"] = list(problem.errors)
    return Response(json.dumps(body), status_code=body["status"], headers=dict(problem.headers), media_type=MEDIA_TYPE)


def response_to(error: Exception, scope: Scope) -> Response | None:
    """Return the response to an exception of a route; None for one that no route should raise."""
    if not isinstance(error, (Problem, Refused, OneInboxError, RequestValidationError, HTTPException)):
        return None
    if isinstance(error, HTTPException) and scope["method"] == "OPTIONS" and (methods := _methods(error, scope)):
        return Response(status_code=204, headers={"Allow": methods})
    return problem_response(scope, _problem_of(error, scope))


def _problem_of(error: Exception, scope: Scope) -> Problem:
    match error:
        case Problem():
            return error
        case Refused():
            return error.problem
        case RequestValidationError():
            return invalid_request(error.errors())
        case OneInboxError():
            if not isinstance(error, NoSuchCall):
                # A misconfiguration needs the operator; the rest passes by itself.
                report = log.error if error.slug == "upstream-misconfigured" else log.warning
                request_id = scope["state"]["request_id"]
                fields = {"problem": error.slug, "reason": error.reason, "request_id": request_id, **error.log_fields}
                report("upstream_failed", **fields)
            headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Busy) else {}
            return Problem(error.slug, headers=headers)
    assert isinstance(error, HTTPException)  # noqa: S101 - the last of the registered classes
    if error.status_code == 405:
        return Problem("method-not-allowed", headers={"Allow": _methods(error, scope)})
    return Problem("not-found" if error.status_code == 404 else "internal-error", headers=error.headers or {})


def _methods(error: HTTPException, scope: Scope) -> str:
    """Return the methods that a path takes, for Allow; empty for a path that does not exist.

    `*` and `/` stand for the whole server (RFC 9110, section 9.3.7): load balancers ask for them.
    """
    if error.status_code == 404:
        return "GET, HEAD, POST, OPTIONS" if route_path(scope) in ("*", "/", "") else ""
    taken = (error.headers or {}).get("Allow", "")
    return f"{taken}, HEAD, OPTIONS" if taken == "GET" and not is_stream(scope) else f"{taken}, OPTIONS"
