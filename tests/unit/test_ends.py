"""When running calls end: their own ends, minutes, and what stands in the way. Time is injected."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import respx
from pydantic import SecretStr

from app.config.agents import Agent
from app.config.plans import Entitlement
from app.identity import User
from app.limits import CallAttempt, Limits, LiveCalls
from app.limits import record as records
from app.limits.call_attempt import NEVER
from app.limits.ledger import Kept, Ledger
from app.limits.live_calls import COLLECT_SECONDS, LOST, STOP_AGAIN_SECONDS
from app.oneinbox import OneInbox
from app.store import BUDGET, KEPT
from app.store.memory import MemoryStore
from tests.support.harness import AGENT_ID, ONEINBOX, Upstream

ANN, BEN = User(mode="jwt", id="ann"), User(mode="jwt", id="ben")
AGENT = Agent("main", AGENT_ID, None, frozenset())
NOW = 1_800_000_000.0


class World:
    """A store, a OneInbox, and replicas; `minutes`: of each user; `seconds`: longest call, 0: no limit."""

    def __init__(self, *, minutes: int | None = 1, seconds: float = 0, **options: Any) -> None:
        self.now = NOW
        self.store = MemoryStore(lambda: self.now)
        self.upstream = Upstream()
        self.oneinbox = OneInbox(ONEINBOX, SecretStr("oi_sk_x"), self.upstream, timeout=5, connect_timeout=1)
        self.entitlement = Entitlement("1000/minute", 1000, minutes, 0)
        self.seconds = seconds
        self.live = self.replica(**options)
        self.limits = Limits(
            self.store,
            self.live.ledger,
            [AGENT],
            global_session_limits="100000/minute",
            request_limits="1000/minute",
            max_live_calls_total=None,
            clock=lambda: self.now,
        )
        self._started = 0

    def replica(self, minutes_of: Callable[[str], int | None] = lambda _: KEPT) -> LiveCalls:
        ledger = Ledger(self.store, lease=100_000, timed=True, now=lambda: self.now)
        return LiveCalls(
            self.store,
            self.oneinbox,
            ledger,
            max_seconds=self.seconds,
            join_timeout=0,
            minutes_of=minutes_of,
            now=lambda: self.now,
        )

    async def start(self, user: User = ANN) -> str:
        """Start a call, and give it to its client; return its id."""
        attempt = await self.reserve(user)
        call_id = f"c{self._started}"
        await self.live.give(attempt, call_id)
        return call_id

    async def reserve(self, user: User = ANN) -> CallAttempt:
        self._started += 1
        ends = self.now + self.seconds if self.seconds else NEVER
        attempt = CallAttempt(f"r{self._started}", int(self.now), "main", user.store_name, "owner", ends=ends)
        await self.limits.reserve(user, AGENT, attempt, self.entitlement)
        self.upstream.has_call(f"c{self._started}", status="in_progress")
        return attempt

    async def wait(self, seconds: float, *replicas: LiveCalls) -> None:
        """Let time pass, second by second."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1)
            for live in replicas or (self.live,):
                await live.flush()
                await live.take_due()
                await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name() == "stop"))

    def stops(self) -> respx.Route:
        """How OneInbox takes it when a call is to be stopped."""
        return self.upstream.router.post(path__regex=r"^/v1/calls/[^/]+/stop$")

    def stopped(self) -> list[str]:
        """The calls that OneInbox was asked to stop, in order."""
        paths = [request.url.path.split("/") for request in self.upstream.requests]
        return [path[3] for path in paths if path[-1] == "stop"]


# --- minutes ---


async def test_two_calls_end_when_they_have_used_the_minutes_together() -> None:
    world = World(minutes=1)
    await world.start()
    await world.start()
    other = await world.start(BEN)
    await world.wait(29)
    assert world.stopped() == []
    await world.wait(2)
    assert sorted(world.stopped()) == ["c1", "c2"]
    assert other not in world.stopped()


async def test_a_plan_without_minutes_ends_the_limit_of_running_calls() -> None:
    world = World(minutes=1)
    await world.start()
    world.entitlement = world.entitlement._replace(talk_minutes=None)
    await world.start()
    await world.wait(100)
    assert world.stopped() == []


@pytest.mark.parametrize(("limit", "stopped"), [(None, []), (120, []), (60, ["c1"])])
async def test_the_settings_of_now_count_and_not_those_of_the_start(limit: int | None, stopped: list[str]) -> None:
    world = World(minutes=1)
    await world.start()
    restarted = world.replica(lambda _: limit)
    await world.wait(70, restarted)
    assert world.stopped() == stopped


async def test_a_budget_whose_calls_are_gone_is_due_no_more() -> None:
    world = World(minutes=1)
    attempt = await world.reserve()
    await world.wait(61)
    world.now += 200_000
    await world.wait(2)
    assert await world.store.due_in([BUDGET + name for name in attempt.sets]) == [None, None, None]


async def test_a_call_that_was_put_back_uses_minutes_again() -> None:
    world = World(minutes=1)
    await world.start()
    world.now += 10
    attempt = CallAttempt("lost", int(world.now) - 10, "main", ANN.store_name, "owner", ends=NEVER)
    await world.live.restore(attempt, "c9")
    await world.wait(21)
    assert sorted(world.stopped()) == ["c1", "c9"]


async def test_a_store_that_lost_all_ends_a_call_that_was_put_back_by_the_settings() -> None:
    world = World(minutes=1)
    live = world.replica(lambda _: 60)
    attempt = CallAttempt("lost", int(world.now) - 10, "main", ANN.store_name, "owner", ends=NEVER)
    world.upstream.has_call("c9", status="in_progress")
    await live.restore(attempt, "c9")
    await world.wait(49, live)
    assert world.stopped() == []
    await world.wait(2, live)
    assert world.stopped() == ["c9"]


async def test_many_calls_at_once_are_ended_by_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.limits.live_calls.STOPS_AT_ONCE", 4)
    world = World(minutes=1)
    for _ in range(20):
        await world.start()
    await world.wait(6, world.live, world.replica())
    assert sorted(world.stopped()) == sorted(f"c{number}" for number in range(1, 21))


# --- ends ---


async def test_a_call_that_no_client_has_ends_at_its_own_end_too() -> None:
    world = World(minutes=None, seconds=6)
    attempt = await world.reserve()
    mark = b"running"
    await world.store.add("kept", mark, 60)
    await world.live.leave(attempt, "c1", Kept("kept", mark, b"answer", 60))
    assert COLLECT_SECONDS > 6
    await world.wait(7)
    assert world.stopped() == ["c1"]


async def test_a_stop_that_is_refused_for_longer_than_the_lease_is_tried_again() -> None:
    world = World(minutes=None, seconds=6)
    world.stops().respond(500)
    await world.start()
    await world.wait(2000)
    world.stops().mock(side_effect=None).respond(json={"id": "c1", "status": "completed"})
    tried = len(world.stopped())
    await world.wait(STOP_AGAIN_SECONDS + 1)
    assert len(world.stopped()) == tried + 1
    await world.wait(60)
    assert len(world.stopped()) == tried + 1


async def test_an_end_that_no_replica_saw_comes_when_one_is_back() -> None:
    world = World(minutes=None, seconds=6)
    await world.start()
    world.now += 100_000
    await world.wait(2)
    assert world.stopped() == ["c1"]


async def test_a_record_that_cannot_be_read_stays_due() -> None:
    world = World(minutes=None, seconds=6)
    await world.start()
    kept = await world.store.get("call:r1")
    assert kept is not None
    await world.store.set("call:r1", b'{"v":99,"state":"tomorrow","member":"r1"}', 9000)
    await world.wait(20)
    await world.store.set("call:r1", kept, 9000)
    await world.wait(7)
    assert world.stopped() == ["c1"]


async def test_a_call_that_was_never_recorded_is_due_no_more() -> None:
    world = World()
    await world.live.ledger.plan("unknown", 0)
    await world.wait(1)
    assert await world.store.due_in(["unknown"]) == [None]


async def test_a_call_that_has_ended_is_due_no_more() -> None:
    world = World(minutes=None)
    await world.start()
    await world.live.ledger.move("r1", records.end(10))
    await world.live.ledger.plan("r1", 0)
    await world.wait(1)
    assert await world.store.due_in(["r1"]) == [None]


async def test_a_call_that_ended_is_not_put_back() -> None:
    world = World(minutes=10)
    attempt = await world.reserve()
    await world.live.give(attempt, "c1")
    stale = await world.live.ledger.find("r1")
    await world.live.ledger.move("r1", records.end(100))
    assert stale is not None
    await world.live.ledger.rejoin(stale)
    assert await world.store.members("live:all") == {}


@pytest.mark.parametrize("seed", range(5))
async def test_both_ends_in_one_second_stop_once(seed: int) -> None:
    world = World(minutes=1, seconds=60)
    await world.start()
    replicas = [world.live, world.replica()]
    await world.wait(62, *(replicas if seed % 2 else reversed(replicas)))
    assert world.stopped() == ["c1"]


async def test_a_lost_call_that_is_found_is_stopped_once_over_replicas() -> None:
    world = World(minutes=None)
    attempt = await world.reserve()
    await world.live.stop(attempt, "c1", LOST)
    await world.wait(20, world.live, world.replica())
    assert world.stopped() == ["c1"]


# --- pages that go ---


async def test_a_call_whose_page_has_gone_is_stopped_by_any_replica_once() -> None:
    world = World(minutes=None)
    await world.start()
    assert await world.live.stop_later("c1", 10)
    others = [world.replica(), world.replica()]
    await world.wait(9, *others)
    assert world.stopped() == []
    await world.wait(20, *others)
    assert world.stopped() == ["c1"]
    bounds = await world.live.bounds("c1")
    assert bounds is not None
    assert bounds.stopped_because == "caller-gone"


@pytest.mark.parametrize("seconds", [0, 100], ids=["without-an-end", "with-an-end-of-its-own"])
@pytest.mark.parametrize("comes_back_after", [0, 9], ids=["at-once", "late"])
async def test_an_owner_who_comes_back_keeps_the_call(seconds: float, comes_back_after: float) -> None:
    world = World(minutes=None, seconds=seconds)
    await world.start()
    await world.live.stop_later("c1", 10)
    await world.wait(comes_back_after)

    await world.replica().keep("c1")

    await world.wait(80)
    assert world.stopped() == []
    await world.wait(100)
    assert world.stopped() == (["c1"] if seconds else [])  # its own end stays planned


async def test_a_page_may_go_again_and_the_last_time_counts() -> None:
    world = World(minutes=None)
    await world.start()
    await world.live.stop_later("c1", 10)
    await world.wait(5)
    await world.live.keep("c1")
    await world.live.stop_later("c1", 30)
    await world.wait(20)
    await world.live.stop_later("c1", 3)
    await world.wait(4)
    assert world.stopped() == ["c1"]


async def test_an_owner_who_comes_back_too_late_finds_the_call_stopped_once() -> None:
    world = World(minutes=None)
    await world.start()
    await world.live.stop_later("c1", 1)
    await world.wait(2)
    await world.live.keep("c1")
    await world.live.stop_later("c1", 1)
    await world.wait(20)
    assert world.stopped() == ["c1"]


async def test_who_comes_back_while_the_stop_is_being_taken_wins_or_loses_whole() -> None:
    """The record moves between the replica's look at it and its write."""
    world = World(minutes=None)
    await world.start()
    await world.live.stop_later("c1", 1)
    world.now += 2
    find = world.live.ledger.find

    async def find_and_keep(request_id: str) -> records.StartRecord | None:
        found = await find(request_id)
        await world.replica().keep("c1")
        return found

    world.live.ledger.find = find_and_keep  # type: ignore[method-assign]
    await world.live.take_due()
    await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name() == "stop"))
    world.live.ledger.find = find  # type: ignore[method-assign]
    await world.wait(60)
    assert world.stopped() == []


async def test_its_own_end_comes_first() -> None:
    world = World(minutes=None, seconds=5)
    await world.start()
    await world.live.stop_later("c1", 30)
    await world.wait(7)
    assert world.stopped() == ["c1"]
    bounds = await world.live.bounds("c1")
    assert bounds is not None
    assert bounds.stopped_because == "max-call-seconds"


async def test_a_call_that_has_ended_meanwhile_is_not_stopped() -> None:
    world = World(minutes=None)
    await world.start()
    await world.live.stop_later("c1", 5)
    await world.live.ledger.move("r1", records.end(3))
    await world.wait(20)
    assert world.stopped() == []
    assert await world.store.due_in(["r1"]) == [None]


async def test_the_end_of_the_process_takes_calls_along_that_no_other_would_stop() -> None:
    world = World(minutes=None)
    await world.start()
    await world.start()
    await world.live.stop_later("c1", 30)
    await world.live.finish()
    assert world.stopped() == ["c1"]


async def test_a_call_that_the_store_does_not_know_cannot_be_stopped_later() -> None:
    world = World()
    assert not await world.live.stop_later("c1", 10)
