"""POST /session when OneInbox's calls of the day are used up."""

import asyncio
import time
from typing import Any

import httpx
import pytest

from app.broker import build
from app.clock import Clock
from tests.conftest import Logs, OpenBroker
from tests.support.harness import Upstream, post_session
from tests.support.shapes import assert_problem, assert_session, remaining

MIDNIGHT = 1_800_057_600.0
"""00:00 UTC of some day."""
METRICS_TOKEN = "metrics-token-of-the-operator"
USED_UP = {"calls_made_today": 100, "max_calls_per_day": 100, "calls_remaining_today": 0}


class Day:
    """A wall clock that a test sets; monotonic time passes as it does."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.clock = Clock(lambda: self.now, time.monotonic)


async def test_a_used_up_allowance_refuses_sessions_unsent(
    open_broker: OpenBroker, upstream: Upstream, logs: Logs
) -> None:
    day = Day(MIDNIGHT - 3600)
    upstream.usage.respond(json=USED_UP)
    broker = await open_broker(clock=day.clock, BROKER_METRICS_TOKEN=METRICS_TOKEN)

    for _ in range(20):
        refused = await post_session(broker)
        assert_problem(refused, "at-capacity")
        assert refused.headers["retry-after"] == "60"
        assert "OneInbox" not in refused.text

    assert not upstream.start.called
    requests = [entry for entry in logs if entry["event"] == "request"]
    assert {(entry["problem"], entry["reason"]) for entry in requests} == {("at-capacity", "oneinbox-calls")}
    metrics = (await broker.get("/metrics", headers={"Authorization": f"Bearer {METRICS_TOKEN}"})).text.splitlines()
    assert 'broker_limits_refused_total{enforced="true",limit="oneinbox-calls"} 20.0' in metrics
    assert "broker_oneinbox_calls_remaining 0.0" in metrics
    assert "broker_oneinbox_calls_per_day 100.0" in metrics


async def test_the_first_session_is_refused_too(open_broker: OpenBroker, upstream: Upstream) -> None:
    async def slow(_: httpx.Request) -> httpx.Response:
        for _turn in range(50):  # turns of the loop: enough for a start that does not wait
            await asyncio.sleep(0)
        return httpx.Response(200, json=USED_UP)

    upstream.usage.mock(side_effect=slow)
    broker = await open_broker()
    assert_problem(await post_session(broker), "at-capacity")


async def test_a_start_does_not_wait_long(
    open_broker: OpenBroker, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(build, "START_SECONDS", 0.01)
    upstream.usage.mock(side_effect=silent)
    async with asyncio.timeout(2):
        broker = await open_broker()
    assert_session(await post_session(broker))


async def test_at_midnight_sessions_start_again_and_nothing_was_spent(
    open_broker: OpenBroker, upstream: Upstream
) -> None:
    day = Day(MIDNIGHT - 30)
    upstream.usage.respond(json=USED_UP)
    broker = await open_broker(clock=day.clock)

    refused = await post_session(broker)
    assert_problem(refused, "at-capacity")
    assert refused.headers["retry-after"] == "30"

    day.now = MIDNIGHT
    started = await post_session(broker)
    assert_session(started)
    assert remaining(started) == 4
    assert upstream.start.call_count == 1


async def test_it_refuses_where_limits_are_only_observed(open_broker: OpenBroker, upstream: Upstream) -> None:
    upstream.usage.respond(json=USED_UP)
    broker = await open_broker(BROKER_LIMITS_MODE="observe")
    assert_problem(await post_session(broker), "at-capacity")
    assert not upstream.start.called


async def test_a_wrong_request_is_told_so_all_the_same(open_broker: OpenBroker, upstream: Upstream) -> None:
    upstream.usage.respond(json=USED_UP)
    broker = await open_broker()
    assert_problem(await post_session(broker, {"voice": "x"}), "invalid-request")


UNWATCHED: dict[str, tuple[int, Any]] = {
    "no-such-route": (404, {"detail": "Not Found"}),
    "not-allowed": (405, {"detail": "Method Not Allowed"}),
    "forbidden": (403, {"detail": "Forbidden"}),
    "broken": (500, {"detail": "Internal Server Error"}),
    "no-cap": (200, {**USED_UP, "max_calls_per_day": 0}),
    "another-shape": (200, {"usage": USED_UP}),
    "negative": (200, {"max_calls_per_day": 100, "calls_remaining_today": -1}),
}


@pytest.mark.parametrize(("status", "answer"), UNWATCHED.values(), ids=UNWATCHED.keys())
async def test_an_account_that_tells_no_allowance_is_not_watched(
    open_broker: OpenBroker, upstream: Upstream, status: int, answer: Any
) -> None:
    upstream.usage.respond(status, json=answer)
    broker = await open_broker(BROKER_METRICS_TOKEN=METRICS_TOKEN)
    assert_session(await post_session(broker))
    metrics = (await broker.get("/metrics", headers={"Authorization": f"Bearer {METRICS_TOKEN}"})).text.splitlines()
    assert "broker_oneinbox_calls_remaining NaN" in metrics
