"""Polling of followed calls: for all streams on all replicas, OneInbox gets one request per call at a time."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field

import structlog

from app.calls.cache import CHANNEL, CallCache
from app.calls.snapshots import Snapshot
from app.identity import User
from app.oneinbox.errors import Busy, OneInboxError
from app.problems import retry_later
from app.store import Store
from app.telemetry.metrics import Metrics

TICK_SECONDS = 1.0
"""How often a replica reads what the others saw, and polls a young call."""
YOUNG_SECONDS = 60.0
SLOWEST_SECONDS = 5.0
LATE_SECONDS = 30.0
"""How long after its end a call is polled for late fields."""
LATE_PACE_SECONDS = 2.0
LONGEST_BACKOFF_SECONDS = 32.0
SHORTEST_PAUSE_SECONDS = 0.1
"""Between polls that take longer than their interval."""
RETRY_AFTER = 10
"""Seconds to wait for a stream to end, where no end is known."""

log = structlog.get_logger(__name__)


@dataclass(eq=False, repr=False)
class Subscription:
    """One call that streams of this process follow.

    `latest`: its last state. `over`: no more will come. `closed`: the process is shutting down. `changed`: set, and
    replaced by a new event, whenever one of these changes. `subscribers`: the number of streams.
    """

    latest: Snapshot
    over: bool = False
    closed: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    subscribers: int = 0

    def update(self, latest: Snapshot | None = None, *, over: bool = False, closed: bool = False) -> None:
        """Wake the subscribers if anything changed. What is over or closed stays so."""
        before = (self.latest.etag, self.over, self.closed)
        self.latest = latest or self.latest
        self.over, self.closed = self.over or over, self.closed or closed
        if (self.latest.etag, self.over, self.closed) != before:
            self.changed.set()
            self.changed = asyncio.Event()


@dataclass(repr=False, eq=False)
class CallPoller:
    """Poll the calls that streams of this process follow, and limit the streams.

    `max_streams`: per user; `max_streams_total`: in this process. `clock`: monotonic seconds; `now`: Unix time.
    """

    cache: CallCache
    store: Store
    _: KW_ONLY
    max_streams: int
    max_streams_total: int
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    metrics: Metrics = field(default_factory=Metrics)
    _subscriptions: dict[str, Subscription] = field(default_factory=dict, init=False)
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)
    _streams: Counter[str] = field(default_factory=Counter, init=False)
    _closed: bool = field(default=False, init=False)

    def is_followed(self, call_id: str) -> bool:
        """Return whether a stream of this process follows the call."""
        return call_id in self._subscriptions

    @property
    def streams(self) -> int:
        """Open streams."""
        return self._streams.total()

    @property
    def followed(self) -> int:
        """Followed calls."""
        return len(self._subscriptions)

    def finished(self, snapshot: Snapshot) -> bool:
        """Return whether the call will not change again."""
        return snapshot.ended and (snapshot.complete or self._late_left(snapshot) <= 0)

    @contextmanager
    def subscribe(self, user: User, call_id: str, latest: Snapshot) -> Iterator[Subscription]:
        """Follow a call until the context ends. Raises `too-many-streams` and `at-capacity`."""
        if self._streams[user.store_name] >= self.max_streams:
            self.metrics.count_refusal(["user-streams"])
            raise retry_later("too-many-streams", RETRY_AFTER, reason="user-streams")
        if self._closed or self._streams.total() >= self.max_streams_total:
            self.metrics.count_refusal(["process-streams"])
            raise retry_later("at-capacity", RETRY_AFTER, reason="process-streams")
        subscription = self._subscriptions.get(call_id)
        if subscription is None:
            subscription = self._subscriptions[call_id] = Subscription(latest)
            self._tasks[call_id] = asyncio.create_task(self._poll(call_id, subscription), name="poll")
        else:
            subscription.update(self.cache.latest(call_id) or latest)
        subscription.subscribers += 1
        self._streams[user.store_name] += 1
        try:
            yield subscription
        finally:
            self._streams[user.store_name] -= 1
            if not self._streams[user.store_name]:
                del self._streams[user.store_name]
            subscription.subscribers -= 1
            if not subscription.subscribers:
                del self._subscriptions[call_id]
                self._tasks.pop(call_id).cancel()

    def close(self) -> None:
        """Close all streams without `end`: browsers reconnect, to another replica."""
        self._closed = True
        for subscription in self._subscriptions.values():
            subscription.update(closed=True)

    async def run(self) -> None:
        """Pass on changes that any replica saw, until cancelled."""
        async with self.store.subscribe(CHANNEL) as messages:
            async for message in messages:
                call_id = message.decode(errors="replace")
                subscription = self._subscriptions.get(call_id)
                if subscription is None:
                    continue
                await self.cache.read_shared(call_id)
                subscription.update(self.cache.latest(call_id))

    async def _poll(self, call_id: str, subscription: Subscription) -> None:
        """Poll a call until it is over. A failure slows polling down, but does not end it."""
        failures = 0
        not_before = self.clock()
        while not self.finished(subscription.latest):
            changed = subscription.changed
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause(call_id, subscription.latest, not_before)):
                    await changed.wait()
                    continue  # it may have ended
            try:
                if await self._is_my_turn(call_id, self._pace(subscription.latest), not_before):
                    gone = await self.cache.fetch(call_id) is None
                    failures = 0
                    await self.cache.drop_lease(call_id)
                    if gone:
                        break  # the last state remains
            except asyncio.CancelledError:
                await self.cache.drop_lease(call_id)
                raise
            except Exception as error:
                failures += 1
                rest = min(2.0 ** min(failures, 10), LONGEST_BACKOFF_SECONDS)
                if isinstance(error, Busy):
                    rest = error.retry_after
                not_before = self.clock() + rest
                if isinstance(error, OneInboxError):
                    log.warning("poll_backoff", call=call_id, reason=error.reason, seconds=rest)
                else:
                    log.exception("poll_failed", call=call_id, seconds=rest)
                await self.cache.drop_lease(call_id, rest)
            subscription.update(self.cache.latest(call_id))
        subscription.update(over=True)

    async def _is_my_turn(self, call_id: str, pace: float, not_before: float) -> bool:
        """Return whether the call is due, and no other replica is fetching it."""
        await self.cache.read_shared(call_id)
        if self.cache.age(call_id) < pace or self.clock() < not_before:
            return False
        return await self.cache.take_lease(call_id)

    def _pause(self, call_id: str, snapshot: Snapshot, not_before: float) -> float:
        """Return the seconds until the call needs attention, unless it changes before."""
        due = max(self._pace(snapshot) - self.cache.age(call_id), not_before - self.clock(), SHORTEST_PAUSE_SECONDS)
        pause = TICK_SECONDS if self.store.shared else due
        if snapshot.ended:
            pause = min(pause, max(self._late_left(snapshot), SHORTEST_PAUSE_SECONDS))
        # Spread, so that replicas do not poll all calls at the same moment.
        return pause * random.uniform(1, 1.1)  # noqa: S311 - spreads polls, no secret

    def _late_left(self, snapshot: Snapshot) -> float:
        """Return the seconds for which an ended call is still polled."""
        return LATE_SECONDS - (self.now() - (snapshot.ended_at or snapshot.seen))

    def _pace(self, snapshot: Snapshot) -> float:
        """Return the seconds between polls: one while the call is young, then gradually more."""
        if snapshot.ended:
            return LATE_PACE_SECONDS
        age = self.now() - (snapshot.created or snapshot.seen)
        return min(SLOWEST_SECONDS, max(1.0, 1.0 + (age - YOUNG_SECONDS) / YOUNG_SECONDS))
