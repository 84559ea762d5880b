"""The store of a single process: exact, about 3 µs per decision, gone at exit.

No operation awaits anything, so each is atomic on the event loop. Names are spread over 256 small dicts, because one
big dict would block the loop for tens of milliseconds each time it grows. At most every 0.25 s an operation sweeps the
next dict, so an expired name is gone after about a minute of use, and no step visits all names.
"""

import heapq
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

from app.store import sliding_window as windows
from app.store.budget import UsedTime
from app.store.local_pubsub import LocalPubSub
from app.store.protocol import (
    BUDGET,
    BUDGET_CLAIM,
    KEPT,
    PAGE,
    Budget,
    BudgetState,
    Change,
    Decision,
    Leave,
    LimitRequest,
    RateState,
    Store,
    Value,
)
from app.store.sliding_window import Window

SHARDS = 256
SWEEP_SECONDS = 0.25

_T = TypeVar("_T")


class MemoryStore(Store):
    """Keep everything in this process's memory.

    `clock`: seconds; it never runs backwards. `epoch`: Unix time at its 0. `plans` False: it only counts beside a
    shared store, which says when budgets run out.
    """

    shared = False

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, epoch: float = 0, plans: bool = True) -> None:
        self._clock = clock
        self._epoch = epoch
        self._plans = plans
        self._windows = _ShardedDict[Window](windows.ended)
        self._values = _ShardedDict[tuple[float, bytes]](_past)
        self._lists = _ShardedDict[tuple[float, tuple[bytes, ...]]](_past)
        self._sets = _ShardedDict[_ExpiringSet](lambda members, now: not members.living(now))
        self._due = _DueIndex()
        self._budgets = _ShardedDict[UsedTime](lambda used, now: used.over_at <= now + epoch)
        self._dicts = (self._windows, self._values, self._lists, self._sets, self._budgets)
        self._sweep_at = float("-inf")
        self._next_shard = 0
        self._pubsub = LocalPubSub()

    def __len__(self) -> int:
        """Return the number of names, including expired ones that are not swept yet."""
        return sum(len(each) for each in self._dicts)

    def now(self) -> float:
        return self._clock() + self._epoch

    async def decide(self, request: LimitRequest) -> Decision:
        rates, slots, member, lease, cost, enforce, record, budgets = request
        if slots and cost and not member:
            raise ValueError("slots need a member")
        now = self._now()
        refused: list[int] = []
        found: list[tuple[dict[str, Window], Window]] = []
        for index, rate in enumerate(rates):
            shard = self._windows.of(rate.name)
            known = shard.get(rate.name)
            window = windows.current(known, now) if known else windows.fresh(rate.seconds)
            if windows.total(window) + cost > rate.amount:
                refused.append(index)
            found.append((shard, window))
        used: list[int] = []
        for index, slot in enumerate(slots, len(rates)):
            members = self._sets.of(slot.name).get(slot.name)
            living = members.living(now) if members else {}
            needed = len(living) + (cost > 0 and member not in living)
            if slot.capacity is not None and needed > slot.capacity:
                refused.append(index)
            used.append(len(living))
        times = [self._budget_of(slots[budget.slot].name, now) for budget in budgets] if budgets else []
        if cost and budgets:
            refused += _used_up(budgets, times, len(rates) + len(slots))
            self._set_limits(request, times)

        counted = cost > 0 and (not refused or not enforce)
        states: list[RateState] = []
        for index, rate in enumerate(rates):
            shard, window = found[index]
            if counted:
                window = shard[rate.name] = windows.count(window, rate, now, cost)
            states.append(windows.describe(window, rate, now, cost if index in refused else None, now))
        if counted:
            for budget, each in zip(budgets, times, strict=True):
                self._join_budget(slots[budget.slot].name, each, member, now, lease)
            used = [self._add_member(slot.name, member, now, lease) for slot in slots]
            if record is not None and self._value(record.name, now) is None:
                self._set(record, now)
        left = _states(budgets, times) if budgets else ()
        return Decision(tuple(refused), tuple(states), tuple(used), counted, budgets=left)

    async def give_back(self, request: LimitRequest, decision: Decision) -> bool:
        if not decision.counted:
            return True
        for rate, state in zip(request.rates, decision.rates, strict=True):
            shard = self._windows.of(rate.name)
            if rate.name in shard:
                shard[rate.name] = windows.uncount(shard[rate.name], rate, state.mark, request.cost)
        timed = {budget.slot for budget in request.budgets}
        for index, slot in enumerate(request.slots):
            self._leave(Leave(slot.name, request.member, 0 if index in timed else None), self._now())
        if request.record is not None:
            self._values.of(request.record.name).pop(request.record.name, None)
        return True

    async def get(self, name: str) -> bytes | None:
        return self._value(name, self._now())

    async def set(self, name: str, value: bytes, ttl: float) -> None:
        self._set(Value(name, value, ttl), self._now())

    async def add(self, name: str, value: bytes, ttl: float) -> bool:
        now = self._now()
        if self._value(name, now) is not None:
            return False
        self._values.of(name)[name] = (now + ttl, value)
        return True

    async def replace(self, name: str, expected: bytes, value: bytes, ttl: float) -> bool:
        now = self._now()
        if self._value(name, now) != expected:
            return False
        self._values.of(name)[name] = (now + ttl, value)
        return True

    async def delete(self, name: str, expected: bytes | None = None) -> bool:
        value = self._value(name, self._now())
        if value is None or (expected is not None and value != expected):
            return False
        del self._values.of(name)[name]
        return True

    async def add_member(self, name: str, member: str, ttl: float) -> None:
        self._add_member(name, member, self._now(), ttl)

    async def remove_member(self, names: Sequence[str], member: str) -> bool:
        now = self._now()
        return sum(self._remove_member(name, member, now) for name in names) > 0

    async def members(self, name: str) -> dict[str, float]:
        now = self._now()
        members = self._sets.of(name).get(name)
        return {member: end - now for member, end in members.living(now).items()} if members else {}

    async def change(self, change: Change) -> bool:
        now = self._now()
        if any(self._value(name, now) != value for name, value in change.expected.items()):
            return False
        for value in change.values:
            self._set(value, now)
        for name, member, ttl, timed in change.joins:
            if timed:
                self._join_budget(name, self._budget_of(name, now), member, now, ttl)
            self._add_member(name, member, now, ttl)
        for leave in change.leaves:
            self._leave(leave, now)
        if change.entry is not None:
            name, entry, keep, ttl = change.entry
            self._lists.of(name)[name] = (now + ttl, (entry, *self._items(name, now))[:keep])
        if change.due is not None:
            self._due.plan(change.due.member, None if change.due.delay is None else now + change.due.delay)
        return True

    async def pages(self, name: str) -> AsyncIterator[list[str]]:
        members = list(self._living(name, self._now()))
        for at in range(0, len(members), PAGE):
            yield members[at : at + PAGE]

    async def take_due(self, most: int, claim: float, held: Sequence[str] = ()) -> list[str]:
        now = self._now()
        short = min(claim, BUDGET_CLAIM)
        for member in held:
            if self._due.at(member) is not None:
                self._due.plan(member, now + (short if member.startswith(BUDGET) else claim))
        taken = self._due.before(now, most)
        for member in taken:
            self._due.plan(member, now + (short if member.startswith(BUDGET) else claim))
        return taken

    async def has_run_out(self, name: str, seconds: int | None) -> bool:
        now = self._now()
        used = self._budget_of(name, now)
        if seconds != KEPT:
            used.limit = seconds
        self._plan_budget(name, used)
        out = used.runs_out()
        return out is not None and out <= used.at

    async def due_in(self, members: Sequence[str]) -> list[float | None]:
        now = self._now()
        return [None if (due := self._due.at(member)) is None else due - now for member in members]

    async def items(self, name: str) -> list[bytes]:
        return list(self._items(name, self._now()))

    async def publish(self, channel: str, message: bytes) -> None:
        self._pubsub.deliver(channel, message)

    def subscribe(self, channel: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self._pubsub.subscribe(channel)

    async def aclose(self) -> None:
        pass

    def _now(self) -> float:
        now = self._clock()
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_SECONDS
            self._next_shard = (self._next_shard + 1) % SHARDS
            for each in self._dicts:
                each.sweep(self._next_shard, now)
        return now

    def _value(self, name: str, now: float) -> bytes | None:
        kept = self._values.of(name).get(name)
        return kept[1] if kept is not None and kept[0] > now else None

    def _set(self, value: Value, now: float) -> None:
        self._values.of(value.name)[value.name] = (now + value.ttl, value.value)

    def _items(self, name: str, now: float) -> tuple[bytes, ...]:
        kept = self._lists.of(name).get(name)
        return kept[1] if kept is not None and kept[0] > now else ()

    def _add_member(self, name: str, member: str, now: float, ttl: float) -> int:
        shard = self._sets.of(name)
        members = shard.get(name)
        if members is None:
            members = shard[name] = _ExpiringSet()
        return members.add(member, now, ttl)

    def _living(self, name: str, now: float) -> dict[str, float]:
        members = self._sets.of(name).get(name)
        return members.living(now) if members is not None else {}

    def _budget_of(self, name: str, now: float) -> UsedTime:
        """Return the time that a set's members have used, as of now; it is kept once `_plan_budget` is called."""
        used = self._budgets.of(name).get(name) or UsedTime(now + self._epoch)
        members = self._sets.of(name).get(name)
        living = members.living(now) if members is not None else {}
        expired = (members.expired if members is not None else None) or []
        used.advance(now + self._epoch, living, expired)
        if members is not None:
            members.expired = []
        return used

    def _set_limits(self, request: LimitRequest, times: Sequence[UsedTime]) -> None:
        for (slot, seconds, enforced), each in zip(request.budgets, times, strict=True):
            each.limit = seconds if enforced else None
            self._plan_budget(request.slots[slot].name, each)

    def _join_budget(self, name: str, used: UsedTime, member: str, now: float, ttl: float) -> None:
        """Count a member that is about to enter a set."""
        used.until = max(used.until, now + ttl + self._epoch)
        members = self._sets.of(name).setdefault(name, _ExpiringSet())
        if members.expired is None:
            members.expired = []
        if member not in members.living(now):
            used.join(member)
        self._plan_budget(name, used)

    def _plan_budget(self, name: str, used: UsedTime) -> None:
        """Keep a set's time, and plan when its budget runs out."""
        self._budgets.of(name)[name] = used
        member, at = BUDGET + name, used.runs_out() if self._plans else None
        planned = self._due.at(member)
        if at is None:
            self._due.plan(member, None)
        # One that has run out already may be claimed: its place in the index is not its time.
        elif at > used.at or planned is None or planned > used.at - self._epoch + BUDGET_CLAIM:
            self._due.plan(member, at - self._epoch)

    def _leave(self, leave: Leave, now: float) -> None:
        name, member, seconds = leave
        if seconds is None:
            self._remove_member(name, member, now)
            return
        used = self._budget_of(name, now)
        if self._remove_member(name, member, now):
            used.leave(member, seconds)
        self._plan_budget(name, used)

    def _remove_member(self, name: str, member: str, now: float) -> bool:
        shard = self._sets.of(name)
        members = shard.get(name)
        if members is None:
            return False
        left = members.living(now).pop(member, None) is not None
        if not members.living(now):
            del shard[name]
        return left


def _used_up(budgets: Sequence[Budget], times: Sequence[UsedTime], first: int) -> list[int]:
    """Return the indices of the budgets of which nothing is left; the first one's is `first`."""
    both = enumerate(zip(budgets, times, strict=True), first)
    return [index for index, (budget, each) in both if budget.seconds is not None and each.total >= budget.seconds]


def _states(budgets: Sequence[Budget], times: Sequence[UsedTime]) -> tuple[BudgetState, ...]:
    return tuple(
        BudgetState(math.inf, 0)
        if budget.seconds is None
        else BudgetState(max(0.0, budget.seconds - each.total), each.free_in(budget.seconds))
        for budget, each in zip(budgets, times, strict=True)
    )


def _past(kept: tuple[float, object], now: float) -> bool:
    return kept[0] <= now


class _ShardedDict(Generic[_T]):
    """A mapping spread over small dicts."""

    def __init__(self, ended: Callable[[_T, float], bool]) -> None:
        self._ended = ended
        self._shards: list[dict[str, _T]] = [{} for _ in range(SHARDS)]

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def of(self, name: str) -> dict[str, _T]:
        """Return the dict that the name belongs to."""
        return self._shards[hash(name) % SHARDS]

    def sweep(self, shard: int, now: float) -> None:
        """Drop one dict's expired names. It becomes a new dict, since an emptied one keeps its size."""
        kept = self._shards[shard]
        if kept:
            self._shards[shard] = {name: value for name, value in kept.items() if not self._ended(value, now)}


class _ExpiringSet:
    """A set whose members expire; `living` costs only the members that ended since the last call."""

    __slots__ = ("_ends", "_queue", "expired")

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        self._queue: list[tuple[float, str]] = []
        self.expired: list[str] | None = None
        """Members whose time in the set has ended since this was emptied; None: they are not noted."""

    def living(self, now: float) -> dict[str, float]:
        """Return the living members and when each ends."""
        while self._queue and self._queue[0][0] <= now:
            end, member = heapq.heappop(self._queue)
            if self._ends.get(member) == end:
                del self._ends[member]
                if self.expired is not None:
                    self.expired.append(member)
        return self._ends

    def add(self, member: str, now: float, ttl: float) -> int:
        """Put a member in, or move its end; return how many are living."""
        living = self.living(now)
        living[member] = now + ttl
        heapq.heappush(self._queue, (now + ttl, member))
        if len(self._queue) > 2 * len(living) + 64:  # mostly of members that left or moved their end
            self._queue = [(end, name) for name, end in living.items()]
            heapq.heapify(self._queue)
        return len(living)


class _DueIndex:
    """Members by the time at which they are due; a queue of times, whose old entries are skipped when they come up."""

    __slots__ = ("_at", "_queue")

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._queue: list[tuple[float, str]] = []

    @property
    def members(self) -> list[str]:
        """All members."""
        return list(self._at)

    def at(self, member: str) -> float | None:
        """Return when a member is due; None if it is not in the index."""
        return self._at.get(member)

    def plan(self, member: str, at: float | None) -> None:
        """Put a member in, or move its time; None: take it out."""
        if at is None:
            self._at.pop(member, None)
            return
        self._at[member] = at
        heapq.heappush(self._queue, (at, member))
        if len(self._queue) > 2 * len(self._at) + 64:
            self._queue = [(time, name) for name, time in self._at.items()]
            heapq.heapify(self._queue)

    def before(self, now: float, most: int) -> list[str]:
        """Return the members that are due, earliest first, and forget their places in the queue: plan them again."""
        found: list[str] = []
        while self._queue and self._queue[0][0] <= now and len(found) < most:
            at, member = heapq.heappop(self._queue)
            if self._at.get(member) == at and member not in found:
                found.append(member)
        return found
