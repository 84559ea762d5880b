"""GET /metrics."""

import asyncio
import secrets

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.dependencies import BrokerDep
from app.api.openapi import answer, problems
from app.problems import Problem

router = APIRouter(tags=["service"])

EXAMPLE = """# HELP broker_streams Open event streams.
# TYPE broker_streams gauge
broker_streams 3.0
"""


@router.get(
    "/metrics",
    operation_id="getMetrics",
    summary="Prometheus metrics",
    response_class=Response,
    openapi_extra={"security": [{"metrics": []}]},
    responses={
        200: answer(
            "Text format, or OpenMetrics if Accept asks for it.",
            texts={"text/plain": EXAMPLE, "application/openmetrics-text": f"{EXAMPLE}# EOF\n"},
        ),
        **problems("unauthenticated", "forbidden-origin", "not-found"),
    },
)
async def metrics(request: Request, broker: BrokerDep) -> Response:
    """Return metrics for Prometheus. Needs BROKER_METRICS_TOKEN as a bearer token; 404 if that is not set."""
    token = broker.settings.metrics_token
    if token is None:
        raise Problem("not-found")
    given = request.headers.getlist("authorization")
    scheme, _, credentials = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    known = secrets.compare_digest(credentials.strip().encode(), token.get_secret_value().encode())
    if not known or scheme.lower() != "bearer":
        raise Problem("unauthenticated", "/metrics needs its bearer token.", {"WWW-Authenticate": "Bearer"})
    await broker.gauges.read()
    # In a thread: thousands of lines take time to write.
    text, media_type = await asyncio.to_thread(broker.metrics.text, request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": media_type})
