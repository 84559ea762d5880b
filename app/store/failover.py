"""The shared store, with a local fallback while it is unreachable.

The local store counts everything this replica counts, so that a loss does not start the counters at zero. Every second
a probe asks the shared store for a decision (a read-only or full server still answers pings). The first operation
without an answer marks the store down; after that no request waits for it, until a probe succeeds.

While the store is down:

- `decide`: answered locally, marked `local`. A replica's own count is better than none; the overshoot is at most the
  limit times the number of replicas.
- `give_back`, `add_member`, `remove_member`, `members`: answered locally, from what this replica put in. Members that
  were added or removed are replayed when the store is back. Counts in the shared store stay: too many rather than too
  few. Members of the last seconds are also replayed when the store has moved: the new primary may have lagged behind.
- `publish`: reaches this process's subscribers only. It is a hint, so never an error.
- `subscribe`: works, and resumes by itself.
- `get`, `set`, `add`, `replace`, `delete`, `change`, `items`, `take_due`, `has_run_out`, `due_in`: StoreUnavailable at
  once. Replicas must agree on these (who answers a repeated key, who polls, what state a call is in, who ends it); a
  local answer would be a guess, so the caller decides. Only the members of a `change` join and leave the local sets
  all the same: they are this replica's own calls.

A right that the store's user lacks is no loss, unless the probe needs it.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, ParamSpec, Self, TypeVar

import structlog

from app.store.generation import Generation
from app.store.memory import MemoryStore
from app.store.protocol import Change, Decision, LimitRequest, Rate, Slot, Store, StoreUnavailable
from app.store.review import weaknesses
from app.store.valkey import Refused, ValkeyStore

PROBE_SECONDS = 1.0
SETTLE_SECONDS = 2.5
"""Seconds after its return within which every replica has noticed it, and has written what it missed."""
PROBE_REQUEST = LimitRequest([Rate("probe", 1, 1)], [Slot("probe", None)], member="probe", lease=1)
PLACE_SECONDS = 2.0
"""Seconds between new connections, which show whether the store's address leads elsewhere by now."""
LAG_SECONDS = 10.0
"""Changes of members this recent are replayed after a move."""
REPLAYED_AT_ONCE = 500
LOSS_REMEDY = "running calls are read back from OneInbox; used limits, pauses and blocks are forgotten"
MISSED = 10_000
"""Changes of members kept for the shared store while it is gone; beyond that, the oldest are dropped."""

_P = ParamSpec("_P")
_T = TypeVar("_T")

log = structlog.stdlib.get_logger()


class FailoverStore(Store):
    """A shared store that may go away, with a local one to fall back on. `async with` runs the probe."""

    shared = True

    def __init__(self, shared: ValkeyStore, local: MemoryStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._shared = shared
        self._local = local
        self._clock = clock
        self._down_since: float | None = None
        self._settled_at = float("-inf")
        self._probe: asyncio.Task[None] | None = None
        self._missed: dict[tuple[str, str], float | None] = {}
        self._recent: deque[tuple[float, Sequence[str], str, float | None]] = deque(maxlen=MISSED)
        self._moves = 0
        self._check_place_at = 0.0
        self._generation = Generation(shared)
        self._reviewed_moves: int | None = None
        self._warned: set[str] = set()
        self.losses = 0

    @property
    def state(self) -> Literal["ok", "down"]:
        """`ok` if the shared store answered last."""
        return "ok" if self._down_since is None else "down"

    @property
    def settling(self) -> bool:
        return self._clock() < self._settled_at

    @property
    def incomplete(self) -> bool:
        return self._generation.incomplete and self._down_since is None

    async def complete(self) -> bool:
        return await self._ask(self._generation.complete)

    async def __aenter__(self) -> Self:
        self._probe = asyncio.create_task(self._probe_forever(), name="store-probe")
        return self

    def now(self) -> float:
        return self._shared.now()

    async def decide(self, request: LimitRequest) -> Decision:
        sent = self._down_since is None
        try:
            decision = await self._ask(self._shared.decide, request)
        except StoreUnavailable:
            alone = await self._local.decide(request._replace(record=None))
            return alone._replace(local=True, doubtful=sent)
        if not decision.counted:
            return decision
        rates, slots, member, lease, cost, _, _, budgets = request  # no `_replace`: it takes longer than the decision
        mirrored = await self._local.decide(LimitRequest(rates, slots, member, lease, cost, False, None, budgets))
        return Decision(*decision[:4], mirrored=mirrored, budgets=decision.budgets)

    async def give_back(self, request: LimitRequest, decision: Decision) -> bool:
        if decision.mirrored is None:
            await self._local.give_back(request, decision)
            return not decision.counted
        await self._local.give_back(request, decision.mirrored)
        try:
            return await self._ask(self._shared.give_back, request, decision)
        except StoreUnavailable:
            return False

    async def get(self, name: str) -> bytes | None:
        return await self._ask(self._shared.get, name)

    async def set(self, name: str, value: bytes, ttl: float) -> None:
        await self._ask(self._shared.set, name, value, ttl)

    async def add(self, name: str, value: bytes, ttl: float) -> bool:
        return await self._ask(self._shared.add, name, value, ttl)

    async def replace(self, name: str, expected: bytes, value: bytes, ttl: float) -> bool:
        return await self._ask(self._shared.replace, name, expected, value, ttl)

    async def delete(self, name: str, expected: bytes | None = None) -> bool:
        return await self._ask(self._shared.delete, name, expected)

    async def add_member(self, name: str, member: str, ttl: float) -> None:
        await self._local.add_member(name, member, ttl)
        self._recent.append((self._clock(), [name], member, ttl))
        try:
            await self._ask(self._shared.add_member, name, member, ttl)
        except StoreUnavailable:
            self._queue_change([name], member, ttl)

    async def remove_member(self, names: Sequence[str], member: str) -> bool:
        left = await self._local.remove_member(names, member)
        self._recent.append((self._clock(), names, member, None))
        try:
            return await self._ask(self._shared.remove_member, names, member)
        except StoreUnavailable:
            self._queue_change(names, member, None)
            return left

    async def members(self, name: str) -> dict[str, float]:
        try:
            return await self._ask(self._shared.members, name)
        except StoreUnavailable:
            return await self._local.members(name)

    async def change(self, change: Change) -> bool:
        members = Change({}, joins=change.joins, leaves=change.leaves) if change.joins or change.leaves else None
        try:
            made = await self._ask(self._shared.change, change)
        except StoreUnavailable:
            if members is not None:
                await self._local.change(members)
            raise
        if made and members is not None:
            await self._local.change(members)
        return made

    async def pages(self, name: str) -> AsyncIterator[list[str]]:
        if self._down_since is not None:
            raise StoreUnavailable("the shared store is gone")
        try:
            async for page in self._shared.pages(name):
                yield page
        except StoreUnavailable as error:
            self._lost(error)
            raise

    async def take_due(self, most: int, claim: float, held: Sequence[str] = ()) -> list[str]:
        return await self._ask(self._shared.take_due, most, claim, held)

    async def has_run_out(self, name: str, seconds: int | None) -> bool:
        return await self._ask(self._shared.has_run_out, name, seconds)

    async def due_in(self, members: Sequence[str]) -> list[float | None]:
        return await self._ask(self._shared.due_in, members)

    async def items(self, name: str) -> list[bytes]:
        return await self._ask(self._shared.items, name)

    async def publish(self, channel: str, message: bytes) -> None:
        try:
            await self._ask(self._shared.publish, channel, message)
        except StoreUnavailable:
            self._shared.pubsub.deliver(channel, message)
        else:
            if self._shared.channels == "refused":
                self._shared.pubsub.deliver(channel, message)

    def subscribe(self, channel: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self._shared.subscribe(channel)

    async def aclose(self) -> None:
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
        except Refused:
            raise
        except StoreUnavailable as error:
            self._lost(error)
            raise

    def _lost(self, error: StoreUnavailable) -> None:
        if self._down_since is None:
            self._down_since = self._clock()
            log.error("store_lost", reason=str(error))

    def _queue_change(self, names: Sequence[str], member: str, ttl: float | None) -> None:
        for name in names:
            self._missed.pop((name, member), None)
            if len(self._missed) >= MISSED:
                del self._missed[next(iter(self._missed))]
            self._missed[name, member] = None if ttl is None else self._clock() + ttl

    def use(self, url: str) -> None:
        """Use another URL of the same kind from now on, such as one with a new password. Raises ValueError."""
        self._shared.use(url)

    async def _probe_forever(self) -> None:
        while True:
            try:
                await self._shared.decide(PROBE_REQUEST)
                moved = await self._check_place()
                await self._check_generation()
                if moved:
                    await self._generation.doubt()
                await self._replay_missed()
            except StoreUnavailable as error:
                self._lost(error)
            except Exception:  # a value that cannot be read must not end the probing
                log.exception("store_probe_failed")
            else:
                if self._down_since is not None:
                    log.warning("store_recovered", gone_seconds=round(self._clock() - self._down_since, 1))
                    self._down_since = None
                    self._settled_at = self._clock() + SETTLE_SECONDS
                await self._review()
            await asyncio.sleep(PROBE_SECONDS)

    async def _check_generation(self) -> None:
        verdict = await self._generation.check()
        if verdict in ("emptied", "set-back"):
            self.losses += 1
            log.error("store_emptied" if verdict == "emptied" else "store_set_back", remedy=LOSS_REMEDY)

    async def _review(self) -> None:
        """Log what is weak about the server in use, each weakness once."""
        if self._reviewed_moves != self._shared.moves:
            self._reviewed_moves = self._shared.moves
            try:
                about = await self._shared.info()
            except StoreUnavailable:
                about = {}
            for weakness in weaknesses(about):
                if weakness.remedy not in self._warned:
                    self._warned.add(weakness.remedy)
                    log.warning("store_warning", detail=weakness.detail, remedy=weakness.remedy)

    async def _check_place(self) -> bool:
        """Look where the server is; return whether another connection is in use since the last time."""
        if self._clock() >= self._check_place_at:
            self._check_place_at = self._clock() + PLACE_SECONDS
            await self._shared.check_place()
        if self._moves == self._shared.moves:
            return False
        self._moves = self._shared.moves
        since = self._clock() - LAG_SECONDS
        for noted, names, member, ttl in self._recent:
            if noted > since:
                for name in names:
                    self._missed.pop((name, member), None)
                    self._missed[name, member] = None if ttl is None else noted + ttl
        return True

    async def _replay_missed(self) -> None:
        """Bring the shared sets up to date; what cannot be written stays for the next time."""
        while self._missed:
            some = list(self._missed.items())[-REPLAYED_AT_ONCE:]
            for key, _ in some:
                del self._missed[key]
            # Together: a store far away takes its time for each.
            results = await asyncio.gather(*(self._replay(*key, end) for key, end in some), return_exceptions=True)
            failed = [(key, end, error) for (key, end), error in zip(some, results, strict=True) if error]
            for key, end, _ in failed:
                self._missed.setdefault(key, end)
            if failed:
                raise failed[0][2]

    async def _replay(self, name: str, member: str, end: float | None) -> None:
        if end is None:
            await self._shared.remove_member([name], member)
        elif (left := end - self._clock()) > 0:
            await self._shared.add_member(name, member, left)
