"""Probes for whoever runs the broker."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

router = APIRouter(tags=["service"])


class Health(BaseModel):
    """The process runs."""

    status: Literal["ok"] = "ok"


@router.get("/healthz", operation_id="getHealth", summary="Is the process alive?")
async def healthz() -> Health:
    """200 while the process runs; asks nobody."""
    return Health()
