"""A span for each request, if tracing is on."""

from dataclasses import dataclass

from opentelemetry.trace import Span, Status, StatusCode, format_trace_id
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.middleware.response_head import head_of
from app.telemetry.metrics import METHODS, OTHER
from app.telemetry.traces import Traces


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class TraceRequests:
    """Record a span for each request, and log its trace id as `trace`."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        traces: Traces | None = scope["state"].get("traces") if scope["type"] == "http" else None
        if traces is None:
            return await self.app(scope, receive, send)
        method = scope["method"] if scope["method"] in METHODS else OTHER
        with traces.request(method) as span:
            scope["state"]["trace"] = format_trace_id(span.get_span_context().trace_id)
            try:
                await self.app(scope, receive, send)
            finally:
                _describe(span, method, scope, head_of(scope).status)


def _describe(span: Span, method: str, scope: Scope, status: int | None) -> None:
    route = getattr(scope.get("route"), "path", None)
    if route is not None:
        span.set_attribute("http.route", route)
        span.update_name(f"{method} {route}")
    if status is not None:
        span.set_attribute("http.response.status_code", status)
    if problem := scope["state"].get("problem"):
        span.set_attribute("broker.problem", problem)
    if status is not None and status >= 500:
        span.set_attribute("error.type", str(status))
        span.set_status(Status(StatusCode.ERROR))
