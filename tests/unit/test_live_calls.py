"""Live calls, by injected clocks: when a slot is free again, what is hung up, and what OneInbox is asked."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import httpx
import pytest
import respx
from pydantic import SecretStr
from structlog.testing import capture_logs

from app.cli.operator import Operator
from app.config.agents import Agent
from app.config.plans import Entitlement
from app.identity import User
from app.limits import CallAttempt, KillSwitch, Limits, LiveCalls
from app.limits.call_attempt import NEVER
from app.limits.ledger import UNSTOPPED, Ledger
from app.limits.live_calls import LISTED_SECONDS, MOST_SINGLE, MOST_UNLISTED, SWEEP_SECONDS
from app.oneinbox import OneInbox
from app.oneinbox.models import CallRecord
from app.problems import Problem
from app.store.failover import FailoverStore
from app.store.memory import MemoryStore
from app.store.valkey import ValkeyStore
from tests.support.harness import AGENT_ID, ONEINBOX, Upstream, settings

ANN, BEN = User(mode="jwt", id="ann"), User(mode="jwt", id="ben")
AGENT = Agent("main", AGENT_ID, None, frozenset())
STOP = r"^/v1/calls/[^/]+/stop$"
MAX_SECONDS, JOIN_SECONDS, LEASE = 3600, 60, 3900


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class House:
    """One store and one OneInbox, and replicas of LiveCalls on them."""

    def __init__(
        self, *, max_live_calls: int = 1, join_timeout: float = JOIN_SECONDS, max_seconds: float = MAX_SECONDS
    ) -> None:
        self.clock = Clock()
        self.store = MemoryStore(self.clock)
        self.upstream = Upstream()
        self.oneinbox = OneInbox(ONEINBOX, SecretStr("oi_sk_x"), self.upstream, timeout=5, connect_timeout=1)
        self.join_timeout, self.max_seconds = join_timeout, max_seconds
        self.ledger = Ledger(self.store, lease=LEASE, now=self.clock)
        self.live = self.replica()
        self.entitlement = Entitlement("1000/minute", max_live_calls, None, LEASE)
        self.limits = Limits(
            self.store,
            self.ledger,
            [AGENT],
            global_session_limits="1000/minute",
            request_limits="1000/minute",
            max_live_calls_total=None,
            clock=self.clock,
        )

    def replica(self) -> LiveCalls:
        return LiveCalls(
            self.store,
            self.oneinbox,
            Ledger(self.store, lease=LEASE, now=self.clock),
            max_seconds=self.max_seconds,
            join_timeout=self.join_timeout,
            now=self.clock,
        )

    def plan(self, call_id: str, user: User = ANN) -> CallAttempt:
        """An attempt whose POST is not sent yet."""
        ends = self.clock.now + self.max_seconds if self.max_seconds else NEVER
        since = int(self.clock.now)
        return CallAttempt(f"start-of-{call_id}", since, AGENT.name, user.store_name, "pseudonym", ends=ends)

    async def start(self, call_id: str, user: User = ANN, status: str = "in_progress") -> CallAttempt:
        """Reserve and begin a call."""
        attempt = self.plan(call_id, user)
        await self.limits.reserve(user, AGENT, attempt, self.entitlement)
        await self.live.give(attempt, call_id)
        self.upstream.has_call(call_id, status=status)
        return attempt

    async def lose(self, call_id: str) -> CallAttempt:
        """Reserve, and start a call that no client gets."""
        attempt = self.plan(call_id)
        await self.limits.reserve(ANN, AGENT, attempt, self.entitlement)
        self.upstream.has_call(call_id, status="in_progress")
        return attempt

    async def has_room(self, user: User = ANN) -> bool:
        """Return whether the user could start one more: reserve, and give back."""
        try:
            reservation = await self.limits.reserve(user, AGENT, self.plan("try", user), self.entitlement)
        except Problem as problem:
            if problem.slug != "too-many-live-calls":
                raise
            return False
        await self.limits.release(reservation)
        return True

    async def tick(self, live: LiveCalls | None = None) -> None:
        """Do what a second does: end the calls whose time has come."""
        live = live or self.live
        await live.flush()
        await live.take_due()
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name() == "stop"))

    def stop(self) -> respx.Route:
        """How OneInbox takes it when a call is to be stopped."""
        return self.upstream.router.post(path__regex=STOP)  # respx knows the route by its pattern

    async def live_calls(self) -> set[str]:
        """The live calls, as the store has them: the ids with which they started."""
        return {CallAttempt.from_key(member).request_id for member in await self.store.members("live:all")}

    async def unstopped(self) -> set[str]:
        return set(await self.store.members(UNSTOPPED))

    def asked(self) -> Counter[str]:
        """What OneInbox was asked: method and the end of the path."""
        return Counter(
            f"{request.method} {request.url.path.removeprefix('/v1/calls/')}" for request in self.upstream.requests
        )


class ListedHouse(House):
    """OneInbox lists its calls, too.

    `statuses`: of the calls it lists, oldest first. `lists_fail`: offset from which on a list fails.
    """

    def __init__(self, *, join_timeout: float = JOIN_SECONDS) -> None:
        super().__init__(max_live_calls=10_000, join_timeout=join_timeout)
        self.statuses: dict[str, str] = {}
        self.lists_fail: float = float("inf")
        self.upstream.router.get("/v1/calls").mock(side_effect=self.list)

    def replica(self) -> LiveCalls:
        live = super().replica()
        live.agent_ids = {AGENT.name: AGENT_ID}
        return live

    def list(self, request: httpx.Request) -> httpx.Response:
        """Answer as OneInbox does, newest call first."""
        asked = request.url.params
        offset, limit = int(asked["offset"]), int(asked["limit"])
        if offset >= self.lists_fail:
            return httpx.Response(503)
        found = [{"id": call, "status": status} for call, status in self.statuses.items() if status == asked["status"]]
        items = found[::-1][offset : offset + limit]
        return httpx.Response(200, json={"items": items, "total": len(found), "limit": limit, "offset": offset})

    async def start(self, call_id: str, user: User = ANN, status: str = "in_progress") -> CallAttempt:
        self.statuses[call_id] = status
        return await super().start(call_id, user, status)

    def ends(self, call_id: str) -> None:
        """OneInbox ends a call."""
        self.statuses[call_id] = "completed"
        self.upstream.has_call(call_id, status="completed")

    async def sweep_later(self, live: LiveCalls | None = None) -> None:
        """Sweep when the next sweep is due."""
        self.clock.now += SWEEP_SECONDS
        await (live or self.live).sweep()

    def looks(self) -> Counter[str]:
        """The calls that OneInbox was asked for singly."""
        return Counter({asked: count for asked, count in self.asked().items() if asked[:5] == "GET c"})


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    yield house
    await house.oneinbox.aclose()


def record(call_id: str, status: str) -> CallRecord:
    return CallRecord(id=call_id, status=status)


# --- seen ---


@pytest.mark.parametrize("status", ["completed", "failed", "no_answer", "no-answer", "busy", "canceled", "cancelled"])
async def test_a_call_seen_ended_frees_its_slot(house: House, status: str) -> None:
    attempt = await house.start("c1")
    assert not await house.has_room()
    await house.live.note_end(attempt.request_id, record("c1", status))
    assert await house.has_room()
    assert await house.live_calls() == set()


@pytest.mark.parametrize("status", ["queued", "initiated", "in_progress", "ringing", "something-new", None])
async def test_any_other_status_is_a_running_call(house: House, status: str | None) -> None:
    attempt = await house.start("c1")
    await house.live.note_end(attempt.request_id, CallRecord(id="c1", status=status))
    assert not await house.has_room()


async def test_an_end_frees_one_slot_and_nobody_elses(house: House) -> None:
    first = await house.start("c1", ANN)
    await house.start("c2", BEN)
    for _ in range(3):
        await house.live.note_end(first.request_id, record("c1", "completed"))
    assert await house.has_room(ANN)
    assert not await house.has_room(BEN)


async def test_another_replica_sees_it_too(house: House) -> None:
    attempt = await house.start("c1")
    await house.replica().note_end(attempt.request_id, record("c1", "completed"))
    assert await house.has_room()


async def test_a_late_word_of_an_old_call_leaves_the_new_one_alone(house: House) -> None:
    old = await house.start("c1")
    house.clock.now += LEASE + 1
    await house.start("c2")
    await house.live.note_end(old.request_id, record("c1", "completed"))
    await house.live.release(old)
    assert await house.live_calls() == {"start-of-c2"}
    assert not await house.has_room()


# --- by age ---


async def test_a_call_stuck_in_progress_frees_its_slot_at_its_age_limit(house: House) -> None:
    await house.start("c1")
    house.stop().respond(500)
    for age in (MAX_SECONDS + 1, LEASE - 1):
        house.clock.now = 1_800_000_000.0 + age
        await house.tick()
        assert not await house.has_room()
    assert house.asked()["POST c1/stop"] == 2
    house.clock.now = 1_800_000_000.0 + LEASE + 1
    assert await house.has_room()
    assert await house.live_calls() == set()


async def test_what_ran_too_long_is_hung_up_once_over_all_replicas(house: House) -> None:
    await house.start("c1")
    replicas = [house.replica() for _ in range(5)]
    house.clock.now += MAX_SECONDS - 0.1
    await house.tick()
    assert house.asked() == {}
    house.clock.now += 0.1

    with capture_logs() as logs:
        await asyncio.gather(*(house.tick(replica) for replica in replicas))

    assert house.asked() == {"POST c1/stop": 1}
    assert logs == [{"event": "call_stop_requested", "log_level": "warning", "call": "c1", "why": "it ran too long"}]
    assert await house.has_room()


@pytest.mark.parametrize("status", ["queued", "initiated"])
async def test_a_sweep_hangs_up_what_nobody_joined(house: House, status: str) -> None:
    await house.start("c1", status=status)
    await house.start("c2", BEN, status="in_progress")
    house.clock.now += JOIN_SECONDS
    await house.live.sweep()
    assert "POST c1/stop" not in house.asked()
    house.clock.now += 30
    with capture_logs() as logs:
        await house.live.sweep()
    assert house.asked()["POST c1/stop"] == 1
    assert [(entry["call"], entry["why"]) for entry in logs] == [("c1", "no one joined it")]
    assert await house.live_calls() == {"start-of-c2"}


async def test_zero_means_never() -> None:
    house = House(join_timeout=0, max_seconds=0)
    await house.start("c1", status="queued")
    house.clock.now += LEASE - 1
    await house.live.sweep()
    assert house.asked() == {"GET c1": 1}


async def test_a_sweep_looks_at_each_call_once_and_frees_what_ended() -> None:
    house = House(max_live_calls=100)
    for number in range(30):
        await house.start(f"c{number}", status="completed" if number % 3 else "in_progress")
    await house.live.sweep()
    assert house.asked() == {f"GET c{number}": 1 for number in range(30)}
    assert await house.live_calls() == {f"start-of-c{number}" for number in range(0, 30, 3)}
    await house.replica().sweep()
    assert sum(house.asked().values()) == 30, "half a minute has not passed"


async def test_a_call_that_is_gone_is_over(house: House) -> None:
    await house.start("c1")
    house.upstream.router.get("/v1/calls/c1").respond(404, json={"detail": "Call not found"})
    for _ in range(2):
        await house.live.sweep()
        assert not await house.has_room(), "one 404 is a rumour, and so is another within a minute"
        house.clock.now += 30
    await house.live.sweep()
    assert await house.has_room()


async def test_a_404_between_two_good_answers_is_forgotten(house: House) -> None:
    await house.start("c1")
    for status in (404, 200, 404):
        house.upstream.router.get("/v1/calls/c1").respond(status, json={"id": "c1", "status": "in_progress"})
        await house.live.sweep()
        house.clock.now += 61
    assert not await house.has_room()


async def test_one_failing_look_up_does_not_end_a_sweep() -> None:
    house = House(max_live_calls=3)
    for name in ("c1", "c2", "c3"):
        await house.start(name, status="completed")
    house.upstream.router.get("/v1/calls/c2").mock(side_effect=httpx.ConnectError("down"))
    with capture_logs() as logs:
        await house.live.sweep()
    assert await house.live_calls() == {"start-of-c2"}
    assert [(entry["event"], entry["call"]) for entry in logs] == [("call_lookup_failed", "c2")]


# --- by lists ---


async def test_300_running_calls_cost_two_replicas_few_requests() -> None:
    house = ListedHouse()
    for number in range(300):
        await house.start(f"c{number}")
    replicas = [house.live, house.replica()]
    for second in range(67):
        if second % 5 == 4:
            house.ends(f"c{second}")
        if second % SWEEP_SECONDS in (0, 7):
            await replicas[second % SWEEP_SECONDS == 7].sweep()
        house.clock.now += 1
    lists = house.asked()["GET /v1/calls"]
    assert lists == 2 * (4 + 300 / 100 - 1), (
        "two sweeps of old calls; few enough have ended that the last page is saved"
    )
    assert sum(house.looks().values()) == 12, "one for each that had ended by the last sweep"
    assert len(await house.live_calls()) == 300 - 12


async def test_a_call_that_left_the_lists_is_looked_at_once() -> None:
    house = ListedHouse()
    for name in ("c1", "c2"):
        await house.start(name)
    await house.sweep_later()
    assert house.looks() == {}
    house.ends("c1")
    for _ in range(3):
        await house.sweep_later()
    assert house.looks() == {"GET c1": 1}
    assert await house.live_calls() == {"start-of-c2"}


async def test_either_spelling_of_a_status_is_a_running_call() -> None:
    house = ListedHouse()
    for name, status in (("c1", "queued"), ("c2", "initiated"), ("c3", "in_progress"), ("c4", "in-progress")):
        await house.start(name, status=status)
    await house.sweep_later()
    assert house.looks() == {}


async def test_a_young_call_may_not_be_listed_yet() -> None:
    house = ListedHouse()
    await house.start("c1")
    house.clock.now += SWEEP_SECONDS
    await house.start("c2")
    del house.statuses["c2"]
    house.clock.now += LISTED_SECONDS - 1
    await house.live.sweep()
    assert house.looks() == {}
    await house.sweep_later()
    assert house.looks() == {"GET c2": 1}


async def test_an_end_that_is_noted_while_the_lists_are_read_costs_no_look() -> None:
    """As a stream that follows the call notes it."""
    house = ListedHouse()
    attempt = await house.start("c1")
    honest = house.list

    async def end(request: httpx.Request) -> httpx.Response:
        house.ends("c1")
        await house.live.note_end(attempt.request_id, record("c1", "completed"))
        return honest(request)

    house.upstream.router.get("/v1/calls").mock(side_effect=end)
    await house.sweep_later()
    assert house.looks() == {}
    assert await house.live_calls() == set()


async def test_a_call_that_is_listed_again_is_not_missing() -> None:
    house = ListedHouse()
    await house.start("c1")
    unknown = house.upstream.router.get("/v1/calls/c1")
    unknown.respond(404)
    for status in ("gone", "in_progress", "gone", "in_progress", "gone"):
        house.statuses["c1"] = status
        await house.sweep_later()
        await house.sweep_later()
    assert await house.live_calls() == {"start-of-c1"}
    for _ in range(2):
        await house.sweep_later()
    assert await house.live_calls() == set(), "two in a row, a minute apart"


@pytest.mark.parametrize("joined", [True, False])
async def test_a_listed_call_that_no_one_joined_is_looked_at_before_it_is_hung_up(joined: bool) -> None:
    house = ListedHouse()
    await house.start("c1", status="initiated")
    house.clock.now += JOIN_SECONDS
    if joined:
        house.upstream.has_call("c1", status="in_progress")
    await house.sweep_later()
    assert house.looks() == {"GET c1": 1}
    assert house.asked()["POST c1/stop"] == (not joined)


@pytest.mark.parametrize("offset", [0, 99])
async def test_nothing_is_concluded_from_lists_that_fail(offset: int) -> None:
    house = ListedHouse()
    for number in range(120):
        await house.start(f"c{number}")
    house.ends("c0")
    house.lists_fail = offset
    for _ in range(MOST_UNLISTED - 1):
        await house.sweep_later()
    assert house.looks() == {}
    house.lists_fail = float("inf")
    await house.sweep_later()
    assert house.looks() == {"GET c0": 1}
    house.lists_fail = offset
    for _ in range(MOST_UNLISTED - 1):
        await house.sweep_later()
    assert house.looks() == {"GET c0": 1}, "a sweep with lists begins the count anew"


async def test_without_lists_the_third_sweep_looks_at_a_hundred_calls_and_the_next_at_others() -> None:
    house = ListedHouse()
    for number in range(200):
        await house.start(f"c{number}")
    house.lists_fail = 0
    replicas = [house.live, house.replica()]
    for number in range(MOST_UNLISTED):
        await house.sweep_later(replicas[number % 2])
    assert len(house.looks()) == sum(house.looks().values()) == MOST_SINGLE
    await house.sweep_later()
    assert len(house.looks()) == sum(house.looks().values()) == 2 * MOST_SINGLE


async def test_what_must_end_ends_without_lists() -> None:
    house = ListedHouse()
    await house.start("c1")
    house.clock.now += MAX_SECONDS
    lost = await house.lose("c2")
    house.stop().respond(500)
    await house.live.stop(lost, "c2", "why")
    house.upstream.works_again()
    house.lists_fail = 0
    await house.sweep_later()
    assert house.asked()["POST c1/stop"] == 1
    await house.tick()
    assert house.asked()["POST c2/stop"] == 2, "again"


async def test_the_calls_of_an_agent_that_is_no_longer_configured_are_looked_at_singly() -> None:
    house = ListedHouse()
    await house.start("c1")
    await house.start("c2")
    house.ends("c2")
    house.live.agent_ids = {"another": "agt_another"}
    await house.sweep_later()
    assert house.asked() == {"GET c1": 1, "GET c2": 1}
    assert await house.live_calls() == {"start-of-c1"}


async def test_a_sweep_of_a_store_without_running_calls_asks_for_no_list() -> None:
    house = ListedHouse()
    await house.sweep_later()
    await house.lose("c1")
    assert len(await house.live.sweep()) == 0, "half a minute has not passed"
    house.clock.now += SWEEP_SECONDS
    assert len(await house.live.sweep()) == 1
    assert house.asked() == {}


async def test_a_sweep_sends_eight_requests_at_once() -> None:
    house = ListedHouse()
    at_once, most = 0, 0

    async def look(request: httpx.Request) -> httpx.Response:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1
        return httpx.Response(200, json={"id": request.url.path.split("/")[-1], "status": "completed"})

    for number in range(40):
        await house.start(f"c{number}")
        house.upstream.router.get(f"/v1/calls/c{number}").mock(side_effect=look)
    house.statuses.clear()
    await house.sweep_later()
    assert (most, await house.live_calls()) == (8, set())


async def test_a_call_that_is_still_being_started_is_left_alone(house: House) -> None:
    attempt = house.plan("c1")
    await house.limits.reserve(ANN, AGENT, attempt, house.entitlement)
    assert await house.live.is_pending(attempt)
    pending = [each.request_id for each in await house.live.sweep()]
    assert pending == [attempt.request_id], "for those who find out what became of it"
    assert house.asked() == {}
    assert not await house.has_room()


# --- hanging up ---


async def test_a_call_nobody_is_given_is_stopped_and_costs_no_slot(house: House) -> None:
    attempt = await house.lose("c1")
    await house.live.stop(attempt, "c1", "its answer could not be kept")
    assert house.asked() == {"POST c1/stop": 1}
    assert await house.has_room()
    assert await house.unstopped() == set()


async def test_a_call_that_was_given_is_not_stopped_for_want_of_an_answer(house: House) -> None:
    attempt = await house.start("c1")
    await house.live.stop(attempt, "c1", "its answer was lost")
    assert house.asked() == {}


async def test_a_stop_that_gets_a_404_is_tried_again_until_that_is_believed(house: House) -> None:
    attempt = await house.lose("c1")
    house.stop().respond(404)
    house.upstream.router.get("/v1/calls/c1").respond(404)
    await house.live.stop(attempt, "c1", "why")
    assert not await house.has_room(), "it may be running"
    assert await house.unstopped() == set()
    house.clock.now += 61
    await house.tick()
    assert house.asked()["POST c1/stop"] == 2
    assert await house.has_room()


async def test_a_stop_that_gets_a_404_of_a_running_call_has_failed(house: House) -> None:
    attempt = await house.lose("c1")
    house.stop().respond(404)
    await house.live.stop(attempt, "c1", "why")
    assert await house.unstopped() == {"c1"}
    for _ in range(4):
        house.clock.now += 10
        await house.tick()
    assert house.asked()["POST c1/stop"] == 5
    assert not await house.has_room()


@pytest.mark.parametrize("failure", [500, 409, httpx.ReadError("lost")])
async def test_a_stop_whose_answer_was_lost_is_asked_about(house: House, failure: int | Exception) -> None:
    attempt = await house.lose("c1")
    stop = house.stop()
    stop.mock(side_effect=failure) if isinstance(failure, Exception) else stop.respond(failure)
    house.upstream.has_call("c1", status="completed")
    await house.live.stop(attempt, "c1", "why")
    assert house.asked() == {"POST c1/stop": 1, "GET c1": 1}
    assert await house.has_room()
    assert await house.unstopped() == set()


@pytest.mark.parametrize("failure", [500, 401, 429, httpx.ConnectError("down"), httpx.ReadError("lost")])
async def test_what_cannot_be_stopped_is_said_and_remembered(house: House, failure: int | Exception) -> None:
    attempt = await house.lose("c1")
    stop = house.stop()
    stop.mock(side_effect=failure) if isinstance(failure, Exception) else stop.respond(failure)
    with capture_logs() as logs:
        await house.live.stop(attempt, "c1", "why")
    assert [(entry["event"], entry["log_level"], entry["call"]) for entry in logs] == [
        ("call_stop_requested", "warning", "c1"),
        ("call_not_stopped", "error", "c1"),
    ]
    assert await house.unstopped() == {"c1"}
    assert not await house.has_room(), "it runs"

    house.clock.now += 10
    await house.tick()
    assert house.asked()["POST c1/stop"] == 2, "it is tried again"
    stop.mock(side_effect=None).respond(json={"id": "c1", "status": "completed"})
    house.clock.now += 10
    await house.tick()
    assert await house.unstopped() == set()
    assert await house.has_room()


async def test_status_names_a_call_that_was_not_found_by_its_request(house: House) -> None:
    await house.live.give_up(await house.lose("c1"))
    operator = Operator(settings(), house.store, KillSwitch(house.store), house.limits)
    assert list((await operator.status()).lines())[-2:] == [
        "calls that could not be stopped: 1",
        "  not found: request start-of-c1",
    ]


# --- a refused user ---


async def test_a_refused_users_calls_are_looked_at_once_per_ten_seconds(house: House) -> None:
    await house.start("c1")
    replica = house.replica()
    assert await asyncio.gather(*(book.recheck(ANN) for book in [house.live, replica] * 50)) == [False] * 100
    assert house.asked() == {"GET c1": 1}
    house.clock.now += 9.9
    assert not await house.live.recheck(ANN)
    assert house.asked() == {"GET c1": 1}
    house.clock.now += 0.2
    house.upstream.has_call("c1", status="completed")
    assert await replica.recheck(ANN)
    assert house.asked() == {"GET c1": 2}
    assert await house.has_room()


async def test_a_look_is_at_the_users_own_calls(house: House) -> None:
    await house.start("c1", ANN)
    await house.start("c2", BEN, status="completed")
    assert not await house.live.recheck(ANN)
    assert house.asked() == {"GET c1": 1}
    assert await house.live.recheck(BEN)


@pytest.mark.parametrize(("seconds", "status"), [(MAX_SECONDS, "in_progress"), (JOIN_SECONDS + 1, "queued")])
async def test_a_refused_users_call_that_must_end_is_hung_up_without_a_wait(
    house: House, seconds: float, status: str
) -> None:
    await house.start("c1", status=status)
    house.clock.now += seconds
    assert not await house.live.recheck(ANN)
    await house.tick()
    assert house.asked()["POST c1/stop"] == 1, "not only when another process would do it"
    assert await house.has_room()


# --- without its store ---


async def test_a_call_begun_while_the_store_is_gone_is_not_forgotten() -> None:
    clock, upstream = Clock(), Upstream()
    oneinbox = OneInbox(ONEINBOX, SecretStr("oi_sk_x"), upstream, timeout=5, connect_timeout=1)
    async with FailoverStore(ValkeyStore("redis://127.0.0.1:1"), MemoryStore(clock)) as store:
        live = LiveCalls(
            store, oneinbox, Ledger(store, lease=3600, now=clock), max_seconds=60, join_timeout=0, now=clock
        )
        attempt = CallAttempt("start-of-c1", int(clock.now), "main", ANN.store_name, "pseudonym")
        for name in attempt.sets:
            await store.add_member(name, attempt.key, 3600)
        await live.give(attempt, "c1")
        upstream.has_call("c1")
        clock.now += 62
        await live.sweep()
        assert [str(request.url.path) for request in upstream.requests] == ["/v1/calls/c1", "/v1/calls/c1/stop"]
        assert await store.members("live:all") == {}
