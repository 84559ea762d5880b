"""Watching calls: however many watch a call, on however many replicas, OneInbox is asked once at a time."""

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
from app.problems import Problem
from app.store import Store
from app.telemetry.metrics import Metrics

TICK_SECONDS = 1.0
"""How often a replica looks at what the others have seen, and at a young call itself."""
YOUNG_SECONDS = 60.0
SLOWEST_SECONDS = 5.0
LATE_SECONDS = 30.0
"""So long after its end a call is watched for what is still to come."""
LATE_PACE_SECONDS = 2.0
LONGEST_BACKOFF_SECONDS = 32.0
SHORTEST_PAUSE_SECONDS = 0.1
"""Between looks that take longer than their pace allows."""
RETRY_AFTER = 10
"""Seconds to wait for a stream to end, where no end is known."""

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Subscription:
    """One call that somebody in this process watches.

    `latest`: its last state. `over`: nothing new will come. `closed`: the process is going down. `changed`: set, and
    replaced by a fresh one, whenever any of them changes.
    """

    latest: Snapshot
    over: bool = False
    closed: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    subscribers: int = 0

    def update(self, latest: Snapshot | None = None, *, over: bool = False, closed: bool = False) -> None:
        """Wake the watchers, if there is anything new."""
        news = latest is not None and latest.etag != self.latest.etag
        self.latest = latest or self.latest
        if not news and over == self.over and closed == self.closed:
            return
        self.over, self.closed = over, closed
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass
class CallPoller:
    """All watches of this process, and who may have how many.

    `clock`: monotonic seconds; `now`: Unix time. `metrics`: count what is refused.
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

    def is_watched(self, call_id: str) -> bool:
        """Whether anybody in this process watches the call."""
        return call_id in self._subscriptions

    @property
    def streams(self) -> int:
        """Open streams."""
        return self._streams.total()

    @property
    def watched(self) -> int:
        """Calls that are watched."""
        return len(self._subscriptions)

    def finished(self, snapshot: Snapshot) -> bool:
        """Whether nothing new will come of a call."""
        return snapshot.ended and (snapshot.complete or self._late_left(snapshot) <= 0)

    @contextmanager
    def subscribe(self, user: User, call_id: str, latest: Snapshot) -> Iterator[Subscription]:
        """Watch a call for as long as the context lasts. Raises `too-many-streams` and `at-capacity`."""
        wait = {"Retry-After": str(RETRY_AFTER)}
        if self._streams[user.store_name] >= self.max_streams:
            self.metrics.refused(["user-streams"])
            raise Problem("too-many-streams", headers=wait)
        if self._closed or self._streams.total() >= self.max_streams_total:
            self.metrics.refused(["process-streams"])
            raise Problem("at-capacity", headers=wait)
        subscription = self._subscriptions.get(call_id)
        if subscription is None:
            subscription = self._subscriptions[call_id] = Subscription(latest)
            self._tasks[call_id] = asyncio.create_task(self._poll(call_id, subscription), name="watch")
        else:
            subscription.update(
                self.cache.latest(call_id) or latest, over=subscription.over, closed=subscription.closed
            )
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
        """End all streams, without saying that their calls ended: browsers come back, to another replica."""
        self._closed = True
        for subscription in self._subscriptions.values():
            subscription.update(over=subscription.over, closed=True)

    async def run(self) -> None:
        """Pass on, for ever, what any replica sees anew."""
        async with self.store.subscribe(CHANNEL) as seen:
            async for message in seen:
                call_id = message.decode(errors="replace")
                subscription = self._subscriptions.get(call_id)
                if subscription is None:
                    continue
                await self.cache.read_shared(call_id)
                subscription.update(self.cache.latest(call_id), over=subscription.over, closed=subscription.closed)

    async def _poll(self, call_id: str, subscription: Subscription) -> None:
        """Look at a call again and again until it is over; a look that fails slows it down, and ends nothing."""
        failures = 0
        rested = self.clock()
        while not self.finished(subscription.latest):
            changed = subscription.changed
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause(call_id, subscription.latest, rested)):
                    await changed.wait()
                    continue  # the end may be among the news
            try:
                if await self._is_my_turn(call_id, self._pace(subscription.latest), rested):
                    gone = await self.cache.fetch(call_id) is None
                    failures = 0
                    await self.cache.drop_lease(call_id)
                    if gone:
                        break  # there is no more to say than what was said last
            except asyncio.CancelledError:
                await self.cache.drop_lease(call_id)
                raise
            except Exception as error:
                failures += 1
                rest = min(2.0 ** min(failures, 10), LONGEST_BACKOFF_SECONDS)
                if isinstance(error, Busy):
                    rest = error.retry_after
                rested = self.clock() + rest
                if isinstance(error, OneInboxError):
                    log.warning("poll_backoff", call=call_id, reason=error.reason, seconds=rest)
                else:
                    log.exception("poll_failed", call=call_id, seconds=rest)
                await self.cache.drop_lease(call_id, rest)
            subscription.update(self.cache.latest(call_id), closed=subscription.closed)
        subscription.update(over=True, closed=subscription.closed)

    async def _is_my_turn(self, call_id: str, pace: float, rested: float) -> bool:
        """Whether it is time to look, and no other replica is looking."""
        await self.cache.read_shared(call_id)
        if self.cache.age(call_id) < pace or self.clock() < rested:
            return False
        return await self.cache.take_lease(call_id)

    def _pause(self, call_id: str, snapshot: Snapshot, rested: float) -> float:
        """Seconds until the call needs attention, unless there is news before."""
        due = max(self._pace(snapshot) - self.cache.age(call_id), rested - self.clock(), SHORTEST_PAUSE_SECONDS)
        pause = TICK_SECONDS if self.store.shared else due
        if snapshot.ended:
            pause = min(pause, max(self._late_left(snapshot), SHORTEST_PAUSE_SECONDS))
        # A little apart, so that replicas and calls do not all look at the same moment.
        return pause * random.uniform(1, 1.1)  # noqa: S311 - spreads polls, no secret

    def _late_left(self, snapshot: Snapshot) -> float:
        """Seconds that an ended call is still watched for."""
        return LATE_SECONDS - (self.now() - (snapshot.ended_at or snapshot.seen))

    def _pace(self, snapshot: Snapshot) -> float:
        """Seconds between looks: one while the call is young, then slower by and by."""
        if snapshot.ended:
            return LATE_PACE_SECONDS
        age = self.now() - (snapshot.created or snapshot.seen)
        return min(SLOWEST_SECONDS, max(1.0, 1.0 + (age - YOUNG_SECONDS) / YOUNG_SECONDS))
