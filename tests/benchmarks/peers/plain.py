"""The shortest FastAPI brokers: a tutorial's, done well, and an empty one."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI


@asynccontextmanager
async def _client(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    async with httpx.AsyncClient(headers={"Authorization": "Bearer oi_sk_benchmark"}, timeout=15) as client:
        app.state.client = client
        yield {}


shared = FastAPI(lifespan=_client)
"""One shared httpx client; no limits, no checks, no logs."""

empty = FastAPI()
"""An empty route: the framework's own cost."""


@shared.post("/session", status_code=201)
async def start_call() -> dict[str, str]:
    """Start a call."""
    url = f"{os.environ['UPSTREAM']}/v1/calls/web"
    answer = await shared.state.client.post(url, json={"agent_id": "agt_benchmark"})
    call = answer.json()
    return {"server_url": call["server_url"], "participant_token": call["participant_token"]}


@empty.post("/session", status_code=201)
@empty.get("/session")
async def answer() -> dict[str, str]:
    """Answer at once."""
    return {}
