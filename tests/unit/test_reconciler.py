"""Lost answers: looked for at set times, found by their metadata, stopped; and never anyone else's call."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from app.clock import Clock
from app.limits import CallAttempt, LiveCalls, Reconciler
from app.limits.call_attempt import ALL_CALLS
from app.limits.ledger import UNSTOPPED, Ledger
from app.limits.live_calls import STOP_AGAIN_SECONDS, SWEEP_SECONDS
from app.limits.reconciler import MOST_FETCHES, SCAN_AFTER, SCAN_PAGES
from app.limits.running_calls import PAGE, TRIES
from app.limits.sweeper import sweep_forever
from app.oneinbox import OneInbox
from app.sandbox.calls import Call
from app.sandbox.emulator import Emulator, EmulatorOptions, create_emulator
from app.sandbox.faults import Hang, Operation, Status
from app.sandbox.schemas import StartCall
from app.store import Change, LimitRequest, Slot, StoreUnavailable
from app.store.memory import MemoryStore
from app.telemetry.metrics import ORPHANS, Metrics
from tests.conftest import Logs
from tests.support.harness import ONEINBOX
from tests.support.simulated_time import in_simulated_time

DATE = 1_800_000_000.0
AGENTS = {"main": "agt_main", "side": "agt_side"}
OWNER = "a-pseudonym"
TIMEOUT, LEASE = 15.0, 3900.0
A_SECOND = 20
"""Calls that a busy account starts in a second."""
LATEST = TIMEOUT + 300
"""Seconds after its POST by which a call may be dated, by OneInbox's clock."""


class Losable(MemoryStore):
    """A store that can go away: then, as FailoverStore has it, sets are answered locally and values not at all."""

    gone = False

    async def get(self, name: str) -> bytes | None:
        self._check()
        return await super().get(name)

    async def set(self, name: str, value: bytes, ttl: float) -> None:
        self._check()
        await super().set(name, value, ttl)

    async def delete(self, name: str, expected: bytes | None = None) -> bool:
        self._check()
        return await super().delete(name, expected)

    async def change(self, change: Change) -> bool:
        if self.gone:
            await super().change(Change({}, joins=change.joins, leaves=change.leaves))
        self._check()
        return await super().change(change)

    def _check(self) -> None:
        if self.gone:
            raise StoreUnavailable


@dataclass
class Books:
    """One replica's part in it."""

    live: LiveCalls
    reconciler: Reconciler

    async def sweep(self) -> None:
        """One round of the sweep."""
        await self.live.flush()
        self.reconciler.report_stale(await self.live.sweep())


class Dated(httpx.ASGITransport):
    """Answers have a Date, as OneInbox's have. `ahead`: of the broker's clock, in seconds."""

    ahead = 0.0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        response.headers["date"] = formatdate(int(House.now() + self.ahead), usegmt=True)
        return response


@dataclass
class House:
    """One OneInbox and one store, and replicas in front of them, in the event loop's own time.

    `ahead`: seconds that OneInbox's clock is ahead, and that its answers' Date tells; None: they have no Date.
    """

    list_metadata: bool = True
    ahead: float | None = None
    store: Losable = field(init=False)
    emulator: Emulator = field(init=False)
    oneinbox: OneInbox = field(init=False)
    metrics: Metrics = field(init=False)
    first: Books = field(init=False)

    def __post_init__(self) -> None:
        options = EmulatorOptions(
            agents=tuple(AGENTS.values()),
            in_progress=1e6,
            list_metadata=self.list_metadata,
            now=lambda: self.now() + (self.ahead or 0),
        )
        account = create_emulator(options)
        self.emulator = account.state.emulator
        self.store = Losable(asyncio.get_running_loop().time)
        key = SecretStr(options.api_key)
        transport = httpx.ASGITransport(account) if self.ahead is None else Dated(account)
        if isinstance(transport, Dated):
            transport.ahead = self.ahead or 0
        clock = Clock(self.now)
        self.oneinbox = OneInbox(ONEINBOX, key, transport, timeout=TIMEOUT, connect_timeout=1, clock=clock)
        self.metrics = Metrics()
        self.first = self.replica()

    @staticmethod
    def now() -> float:
        """Unix time, OneInbox's and the broker's."""
        return DATE + asyncio.get_running_loop().time()

    def replica(self) -> Books:
        """One more process."""
        live = LiveCalls(
            self.store,
            self.oneinbox,
            Ledger(self.store, lease=LEASE, now=self.now),
            max_seconds=3600,
            join_timeout=0,
            now=self.now,
            metrics=self.metrics,
        )
        reconciler = Reconciler(
            self.oneinbox, live, agent_ids=AGENTS, timeout=TIMEOUT, now=self.now, metrics=self.metrics
        )
        return Books(live, reconciler)

    async def reserve(self, name: str, agent: str = "main") -> CallAttempt:
        """A POST is about to be sent; its slots are taken."""
        attempt = CallAttempt(name, int(self.now()), agent, "ann", OWNER)
        slots = [Slot(each, None) for each in attempt.sets]
        record = self.first.live.ledger.reserved(attempt)
        await self.store.decide(LimitRequest([], slots, member=attempt.key, lease=LEASE, record=record))
        return attempt

    def arrives(self, attempt: CallAttempt, **changes: Any) -> Call:
        """OneInbox starts the call; its answer does not matter here."""
        metadata = {"broker_user": attempt.owner, "broker_request_id": attempt.request_id, **changes}
        return self.emulator.calls.start(StartCall(agent_id=AGENTS[attempt.agent], metadata=metadata))

    def others(self, count: int, metadata: Mapping[str, Any] | None = None, agent: str = "agt_main") -> list[Call]:
        """Calls that are nothing to do with the broker, or look alike."""
        body = StartCall(agent_id=agent, metadata=dict(metadata) if metadata is not None else None)
        return [self.emulator.calls.start(body) for _ in range(count)]

    def busy_for(self, seconds: float) -> None:
        """Twenty calls a second have been started for so long, and run."""
        for number in range(int(seconds * A_SECOND)):
            (call,) = self.others(1, {})
            call.created_at -= seconds - number / A_SECOND

    async def stays_busy(self) -> None:
        """Start twenty calls a second."""
        while True:
            self.others(1, {})
            await asyncio.sleep(1 / A_SECOND)

    def runs(self, call: Call) -> bool:
        """Whether a call costs money."""
        return self.emulator.calls.state(call).running

    def asked(self, operation: Operation) -> list[float]:
        """When OneInbox was asked so, in seconds of the loop."""
        return [round(each.at - DATE, 3) for each in self.emulator.requests if each.operation == operation]

    async def live(self) -> set[str]:
        """The request ids that hold slots."""
        return {CallAttempt.from_key(member).request_id for member in await self.store.members(ALL_CALLS)}

    def fates(self) -> dict[str, int]:
        """What became of lost calls, as metrics say."""
        text = self.metrics.text("")[0].decode()
        counts = {fate: re.search(rf'broker_orphans_total{{fate="{fate}"}} (\d+)', text) for fate in ORPHANS}
        return {fate: int(count[1]) for fate, count in counts.items() if count is not None and count[1] != "0"}

    @asynccontextmanager
    async def at_work(self, *books: Books) -> AsyncIterator[None]:
        """Replicas (the first, unless named) look for their losses meanwhile."""
        tasks = [asyncio.create_task(each.reconciler.run()) for each in books or (self.first,)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def later(*seconds: float) -> list[float]:
    """Moments after now, in seconds of the loop."""
    now = asyncio.get_running_loop().time()
    return [round(now + each, 3) for each in seconds]


# --- when ---


@in_simulated_time
async def test_looks_two_five_fifteen_and_sixty_seconds_after_the_loss_and_frees_the_slot_then() -> None:
    house = House()
    attempt = await house.reserve("lost")
    async with house.at_work():
        await asyncio.sleep(100)
        expected = later(2, 5, 15, 60)
        house.first.reconciler.report_lost(attempt)
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(59.9)
        assert await house.live() == {"lost"}
        await asyncio.sleep(300)
    assert sorted(set(house.asked("list"))) == expected
    assert await house.live() == set(), "the last scan found none"
    assert not house.asked("stop")


@in_simulated_time
async def test_a_call_that_appears_late_is_found_by_the_next_look() -> None:
    for seconds, scans in ((0.0, 1), (4.0, 2), (14.0, 3), (59.0, 4)):
        house = House()
        attempt = await house.reserve("lost")
        async with house.at_work():
            house.first.reconciler.report_lost(attempt)
            await asyncio.sleep(seconds)
            call = house.arrives(attempt)
            assert house.runs(call)
            await asyncio.sleep(SCAN_AFTER[scans - 1] - seconds + 0.1)
            assert not house.runs(call)
            assert await house.live() == set()
            await asyncio.sleep(100)
        assert len(set(house.asked("list"))) == scans
        assert len(house.asked("stop")) == 1


@in_simulated_time
async def test_many_losses_share_a_scan() -> None:
    house = House()
    attempts = [await house.reserve(f"lost-{number}") for number in range(60)]
    calls = [house.arrives(attempt) for attempt in attempts]
    async with house.at_work():
        for attempt in attempts:
            house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(3)
    assert len(house.asked("list")) == 1
    assert len(house.asked("stop")) == 60
    assert not any(house.runs(call) for call in calls)
    assert await house.live() == set()


@in_simulated_time
async def test_each_agent_is_scanned_and_the_failure_of_one_is_not_the_others() -> None:
    house = House()
    lost = {agent: await house.reserve(agent, agent) for agent in AGENTS}
    calls = {agent: house.arrives(attempt) for agent, attempt in lost.items()}
    house.emulator.faults.add(Status(operation="list", status=500, times=TRIES))
    async with house.at_work():
        for attempt in lost.values():
            house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(2.1)
        assert sorted(house.runs(call) for call in calls.values()) == [False, True]
        await asyncio.sleep(3)
    assert not any(house.runs(call) for call in calls.values())


@in_simulated_time
async def test_a_new_loss_is_looked_for_in_time_whatever_else_is_pending() -> None:
    house = House()
    async with house.at_work():
        house.first.reconciler.report_lost(await house.reserve("old"))
        await asyncio.sleep(20)
        attempt = await house.reserve("new")
        call = house.arrives(attempt)
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(2.1)
        assert not house.runs(call)


@in_simulated_time
async def test_stops_that_hang_hold_no_other_loss_up() -> None:
    """Twenty stops without an answer, one after the other, would be five minutes without a scan."""
    house = House()
    early = [await house.reserve(f"early-{number}") for number in range(20)]
    for each in early:
        house.arrives(each)
    house.emulator.faults.add(Hang(operation="stop", times=20))
    async with house.at_work():
        for each in early:
            house.first.reconciler.report_lost(each)
        await asyncio.sleep(10)
        attempt = await house.reserve("late")
        call = house.arrives(attempt)
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(2 * TIMEOUT + SCAN_AFTER[0])
        assert not house.runs(call)
        await asyncio.sleep(600)


@in_simulated_time
async def test_a_bug_in_a_scan_does_not_end_the_looking() -> None:
    house = House()
    attempt = await house.reserve("lost")
    call = house.arrives(attempt)
    honest, failures = house.oneinbox.list_calls, iter([RuntimeError("a bug")])

    async def list_calls(**options: Any) -> Any:
        for failure in failures:
            raise failure
        return await honest(**options)

    house.oneinbox.list_calls = list_calls  # type: ignore[method-assign]
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(16)
    assert not house.runs(call)


# --- which ---

ALIKE: dict[str, dict[str, Any]] = {
    "another-user": {"broker_user": "another-pseudonym"},
    "no-user": {"broker_user": None},
    "another-post": {"broker_request_id": "another"},
    "a-longer-id": {"broker_request_id": "lost-too"},
    "other-case": {"broker_request_id": "LOST"},
    "a-list": {"broker_request_id": ["lost"]},
    "nothing": {"broker_request_id": None, "broker_user": None},
}


@pytest.mark.parametrize("changes", ALIKE.values(), ids=ALIKE.keys())
@pytest.mark.parametrize("list_metadata", [True, False])
@in_simulated_time
async def test_a_call_that_is_merely_alike_is_left_alone(changes: dict[str, Any], list_metadata: bool) -> None:
    house = House(list_metadata)
    attempt = await house.reserve("lost")
    alike = house.arrives(attempt, **changes)
    others = [*house.others(1), *house.others(1, {}), *house.others(1, {"broker_user": OWNER})]
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(100)
    assert all(house.runs(call) for call in [alike, *others])
    assert not house.asked("stop")


@in_simulated_time
async def test_another_agents_call_is_left_alone() -> None:
    house = House()
    attempt = await house.reserve("lost")
    (other,) = house.others(1, {"broker_user": OWNER, "broker_request_id": "lost"}, agent="agt_side")
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(100)
    assert house.runs(other)


@in_simulated_time
async def test_a_list_that_ignores_the_agent_asked_for_stops_nobody_elses() -> None:
    house = House()
    attempt = await house.reserve("lost")
    (other,) = house.others(1, {"broker_user": OWNER, "broker_request_id": "lost"})
    other.extra["agent_id"] = "agt_side"
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(100)
    assert house.runs(other)


@pytest.mark.parametrize(
    ("after", "found"), [(-301, False), (-299, True), (0, True), (LATEST - 1, True), (LATEST + 1, False), (None, True)]
)
@in_simulated_time
async def test_a_call_counts_by_the_time_of_its_creation(after: float | None, found: bool) -> None:
    house = House()
    await asyncio.sleep(1000)
    attempt = await house.reserve("lost")
    call = house.arrives(attempt)
    if after is None:
        call.removed.add("created_at")
    else:
        call.created_at = attempt.since + after
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(100)
    assert house.runs(call) != found


# --- how much OneInbox is asked ---


@in_simulated_time
async def test_a_list_without_metadata_has_its_candidates_fetched() -> None:
    house = House(list_metadata=False)
    house.others(40)
    await asyncio.sleep(LATEST + 400)
    attempt = await house.reserve("lost")
    near = house.others(5)
    call = house.arrives(attempt)
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(3)
    assert not house.runs(call)
    assert len(house.asked("get")) == 6, "those in the window only"
    assert all(house.runs(other) for other in near)


@in_simulated_time
async def test_fetching_is_bounded() -> None:
    house = House(list_metadata=False)
    attempt = await house.reserve("lost")
    house.others(MOST_FETCHES + 50)
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(2.5)
    assert len(house.asked("get")) == MOST_FETCHES


@in_simulated_time
async def test_pages_are_turned_until_the_calls_are_too_old() -> None:
    house = House()
    house.others(3 * PAGE)
    await asyncio.sleep(LATEST + 400)
    attempt = await house.reserve("lost")
    call = house.arrives(attempt)
    house.others(2 * PAGE)
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(2.5)
        assert not house.runs(call)
        assert len(house.asked("list")) == 3
        house.emulator.requests.clear()
        house.first.reconciler.report_lost(await house.reserve("nothing"))
        await asyncio.sleep(2.5)
        assert len(house.asked("list")) == 3


@pytest.mark.parametrize("ended", [1, 9, 10, 30, 80, 140])
@in_simulated_time
async def test_calls_that_end_while_pages_are_turned_hide_no_other(ended: int) -> None:
    """A list by status gets shorter: what stood on the next page may have moved to the one that was read."""
    house = House()
    house.others(150)
    attempt = await house.reserve("lost")
    call = house.arrives(attempt)
    newer = house.others(140)
    honest = house.oneinbox.list_calls

    async def list_calls(**options: Any) -> Any:
        page = await honest(**options)
        for each in newer[-ended:] if page.items else ():
            house.emulator.calls.stop(each)
        return page

    house.oneinbox.list_calls = list_calls  # type: ignore[method-assign]
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(SCAN_AFTER[0] + 0.5)
    assert not house.runs(call)


@in_simulated_time
async def test_pages_are_bounded() -> None:
    house = House()
    attempt = await house.reserve("lost")
    house.others((SCAN_PAGES[-1] + 1) * PAGE)
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        began = house.now()
        for pages, seconds in zip(SCAN_PAGES, SCAN_AFTER, strict=True):
            house.emulator.requests.clear()
            await asyncio.sleep(began + seconds + 0.5 - house.now())
            assert len(house.asked("list")) == pages
    assert house.fates() == {"lost": 1, "given-up": 1}


@pytest.mark.parametrize("list_metadata", [True, False])
@in_simulated_time
async def test_a_scan_that_was_cut_short_does_not_say_that_there_is_none(list_metadata: bool) -> None:
    """Beyond the bounds there may be a call: its slot must not be given away, nor the call be forgotten."""
    house = House(list_metadata)
    attempt = await house.reserve("lost")
    call = house.arrives(attempt)
    house.others((SCAN_PAGES[-1] + 1) * PAGE)
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(70)
        assert not house.runs(call) or await house.live() == {"lost"}


@pytest.mark.parametrize("ahead", [0.0, 200.0, -200.0])
@pytest.mark.parametrize("exists", [True, False])
@in_simulated_time
async def test_with_10000_running_calls_a_loss_costs_25_lists_and_is_settled(exists: bool, ahead: float) -> None:
    house = House(ahead=ahead)
    house.busy_for(500)
    others = asyncio.create_task(house.stays_busy())
    attempt = await house.reserve("lost")
    call = house.arrives(attempt) if exists else None
    await asyncio.sleep(TIMEOUT)
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(3)
        assert call is None or not house.runs(call), "the first scan covers the wait for the answer"
        await asyncio.sleep(SCAN_AFTER[-1])
    others.cancel()
    assert len(house.asked("list")) <= 25
    assert house.fates() == {"lost": 1, **({"found": 1, "stopped": 1} if exists else {"not-found": 1})}
    assert await house.live() == set()


@in_simulated_time
async def test_with_10000_running_calls_a_call_that_appears_late_is_found() -> None:
    house = House(ahead=0.0)
    house.busy_for(500)
    others = asyncio.create_task(house.stays_busy())
    attempt = await house.reserve("lost")
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(SCAN_AFTER[2] + 1)
        call = house.arrives(attempt)
        await asyncio.sleep(SCAN_AFTER[3] - SCAN_AFTER[2])
    others.cancel()
    assert not house.runs(call)
    assert len(house.asked("list")) <= 25


@in_simulated_time
async def test_with_10000_running_calls_losses_of_some_seconds_share_their_scans() -> None:
    house = House(ahead=0.0)
    house.busy_for(500)
    async with house.at_work():
        for number in range(30):
            house.first.reconciler.report_lost(await house.reserve(f"lost-{number}"))
            await asyncio.sleep(0.1)
        await asyncio.sleep(SCAN_AFTER[-1])
    assert house.fates() == {"lost": 30, "not-found": 30}
    assert len(house.asked("list")) <= 2 * 25, "three seconds, in scans for two seconds each"


@in_simulated_time
async def test_losses_that_share_their_scans_share_the_cost_of_a_burst() -> None:
    """All calls were created in the second of the POSTs, so each of them may be a lost one."""
    house = House(ahead=0.0)
    house.others(10_000, {})
    async with house.at_work():
        for number in range(30):
            house.first.reconciler.report_lost(await house.reserve(f"lost-{number}"))
        await asyncio.sleep(SCAN_AFTER[-1] + 1)
    assert house.fates() == {"lost": 30, "not-found": 30}
    assert len(house.asked("list")) == sum(SCAN_PAGES[:-1]) + 101


@pytest.mark.parametrize("exists", [True, False])
@in_simulated_time
async def test_with_10000_running_calls_a_dead_processs_start_is_settled(exists: bool) -> None:
    """Its clock is not known, so more is read."""
    house = House(ahead=0.0)
    house.busy_for(500)
    attempt = await house.reserve("left-behind")
    call = house.arrives(attempt) if exists else None
    others = asyncio.create_task(house.stays_busy())
    await asyncio.sleep(TIMEOUT + 61)
    others.cancel()
    async with house.at_work():
        await house.first.sweep()
        await asyncio.sleep(SWEEP_SECONDS + 61)
    assert call is None or not house.runs(call)
    assert await house.live() == set()


@in_simulated_time
async def test_a_clock_that_is_set_back_meanwhile_hides_no_call() -> None:
    """By the clock as it is at the last scan, the call would seem to have been created ten minutes later."""
    house = House(ahead=0.0)
    house.busy_for(20)
    attempt = await house.reserve("lost")
    call = house.arrives(attempt)
    house.others(3 * PAGE, {})
    honest, blind = house.oneinbox.list_calls, True

    async def list_calls(**options: Any) -> Any:
        page = await honest(**options)
        return page.model_copy(update={"items": [each for each in page.items if not blind or each.id != call.id]})

    house.oneinbox.list_calls = list_calls  # type: ignore[method-assign]
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(20)
        blind = False
        house.oneinbox._clock = Clock(lambda: house.now() - 100)
        await asyncio.sleep(41)
    assert not house.runs(call)


@in_simulated_time
async def test_a_dead_store_keeps_no_other_loss_waiting() -> None:
    house = House()
    attempt, stale = await house.reserve("lost", "side"), await house.reserve("left-behind")
    call = house.arrives(attempt)
    async with house.at_work():
        await asyncio.sleep(TIMEOUT + 61)
        house.first.reconciler.report_stale([stale])
        await asyncio.sleep(SWEEP_SECONDS)
        house.store.gone = True
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(2.5)
        assert not house.runs(call)
        house.store.gone = False
        await asyncio.sleep(SCAN_AFTER[-1] + 2 * SCAN_AFTER[0])
    assert house.fates() == {"lost": 2, "found": 1, "stopped": 1, "not-found": 1}


@in_simulated_time
async def test_a_list_that_takes_long_keeps_no_other_agent_waiting() -> None:
    house = House()
    lost = {agent: await house.reserve(agent, agent) for agent in AGENTS}
    calls = {agent: house.arrives(attempt) for agent, attempt in lost.items()}
    honest = house.oneinbox.list_calls

    async def list_calls(*, agent_id: str, **options: Any) -> Any:
        await asyncio.sleep(TIMEOUT if agent_id == AGENTS["main"] else 0)
        return await honest(agent_id=agent_id, **options)

    house.oneinbox.list_calls = list_calls  # type: ignore[method-assign, assignment]
    async with house.at_work():
        house.first.reconciler.report_lost(lost["main"])
        await asyncio.sleep(1)
        house.first.reconciler.report_lost(lost["side"])
        await asyncio.sleep(2.5)
        assert [house.runs(calls[agent]) for agent in ("main", "side")] == [True, False]
        await asyncio.sleep(TIMEOUT)
    assert not house.runs(calls["main"])


# --- what can go wrong at OneInbox ---


@in_simulated_time
async def test_one_call_that_cannot_be_fetched_hides_no_other() -> None:
    """A call that was deleted since it was listed, or whose record is broken."""
    house = House(list_metadata=False)
    attempt = await house.reserve("lost")
    call = house.arrives(attempt)
    (odd,) = house.others(1)
    odd.extra["id"] = "not-fetched-under-this"
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(100)
    assert not house.runs(call)


@pytest.mark.parametrize("odd_id", [None, "call:17", 17, "x" * 200])
@in_simulated_time
async def test_one_odd_item_of_a_list_hides_no_other(odd_id: Any) -> None:
    house = House()
    attempt = await house.reserve("lost")
    call = house.arrives(attempt)
    (odd,) = house.others(1)
    odd.extra["id"] = odd_id
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(100)
    assert not house.runs(call)


@in_simulated_time
async def test_what_was_found_is_stopped_although_the_scan_broke_off() -> None:
    house = House()
    async with house.at_work():
        first, second = await house.reserve("first"), await house.reserve("second")
        old = house.arrives(second)
        house.others(PAGE)
        new = house.arrives(first)
        honest = house.oneinbox.list_calls

        async def list_calls(*, offset: int = 0, **options: Any) -> Any:
            if offset:
                house.emulator.faults.add(Status(operation="list", status=500, times=1))
            return await honest(offset=offset, **options)

        house.oneinbox.list_calls = list_calls  # type: ignore[method-assign]
        house.first.reconciler.report_lost(first)
        house.first.reconciler.report_lost(second)
        await asyncio.sleep(2.5)
        assert not house.runs(new)
        assert house.runs(old)


@in_simulated_time
async def test_when_the_last_look_failed_the_slot_stays_and_the_sweep_begins_anew() -> None:
    house = House()
    attempt = await house.reserve("lost")
    call = house.arrives(attempt)
    house.emulator.faults.add(Status(operation="list", status=500, times=len(SCAN_AFTER) * TRIES))
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(61)
        assert await house.live() == {"lost"}
        await asyncio.sleep(20)
        await house.first.sweep()
        await asyncio.sleep(SWEEP_SECONDS + 2.1)
        assert not house.runs(call)
        assert await house.live() == set()


def test_giving_up_is_an_error_in_the_log(logs: Logs) -> None:
    @in_simulated_time
    async def run() -> None:
        house = House()
        attempt = await house.reserve("lost")
        house.emulator.faults.add(Status(operation="list", status=500))
        async with house.at_work():
            house.first.reconciler.report_lost(attempt)
            await asyncio.sleep(61)

    run()
    assert [entry["log_level"] for entry in logs if entry["event"] == "lost_call_unresolved"] == ["error"]


@in_simulated_time
async def test_the_slot_of_an_agent_that_is_no_longer_configured_is_not_given_away() -> None:
    house = House()
    attempt = await house.reserve("lost")
    house.arrives(attempt)
    house.first.reconciler.agent_ids = {"side": AGENTS["side"]}
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(61)
    assert not house.asked("list")
    assert await house.live() == {"lost"}
    assert house.fates() == {"lost": 1, "given-up": 1}


@in_simulated_time
async def test_a_stop_that_fails_is_remembered_and_tried_again_by_any_replica() -> None:
    house = House()
    attempt = await house.reserve("lost")
    call = house.arrives(attempt)
    house.emulator.faults.add(Status(operation="stop", status=500, times=2))
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(3)
        assert set(await house.store.members(UNSTOPPED)) == {call.id}
        assert await house.live() == {"lost"}, "it runs"
        other = house.replica()
        await asyncio.sleep(STOP_AGAIN_SECONDS)
        await other.live.take_due()
        await asyncio.sleep(1)
        assert set(await house.store.members(UNSTOPPED)) == {call.id}
        await asyncio.sleep(STOP_AGAIN_SECONDS)
        await other.live.take_due()
        await asyncio.sleep(1)
    assert not house.runs(call)
    assert await house.live() == set()
    assert await house.store.members(UNSTOPPED) == {}
    assert len(house.asked("stop")) == 3


@pytest.mark.parametrize("gone", [False, True])
@in_simulated_time
async def test_a_call_that_ended_by_itself_is_no_longer_one_that_could_not_be_stopped(gone: bool) -> None:
    house = House()
    attempt = await house.reserve("lost")
    call = house.arrives(attempt)
    house.emulator.faults.add(Status(operation="stop", status=500))
    async with house.at_work():
        house.first.reconciler.report_lost(attempt)
        await asyncio.sleep(3)
    assert set(await house.store.members(UNSTOPPED)) == {call.id}
    if gone:
        house.emulator.calls.delete(call)
    else:
        house.emulator.calls.force(call, "completed")
    await house.first.sweep()
    if gone:
        assert await house.live() == {"lost"}, "one 404 is a rumour"
        for _ in range(2):
            await asyncio.sleep(31)
            await house.first.sweep()
    assert await house.live() == set()
    assert await house.store.members(UNSTOPPED) == {}, "`status` would tell of it for a week"


# --- what another process left behind ---


@in_simulated_time
async def test_the_sweep_finds_what_a_dead_process_left() -> None:
    house = House()
    attempt = await house.reserve("left-behind")
    call = house.arrives(attempt)
    async with house.at_work():
        await asyncio.sleep(TIMEOUT + 59)
        await house.first.sweep()
        await asyncio.sleep(10)
        assert house.runs(call), "the process that asked may live, and its answer be on its way"
        await asyncio.sleep(25)
        await house.first.sweep()
        await asyncio.sleep(SWEEP_SECONDS + 2.1)
    assert not house.runs(call)
    assert await house.live() == set()


@in_simulated_time
async def test_a_dead_processs_start_that_became_no_call_frees_its_slot() -> None:
    house = House()
    await house.reserve("left-behind")
    async with house.at_work():
        await asyncio.sleep(TIMEOUT + 61)
        await house.first.sweep()
        await asyncio.sleep(SWEEP_SECONDS + 61)
    assert await house.live() == set()


@in_simulated_time
async def test_two_replicas_that_look_for_the_same_do_no_harm() -> None:
    house = House()
    attempt, good = await house.reserve("lost"), await house.reserve("good")
    calls = house.arrives(attempt), house.arrives(good)
    await house.first.live.give(good, calls[1].id)
    other = house.replica()
    async with house.at_work(house.first, other):
        house.first.reconciler.report_lost(attempt)
        other.reconciler.report_lost(attempt)
        await asyncio.sleep(100)
        await other.sweep()
        await asyncio.sleep(100)
    assert [house.runs(call) for call in calls] == [False, True]
    assert await house.live() == {"good"}


@in_simulated_time
async def test_a_call_whose_answer_came_after_all_is_not_stopped() -> None:
    """The other replica took it for left behind while the one that asked still waited."""
    house = House()
    attempt = await house.reserve("slow")
    call = house.arrives(attempt)
    other = house.replica()
    async with house.at_work(other):
        await asyncio.sleep(TIMEOUT + 61)
        await other.sweep()
        await house.first.live.give(attempt, call.id)
        await asyncio.sleep(100)
    assert house.runs(call)


@in_simulated_time
async def test_the_calls_of_users_run_on_while_the_store_is_gone() -> None:
    """A store that is gone does not make the outcome of an attempt unknown."""
    house = House()
    attempt = await house.reserve("good")
    call = house.arrives(attempt)
    await house.first.live.give(attempt, call.id)
    async with house.at_work():
        house.store.gone = True
        for _ in range(10):
            await asyncio.sleep(30)
            await house.first.sweep()
        assert house.runs(call)
        house.store.gone = False
        await asyncio.sleep(100)
    assert house.runs(call)
    assert await house.live() == {"good"}


@in_simulated_time
async def test_a_call_that_the_store_was_not_told_of_in_time_is_nobody_elses_to_stop() -> None:
    """Begun while the store was gone, its member may be in the shared set before its record is."""
    house = House()
    attempt = await house.reserve("good")
    call = house.arrives(attempt)
    first, other = house.first, house.replica()
    house.store.gone = True
    await first.live.give(attempt, call.id)
    house.store.gone = False
    async with house.at_work(other):
        await asyncio.sleep(TIMEOUT + 61)
        await other.sweep()
        await asyncio.sleep(29)  # the first replica's next sweep is due within thirty seconds
        await first.sweep()
        await asyncio.sleep(100)
    assert house.runs(call)


@in_simulated_time
async def test_what_becomes_of_lost_calls_is_counted() -> None:
    house = House()
    found, absent, hidden = [await house.reserve(name) for name in ("found", "absent", "hidden")]
    async with house.at_work():
        house.arrives(found)
        house.first.reconciler.report_lost(found)
        house.first.reconciler.report_lost(absent)
        house.first.reconciler.report_lost(absent)
        await asyncio.sleep(61)
        assert house.fates() == {"lost": 2, "found": 1, "stopped": 1, "not-found": 1}
        house.emulator.faults.add(Status(operation="list", status=500))
        house.first.reconciler.report_lost(hidden)
        await asyncio.sleep(61)
    assert house.fates() == {"lost": 3, "found": 1, "stopped": 1, "not-found": 1, "given-up": 1}


# --- what a dead process left ---


@in_simulated_time
async def test_the_sweep_hands_on_what_a_killed_process_left() -> None:
    """Its slot is in the store without a call: any replica's sweep reports it."""
    house = House()
    call = house.arrives(await house.reserve("of-a-killed-process"))
    async with house.at_work():
        sweeping = asyncio.create_task(sweep_forever(house.first.live, house.first.reconciler))
        await asyncio.sleep(TIMEOUT + SCAN_AFTER[-1] + 3 * SWEEP_SECONDS)
        sweeping.cancel()
    assert not house.runs(call)
    assert await house.live() == set()
