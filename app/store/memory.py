"""The store of a single process: exact, about 3 µs a decision, forgotten at exit.

No operation awaits anything, so each is atomic on the event loop. Names are spread over 256 small dicts, because one
big one would stop the loop for tens of milliseconds each time it grows; a quarter of a second apart, operations sweep
the dead names out of the next of them. So a dead name is gone after a minute or so of use, and no step looks at all.
"""

import heapq
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Generic, Literal, Self, TypeVar

from app.store import sliding_window as windows
from app.store.local_pubsub import LocalPubSub
from app.store.protocol import Decision, LimitRequest, RateState, Value
from app.store.sliding_window import Window

SHARDS = 256
SWEEP_SECONDS = 0.25

_T = TypeVar("_T")


class MemoryStore:
    """`Store` in this process's memory. `clock` counts seconds and never runs backwards."""

    shared = False

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows = _ShardedDict[Window](windows.ended)
        self._values = _ShardedDict[tuple[float, bytes]](_past)
        self._lists = _ShardedDict[tuple[float, tuple[bytes, ...]]](_past)
        self._sets = _ShardedDict[_ExpiringSet](lambda members, now: not members.living(now))
        self._dicts = (self._windows, self._values, self._lists, self._sets)
        self._sweep_at = float("-inf")
        self._hand = 0
        self._pubsub = LocalPubSub()

    @property
    def state(self) -> Literal["ok", "down"]:
        """Always ok."""
        return "ok"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __len__(self) -> int:
        """Names held, dead ones not swept yet included."""
        return sum(len(each) for each in self._dicts)

    async def decide(self, request: LimitRequest) -> Decision:
        """See `Store.decide`."""
        rates, slots, member, lease, cost, enforce = request
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

        counted = cost > 0 and (not refused or not enforce)
        states: list[RateState] = []
        for index, rate in enumerate(rates):
            shard, window = found[index]
            if counted:
                window = shard[rate.name] = windows.count(window, rate, now, cost)
            states.append(windows.describe(window, rate, now, cost if index in refused else None, now))
        if counted:
            used = [self._add_member(slot.name, member, now, lease) for slot in slots]
        return Decision(tuple(refused), tuple(states), tuple(used), counted)

    async def give_back(self, request: LimitRequest, decision: Decision) -> None:
        """See `Store.give_back`."""
        if not decision.counted:
            return
        for rate, state in zip(request.rates, decision.rates, strict=True):
            shard = self._windows.of(rate.name)
            if rate.name in shard:
                shard[rate.name] = windows.uncount(shard[rate.name], rate, state.mark, request.cost)
        await self.remove_member([slot.name for slot in request.slots], request.member)

    async def get(self, name: str) -> bytes | None:
        """See `Store.get`."""
        return self._value(name, self._now())

    async def set(self, name: str, value: bytes, ttl: float) -> None:
        """See `Store.set`."""
        self._values.of(name)[name] = (self._now() + ttl, value)

    async def add(self, name: str, value: bytes, ttl: float) -> bool:
        """See `Store.add`."""
        now = self._now()
        if self._value(name, now) is not None:
            return False
        self._values.of(name)[name] = (now + ttl, value)
        return True

    async def replace(self, name: str, expected: bytes, value: bytes, ttl: float) -> bool:
        """See `Store.replace`."""
        now = self._now()
        if self._value(name, now) != expected:
            return False
        self._values.of(name)[name] = (now + ttl, value)
        return True

    async def delete(self, name: str, expected: bytes | None = None) -> bool:
        """See `Store.delete`."""
        value = self._value(name, self._now())
        if value is None or (expected is not None and value != expected):
            return False
        del self._values.of(name)[name]
        return True

    async def add_member(self, name: str, member: str, ttl: float) -> None:
        """See `Store.add_member`."""
        self._add_member(name, member, self._now(), ttl)

    async def remove_member(self, names: Sequence[str], member: str) -> bool:
        """See `Store.remove_member`."""
        now = self._now()
        left = False
        for name in names:
            shard = self._sets.of(name)
            members = shard.get(name)
            if members is None:
                continue
            left = members.living(now).pop(member, None) is not None or left
            if not members.living(now):
                del shard[name]
        return left

    async def members(self, name: str) -> dict[str, float]:
        """See `Store.members`."""
        now = self._now()
        members = self._sets.of(name).get(name)
        return {member: end - now for member, end in members.living(now).items()} if members else {}

    async def push(self, name: str, value: bytes, *, keep: int, ttl: float, setting: Sequence[Value] = ()) -> None:
        """See `Store.push`."""
        now = self._now()
        for each in setting:
            self._values.of(each.name)[each.name] = (now + each.ttl, each.value)
        self._lists.of(name)[name] = (now + ttl, (value, *self._items(name, now))[:keep])

    async def items(self, name: str) -> list[bytes]:
        """See `Store.items`."""
        return list(self._items(name, self._now()))

    async def publish(self, channel: str, message: bytes) -> None:
        """See `Store.publish`."""
        self._pubsub.deliver(channel, message)

    def subscribe(self, channel: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """See `Store.subscribe`."""
        return self._pubsub.listen(channel)

    async def aclose(self) -> None:
        """Nothing to close."""

    def _now(self) -> float:
        now = self._clock()
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_SECONDS
            self._hand = (self._hand + 1) % SHARDS
            for each in self._dicts:
                each.sweep(self._hand, now)
        return now

    def _value(self, name: str, now: float) -> bytes | None:
        kept = self._values.of(name).get(name)
        return kept[1] if kept is not None and kept[0] > now else None

    def _items(self, name: str, now: float) -> tuple[bytes, ...]:
        kept = self._lists.of(name).get(name)
        return kept[1] if kept is not None and kept[0] > now else ()

    def _add_member(self, name: str, member: str, now: float, ttl: float) -> int:
        shard = self._sets.of(name)
        members = shard.get(name)
        if members is None:
            members = shard[name] = _ExpiringSet()
        return members.add(member, now, ttl)


def _past(kept: tuple[float, object], now: float) -> bool:
    return kept[0] <= now


class _ShardedDict(Generic[_T]):
    """Names of one kind, spread over small dicts."""

    def __init__(self, ended: Callable[[_T, float], bool]) -> None:
        self._ended = ended
        self._shards: list[dict[str, _T]] = [{} for _ in range(SHARDS)]

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def of(self, name: str) -> dict[str, _T]:
        """The dict that holds the name, if anything does."""
        return self._shards[hash(name) % SHARDS]

    def sweep(self, shard: int, now: float) -> None:
        """Drop one dict's dead names. A new dict, since an emptied one would keep its size."""
        kept = self._shards[shard]
        if kept:
            self._shards[shard] = {name: value for name, value in kept.items() if not self._ended(value, now)}


class _ExpiringSet:
    """A set whose members each have an end; `living` costs only the members that ended since the last look."""

    __slots__ = ("_ends", "_queue")

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        self._queue: list[tuple[float, str]] = []

    def living(self, now: float) -> dict[str, float]:
        """The living members and when each ends."""
        while self._queue and self._queue[0][0] <= now:
            end, member = heapq.heappop(self._queue)
            if self._ends.get(member) == end:
                del self._ends[member]
        return self._ends

    def add(self, member: str, now: float, ttl: float) -> int:
        """Put a member in, or move its end; how many live then."""
        living = self.living(now)
        living[member] = now + ttl
        heapq.heappush(self._queue, (now + ttl, member))
        if len(self._queue) > 2 * len(living) + 64:  # mostly members that left or moved their end
            self._queue = [(end, name) for name, end in living.items()]
            heapq.heapify(self._queue)
        return len(living)
