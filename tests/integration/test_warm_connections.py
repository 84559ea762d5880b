"""Warm connections against real TLS servers that close idle ones, unknown to the broker, after 1, 5 and 60 s.

All times are a twentieth of the real ones.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import httpx
import pytest

from app.oneinbox import dialer, idle_time, pool
from app.oneinbox.transport import open_transport
from app.telemetry.metrics import Metrics
from tests.support.certificates import Authority

pytestmark = [pytest.mark.process, pytest.mark.every_loop]

TIMES_FASTER = 20
POSTS = 24
LEARNT_AFTER = 8
"""POSTs by which even a server that closes early is known."""


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in {
        idle_time: ("FIRST_SECONDS", "LONGEST_SECONDS", "LEAD_SECONDS", "RELEARN_SECONDS", "TIMER_SECONDS"),
        pool: ("IDLE_SECONDS", "LOOK_SECONDS", "WORTH_SECONDS", "FIRST_PAUSE", "LONGEST_PAUSE", "ADDRESS_SECONDS"),
        dialer: ("ADDRESS_SECONDS",),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name) / TIMES_FASTER)


class CountingMetrics(Metrics):
    """Counts what the transport tells it."""

    cold = 0

    def count_cold_post(self) -> None:
        self.cold += 1


@dataclass
class Server:
    """A server that closes connections idle for `keeps` seconds. `posts`: how often each came."""

    keeps: float
    posts: Counter[bytes] = field(default_factory=Counter)

    def protocol(self) -> asyncio.Protocol:
        return _Served(self)


class _Served(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self._server = server
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        self._server.posts[data.rpartition(b"\r\n\r\n")[2]] += 1
        self._transport.write(b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\n{}")
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._server.keeps / TIMES_FASTER, self._transport.close)


@asynccontextmanager
async def serving(server: Server, authority: Authority) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(server.protocol, "127.0.0.1", 0, ssl=authority.server)
    try:
        yield f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()


async def posts_at_random_gaps(server: Server, authority: Authority) -> list[int]:
    """Send all POSTs; return for each how many handshakes it waited for."""
    metrics, chance = CountingMetrics(), random.Random(server.keeps)
    cold = []
    async with serving(server, authority) as url:
        transport = open_transport(url, pool_size=10, warm=1, metrics=metrics)
        for number in range(POSTS):
            await asyncio.sleep(chance.uniform(0, 60) / TIMES_FASTER)  # these gaps are what is tested
            before = metrics.cold
            request = httpx.Request("POST", url, stream=httpx.ByteStream(b"%d" % number))
            response = await transport.handle_async_request(request)
            await response.aread()
            await response.aclose()
            cold.append(metrics.cold - before)
        await transport.aclose()
    return cold


async def test_no_post_is_lost_or_sent_twice_and_few_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    servers = [Server(1), Server(5), Server(60)]
    results = await asyncio.gather(*(posts_at_random_gaps(server, authority) for server in servers))

    for server, cold in zip(servers, results, strict=True):
        assert len(server.posts) == POSTS
        assert set(server.posts.values()) == {1}
        # A twentieth of real time: a busy machine may be late with one.
        assert server.keeps == 1 or sum(cold[LEARNT_AFTER:]) <= 2, server
