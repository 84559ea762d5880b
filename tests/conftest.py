"""Hooks and fixtures of all tests."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, MutableMapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import uvloop
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from app.clock import SYSTEM_CLOCK, Clock
from app.server.gc import freeze_gc
from tests.support.harness import BROKER, CLIENT, Upstream, running_broker, settings
from tests.support.ports import free_port
from tests.support.valkey import Valkey, running_valkey

# How long an example takes is for a busy machine to say; what it shows is not.
hypothesis_settings.register_profile(
    "broker", parent=hypothesis_settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("broker")


def pytest_configure() -> None:
    """Ctrl-C ends what tests start, even where they run in a shell's background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The image and browsers first: they take longest, and pytest-xdist hands out modules in this order."""
    items.sort(key=lambda item: (not item.get_closest_marker("image"), not item.get_closest_marker("browser")))


def pytest_collection_finish() -> None:
    """Exempt the collected tests from garbage collection, whose pauses would make an emulator in here late."""
    freeze_gc()


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Python's own event loop, and the server's for what they do differently (`every_loop`)."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.get_closest_marker("every_loop"):
        loops["uvloop"] = uvloop.new_event_loop
    return loops


Logs = list[MutableMapping[str, Any]]


@pytest.fixture(autouse=True)
def clean_surroundings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep this machine's settings and `.env` from a test; and all programs but Python from one without a marker."""
    if not any(map(request.node.get_closest_marker, ("process", "browser", "image", "voice"))):
        monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    for name in list(os.environ):
        if name.upper().startswith(("BROKER_", "ONEINBOX_", "OTEL_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def logs() -> Iterator[Logs]:
    """The broker's log entries during the test, instead of lines on stderr."""
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
def unused_tcp_port() -> int:
    """A port that stays free until the test takes it: pytest-asyncio's may go to another test meanwhile."""
    return free_port()


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    """The server behind `valkey`."""
    with running_valkey() as server:
        yield server


@pytest.fixture
def valkey(shared_valkey: Valkey) -> Valkey:
    """An empty Valkey, for tests that leave it running and as it was. Others start their own."""
    with shared_valkey.client() as client:
        client.flushall()
    return shared_valkey


@pytest.fixture
def upstream() -> Upstream:
    """A canned OneInbox."""
    return Upstream()


class OpenBroker:
    """Starts brokers for a test: `await open_broker(BROKER_DOCS="false")` is a client of one with these settings."""

    def __init__(self, stack: AsyncExitStack, upstream: Upstream) -> None:
        self._stack, self._upstream = stack, upstream

    async def __call__(
        self,
        given: Mapping[str, str] | None = None,
        /,
        *,
        peer: str = CLIENT,
        base_url: str = BROKER,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Clock = SYSTEM_CLOCK,
        **environ: str,
    ) -> httpx.AsyncClient:
        """A client at `peer` of a new broker in front of `upstream`."""
        broker = running_broker(
            settings({**(given or {}), **environ}),
            transport or self._upstream,
            peer=peer,
            base_url=base_url,
            clock=clock,
        )
        return await self._stack.enter_async_context(broker)


@pytest.fixture
async def open_broker(upstream: Upstream) -> AsyncIterator[OpenBroker]:
    """Starts brokers with settings of the test's choice."""
    async with AsyncExitStack() as stack:
        yield OpenBroker(stack, upstream)


@pytest.fixture
async def broker(open_broker: OpenBroker) -> httpx.AsyncClient:
    """A broker with nothing but the required settings."""
    return await open_broker()
