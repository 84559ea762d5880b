"""Connections to OneInbox are ready, however long nobody calls: learnt idle times, renewals, and pauses."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from app.oneinbox.http1 import Connection
from app.oneinbox.pool import LONGEST_PAUSE, Pool
from app.telemetry.metrics import Metrics
from tests.support.idle_server import IdleServer
from tests.support.simulated_time import in_simulated_time

HOUR = 3600
POST = b"POST / HTTP/1.1\r\n\r\n"


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated connections have no socket to ask the kernel about."""
    monkeypatch.setattr(Connection, "has_news", lambda _: False)


@asynccontextmanager
async def warm_pool(server: IdleServer, warm: int = 1) -> AsyncIterator[Pool]:
    random.seed(1)
    pool = Pool(server, size=100, warm=warm)
    try:
        yield pool
    finally:
        await pool.aclose()
        await asyncio.sleep(0)
        assert server.open == []


async def post(pool: Pool) -> bool:
    """Send a POST; return whether it found a connection ready."""
    await pool.enter()
    connection = pool.reuse()
    ready = connection is not None
    connection = connection or await pool.connect(3)
    try:
        connection.send(POST)
        await connection.head()
        assert await connection.read() == b"{}"
    except BaseException:
        pool.leave()
        raise
    pool.leave(connection)
    return ready


@pytest.mark.parametrize("keeps", [5, 20, 60, 350, None])
@in_simulated_time
async def test_a_connection_is_ready_from_the_start_on_and_after_any_idle_time(keeps: float | None) -> None:
    server = IdleServer(keeps)
    async with warm_pool(server) as pool:
        await asyncio.sleep(1)  # for the first handshake
        assert await post(pool)
        await asyncio.sleep(30)  # a server that closes after less than 15 s is known by then
        ready = []
        for idle in (0, 5, 20, 75, 300, 900) * 3:
            await asyncio.sleep(idle)
            ready.append(await post(pool))

        assert all(ready)


@pytest.mark.parametrize(("keeps", "most"), [(5, 1000), (20, 240), (60, 80), (350, 20), (None, 20)])
@in_simulated_time
async def test_handshakes_per_idle_hour(keeps: float | None, most: int) -> None:
    server = IdleServer(keeps)
    async with warm_pool(server):
        await asyncio.sleep(HOUR)
        server.attempts.clear()
        await asyncio.sleep(HOUR)

        assert len(server.attempts) <= most
        assert len(server.open) <= 2  # the warm one, and the one that shows how long the server keeps it
        assert server.requests == 0


@in_simulated_time
async def test_learning_takes_few_handshakes() -> None:
    server = IdleServer(None)
    async with warm_pool(server):
        await asyncio.sleep(600)

        assert len(server.attempts) <= 8


@pytest.mark.parametrize("keeps", [1, 5, 60, 350])
@in_simulated_time
async def test_no_post_is_lost_at_random_gaps(keeps: float) -> None:
    server = IdleServer(keeps)
    chance = random.Random(keeps)
    async with warm_pool(server) as pool:
        cold = []
        for _ in range(200):
            await asyncio.sleep(chance.uniform(0, 90))
            cold.append(not await post(pool))

        assert server.requests == 200
        assert keeps == 1 or not any(cold[5:])


@in_simulated_time
async def test_connections_that_carried_a_request_are_learnt_apart_from_others() -> None:
    server = IdleServer(keeps_unused=60, keeps_used=4)
    async with warm_pool(server) as pool:
        ready = []
        for _ in range(50):
            ready.append(await post(pool))
            await asyncio.sleep(30)

        assert all(ready[3:])


@in_simulated_time
async def test_what_the_server_says_of_its_patience_holds_at_once() -> None:
    server = IdleServer(keeps_unused=60, keeps_used=4)
    server.answer = b"HTTP/1.1 201 Created\r\nKeep-Alive: max=100, timeout=4\r\ncontent-length: 2\r\n\r\n{}"
    async with warm_pool(server) as pool:
        await asyncio.sleep(1)
        await post(pool)
        await asyncio.sleep(4.1)  # one that had to see the end of the connection would be connecting now

        assert await post(pool)


@in_simulated_time
async def test_a_restarted_server_does_not_teach_short_times_for_good() -> None:
    server = IdleServer(60)
    async with warm_pool(server):
        await asyncio.sleep(HOUR)
        for wire in list(server.open):
            wire.abort()
        await asyncio.sleep(300)
        server.attempts.clear()
        await asyncio.sleep(HOUR)

        assert len(server.attempts) <= 80


@pytest.mark.parametrize("warm", [0, 1, 3])
@in_simulated_time
async def test_as_many_are_ready_as_the_setting_says(warm: int) -> None:
    server = IdleServer(60)
    async with warm_pool(server, warm) as pool:
        await asyncio.sleep(10)
        assert len(server.open) == warm
        await asyncio.gather(*(post(pool) for _ in range(8)))
        await asyncio.sleep(40)

        assert warm <= len(server.open) <= warm + 2 * (warm > 0)


def refuses(server: IdleServer) -> None:
    server.fails = True


def closes_at_once(server: IdleServer) -> None:
    server.keeps_unused = server.keeps_used = 0.0


def closes_after_a_second(server: IdleServer) -> None:
    server.keeps_unused = server.keeps_used = 1.0


def closes_before_it_is_worth_it(server: IdleServer) -> None:
    server.keeps_unused = server.keeps_used = 1.9


def never_speaks(server: IdleServer) -> None:
    server.connect_seconds = 10
    server.fails = True


@pytest.mark.parametrize(
    "trouble", [refuses, closes_at_once, closes_after_a_second, closes_before_it_is_worth_it, never_speaks]
)
@in_simulated_time
async def test_a_server_that_keeps_nothing_meets_no_storm(trouble: Callable[[IdleServer], None]) -> None:
    server = IdleServer(60)
    trouble(server)
    with capture_logs() as logs:
        async with warm_pool(server):
            await asyncio.sleep(600)

            assert server.shortest_gap >= 1
            assert len(server.attempts) <= 8 + 600 / LONGEST_PAUSE
            assert logs == []


@in_simulated_time
async def test_a_server_that_closes_after_each_answer_still_finds_a_connection_ready() -> None:
    server = IdleServer(60)
    server.answer = b"HTTP/1.1 201 Created\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}"
    async with warm_pool(server) as pool:
        ready = []
        for _ in range(20):
            await asyncio.sleep(5)
            ready.append(await post(pool))

        assert all(ready)
        assert server.shortest_gap >= 1


@in_simulated_time
async def test_it_is_warm_again_after_an_outage() -> None:
    server = IdleServer(60)
    async with warm_pool(server) as pool:
        await asyncio.sleep(100)
        server.fails = True
        for wire in list(server.open):
            wire.abort()
        await asyncio.sleep(300)
        server.fails = False
        await asyncio.sleep(LONGEST_PAUSE * 1.25 + 1)

        assert await post(pool)


@in_simulated_time
async def test_a_connection_to_an_address_that_is_gone_is_replaced() -> None:
    server = IdleServer(None)
    async with warm_pool(server):
        await asyncio.sleep(30)
        server.address, server.moved = "192.0.2.2", {"192.0.2.1"}
        await asyncio.sleep(11)

        assert {wire.connection.address for wire in server.open if not wire.connection.has_carried} >= {"192.0.2.2"}


@in_simulated_time
async def test_a_connection_with_news_in_the_kernel_carries_no_request() -> None:
    server = IdleServer(60)
    async with warm_pool(server) as pool:
        await asyncio.sleep(2)
        (idle,) = server.open
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Connection, "has_news", lambda each: each is idle.connection)

            assert not await post(pool)


@in_simulated_time
async def test_a_connection_that_was_taken_and_not_used_is_as_old_as_before() -> None:
    server = IdleServer(20)
    async with warm_pool(server) as pool:
        await asyncio.sleep(10)
        await pool.enter()
        connection = pool.reuse()
        assert connection is not None
        pool.put_back(connection)
        pool.leave()

        assert asyncio.get_running_loop().time() - connection.idle_since > 9


@in_simulated_time
async def test_metrics_count_handshakes_and_posts_that_waited_for_one() -> None:
    metrics = Metrics()
    server = IdleServer(60)
    pool = Pool(server, size=10, warm=1, metrics=metrics)
    await asyncio.sleep(HOUR)
    await pool.aclose()
    text = metrics.text("")[0].decode()
    samples = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}

    assert samples["broker_oneinbox_handshakes_total"] == len(server.attempts)
