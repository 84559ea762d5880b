"""POST /calls/{call}/stop?after=: for a page that goes, and may be reloading."""

import asyncio
import time

import httpx
import pytest

from app.clock import Clock
from tests.conftest import OpenBroker
from tests.support.harness import Upstream, start_call
from tests.support.shapes import assert_problem

ROUND = 1.5
"""Seconds in which a broker has looked at what is due."""


def stops(upstream: Upstream) -> int:
    return sum(request.url.path.endswith("/stop") for request in upstream.requests)


@pytest.mark.parametrize("after", ["1", "10", "30", "05"])
async def test_it_answers_with_the_running_call(broker: httpx.AsyncClient, upstream: Upstream, after: str) -> None:
    path = await start_call(broker)
    upstream.has_call("call_1")

    response = await broker.post(f"{path}/stop?after={after}")

    assert response.status_code == 200
    assert response.json()["status"] == "in_progress"
    assert response.json() == (await broker.get(path)).json()
    assert response.headers["etag"]
    assert stops(upstream) == 0


WRONG = ["", "0", "31", "-1", "1.5", "ten", "1e1", "%2B5", "+5", "٥", "100", "5&after=6", "5&after="]


@pytest.mark.parametrize("after", WRONG)
async def test_other_times_are_refused(broker: httpx.AsyncClient, upstream: Upstream, after: str) -> None:
    path = await start_call(broker)
    upstream.has_call("call_1")

    problem = assert_problem(await broker.post(f"{path}/stop?after={after}"), "invalid-request")

    assert [each["loc"] for each in problem["errors"]] == [["query", "after"]]
    assert stops(upstream) == 0


async def test_an_ended_call_is_answered_as_it_is(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = await start_call(broker)
    upstream.has_call("call_1", status="completed")

    response = await broker.post(f"{path}/stop?after=5")

    assert (response.status_code, response.json()["status"]) == (200, "completed")


async def test_a_strangers_call_is_not_found(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = await start_call(broker)
    upstream.has_call("call_1")

    assert_problem(await broker.post(f"{path}x/stop?after=5"), "not-found")


@pytest.mark.parametrize("comes_back", [True, False])
async def test_the_owner_decides(open_broker: OpenBroker, upstream: Upstream, comes_back: bool) -> None:
    passed = 0.0
    broker = await open_broker(clock=Clock(lambda: time.time() + passed, lambda: time.monotonic() + passed))
    path = await start_call(broker)
    upstream.has_call("call_1")
    await broker.post(f"{path}/stop?after=10")

    if comes_back:
        await broker.get(path)
    passed = 11
    await asyncio.sleep(ROUND)  # until the index of due times was looked at

    assert stops(upstream) == (not comes_back)


async def test_a_call_that_this_deployment_does_not_know_is_stopped_at_once(
    open_broker: OpenBroker, upstream: Upstream
) -> None:
    """No store remembers it, so no replica could stop it later."""
    secret = "s" * 32
    path = await start_call(await open_broker(BROKER_SECRET=secret))
    upstream.has_call("call_1")

    response = await (await open_broker(BROKER_SECRET=secret)).post(f"{path}/stop?after=30")

    assert (response.status_code, response.json()["status"]) == (200, "completed")
    assert stops(upstream) == 1
