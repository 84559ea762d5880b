"""POST /session while the circuit breaker is open: answered at once, unsent, and nothing is spent."""

import asyncio

import httpx
import pytest

from app.oneinbox.circuit_breaker import FAILURE_PAUSE, FAILURES_IN_A_ROW, CircuitBreaker
from tests.conftest import OpenBroker
from tests.support.harness import CLIENT, Upstream, post_session, start_call, started
from tests.support.shapes import assert_problem, assert_session, remaining

MANY = "100000/minute"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of every circuit breaker."""
    clock = Clock()
    monkeypatch.setattr("app.oneinbox.client.CircuitBreaker", lambda _, metrics: CircuitBreaker(clock, metrics))
    return clock


async def pause(broker: httpx.AsyncClient, upstream: Upstream, seconds: int) -> None:
    """Have OneInbox answer a 429 once."""
    upstream.start.respond(429, headers={"Retry-After": str(seconds)})
    assert_problem(await post_session(broker), "upstream-busy")
    upstream.works_again()


async def busy(broker: httpx.AsyncClient, **headers: str) -> int:
    """A request that is refused as busy; its Retry-After."""
    response = await post_session(broker, **headers)
    assert_problem(response, "upstream-busy")
    return int(response.headers["retry-after"])


async def test_after_a_429_nobody_asks_until_it_is_over(
    open_broker: OpenBroker, upstream: Upstream, clock: Clock
) -> None:
    broker = await open_broker()
    await pause(broker, upstream, 7)

    assert [await busy(broker) for _ in range(3)] == [7, 7, 7]
    clock.now += 6.9
    assert await busy(broker) == 1
    assert upstream.start.call_count == 1

    clock.now += 0.1
    assert_session(await post_session(broker))
    assert_session(await post_session(broker))


@pytest.mark.parametrize(
    ("error", "slug"),
    [
        (httpx.ConnectError, "upstream-unreachable"),
        (httpx.ConnectTimeout, "upstream-unreachable"),
        (httpx.ReadTimeout, "upstream-timeout"),
        (httpx.ReadError, "upstream-error"),
    ],
)
async def test_after_ten_failures_in_a_row_nobody_asks_for_five_seconds(
    error: type[httpx.TransportError], slug: str, open_broker: OpenBroker, upstream: Upstream, clock: Clock
) -> None:
    broker = await open_broker(BROKER_SESSION_LIMITS=MANY)
    upstream.start.mock(side_effect=error(""))
    for _ in range(FAILURES_IN_A_ROW):
        assert_problem(await post_session(broker), slug)
    upstream.works_again()

    assert await busy(broker) == FAILURE_PAUSE
    assert upstream.start.call_count == FAILURES_IN_A_ROW

    clock.now += FAILURE_PAUSE
    assert_session(await post_session(broker))


async def test_a_server_error_is_no_reason(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_SESSION_LIMITS=MANY)
    upstream.start.respond(500)

    for _ in range(3 * FAILURES_IN_A_ROW):
        assert_problem(await post_session(broker), "upstream-error")


async def test_what_is_not_sent_spends_nothing(open_broker: OpenBroker, upstream: Upstream, clock: Clock) -> None:
    broker = await open_broker(
        BROKER_SESSION_LIMITS="2/minute", BROKER_GLOBAL_SESSION_LIMITS="2/minute", BROKER_MAX_LIVE_CALLS="1"
    )
    await pause(broker, upstream, 7)
    for _ in range(20):
        await busy(broker)

    clock.now += 7
    response = await post_session(broker)

    assert_session(response)
    assert remaining(response) == 1


async def test_of_a_hundred_at_the_end_one_asks(open_broker: OpenBroker, upstream: Upstream, clock: Clock) -> None:
    async def slow(_: httpx.Request) -> httpx.Response:
        arrived.set()
        await go_on.wait()
        return httpx.Response(201, json=started())

    arrived, go_on = asyncio.Event(), asyncio.Event()
    broker = await open_broker(BROKER_SESSION_LIMITS=MANY, BROKER_GLOBAL_SESSION_LIMITS=MANY)
    await pause(broker, upstream, 7)
    clock.now += 7
    upstream.start.mock(side_effect=slow)

    probe = asyncio.create_task(post_session(broker))
    await arrived.wait()
    others = await asyncio.gather(*(post_session(broker) for _ in range(99)))
    go_on.set()

    assert_session(await probe)
    for response in others:
        assert_problem(response, "upstream-busy")
    assert upstream.start.call_count == 2
    upstream.works_again()
    assert_session(await post_session(broker))


async def test_calls_are_read_and_ended_meanwhile(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker()
    path = await start_call(broker)
    upstream.has_call("call_1")
    await pause(broker, upstream, 7)

    assert (await broker.get(path)).status_code == 200
    assert (await broker.post(f"{path}/stop")).status_code == 200
    assert await busy(broker) == 7


async def test_it_is_the_same_for_everybody(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(peer="10.0.0.1", BROKER_TRUSTED_PROXIES="10.0.0.0/8")
    await pause(broker, upstream, 7)

    assert await busy(broker, X_Forwarded_For=CLIENT) == 7


async def test_a_key_is_free_again(open_broker: OpenBroker, upstream: Upstream, clock: Clock) -> None:
    broker = await open_broker()
    await pause(broker, upstream, 7)
    assert await busy(broker, Idempotency_Key="a-key-of-sixteen") == 7

    clock.now += 7
    response = await post_session(broker, Idempotency_Key="a-key-of-sixteen")

    assert_session(response)
    assert "idempotency-replayed" not in response.headers
