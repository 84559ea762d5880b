"""Talk time: the minutes that users have talked in the last day."""

import math
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

import structlog

from app.identity import User
from app.limits.call_attempt import ALL_CALLS, CallAttempt, calls_of_user
from app.problems import retry_later
from app.store import LimitRequest, Rate, Store
from app.telemetry.metrics import Metrics

DAY = 86400
RETRY_AFTER = 60
"""Retry-After in seconds while a running call uses the last minutes: its end is not known."""
GLOBAL_MINUTES = "global-talk-minutes"

log = structlog.get_logger(__name__)


@dataclass(repr=False, eq=False)
class TalkTime:
    """Count the seconds of finished calls, and add those of running ones, from their POST on.

    Sessions are refused once the minutes are used up. Running calls go on, so the excess is at most the live calls
    times BROKER_MAX_CALL_SECONDS. `minutes`, `minutes_total`: per user and in all; None: no limit. `now`: Unix time.
    `metrics`: counts refusals.
    """

    store: Store
    _: KW_ONLY
    minutes: int | None
    minutes_total: int | None
    enforce: bool = True
    now: Callable[[], float] = time.time
    metrics: Metrics = field(default_factory=Metrics)

    async def check(self, user: User) -> None:
        """Raise `talk-time-used-up` for the user's own minutes, `at-capacity` for those of all users."""
        if self.minutes is not None:
            rate = self._rate(user.store_name, self.minutes)
            await self._check(rate, calls_of_user(user.store_name), "talk-time-used-up")
        if self.minutes_total is not None:
            await self._check(self._rate("all", self.minutes_total), ALL_CALLS, "at-capacity")

    async def usage(self) -> list[tuple[str, int, int]]:
        """Return the limit of all users together, if there is one: name, seconds used, seconds allowed."""
        if self.minutes_total is None:
            return []
        rate = self._rate("all", self.minutes_total)
        state = (await self.store.decide(LimitRequest([rate], cost=0))).rates[0]
        running = await self._running(ALL_CALLS)
        return [(GLOBAL_MINUTES, rate.amount - state.remaining + math.ceil(running), rate.amount)]

    async def count(self, user: str, seconds: float) -> None:
        """Count an ended call of `seconds`, once. `user`: name in the store."""
        limits = ((user, self.minutes), ("all", self.minutes_total))
        rates = [self._rate(name, minutes) for name, minutes in limits if minutes is not None]
        if rates and seconds > 0:
            await self.store.decide(LimitRequest(rates, cost=math.ceil(seconds), enforce=False))

    async def _check(self, rate: Rate, running: str, slug: str) -> None:
        state = (await self.store.decide(LimitRequest([rate], cost=0))).rates[0]
        if state.remaining > 0 and await self._running(running) < state.remaining:
            return
        limit = "user-talk-minutes" if slug == "talk-time-used-up" else GLOBAL_MINUTES
        self.metrics.count_refusal([limit], enforced=self.enforce)
        if not self.enforce:
            log.warning("would_refuse", limits=[rate.name])
            return
        raise retry_later(slug, RETRY_AFTER if state.remaining else state.reset)

    async def _running(self, calls: str) -> float:
        """Return the seconds that the running calls of a set have taken so far."""
        attempts = [CallAttempt.from_key(member) for member in await self.store.members(calls)]
        return sum(self.now() - attempt.since for attempt in attempts)

    def _rate(self, name: str, minutes: int) -> Rate:
        return Rate(f"talk:{name}", minutes * 60, DAY)
