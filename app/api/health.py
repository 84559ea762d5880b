"""Probes for whoever runs the broker."""

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from app.api.dependencies import BrokerDep
from app.api.openapi import answer, problems

router = APIRouter(tags=["service"])


class Health(BaseModel):
    """The process runs."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether the broker can serve, and what of it works."""

    status: Literal["ok", "degraded", "draining"] = Field(
        description="`degraded`: it serves, but something it uses is gone. `draining`: it is about to end."
    )
    checks: dict[str, str] = Field(description="Each part: `ok` or `down`.", examples=[{"store": "ok"}])


@router.get(
    "/healthz",
    operation_id="getHealth",
    summary="Is the process alive?",
    responses={200: answer("It is.", examples={"Alive": {"status": "ok"}}), **problems("forbidden-origin")},
)
async def healthz() -> Health:
    """200 while the process runs; asks nobody."""
    return Health()


@router.get(
    "/readyz",
    operation_id="getReadiness",
    summary="Can it serve?",
    responses={
        200: answer(
            "It serves.",
            examples={
                "All is well": {"status": "ok", "checks": {"store": "ok"}},
                "Without its store": {"status": "degraded", "checks": {"store": "down"}},
            },
        ),
        503: {"model": Readiness}
        | answer("It is about to end.", examples={"About to end": {"status": "draining", "checks": {"store": "ok"}}}),
        **problems("forbidden-origin"),
    },
)
async def readyz(broker: BrokerDep, response: Response) -> Readiness:
    """200 for `ok` and `degraded`: without its store the broker counts locally, and taking it out would help nobody.

    503 for `draining`: new requests should go elsewhere.
    """
    checks: dict[str, str] = {"store": broker.store.state}
    if broker.shutdown.draining:
        response.status_code = 503
        return Readiness(status="draining", checks=checks)
    return Readiness(status="ok" if broker.store.state == "ok" else "degraded", checks=checks)
