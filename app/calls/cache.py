"""A cache of call states, so that OneInbox is asked no more often than needed."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from app.calls.snapshots import Snapshot
from app.identity.keyring import Keyring
from app.limits import Bounds, LiveCalls
from app.oneinbox import CallRecord, OneInbox
from app.oneinbox.errors import NoSuchCall, Rejected
from app.oneinbox.models import BROKER_USER
from app.problems import Problem, retry_later
from app.store import LimitRequest, Rate, Store, StoreUnavailable
from app.store.memory import MemoryStore

FRESH_SECONDS = 1.0
FRESH_ENDED_SECONDS = 2.0
"""Freshness while a transcript may still arrive."""
SETTLING_SECONDS = 60.0
"""A call may still change for this long after its end was first seen."""
FRESH_SETTLED_SECONDS = 3600.0
REMEMBERED_SECONDS = 60.0
"""How long the owner of a call, or its absence, is known without asking."""
CACHED_CALLS = 10_000
CACHED_BYTES = 64 * 1024 * 1024
SHARED_BYTES = 256 * 1024
"""A larger snapshot is not shared: each replica fetches its own."""
SHARED_SECONDS = 120
LEASE_SECONDS = 3
"""How long a replica may take to fetch a call before another one does."""
BUDGET = Rate("all", 100, 1)
UNKNOWN_BUDGET = Rate("unknown", 20, 1)
CHANNEL = "calls"
"""Where replicas announce calls that have changed."""


@dataclass(frozen=True, slots=True)
class Cached:
    """The cached state of a call.

    `snapshot` None: no such call. `ours`: this deployment started it. `since`: when OneInbox was asked for it.
    `first_ended`: when it was first seen ended. Times are monotonic.
    """

    snapshot: Snapshot | None
    since: float
    first_ended: float | None = None
    ours: bool = False


@dataclass(kw_only=True, repr=False, eq=False)
class CallCache:
    """Call states, for reads and for event streams.

    `clock`: monotonic seconds; `now`: Unix time.
    """

    oneinbox: OneInbox
    store: Store
    keyring: Keyring
    live: LiveCalls
    agent_names: Mapping[str, str]
    expose: Collection[str]
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    _budgets: MemoryStore = field(init=False)
    _cache: OrderedDict[str, Cached] = field(default_factory=OrderedDict, init=False)
    _cached_bytes: int = field(default=0, init=False)
    _fetching: dict[str, asyncio.Future[Snapshot | None]] = field(default_factory=dict, init=False)
    _sought: set[str] = field(default_factory=set, init=False)
    """Calls that `get_if` is looking for."""
    _refused: OrderedDict[str, float] = field(default_factory=OrderedDict, init=False)
    """When `get_if` was last asked for a call that was not the asking user's, and answered."""
    _lease: bytes = field(default_factory=lambda: secrets.token_bytes(8), init=False)

    def __post_init__(self) -> None:
        self._budgets = MemoryStore(self.clock)

    def latest(self, call_id: str) -> Snapshot | None:
        """Return the last known state of the call, however old."""
        cached = self._cache.get(call_id)
        return cached.snapshot if cached is not None else None

    def age(self, call_id: str) -> float:
        """Return the seconds since OneInbox was last asked for the call, as far as known."""
        cached = self._cache.get(call_id)
        return self.clock() - cached.since if cached is not None else float("inf")

    async def get(self, call_id: str) -> Snapshot | None:
        """Return the state of a call of the asking user's, at most as old as allowed; None if there is no such call.

        Raises OneInboxError, and `at-capacity` if OneInbox was asked too often and the call is not cached.
        """
        cached = self._fresh(call_id)
        if cached is None:
            await self.read_shared(call_id)
            cached = self._fresh(call_id)
        if cached is not None and (cached.snapshot is not None or cached.ours):
            return cached.snapshot
        if call_id not in self._fetching and not await self._may_ask(Rate(f"call:{call_id}", 1, 1), BUDGET):
            latest = self.latest(call_id)
            if latest is None:
                raise _asked_too_often()
            return latest
        return await self.fetch(call_id)

    async def get_if(self, owned: Callable[[Snapshot], bool], call_id: str) -> Snapshot | None:
        """Return the state of a call that may be another user's; None unless it is `owned`.

        Raises OneInboxError and `at-capacity`. So that `at-capacity` says nothing about the call, a question counts
        against UNKNOWN_BUDGET even if the answer is cached, unless it was refused within REMEMBERED_SECONDS.
        """
        cached, asked = self._recent(call_id), self.clock()
        if cached is not None and asked - self._refused.get(call_id, float("-inf")) < REMEMBERED_SECONDS:
            return None
        rates = [BUDGET, UNKNOWN_BUDGET]
        if cached is None:  # else OneInbox is not asked
            rates.append(Rate(f"any:{call_id}", 1, 1))
        if call_id not in self._sought and not await self._may_ask(*rates):
            raise _asked_too_often()
        self._sought.add(call_id)
        try:
            if cached is None:
                await self.read_shared(call_id)
                cached = self._recent(call_id)
            if cached is None:
                known = self.latest(call_id) is not None or await self.live.started_here(call_id)
                snapshot = await self.fetch(call_id, known=known)
            else:
                snapshot = cached.snapshot
        finally:
            self._sought.discard(call_id)
        if snapshot is not None and owned(snapshot):
            return snapshot
        self._refused.pop(call_id, None)
        self._refused[call_id] = asked
        if len(self._refused) > CACHED_CALLS:
            self._refused.popitem(last=False)
        return None

    async def fetch(self, call_id: str, *, known: bool = True) -> Snapshot | None:
        """Ask OneInbox now. Concurrent callers share the answer. None: there is no such call."""
        while (under_way := self._fetching.get(call_id)) is not None:
            try:
                return await asyncio.shield(under_way)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not under_way.cancelled() or (task is not None and task.cancelling()):
                    raise  # we were cancelled; otherwise the fetching caller was, and another has to fetch
        # In the first caller, not in a new task: under attack each turn of the event loop takes long.
        answer: asyncio.Future[Snapshot | None] = asyncio.get_running_loop().create_future()
        self._fetching[call_id] = answer
        try:
            snapshot = await self._fetch(call_id, known)
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except Exception as error:
            answer.set_exception(error)
            answer.exception()  # marks it as retrieved, in case no one else waits for it
            raise
        else:
            answer.set_result(snapshot)
            return snapshot
        finally:
            del self._fetching[call_id]

    async def refetch(self, call_id: str) -> Snapshot | None:
        """Ask OneInbox after something happened: a request already sent may not reflect it."""
        under_way = self._fetching.get(call_id)
        if under_way is not None:
            await asyncio.wait([under_way])
        await self.read_shared(call_id)
        return await self.fetch(call_id)

    async def take_lease(self, call_id: str) -> bool:
        """Return whether this replica may fetch the call now; without a shared store, always."""
        try:
            return not self.store.shared or await self.store.add(f"look:{call_id}", self._lease, LEASE_SECONDS)
        except StoreUnavailable:
            return True

    async def drop_lease(self, call_id: str, rest: float = 0) -> None:
        """Let another replica fetch, after `rest` seconds. A lease that another replica holds by now stays."""
        if not self.store.shared:
            return
        with suppress(StoreUnavailable):
            if rest:
                await self.store.replace(f"look:{call_id}", self._lease, self._lease, rest)
            else:
                await self.store.delete(f"look:{call_id}", self._lease)

    async def read_shared(self, call_id: str) -> None:
        """Copy the latest state that any replica saw into this process's cache, if it is newer."""
        if not self.store.shared:
            return
        with suppress(StoreUnavailable):
            self._adopt(call_id, await self.store.get(f"seen:{call_id}"))

    def _adopt(self, call_id: str, value: bytes | None) -> None:
        """Cache a state that a replica shared, if it is newer."""
        plain = self.keyring.decrypt(value) if value is not None else None
        snapshot = Snapshot.from_bytes(plain) if plain is not None else None
        if snapshot is None:
            return
        cached = self._cache.get(call_id)
        known = cached.snapshot if cached is not None else None
        if known is not None and (known.seen == snapshot.seen or (known.ended and not snapshot.ended)):
            return  # the same state, or one that a later one has overtaken
        # Replicas' clocks differ: a time in the future may be any age.
        since = self.clock() - abs(self.now() - snapshot.seen)
        ends = known is not None and snapshot.ended and not known.ended
        if cached is None or since > cached.since or ends:
            self._keep(call_id, snapshot, since)

    async def update(self, record: CallRecord, since: float) -> Snapshot:
        """Cache and share OneInbox's record, announce a change, and free the slot of an ended call.

        `since`: when OneInbox was asked, by `clock`. A record older than the cached one is ignored, and so is any that
        brings an ended call back to life: an end is final.
        """
        self.live.note_seen(record.id)
        bounds = await self.live.bounds(record.id)
        cached = self._cache.get(record.id)
        before = cached.snapshot if cached is not None else None
        if cached is not None and before is not None and (cached.since > since or (before.ended and not record.ended)):
            return before
        snapshot = self._snapshot(record, since, bounds, before)
        self._keep(record.id, snapshot, since)
        if record.request_id:
            await self.live.note_end(record.request_id, record)
        await self._share(record.id, snapshot)
        if before is None or before.etag != snapshot.etag:
            await self.store.publish(CHANNEL, record.id.encode())
        return self.latest(record.id) or snapshot

    async def _fetch(self, call_id: str, known: bool) -> Snapshot | None:
        since = self.clock()
        # OneInbox may reject an id for its form.
        nothing = NoSuchCall if known else (NoSuchCall, Rejected)
        try:
            record = await self.oneinbox.get_call(call_id)
        except nothing:
            believed = not known or await self.live.note_missing(call_id)
            snapshot = None if believed else await self._last_known(call_id, since)
            self._keep(call_id, snapshot, since, ours=known)
            return snapshot
        return await self.update(record, since)

    async def _last_known(self, call_id: str, since: float) -> Snapshot | None:
        """Return the last known state of a call of which OneInbox said once that it does not know it."""
        await self.read_shared(call_id)
        snapshot = self.latest(call_id)
        started = await self.live.started(call_id) if snapshot is None else None
        if started is not None and started.running:
            attempt = started.attempt
            record = CallRecord(
                id=call_id,
                agent_id=next((each for each, name in self.agent_names.items() if name == attempt.agent), None),
                status="queued",
                created_at=datetime.fromtimestamp(attempt.since, UTC),
                metadata={BROKER_USER: attempt.owner},
            )
            return self._snapshot(record, since, await self.live.bounds(call_id))
        return snapshot

    def _snapshot(
        self, record: CallRecord, since: float, bounds: Bounds | None, before: Snapshot | None = None
    ) -> Snapshot:
        return Snapshot.of(
            record,
            seen=self.now() - (self.clock() - since),
            bounds=bounds,
            before=before,
            agent_names=self.agent_names,
            expose=self.expose,
        )

    async def _share(self, call_id: str, snapshot: Snapshot) -> None:
        if not self.store.shared:
            return
        value = snapshot.to_bytes()
        name = f"seen:{call_id}"
        with suppress(StoreUnavailable):
            if len(value) > SHARED_BYTES:
                await self.store.delete(name)
                return
            sealed = self.keyring.encrypt(value)
            if snapshot.ended:
                await self.store.set(name, sealed, SHARED_SECONDS)
                return
            # Another replica may have seen the end meanwhile: it must not be overwritten.
            before = await self.store.get(name)
            self._adopt(call_id, before)
            if self.latest(call_id) is snapshot:
                if before is None:
                    await self.store.add(name, sealed, SHARED_SECONDS)
                else:
                    await self.store.replace(name, before, sealed, SHARED_SECONDS)

    def _keep(self, call_id: str, snapshot: Snapshot | None, since: float, *, ours: bool = False) -> None:
        old = self._cache.pop(call_id, None)
        first_ended = old.first_ended if old is not None else None
        if snapshot is not None and snapshot.ended and first_ended is None:
            first_ended = since
        self._cache[call_id] = Cached(snapshot, since, first_ended, ours)
        self._cached_bytes += _size(snapshot) - (_size(old.snapshot) if old is not None else 0)
        while len(self._cache) > CACHED_CALLS or (self._cached_bytes > CACHED_BYTES and len(self._cache) > 1):
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= _size(dropped.snapshot)

    async def _may_ask(self, *rates: Rate) -> bool:
        return (await self._budgets.decide(LimitRequest(rates))).allowed

    def _recent(self, call_id: str) -> Cached | None:
        """Return the cached state if it is recent enough to know the owner, or that there is no such call."""
        cached = self._cache.get(call_id)
        if cached is None or self.clock() - cached.since > max(REMEMBERED_SECONDS, self._freshness(cached)):
            return None
        return cached

    def _fresh(self, call_id: str) -> Cached | None:
        """Return the cached state if it is fresh."""
        cached = self._cache.get(call_id)
        if cached is None or self.clock() - cached.since >= self._freshness(cached):
            return None
        self._cache.move_to_end(call_id)
        return cached

    def _freshness(self, cached: Cached) -> float:
        """Return the seconds for which a cached state may be used."""
        if cached.snapshot is None:
            return FRESH_SECONDS if cached.ours else REMEMBERED_SECONDS
        if not cached.snapshot.ended or cached.first_ended is None:
            return FRESH_SECONDS
        settled = cached.since - cached.first_ended >= SETTLING_SECONDS
        return FRESH_SETTLED_SECONDS if settled else FRESH_ENDED_SECONDS


def _asked_too_often() -> Problem:
    return retry_later("at-capacity", 1, reason="look-ups")


def _size(snapshot: Snapshot | None) -> int:
    return len(snapshot.fields) if snapshot is not None else 0
