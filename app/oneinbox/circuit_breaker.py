"""When OneInbox is left alone: after its 429, and while it cannot be reached."""

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime

import structlog

from app.oneinbox.errors import Busy, CircuitOpen, OneInboxError
from app.telemetry.metrics import Metrics

DEFAULT_PAUSE, LONGEST_PAUSE = 5, 60
"""Seconds of a pause where OneInbox does not say how long, and at most."""
FAILURES_IN_A_ROW = 10
FAILURE_PAUSE = 5
"""Seconds to leave an OneInbox alone that cannot be reached."""
WHILE_PROBING = 1
"""Seconds that the others wait while one request finds out."""

log = structlog.get_logger(__name__)


@dataclass
class CircuitBreaker:
    """Decides for each request, in this process, whether it may be sent; `turn` goes around every one.

    A 429 starts a pause of the length it asks for, FAILURES_IN_A_ROW requests without any answer one of FAILURE_PAUSE.
    When it is over, one request goes ahead as a probe, and the others go on being refused until it is known what became
    of it: an answer, whichever (a 5xx came over a connection that works), ends the cool-down; a 429 or none begins it
    anew; a probe whose caller was cancelled found out nothing, and the next request is the probe.

    `clock`: monotonic seconds. `metrics`: count the pauses.
    """

    clock: Callable[[], float] = time.monotonic
    metrics: Metrics = field(default_factory=Metrics)
    _until: float | None = field(default=None, init=False)
    _probing: bool = field(default=False, init=False)
    _failures: int = field(default=0, init=False)
    _pauses: int = field(default=0, init=False)

    @property
    def seconds_left(self) -> float:
        """Seconds in which nothing is sent; 0 where something is, be it a probe only."""
        return 0.0 if self._until is None else max(0.0, self._until - self.clock())

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around one request, to its answer. Raises CoolingDown instead, where it must not be sent."""
        probe, pauses = self._admit(), self._pauses
        try:
            yield
        except Busy as busy:
            self._pause(busy.retry_after, "asked for")
            raise
        except OneInboxError:
            # What was sent before the last pause began says nothing that was not known then: of a hundred requests
            # that time out together, ten start a pause and ninety must not start the next.
            if pauses == self._pauses:
                self._failures += 1
                if probe or self._failures == FAILURES_IN_A_ROW:
                    self._pause(FAILURE_PAUSE, "no answers")
            raise
        else:
            self._failures = 0
            if probe and not self.seconds_left:  # else a request of before the pause was answered with a 429 meanwhile
                self._until = None
                log.info("oneinbox_recovered")
        finally:
            if probe:
                self._probing = False

    def _admit(self) -> bool:
        """Whether the request that is let through is the probe. Raises CoolingDown."""
        if self._until is None:
            return False
        if left := self.seconds_left:
            raise CircuitOpen(math.ceil(left))
        if self._probing:
            raise CircuitOpen(WHILE_PROBING)
        self._probing = True
        return True

    def _pause(self, seconds: float, why: str) -> None:
        if self._until is None:
            log.warning("oneinbox_paused", seconds=seconds, why=why)
            self.metrics.paused(why.replace(" ", "-"))
        self._until = max(self._until or 0.0, self.clock() + seconds)
        self._failures = 0
        self._pauses += 1


def pause_asked_for(retry_after: str | None, now: float) -> int:
    """Whole seconds of a Retry-After header (RFC 9110, section 10.2.3): a number of seconds or a date.

    At least 1 and at most LONGEST_PAUSE; DEFAULT_PAUSE where it is missing or neither. `now`: Unix time.
    """
    text = (retry_after or "").strip()
    if re.fullmatch(r"[0-9]+", text):
        seconds = float(text)
    else:
        try:
            moment = parsedate_to_datetime(text)
        except ValueError:
            return DEFAULT_PAUSE
        # All three forms of section 5.6.7 are in UTC, though one does not say so.
        seconds = moment.replace(tzinfo=UTC).timestamp() - now
    return max(1, math.ceil(min(seconds, LONGEST_PAUSE)))
