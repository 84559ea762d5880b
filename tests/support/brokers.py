"""Broker processes in front of an emulator in the test's event loop.

async with running_emulator(LONG_CALLS) as oneinbox, running_broker_processes(2, oneinbox.url) as brokers:
    responses = await post_many(brokers, 200)
"""

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from app.api.app import create_app
from app.config.loading import load_settings
from app.config.settings import Settings
from app.oneinbox.transport import open_transport
from app.sandbox.emulator import Emulator, EmulatorOptions
from app.sandbox.middleware import RecordedRequest
from app.server.server import create_server, listen, url_of
from tests.support.processes import PATIENCE, Process, running

LONG_CALLS = EmulatorOptions(queued=0, initiated=0, in_progress=3600)
"""Calls run until they are stopped."""
SECRET = "a secret of the tests, of more than 32 characters"
# Bounds that a test about something else must not run into.
ROOMY = {
    "BROKER_SESSION_LIMITS": "100000/minute",
    "BROKER_GLOBAL_SESSION_LIMITS": "100000/minute",
    "BROKER_REQUEST_LIMITS": "100000/minute",
    "BROKER_MAX_LIVE_CALLS": "100000",
}


def environ_of(oneinbox: str, changes: Mapping[str, str]) -> dict[str, str]:
    """Settings of a broker in front of an emulator at this URL: roomy, with changes."""
    return {
        "ONEINBOX_API_KEY": LONG_CALLS.api_key,
        "ONEINBOX_BASE_URL": oneinbox,
        "ONEINBOX_AGENT_ID": LONG_CALLS.agents[0],
        "BROKER_SECRET": SECRET,
        **ROOMY,
        **changes,
    }


def settings_of(oneinbox: str, changes: Mapping[str, str]) -> Settings:
    """The same as settings."""
    return load_settings(environ_of(oneinbox, changes), env_file=None)


@dataclass(frozen=True)
class BrokerProcess:
    """A broker that runs, and a client of it."""

    client: httpx.AsyncClient
    process: Process

    @property
    def logs(self) -> list[dict[str, Any]]:
        """Its log so far."""
        return self.process.records

    async def readiness(self) -> str:
        """`ok` or `degraded`, as /readyz says."""
        response = await self.client.get("/readyz")
        assert response.status_code == 200
        status: str = response.json()["status"]
        return status


@asynccontextmanager
async def running_broker_process(oneinbox: str, *arguments: str, **changes: str) -> AsyncIterator[BrokerProcess]:
    """`python -m app serve` with these arguments and settings, until the block ends."""
    environ = environ_of(oneinbox, changes)
    with (
        tempfile.TemporaryDirectory() as empty,  # no .env there
        running("serve", "--port", "0", *arguments, cwd=Path(empty), environ=environ) as process,
    ):
        url = await process.listens()
        # httpx's own pool would take seconds of CPU to get hundreds of requests out at once.
        transport = open_transport(url, pool_size=1000)
        try:
            async with httpx.AsyncClient(base_url=url, transport=transport, timeout=PATIENCE) as client:
                assert (await client.get("/readyz")).status_code == 200
                yield BrokerProcess(client, process)
        finally:
            await process.stop()


@asynccontextmanager
async def served(settings: Settings) -> AsyncIterator[str]:
    """A broker in this process, on a real socket; its URL. Leave them in the reverse order: they nest signals."""
    with listen("127.0.0.1", 0) as listener:
        url = url_of(listener)
        server = create_server(create_app(settings))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
                assert (await client.get("/readyz")).status_code == 200
            yield url
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def running_broker_processes(count: int, oneinbox: str, **changes: str) -> AsyncIterator[list[BrokerProcess]]:
    """Several brokers with the same settings."""
    async with AsyncExitStack() as stack:
        yield await asyncio.gather(
            *(stack.enter_async_context(running_broker_process(oneinbox, **changes)) for _ in range(count))
        )


async def post_many(
    brokers: Sequence[BrokerProcess], count: int, headers: Mapping[str, str] | None = None
) -> list[httpx.Response]:
    """So many POST /session at once, taking turns between brokers."""
    turns = (brokers[number % len(brokers)].client for number in range(count))
    return await asyncio.gather(*(client.post("/session", json={}, headers=headers) for client in turns))


def outcomes(responses: Sequence[httpx.Response]) -> Counter[str]:
    """How often each status came, or each problem."""
    return Counter(
        response.json()["type"].rpartition("/")[2] if response.is_error else str(response.status_code)
        for response in responses
    )


def asked(emulator: Emulator, operation: str) -> list[RecordedRequest]:
    """The requests of one kind that reached OneInbox."""
    return [request for request in emulator.requests if request.operation == operation]


async def eventually(holds: Callable[[], Awaitable[bool]], within: float) -> float:
    """Ask until it holds; the seconds that took. Fails when it takes longer."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not await holds():
        assert loop.time() - began < within, f"not within {within} s"
        await asyncio.sleep(0.02)
    return loop.time() - began


def from_address(address: str) -> dict[str, str]:
    """The header with which a trusted proxy names its client."""
    return {"X-Forwarded-For": address}
