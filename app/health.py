"""Probes for whoever runs the broker."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.broker import BrokerDep

router = APIRouter(tags=["service"])


class Health(BaseModel):
    """The process runs."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether the broker can serve, and what of it works."""

    status: Literal["ok", "degraded"] = Field(description="`degraded`: it serves, but something it uses is gone.")
    checks: dict[str, str] = Field(description="Each part: `ok` or `down`.", examples=[{"store": "ok"}])


@router.get("/healthz", operation_id="getHealth", summary="Is the process alive?")
async def healthz() -> Health:
    """200 while the process runs; asks nobody."""
    return Health()


@router.get("/readyz", operation_id="getReadiness", summary="Can it serve?")
async def readyz(broker: BrokerDep) -> Readiness:
    """200 for `ok` and `degraded`: without its store the broker counts locally, and taking it out would help nobody."""
    store = broker.store.state
    return Readiness(status="ok" if store == "ok" else "degraded", checks={"store": store})
