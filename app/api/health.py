"""Health and readiness probes."""

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from app.api.dependencies import BrokerDep
from app.api.openapi import answer, problems

router = APIRouter(tags=["service"])


class Health(BaseModel):
    """The process is running."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """The state of the broker and its parts."""

    status: Literal["ok", "degraded", "draining"] = Field(
        description="`degraded`: serving without something it uses. `draining`: shutting down."
    )
    checks: dict[str, str] = Field(description="Each part: `ok` or `down`.", examples=[{"store": "ok"}])


@router.get(
    "/healthz",
    operation_id="getHealth",
    summary="Liveness",
    responses={200: answer("It is running.", examples={"Alive": {"status": "ok"}}), **problems("forbidden-origin")},
)
async def healthz() -> Health:
    """Return 200 while the process runs, without checking anything else."""
    return Health()


@router.get(
    "/readyz",
    operation_id="getReadiness",
    summary="Readiness",
    responses={
        200: answer(
            "It is serving.",
            examples={
                "Everything works": {"status": "ok", "checks": {"store": "ok"}},
                "Without its store": {"status": "degraded", "checks": {"store": "down"}},
            },
        ),
        503: {"model": Readiness}
        | answer("It is shutting down.", examples={"Shutting down": {"status": "draining", "checks": {"store": "ok"}}}),
        **problems("forbidden-origin"),
    },
)
async def readyz(broker: BrokerDep, response: Response) -> Readiness:
    """Return 200 for `ok` and `degraded`, 503 for `draining`: send new requests elsewhere.

    `degraded`: without its store the broker counts limits locally, so it should stay in service.
    """
    checks: dict[str, str] = {"store": broker.store.state}
    if broker.shutdown.draining:
        response.status_code = 503
        return Readiness(status="draining", checks=checks)
    return Readiness(status="ok" if broker.store.state == "ok" else "degraded", checks=checks)
