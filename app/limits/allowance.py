"""OneInbox's own allowance: the calls that the account may start in a day, until 00:00 UTC."""

import asyncio
import contextlib
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from app.clock import SYSTEM_CLOCK, Clock
from app.oneinbox import OneInbox
from app.oneinbox.errors import Invalid, OneInboxError
from app.problems import retry_later
from app.store import LimitRequest, Rate, Store, StoreUnavailable
from app.telemetry.metrics import Metrics

READING = "allowance"
"""Name in the store of the last reading, which all replicas go by."""
ASK_SECONDS = 60
"""One replica asks OneInbox this often."""
LOOK_SECONDS = 5
"""Each replica looks into the store this often."""
KEPT_SECONDS = 180
"""A reading counts for so long, so two failed requests in a row change nothing."""
LONGEST_WAIT = 60
"""Retry-After in seconds at most: the operator may buy more calls at any time."""
NOT_OFFERED = (403, 404, 405)
"""Statuses of an account that does not tell its allowance."""
LIMIT = "oneinbox-calls"
"""Name of what refuses, in metrics and in the log."""
DAY = 86400

log = structlog.get_logger(__name__)


class Reading(BaseModel):
    """OneInbox's answer. `left` of `cap` calls; None: not to be watched. `at`: Unix time of the question."""

    model_config = ConfigDict(frozen=True)

    v: Literal[1] = 1
    left: int | None
    cap: int | None
    at: float

    def of_today(self, now: float) -> bool:
        """Return whether it was read on the day of `now` (UTC), or later by another replica's clock."""
        return self.at // DAY >= now // DAY


@dataclass(repr=False, eq=False)
class Allowance:
    """Watch the calls that are left, in the background; refuse sessions when there are none.

    `ready`: set after the first look. `metrics`: counts refusals.
    """

    store: Store
    oneinbox: OneInbox
    _: KW_ONLY
    clock: Clock = SYSTEM_CLOCK
    metrics: Metrics = field(default_factory=Metrics)
    ready: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _reading: Reading | None = field(default=None, init=False)
    _until: float = field(default=0.0, init=False)
    """When the reading is too old, in monotonic seconds."""
    _told: bool = field(default=False, init=False)

    def check(self) -> None:
        """Raise `at-capacity` if no calls are left today."""
        if self.left == 0:
            self.metrics.count_refusal([LIMIT])
            raise retry_later("at-capacity", min(DAY - self.clock.now() % DAY, LONGEST_WAIT), reason=LIMIT)

    @property
    def left(self) -> int | None:
        """The calls that are left today; None if that is not known, or there is no cap."""
        known = self._known()
        return known.left if known is not None else None

    @property
    def cap(self) -> int | None:
        """The calls of a whole day; None if that is not known, or there is no cap."""
        known = self._known()
        return known.cap if known is not None else None

    async def run(self) -> None:
        """Refresh every LOOK_SECONDS, until cancelled."""
        while True:
            try:
                await self.refresh()
            except StoreUnavailable:
                pass  # the next look may find it again
            except Exception:
                log.exception("allowance_check_failed")
            self.ready.set()
            await asyncio.sleep(LOOK_SECONDS)

    async def refresh(self) -> None:
        """Take over what a replica has read, and ask OneInbox if it is time. Raises StoreUnavailable."""
        with contextlib.suppress(StoreUnavailable):  # then each replica asks for itself
            self._take(await read_allowance(self.store))
        if (await self.store.decide(LimitRequest([Rate("usage", 1, ASK_SECONDS - 1)]))).allowed:
            await self._ask()

    async def _ask(self) -> None:
        now = self.clock.now()
        try:
            usage = await self.oneinbox.usage()
            reading = Reading(left=usage.left, cap=usage.max_calls_per_day or None, at=now)
        except OneInboxError as error:
            if not isinstance(error, Invalid) and error.status not in NOT_OFFERED:
                return  # it passes; meanwhile the last reading counts
            if not self._told:
                log.info("allowance_not_watched", reason=error.reason)
            self._told = True
            reading = Reading(left=None, cap=None, at=now)
        self._take(reading)
        await self.store.set(READING, reading.model_dump_json().encode(), KEPT_SECONDS)

    def _take(self, reading: Reading | None) -> None:
        if reading is None or reading == self._reading:
            return  # one that the store has lost counts on, until it is too old
        if reading.left == 0 and self.left != 0:
            log.warning("allowance_used_up", of=reading.cap)
        self._reading, self._until = reading, self.clock.monotonic() + KEPT_SECONDS

    def _known(self) -> Reading | None:
        """Return the last reading if it still counts."""
        reading = self._reading
        if reading is None or self.clock.monotonic() >= self._until or not reading.of_today(self.clock.now()):
            return None
        return reading


async def read_allowance(store: Store) -> Reading | None:
    """Return the last reading of any replica. Raises StoreUnavailable."""
    value = await store.get(READING)
    if value is None:
        return None
    try:
        return Reading.model_validate_json(value)
    except ValidationError:
        log.warning("store_record_skipped", name=READING)
        return None
