"""The store of a single process: exact, about 3 µs per decision, gone at exit.

No operation awaits anything, so each is atomic on the event loop. Names are spread over 256 small dicts, because one
big dict would block the loop for tens of milliseconds each time it grows. At most every 0.25 s an operation sweeps the
next dict, so an expired name is gone after about a minute of use, and no step visits all names.
"""

import heapq
import math
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

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
    Rate,
    RateState,
    Store,
    Value,
)
from app.store.sliding_window import Window

FEW = 4
"""Members of a set that needs no timetable."""
SPARE_ENTRIES = 64
"""Entries of a timetable that may be out of date, besides as many as it has members."""
SHARDS = 256
SWEEP_SECONDS = 0.25

_END, _LENGTH = struct.Struct("d"), struct.Struct("I")
"""The time at which a value or a list ends, before it; the length of each of a list's entries. One object, not five."""

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
        self._windows = _Windows()
        self._values = _ShardedDict[bytes](_has_ended)
        self._lists = _ShardedDict[bytes](_has_ended)
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
        found: list[Window | None] = []
        for index, rate in enumerate(rates):
            window = self._windows.get(rate)
            if (0 if window is None else windows.drop(window, now)) + cost > rate.amount:
                refused.append(index)
            found.append(window)
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
            window = found[index] or windows.fresh(rate.seconds)
            if counted:
                windows.count(window, rate, now, cost)
                if found[index] is None:
                    self._windows.add(rate, window)
            states.append(windows.describe(window, rate, now, cost if index in refused else None, now))
        if counted:
            end = now + lease
            for budget, each in zip(budgets, times, strict=True):
                self._join_budget(slots[budget.slot].name, each, member, now, end)
            used = [self._add_member(slot.name, member, now, end) for slot in slots]
            if record is not None and self._value(record.name, now) is None:
                self._set(record, now)
        left = _states(budgets, times) if budgets else ()
        return Decision(tuple(refused), tuple(states), tuple(used), counted, budgets=left)

    async def give_back(self, request: LimitRequest, decision: Decision) -> bool:
        if not decision.counted:
            return True
        for rate, state in zip(request.rates, decision.rates, strict=True):
            if window := self._windows.get(rate):
                windows.uncount(window, rate, state.mark, request.cost)
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
        self._set(Value(name, value, ttl), now)
        return True

    async def replace(self, name: str, expected: bytes, value: bytes, ttl: float) -> bool:
        now = self._now()
        if self._value(name, now) != expected:
            return False
        self._set(Value(name, value, ttl), now)
        return True

    async def delete(self, name: str, expected: bytes | None = None) -> bool:
        value = self._value(name, self._now())
        if value is None or (expected is not None and value != expected):
            return False
        del self._values.of(name)[name]
        return True

    async def add_member(self, name: str, member: str, ttl: float) -> None:
        now = self._now()
        self._add_member(name, member, now, now + ttl)

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
                self._join_budget(name, self._budget_of(name, now), member, now, now + ttl)
            self._add_member(name, member, now, now + ttl)
        for leave in change.leaves:
            self._leave(leave, now)
        if change.entry is not None:
            name, entry, keep, ttl = change.entry
            entries = [entry, *self._items(name, now)][:keep]
            packed = [part for each in entries for part in (_LENGTH.pack(len(each)), each)]
            self._lists.of(name)[name] = _END.pack(now + ttl) + b"".join(packed)
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
        return self._items(name, self._now())

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
        return kept[_END.size :] if kept is not None and not _has_ended(kept, now) else None

    def _set(self, value: Value, now: float) -> None:
        self._values.of(value.name)[value.name] = _END.pack(now + value.ttl) + value.value

    def _items(self, name: str, now: float) -> list[bytes]:
        kept = self._lists.of(name).get(name)
        if kept is None or _has_ended(kept, now):
            return []
        items, at = [], _END.size
        while at < len(kept):
            first = at + _LENGTH.size
            at = first + _LENGTH.unpack_from(kept, at)[0]
            items.append(kept[first:at])
        return items

    def _add_member(self, name: str, member: str, now: float, end: float) -> int:
        shard = self._sets.of(name)
        members = shard.get(name)
        if members is None:
            members = shard[name] = _ExpiringSet()
        return members.add(member, now, end)

    def _living(self, name: str, now: float) -> Mapping[str, float]:
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

    def _join_budget(self, name: str, used: UsedTime, member: str, now: float, end: float) -> None:
        """Count a member that is about to enter a set."""
        used.until = max(used.until, end + self._epoch)
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
        left = members.remove(member, now)
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


def _has_ended(kept: bytes, now: float) -> bool:
    ends: float = _END.unpack_from(kept)[0]
    return ends <= now


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


class _Windows(_ShardedDict[tuple[Any, ...]]):
    """Windows; those of one owner are one tuple, `(kind, window, kind, window, …)`."""

    def __init__(self) -> None:
        super().__init__(_all_ended)

    def get(self, rate: Rate) -> Window | None:
        """Return a rate's window; None if there is none."""
        owner = rate.owner or rate.name
        group = self.of(owner).get(owner, ())
        return group[group.index(rate.kind) + 1] if rate.kind in group else None

    def add(self, rate: Rate, window: Window) -> None:
        """Keep a rate's first window."""
        owner = rate.owner or rate.name
        shard = self.of(owner)
        shard[owner] = (*shard.get(owner, ()), rate.kind, window)


def _all_ended(group: tuple[Any, ...], now: float) -> bool:
    # From the last one: it is mostly the longest, and tells at once.
    for window in group[::-2]:  # noqa: SIM110 - a generator takes half as long again, and a sweep asks for many users
        if not windows.ended(window, now):
            return False
    return True


class _Timetable:
    """Members by the time at which they are due, in little memory.

    Those of a later second wait in its list, unsorted; when it begins, they go into a queue. What has left, or moved
    its time, stays in its list until a later step finds it: no step looks at more than one second's list.
    """

    __slots__ = ("_begun", "_entries", "_later", "_queue", "_seconds", "at")

    def __init__(self) -> None:
        self.at: dict[str, float] = {}
        """When each member is due."""
        self._later: dict[float, list[str]] = {}
        self._seconds: list[float] = []
        self._queue: list[tuple[float, str]] = []
        self._begun: float = -math.inf
        self._entries = 0

    def plan(self, member: str, at: float) -> None:
        """Put a member in, or move its time."""
        self.at[member] = at
        second = at // 1
        if second <= self._begun:
            heapq.heappush(self._queue, (at, member))
            return
        waiting = self._later.get(second)
        if waiting is None:
            waiting = self._later[second] = []
            heapq.heappush(self._seconds, second)
        waiting.append(member)
        self._entries += 1
        if self._entries > 2 * len(self.at) + SPARE_ENTRIES:
            self._tidy()

    def pop(self, now: float) -> str | None:
        """Take the earliest member that is due from its place and return it; it stays in `at`. None: none is due."""
        while self._seconds and self._seconds[0] <= now:
            self._begun = heapq.heappop(self._seconds)
            for member in self._later.pop(self._begun, ()):
                self._entries -= 1
                at = self.at.get(member)
                if at is not None and at // 1 == self._begun:
                    heapq.heappush(self._queue, (at, member))
        while self._queue and self._queue[0][0] <= now:
            at, member = heapq.heappop(self._queue)
            if self.at.get(member) == at:
                return member
        return None

    def _tidy(self) -> None:
        """Drop what has left, or moved its time, from one second's list."""
        second = next(iter(self._later))
        waiting = self._later.pop(second)
        self._entries -= len(waiting)
        kept = [member for member in dict.fromkeys(waiting) if self.at.get(member, -1) // 1 == second]
        if kept:
            self._later[second] = kept  # the last to be tidied again
            self._entries += len(kept)


class _ExpiringSet:
    """A set whose members expire; a step costs only the members that ended since the last one.

    Most sets are a user's, with a call or two: up to FEW members are a tuple of names and ends.
    """

    __slots__ = ("_few", "_many", "expired")

    def __init__(self) -> None:
        self._few: tuple[Any, ...] = ()
        self._many: _Timetable | None = None
        self.expired: list[str] | None = None
        """Members whose time in the set has ended since this was emptied; None: they are not noted."""

    def living(self, now: float) -> Mapping[str, float]:
        """Return the living members and when each ends."""
        if self._many is not None:
            while (member := self._many.pop(now)) is not None:
                del self._many.at[member]
                if self.expired is not None:
                    self.expired.append(member)
            return self._many.at
        if not self._few:
            return {}
        members = dict(zip(self._few[::2], self._few[1::2], strict=True))
        if min(members.values()) <= now:
            for _, member in sorted((end, member) for member, end in members.items() if end <= now):
                del members[member]
                if self.expired is not None:
                    self.expired.append(member)
            self._few = _flat(members)
        return members

    def add(self, member: str, now: float, end: float) -> int:
        """Put a member in, or move its end; return how many are living."""
        living = self.living(now)
        if self._many is not None:
            self._many.plan(member, end)
            return len(living)
        if member not in living and len(living) < FEW:
            self._few = (*self._few, member, end)
            return len(living) + 1
        members = {**living, member: end}
        if len(members) <= FEW:
            self._few = _flat(members)
        else:
            self._few, self._many = (), _Timetable()
            for each, its_end in members.items():
                self._many.plan(each, its_end)
        return len(members)

    def remove(self, member: str, now: float) -> bool:
        """Take a member out; return whether it was in."""
        members = self.living(now)
        if member not in members:
            return False
        if self._many is not None:
            del self._many.at[member]
        else:
            self._few = _flat({each: end for each, end in members.items() if each != member})
        return True


def _flat(members: Mapping[str, float]) -> tuple[Any, ...]:
    return tuple(part for pair in members.items() for part in pair)


class _DueIndex:
    """Members by the time at which they are due."""

    __slots__ = ("_times",)

    def __init__(self) -> None:
        self._times = _Timetable()

    @property
    def members(self) -> list[str]:
        """All members."""
        return list(self._times.at)

    def at(self, member: str) -> float | None:
        """Return when a member is due; None if it is not in the index."""
        return self._times.at.get(member)

    def plan(self, member: str, at: float | None) -> None:
        """Put a member in, or move its time; None: take it out."""
        if at is None:
            self._times.at.pop(member, None)
        else:
            self._times.plan(member, at)

    def before(self, now: float, most: int) -> list[str]:
        """Return the members that are due, earliest first, and forget their places: plan them again."""
        found: list[str] = []
        while len(found) < most and (member := self._times.pop(now)) is not None:
            if member not in found:
                found.append(member)
        return found
