"""The shared store, and this process alone while it is gone.

The local store is fed with everything this replica counts, so that a loss does not start the counters at zero. A probe
asks the shared store each second for a decision (and no mere ping: a server that is read-only or out of memory answers
pings). The first question without an answer marks it down; from then on nobody waits
for it, until a probe succeeds.

What is answered while it is down, and why:

- `decide`: locally, marked `local`. A caller is better off with this replica's own count than with none; the overshoot
  is at most the limit times the replicas.
- `give_back`, `enter`, `leave`, `members`: locally; sets as this replica filled them. What entered or left meanwhile is
  told to the shared store when it is back, so that no call is forgotten that must be hung up later, and no slot stays
  taken until its lease ends. What was counted in the shared store stays counted there: the safe side.
- `publish`: to the listeners of this process. A hint is worth that much, and never an error.
- `subscribe`: as ever; it resumes by itself.
- `get`, `set`, `add`, `replace`, `delete`, `push`, `items`: StoreUnavailable at once. They hold what replicas agree on
  (who answers a repeated key, who polls, what is paused); an answer from here alone would be a guess, and what to do
  without is the caller's to say.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, ParamSpec, Self, TypeVar

import structlog

from app.store.memory import MemoryStore
from app.store.protocol import Decision, LimitRequest, Rate, Slot, StoreUnavailable, Value
from app.store.valkey import ValkeyStore

PROBE_SECONDS = 1.0
PROBE = LimitRequest([Rate("probe", 1, 1)], [Slot("probe", None)], member="probe", lease=1)
MISSED = 10_000
"""Entries and departures remembered for the shared store while it is gone; beyond, the oldest are forgotten."""

_P = ParamSpec("_P")
_T = TypeVar("_T")

log = structlog.stdlib.get_logger()


@dataclass(frozen=True, slots=True)
class _Fed(Decision):
    """A decision of the shared store, with the local one that was fed along."""

    own: Decision | None = None


class FailoverStore:
    """`Store` on a shared store that may go away. Use as `async with`, which runs the probe."""

    shared = True

    def __init__(self, shared: ValkeyStore, local: MemoryStore) -> None:
        self._shared = shared
        self._local = local
        self._down_since: float | None = None
        self._probe: asyncio.Task[None] | None = None
        self._missed: dict[tuple[str, str], float | None] = {}

    @property
    def state(self) -> Literal["ok", "down"]:
        """Whether the shared store answered last."""
        return "ok" if self._down_since is None else "down"

    async def __aenter__(self) -> Self:
        self._probe = asyncio.create_task(self._watch(), name="store-probe")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def decide(self, request: LimitRequest) -> Decision:
        """See `Store.decide`."""
        sent = self._down_since is None
        try:
            decision = await self._ask(self._shared.decide, request)
        except StoreUnavailable:
            if sent:  # a frozen server may let the member in yet
                self._miss_slots(request, None)
            alone = await self._local.decide(request)
            if alone.counted:
                self._miss_slots(request, request.lease)
            return dataclasses.replace(alone, local=True)
        if not decision.counted:
            return decision
        own = await self._local.decide(request._replace(enforce=False))
        return _Fed(decision.refused, decision.rates, decision.used, True, own=own)

    async def give_back(self, request: LimitRequest, decision: Decision) -> None:
        """See `Store.give_back`. Never raises."""
        if not isinstance(decision, _Fed):
            await self._local.give_back(request, decision)
            if decision.counted:
                self._miss_slots(request, None)
            return
        if decision.own is not None:
            await self._local.give_back(request, decision.own)
        try:
            await self._ask(self._shared.give_back, request, decision)
        except StoreUnavailable:
            self._miss_slots(request, None)

    async def get(self, name: str) -> bytes | None:
        """See `Store.get`."""
        return await self._ask(self._shared.get, name)

    async def set(self, name: str, value: bytes, ttl: float) -> None:
        """See `Store.set`."""
        await self._ask(self._shared.set, name, value, ttl)

    async def add(self, name: str, value: bytes, ttl: float) -> bool:
        """See `Store.add`."""
        return await self._ask(self._shared.add, name, value, ttl)

    async def replace(self, name: str, expected: bytes, value: bytes, ttl: float) -> bool:
        """See `Store.replace`."""
        return await self._ask(self._shared.replace, name, expected, value, ttl)

    async def delete(self, name: str, expected: bytes | None = None) -> bool:
        """See `Store.delete`."""
        return await self._ask(self._shared.delete, name, expected)

    async def add_member(self, name: str, member: str, ttl: float) -> None:
        """See `Store.add_member`. Never raises."""
        await self._local.add_member(name, member, ttl)
        try:
            await self._ask(self._shared.add_member, name, member, ttl)
        except StoreUnavailable:
            self._miss([name], member, ttl)

    async def remove_member(self, names: Sequence[str], member: str) -> bool:
        """See `Store.remove_member`. Never raises."""
        left = await self._local.remove_member(names, member)
        try:
            return await self._ask(self._shared.remove_member, names, member)
        except StoreUnavailable:
            self._miss(names, member, None)
            return left

    async def members(self, name: str) -> dict[str, float]:
        """See `Store.members`. Never raises; while the store is gone, the members this replica knows."""
        try:
            return await self._ask(self._shared.members, name)
        except StoreUnavailable:
            return await self._local.members(name)

    async def push(self, name: str, value: bytes, *, keep: int, ttl: float, setting: Sequence[Value] = ()) -> None:
        """See `Store.push`."""
        await self._ask(self._shared.push, name, value, keep=keep, ttl=ttl, setting=setting)

    async def items(self, name: str) -> list[bytes]:
        """See `Store.items`."""
        return await self._ask(self._shared.items, name)

    async def publish(self, channel: str, message: bytes) -> None:
        """See `Store.publish`. Never raises."""
        try:
            await self._ask(self._shared.publish, channel, message)
        except StoreUnavailable:
            self._shared.pubsub.deliver(channel, message)

    def subscribe(self, channel: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """See `Store.subscribe`."""
        return self._shared.subscribe(channel)

    async def aclose(self) -> None:
        """See `Store.aclose`."""
        if self._probe is not None:
            self._probe.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probe
            self._probe = None
        await self._shared.aclose()

    async def _ask(self, operation: Callable[_P, Awaitable[_T]], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        if self._down_since is not None:
            raise StoreUnavailable("the shared store is gone")
        try:
            return await operation(*args, **kwargs)
        except StoreUnavailable as error:
            self._lost(error)
            raise

    def _lost(self, error: StoreUnavailable) -> None:
        if self._down_since is None:
            self._down_since = time.monotonic()
            log.error("store_lost", reason=str(error))

    def _miss(self, names: Sequence[str], member: str, ttl: float | None) -> None:
        for name in names:
            self._missed.pop((name, member), None)
            if len(self._missed) >= MISSED:
                del self._missed[next(iter(self._missed))]
            self._missed[name, member] = None if ttl is None else time.monotonic() + ttl

    def _miss_slots(self, request: LimitRequest, ttl: float | None) -> None:
        self._miss([slot.name for slot in request.slots], request.member, ttl)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            try:
                await self._shared.decide(PROBE)
                await self._replay_missed()
            except StoreUnavailable as error:
                self._lost(error)
                continue
            if self._down_since is not None:
                log.warning("store_recovered", gone_seconds=round(time.monotonic() - self._down_since, 1))
                self._down_since = None

    async def _replay_missed(self) -> None:
        """Bring the shared sets up to date; what cannot be told stays for the next time."""
        while self._missed:
            (name, member), end = self._missed.popitem()
            try:
                if end is None:
                    await self._shared.remove_member([name], member)
                elif (left := end - time.monotonic()) > 0:
                    await self._shared.add_member(name, member, left)
            except StoreUnavailable:
                self._missed.setdefault((name, member), end)
                raise
