"""A real identity provider, npm's oidc-provider, whose access tokens a real broker checks by its published keys."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.sandbox.server import running_emulator
from tests.support.brokers import LONG_CALLS, running_broker_process
from tests.support.needs import node
from tests.support.processes import PATIENCE
from tests.support.shapes import assert_problem

pytestmark = pytest.mark.browser

SCRIPT = Path(__file__).parents[1] / "e2e" / "oidc_provider.mjs"
CLIENT, SECRET, AUDIENCE = "web-shop", "a secret of the tests", "https://voice.example"


@dataclass(frozen=True)
class Provider:
    """An identity provider that runs. `jwks`, `token`: its addresses."""

    process: asyncio.subprocess.Process
    issuer: str
    jwks: str
    token: str

    async def login(self, resource: str = AUDIENCE) -> str:
        """An access token for an API."""
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as client:
            form = {"grant_type": "client_credentials", "resource": resource}
            answer = await client.post(self.token, data=form, auth=(CLIENT, SECRET))
        assert answer.status_code == 200, answer.text
        token: str = answer.json()["access_token"]
        return token

    async def end(self) -> None:
        """Stop answering, for good."""
        await _end(self.process)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    await asyncio.wait_for(process.wait(), PATIENCE)


@asynccontextmanager
async def running_provider() -> AsyncIterator[Provider]:
    process = await asyncio.create_subprocess_exec(
        *(node("oidc-provider"), str(SCRIPT), CLIENT, SECRET, AUDIENCE),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
        assert line, "the provider ended"
        yield Provider(process, **json.loads(line))
    finally:
        await _end(process)


async def test_tokens_of_a_real_identity_provider() -> None:
    async with (
        running_provider() as provider,
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(
            oneinbox.url,
            BROKER_AUTH="jwt",
            BROKER_JWT_JWKS_URL=provider.jwks,
            BROKER_JWT_ISSUER=provider.issuer,
            BROKER_JWT_AUDIENCE=AUDIENCE,
            BROKER_SHARE_USER_ID="true",
        ) as broker,
    ):

        async def post(token: str) -> httpx.Response:
            return await broker.client.post("/session", json={}, headers={"Authorization": f"Bearer {token}"})

        token = await provider.login()
        started = await post(token)
        assert started.status_code == 201, started.text
        (call,) = oneinbox.emulator.calls
        assert call.metadata["broker_user_id"] == CLIENT
        assert started.headers["location"] == f"/calls/{call.id}"

        for forged in (
            _changed(token, sub="admin"),
            _changed(token, exp=4_000_000_000),
            token[:-40] + "A" * 40,
            token.rpartition(".")[0] + ".",
            await provider.login("https://mail.example"),
        ):
            assert_problem(await post(forged), "unauthenticated")
        assert len(oneinbox.emulator.calls) == 1

        other = await provider.login()
        assert other != token
        read = await broker.client.get(started.headers["location"], headers={"Authorization": f"Bearer {other}"})
        assert read.status_code == 200, "a new token of the same user"

        # An outage of the provider locks no user out, and lets none in.
        fresh = await provider.login()
        await provider.end()
        assert (await post(fresh)).status_code == 201
        assert_problem(await post(_changed(fresh, sub="admin")), "unauthenticated")


def _changed(token: str, **claims: Any) -> str:
    head, payload, signature = token.split(".")
    said = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))) | claims
    return f"{head}.{base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b'=').decode()}.{signature}"
