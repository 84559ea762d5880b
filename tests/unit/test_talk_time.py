"""Talk minutes: what finished and what runs, of one user and of all, counted once."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import SecretStr

from app.config.agents import Agent
from app.config.plans import Entitlement
from app.identity import User
from app.limits import CallAttempt, Limits, LiveCalls
from app.limits.ledger import Ledger
from app.limits.live_calls import SWEEP_SECONDS
from app.oneinbox import CallRecord, OneInbox
from app.problems import Problem
from app.store.memory import MemoryStore
from tests.conftest import Logs, OpenBroker
from tests.support.harness import AGENT_ID, ONEINBOX, Upstream, post_session, start_call
from tests.support.shapes import assert_problem, assert_session

ANN, BEN = User(mode="jwt", id="ann"), User(mode="jwt", id="ben")
DAY = 86400
AGENT = Agent("main", AGENT_ID, None, frozenset())


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class House:
    """A store and a clock, and what replicas count there."""

    def __init__(self, minutes: int | None = 10, minutes_total: int | None = None, **options: Any) -> None:
        self.clock = Clock()
        self.store = MemoryStore(self.clock)
        self.ledger = Ledger(self.store, lease=2 * DAY, timed=True, now=self.clock)
        self.limits = Limits(
            self.store,
            self.ledger,
            [AGENT],
            global_session_limits="1000000/minute",
            request_limits="1000000/minute",
            max_live_calls_total=None,
            talk_minutes_total=minutes_total,
            clock=self.clock,
            **options,
        )
        self.entitlement = Entitlement("1000000/minute", 1000, minutes, 0)
        self._started = 0

    def live(self, upstream: Upstream) -> LiveCalls:
        """A replica that follows calls."""
        oneinbox = OneInbox(ONEINBOX, SecretStr("oi_sk_x"), upstream, timeout=5, connect_timeout=1)
        ledger = Ledger(self.store, lease=2 * DAY, timed=True, now=self.clock)
        return LiveCalls(self.store, oneinbox, ledger, max_seconds=0, join_timeout=0, now=self.clock)

    async def start(self, user: User = ANN) -> CallAttempt:
        """A call begins."""
        attempt = self._attempt(user)
        await self.limits.reserve(user, AGENT, attempt, self.entitlement)
        return attempt

    def _attempt(self, user: User) -> CallAttempt:
        self._started += 1
        return CallAttempt(f"r{self._started}", int(self.clock()), AGENT.name, user.store_name, "owner")

    async def end(self, attempt: CallAttempt, seconds: float | None) -> None:
        """A call is seen ended."""
        upstream = Upstream()
        live = self.live(upstream)
        await live.note_end(attempt.request_id, ended(seconds))

    async def refusal(self, user: User = ANN) -> Problem | None:
        """What a user who asks now is told; None: nothing."""
        try:
            reservation = await self.limits.reserve(user, AGENT, self._attempt(user), self.entitlement)
        except Problem as problem:
            return problem
        await self.limits.release(reservation)
        return None

    async def is_refused(self, user: User = ANN) -> bool:
        return await self.refusal(user) is not None


def ended(seconds: float | None) -> CallRecord:
    return CallRecord(id="c", status="completed", duration_seconds=seconds)


def wait_of(problem: Problem | None) -> int:
    assert problem is not None
    return int(problem.headers["Retry-After"])


async def test_finished_calls_count_by_their_duration() -> None:
    house = House(minutes=10)
    for _ in range(9):
        await house.end(await house.start(), 60)
    await house.end(await house.start(), 59)
    assert not await house.is_refused()
    await house.end(await house.start(), 0.2)  # a second begun is a second
    problem = await house.refusal()
    assert problem is not None
    assert problem.slug == "talk-time-used-up"


async def test_running_calls_count_from_their_post_until_now() -> None:
    house = House(minutes=10)
    await house.start()
    await house.start()
    house.clock.now += 299
    assert not await house.is_refused()
    house.clock.now += 1
    problem = await house.refusal()
    assert problem is not None
    assert (problem.slug, wait_of(problem)) == ("talk-time-used-up", 60), "no end is known"


async def test_finished_and_running_calls_count_together() -> None:
    house = House(minutes=10)
    await house.end(await house.start(), 300)
    await house.start()
    house.clock.now += 299
    assert not await house.is_refused()
    house.clock.now += 1
    assert await house.is_refused()


async def test_the_end_of_a_call_counts_its_talk_and_not_its_life() -> None:
    house = House(minutes=10)
    attempt = await house.start()
    house.clock.now += 601
    assert await house.is_refused()
    await house.end(attempt, 120)
    assert not await house.is_refused()


async def test_a_call_that_says_no_duration_counts_from_its_post() -> None:
    record = CallRecord(id="c", status="completed")
    house = House(minutes=10)
    attempt = await house.start()
    house.clock.now += 600
    live = house.live(Upstream())
    await live.give(attempt, "c")
    await live.note_end(attempt.request_id, record)
    assert await house.is_refused()


@pytest.mark.parametrize("seconds", [0.0, -5.0])
async def test_a_call_without_talk_counts_nothing(seconds: float) -> None:
    house = House(minutes=1)
    attempt = await house.start()
    house.clock.now += 30
    await house.end(attempt, seconds)
    await house.start()
    house.clock.now += 59
    assert not await house.is_refused()


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 1e300])
async def test_a_duration_that_cannot_be_is_survived(seconds: float) -> None:
    house = House(minutes=1)
    await house.end(await house.start(), seconds)


async def test_minutes_come_back_a_day_after_their_call_and_retry_after_says_so() -> None:
    house = House(minutes=10)
    await house.end(await house.start(), 300)
    house.clock.now += 3600
    await house.end(await house.start(), 300)
    house.clock.now += 60
    wait = wait_of(await house.refusal())
    assert DAY - 3660 <= wait <= DAY - 3660 + DAY / 64 + 1
    house.clock.now += wait - 1200
    assert await house.is_refused()
    house.clock.now += 1200
    assert not await house.is_refused()


async def test_retry_after_is_honest_when_more_than_all_was_used() -> None:
    house = House(minutes=10)
    await house.end(await house.start(), 60)
    house.clock.now += 3600
    await house.end(await house.start(), 3600)
    wait = wait_of(await house.refusal())
    house.clock.now += wait
    assert not await house.is_refused()


@pytest.mark.parametrize(("minutes", "seconds"), [(1, 50), (60, 50), (1440, 590)])
async def test_never_more_than_the_minutes_in_any_day(minutes: int, seconds: int) -> None:
    """Calls one after the other for three days: each is started with minutes left."""
    house = House(minutes=minutes)
    talked: list[float] = []
    for _ in range(3 * DAY // seconds):
        if await house.is_refused():
            house.clock.now += seconds
            continue
        attempt = await house.start()
        house.clock.now += seconds
        await house.end(attempt, seconds)
        talked.append(house.clock.now)
    first = 0
    for last, at in enumerate(talked):
        while talked[first] <= at - DAY:
            first += 1
        assert (last - first + 1) * seconds <= minutes * 60 + seconds, (
            "the call that was under way when they were used up"
        )


async def test_users_have_minutes_of_their_own() -> None:
    house = House(minutes=1)
    await house.end(await house.start(ANN), 60)
    assert await house.is_refused(ANN)
    assert not await house.is_refused(BEN)


async def test_everybodys_minutes_are_at_capacity_for_each() -> None:
    house = House(minutes=None, minutes_total=2)
    await house.end(await house.start(ANN), 60)
    await house.start(BEN)
    house.clock.now += 59
    assert not await house.is_refused(ANN)
    house.clock.now += 1
    for user in (ANN, BEN, User(mode="jwt", id="new")):
        problem = await house.refusal(user)
        assert problem is not None
        assert problem.slug == "at-capacity"
        assert wait_of(problem) == 60


async def test_the_users_own_refusal_comes_before_everybodys() -> None:
    house = House(minutes=1, minutes_total=1)
    await house.end(await house.start(ANN), 60)
    problem = await house.refusal(ANN)
    assert problem is not None
    assert problem.slug == "talk-time-used-up"
    problem = await house.refusal(BEN)
    assert problem is not None
    assert problem.slug == "at-capacity"


async def test_without_limits_no_minutes_are_refused() -> None:
    house = House(minutes=None)
    await house.end(await house.start(), 1e6)
    assert not await house.is_refused()


async def test_observing_lets_it_through_and_says_so(logs: Logs) -> None:
    house = House(minutes=1, minutes_total=1, enforce=False)
    await house.end(await house.start(), 60)
    assert not await house.is_refused()
    assert [len(entry["limits"]) for entry in logs if entry["event"] == "would_refuse"] == [2]


async def test_an_end_that_many_see_counts_once_over_replicas() -> None:
    house = House(minutes=10)
    upstream = Upstream()
    replicas = [house.live(upstream) for _ in range(5)]
    attempt = await house.start()
    await replicas[0].give(attempt, "c")
    house.clock.now += SWEEP_SECONDS
    upstream.has_call("c", status="completed", duration_seconds=300)
    sweeps = [each.sweep() for each in replicas]
    sights = [each.note_end(attempt.request_id, ended(300)) for each in replicas * 3]
    await asyncio.gather(*sweeps, *sights, *(each.stop(attempt, "c", "why") for each in replicas))
    await house.start()
    house.clock.now += 299
    assert not await house.is_refused()
    house.clock.now += 1
    assert await house.is_refused()


# --- as a browser sees it ---


async def test_a_session_is_refused_once_the_minutes_are_used_up(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_TALK_MINUTES="1")
    path = await start_call(broker)
    request_id = upstream.asked["metadata"]["broker_request_id"]
    assert_session(await post_session(broker))
    upstream.has_call("call_1", status="completed", duration_seconds=3600, metadata={"broker_request_id": request_id})
    assert (await broker.get(path)).status_code == 200
    attempts = upstream.start.call_count
    response = await post_session(broker)
    assert_problem(response, "talk-time-used-up")
    assert DAY - DAY / 64 - 60 <= int(response.headers["retry-after"]) <= DAY + DAY / 64
    assert upstream.start.call_count == attempts


async def test_a_refusal_for_the_minutes_spends_no_session(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_TALK_MINUTES="1", BROKER_SESSION_LIMITS="2/minute", BROKER_MAX_LIVE_CALLS="9")
    path = await start_call(broker)
    request_id = upstream.asked["metadata"]["broker_request_id"]
    upstream.has_call("call_1", status="completed", duration_seconds=60, metadata={"broker_request_id": request_id})
    await broker.get(path)
    for _ in range(5):
        assert_problem(await post_session(broker), "talk-time-used-up")


async def test_everybodys_minutes(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(peer="10.0.0.1", BROKER_TRUSTED_PROXIES="10.0.0.0/8", BROKER_GLOBAL_TALK_MINUTES="1")
    first = await post_session(broker, x_forwarded_for="192.0.2.1")
    request_id = upstream.asked["metadata"]["broker_request_id"]
    created = datetime.now(UTC).isoformat()
    upstream.has_call(
        "call_1",
        status="completed",
        created_at=created,
        duration_seconds=60,
        metadata={"broker_request_id": request_id},
    )
    await broker.get(first.headers["location"], headers={"X-Forwarded-For": "192.0.2.1"})
    assert_problem(await post_session(broker, x_forwarded_for="192.0.2.2"), "at-capacity")


async def test_a_stopped_call_counts_too(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_TALK_MINUTES="1")
    path = await start_call(broker)
    request_id = upstream.asked["metadata"]["broker_request_id"]
    metadata = {"broker_request_id": request_id}
    upstream.has_call("call_1", status="in_progress", metadata=metadata)
    upstream.router.post(path__regex=r"^/v1/calls/[^/]+/stop$").mock(side_effect=None).respond(
        json={"id": "call_1", "status": "completed", "duration_seconds": 61, "metadata": metadata}
    )
    assert (await broker.post(f"{path}/stop")).status_code == 200
    assert_problem(await post_session(broker), "talk-time-used-up")
