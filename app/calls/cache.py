"""Looking calls up at OneInbox: never more often than it does good, and for all who ask at once."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from app.calls.snapshots import Snapshot
from app.identity.keyring import Keyring
from app.limits import LiveCalls
from app.oneinbox import CallRecord, OneInbox
from app.oneinbox.errors import NoSuchCall, Rejected
from app.problems import Problem
from app.store import LimitRequest, Rate, Store, StoreUnavailable
from app.store.memory import MemoryStore

FRESH_SECONDS = 1.0
FRESH_ENDED_SECONDS = 2.0
"""While what comes after the end (transcript, recording) may still come."""
SETTLING_SECONDS = 60.0
"""So long after its end was first seen, a call may still change."""
FRESH_SETTLED_SECONDS = 3600.0
REMEMBERED_SECONDS = 60.0
"""So long the owner of a call, or that there is none, is known without asking."""
CACHED_CALLS = 10_000
CACHED_BYTES = 64 * 1024 * 1024
SHARED_BYTES = 256 * 1024
"""A larger snapshot is not shared: each replica looks for itself."""
SHARED_SECONDS = 120
LEASE_SECONDS = 3
"""How long a replica may take over one look before another takes over."""
BUDGET = Rate("all", 100, 1)
UNKNOWN_BUDGET = Rate("unknown", 20, 1)
CHANNEL = "calls"
"""Where replicas tell each other which call they have just seen anew."""


@dataclass(frozen=True, slots=True)
class Cached:
    """What this process knows of a call.

    `snapshot` None: it does not exist; `ours`: although this deployment handed it out. `since`: when OneInbox was asked
    for it; `first_ended`: when it was first seen ended. Times are the clock's, which no change of date moves.
    """

    snapshot: Snapshot | None
    since: float
    first_ended: float | None = None
    ours: bool = False


@dataclass(kw_only=True)
class CallCache:
    """The status cache, shared by plain reads and watchers.

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
    _lease: bytes = field(default_factory=lambda: secrets.token_bytes(8), init=False)

    def __post_init__(self) -> None:
        self._budgets = MemoryStore(self.clock)

    def remembered(self, call_id: str) -> Snapshot | None:
        """A state of the call out of the last minute; enough to say whose it is."""
        cached = self._cache.get(call_id)
        if cached is None or self.clock() - cached.since > max(REMEMBERED_SECONDS, self._freshness(cached)):
            return None
        return cached.snapshot

    def latest(self, call_id: str) -> Snapshot | None:
        """The last known state of the call, however old."""
        cached = self._cache.get(call_id)
        return cached.snapshot if cached is not None else None

    def age(self, call_id: str) -> float:
        """Seconds since anybody is known to have asked OneInbox for the call."""
        cached = self._cache.get(call_id)
        return self.clock() - cached.since if cached is not None else float("inf")

    async def get(self, call_id: str, *, known: bool) -> Snapshot | None:
        """The call's state, not older than it may be; None when there is no such call.

        `known`: this deployment handed the call out, for sure. Raises OneInboxError, and `at-capacity` when OneInbox
        has been asked too often and nothing is known of the call.
        """
        cached = self._fresh(call_id)
        if cached is None:
            await self.read_shared(call_id)
            cached = self._fresh(call_id)
        if cached is not None and (cached.snapshot is not None or cached.ours):
            return cached.snapshot
        # Whatever was seen once is known: neither its look-ups nor its answers depend on strangers' questions.
        known = known or self.latest(call_id) is not None or await self.live.handed_out(call_id)
        if cached is not None and not known:
            return None
        if call_id not in self._fetching:
            once = Rate(f"call:{known}:{call_id}", 1, 1)
            rates = [once, BUDGET] if known else [once, BUDGET, UNKNOWN_BUDGET]
            if not (await self._budgets.decide(LimitRequest(rates))).allowed:
                latest = self.latest(call_id)
                if latest is None:
                    raise Problem("at-capacity", headers={"Retry-After": "1"})
                return latest
        return await self.fetch(call_id, known=known)

    async def fetch(self, call_id: str, *, known: bool = True) -> Snapshot | None:
        """Ask OneInbox now; all who ask meanwhile get the same answer. None: there is no such call."""
        while (under_way := self._fetching.get(call_id)) is not None:
            try:
                return await asyncio.shield(under_way)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not under_way.cancelled() or (task is not None and task.cancelling()):
                    raise  # we were given up; else whoever looked was, and somebody else has to
        # By the first who asks, and not in a task of its own: under an attack each turn of the event loop is long.
        answer: asyncio.Future[Snapshot | None] = asyncio.get_running_loop().create_future()
        self._fetching[call_id] = answer
        try:
            snapshot = await self._fetch(call_id, known)
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except Exception as error:
            answer.set_exception(error)
            answer.exception()  # looked at, even if nobody else waits for it
            raise
        else:
            answer.set_result(snapshot)
            return snapshot
        finally:
            del self._fetching[call_id]

    async def refetch(self, call_id: str) -> Snapshot | None:
        """Ask OneInbox for what has just happened: an answer that is already on its way does not know of it."""
        under_way = self._fetching.get(call_id)
        if under_way is not None:
            await asyncio.wait([under_way])
        return await self.fetch(call_id)

    async def take_lease(self, call_id: str) -> bool:
        """Whether this replica is the one to look now. Alone, it always is."""
        try:
            return not self.store.shared or await self.store.add(f"look:{call_id}", self._lease, LEASE_SECONDS)
        except StoreUnavailable:
            return True

    async def drop_lease(self, call_id: str, rest: float = 0) -> None:
        """Let the next one look, after `rest` seconds. A lease that has passed on to another replica stays there."""
        if not self.store.shared:
            return
        try:
            if rest:
                await self.store.replace(f"look:{call_id}", self._lease, self._lease, rest)
            else:
                await self.store.delete(f"look:{call_id}", self._lease)
        except StoreUnavailable:
            return

    async def read_shared(self, call_id: str) -> None:
        """Take what any replica has seen last into this process's cache, where it is news."""
        if not self.store.shared:
            return
        try:
            value = await self.store.get(f"seen:{call_id}")
        except StoreUnavailable:
            return
        plain = self.keyring.decrypt(value) if value is not None else None
        snapshot = Snapshot.from_bytes(plain) if plain is not None else None
        if snapshot is None:
            return
        cached = self._cache.get(call_id)
        if cached is not None and cached.snapshot is not None and cached.snapshot.seen == snapshot.seen:
            return  # the same look
        # Replicas' clocks differ: a look of the future may be as old as any.
        since = self.clock() - abs(self.now() - snapshot.seen)
        if cached is None or since > cached.since:
            self._keep(call_id, snapshot, since)

    async def update(self, record: CallRecord, since: float) -> Snapshot:
        """What OneInbox answered: cache it, share it, wake the call's watchers, free its slot.

        `since`: when it was asked, by the clock. An answer that was overtaken by a later one's changes nothing.
        """
        cached = self._cache.get(record.id)
        before = cached.snapshot if cached is not None else None
        if cached is not None and before is not None and cached.since > since:
            return before
        seen = self.now() - (self.clock() - since)
        snapshot = Snapshot.of(record, seen=seen, before=before, agent_names=self.agent_names, expose=self.expose)
        self._keep(record.id, snapshot, since)
        if record.request_id:
            await self.live.note_end(record.request_id, record)
        await self._share(record.id, snapshot)
        if before is None or before.etag != snapshot.etag:
            await self.store.publish(CHANNEL, record.id.encode())
        return self.latest(record.id) or snapshot

    async def _fetch(self, call_id: str, known: bool) -> Snapshot | None:
        since = self.clock()
        # An id that OneInbox never gives out may be refused for its form.
        nothing = NoSuchCall if known else (NoSuchCall, Rejected)
        try:
            record = await self.oneinbox.get_call(call_id)
        except nothing:
            self._keep(call_id, None, since, ours=known)
            if known:
                await self.live.note_gone(call_id)
            return None
        return await self.update(record, since)

    async def _share(self, call_id: str, snapshot: Snapshot) -> None:
        if not self.store.shared:
            return
        value = snapshot.to_bytes()
        try:
            if len(value) <= SHARED_BYTES:
                await self.store.set(f"seen:{call_id}", self.keyring.encrypt(value), SHARED_SECONDS)
            else:
                await self.store.delete(f"seen:{call_id}")
        except StoreUnavailable:
            return

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

    def _fresh(self, call_id: str) -> Cached | None:
        """What is known of a call, where nobody need ask again."""
        cached = self._cache.get(call_id)
        if cached is None or self.clock() - cached.since >= self._freshness(cached):
            return None
        self._cache.move_to_end(call_id)
        return cached

    def _freshness(self, cached: Cached) -> float:
        """Seconds that an answer may be given without asking again."""
        if cached.snapshot is None:
            return FRESH_SECONDS if cached.ours else REMEMBERED_SECONDS
        if not cached.snapshot.ended or cached.first_ended is None:
            return FRESH_SECONDS
        settled = cached.since - cached.first_ended >= SETTLING_SECONDS
        return FRESH_SETTLED_SECONDS if settled else FRESH_ENDED_SECONDS


def _size(snapshot: Snapshot | None) -> int:
    return len(snapshot.fields) if snapshot is not None else 0
