"""Minutes, not only calls: how long users have talked in the last day."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field

import structlog

from app.identity import User
from app.limits.call_attempt import ALL_CALLS, CallAttempt, calls_of_user
from app.oneinbox import CallRecord
from app.problems import Problem
from app.store import LimitRequest, Rate, Store
from app.telemetry.metrics import Metrics

DAY = 86400
RETRY_AFTER = 60
"""Seconds to wait for a running call to end, where no end is known."""
GLOBAL_MINUTES = "global-talk-minutes"

log = structlog.get_logger(__name__)


@dataclass
class TalkTime:
    """Counts the seconds of finished calls, and adds those of running ones, from their POST on.

    A session is refused once the minutes are used up; calls that run then run on, so that they are exceeded by the live
    calls times BROKER_MAX_CALL_SECONDS at most. `minutes`, `minutes_total`: per user and in all; None: any. `now`: Unix
    time. `metrics`: count what is refused.
    """

    store: Store
    _: KW_ONLY
    minutes: int | None
    minutes_total: int | None
    enforce: bool = True
    now: Callable[[], float] = time.time
    metrics: Metrics = field(default_factory=Metrics)

    async def check(self, user: User) -> None:
        """Raises `talk-time-used-up` for the user's own minutes, `at-capacity` for everybody's."""
        if self.minutes is not None:
            rate = self._rate(user.store_name, self.minutes)
            await self._check(rate, calls_of_user(user.store_name), "talk-time-used-up")
        if self.minutes_total is not None:
            await self._check(self._rate("all", self.minutes_total), ALL_CALLS, "at-capacity")

    async def usage(self) -> list[tuple[str, int, int]]:
        """The minutes of all users together, if they are limited: name, seconds used, seconds allowed."""
        if self.minutes_total is None:
            return []
        rate = self._rate("all", self.minutes_total)
        state = (await self.store.decide(LimitRequest([rate], cost=0))).rates[0]
        running = await self._running(ALL_CALLS)
        return [(GLOBAL_MINUTES, rate.amount - state.remaining + math.ceil(running), rate.amount)]

    async def count(self, attempt: CallAttempt, record: CallRecord | None) -> None:
        """Count an ended call, once. One that is gone, or says no duration, counts from its POST until now."""
        rates = [self._rate(name, minutes) for name, minutes in self._limits(attempt) if minutes is not None]
        if not rates:
            return
        seconds = record.duration_seconds if record is not None else None
        if seconds is None:
            seconds = self.now() - attempt.since
        if seconds > 0:
            await self.store.decide(LimitRequest(rates, cost=math.ceil(seconds), enforce=False))

    def _limits(self, attempt: CallAttempt) -> Sequence[tuple[str, int | None]]:
        return (attempt.user, self.minutes), ("all", self.minutes_total)

    async def _check(self, rate: Rate, running: str, slug: str) -> None:
        state = (await self.store.decide(LimitRequest([rate], cost=0))).rates[0]
        if state.remaining > 0 and await self._running(running) < state.remaining:
            return
        limit = "user-talk-minutes" if slug == "talk-time-used-up" else GLOBAL_MINUTES
        self.metrics.refused([limit], enforced=self.enforce)
        if not self.enforce:
            log.warning("would_refuse", limits=[rate.name])
            return
        wait = RETRY_AFTER if state.remaining else max(1, math.ceil(state.reset))
        raise Problem(slug, headers={"Retry-After": str(wait)})

    async def _running(self, calls: str) -> float:
        """Seconds that the running calls of a set have taken until now."""
        attempts = [CallAttempt.from_key(member) for member in await self.store.members(calls)]
        return sum(self.now() - attempt.since for attempt in attempts)

    def _rate(self, name: str, minutes: int) -> Rate:
        return Rate(f"talk:{name}", minutes * 60, DAY)
