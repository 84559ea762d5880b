"""Start no calls for a while after OneInbox's 429, and while it does not answer."""

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
"""Seconds of a pause: if OneInbox does not say how long, and at most."""
FAILURES_IN_A_ROW = 10
FAILURE_PAUSE = 5
"""Seconds of a pause after failures."""
WHILE_PROBING = 1
"""Retry-After in seconds for other requests during a probe."""

log = structlog.get_logger(__name__)


@dataclass(repr=False, eq=False)
class CircuitBreaker:
    """Decide in this process whether a call may be started; `guard` wraps each start.

    A 429 starts a pause of the length it asks for, FAILURES_IN_A_ROW requests without any answer one of FAILURE_PAUSE.
    After the pause one request is sent as a probe, and the others are refused until it has ended. Any answer to the
    probe closes the circuit (even a 5xx shows that the connection works); a 429 or no answer starts another pause. If
    the probe is cancelled, the next request becomes the probe.

    `clock`: monotonic seconds. `metrics`: counts the pauses.
    """

    clock: Callable[[], float] = time.monotonic
    metrics: Metrics = field(default_factory=Metrics)
    _until: float | None = field(default=None, init=False)
    _probing: bool = field(default=False, init=False)
    _failures: int = field(default=0, init=False)
    _pauses: int = field(default=0, init=False)

    @property
    def seconds_left(self) -> float:
        """Seconds left in which no call is started; 0 if one may be, even if only as a probe."""
        return 0.0 if self._until is None else max(0.0, self._until - self.clock())

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Wrap one start, until its answer. Raises CircuitOpen if it must not be sent."""
        probe, pauses = self._admit(), self._pauses
        try:
            yield
        except Busy as busy:
            self._pause(busy.retry_after, "asked for")
            raise
        except OneInboxError:
            # A request sent before the last pause says nothing new: of a hundred that time out together, ten start a
            # pause, and ninety must not start the next one.
            if pauses == self._pauses:
                self._failures += 1
                if probe or self._failures == FAILURES_IN_A_ROW:
                    self._pause(FAILURE_PAUSE, "no answers")
            raise
        else:
            self._failures = 0
            if probe and not self.seconds_left:  # unless an older request got a 429 meanwhile
                self._until = None
                log.info("oneinbox_recovered")
        finally:
            if probe:
                self._probing = False

    def _admit(self) -> bool:
        """Admit a request; return whether it is the probe. Raises CircuitOpen."""
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
            self.metrics.count_pause(why.replace(" ", "-"))
        self._until = max(self._until or 0.0, self.clock() + seconds)
        self._failures = 0
        self._pauses += 1


def parse_retry_after(retry_after: str | None, now: float) -> int:
    """Return the whole seconds of a Retry-After header (RFC 9110, section 10.2.3): a number of seconds or a date.

    At least 1 and at most LONGEST_PAUSE; DEFAULT_PAUSE if it is missing or neither. `now`: Unix time.
    """
    text = (retry_after or "").strip()
    if re.fullmatch(r"[0-9]+", text):
        seconds = float(text)
    else:
        date = parse_date(text)
        if date is None:
            return DEFAULT_PAUSE
        seconds = date - now
    return max(1, math.ceil(min(seconds, LONGEST_PAUSE)))


def parse_date(text: str | None) -> float | None:
    """Return the Unix time of a date in a header (RFC 9110, section 5.6.7); None if it is missing or no date."""
    try:
        # All three forms are in UTC, though one does not say so.
        return parsedate_to_datetime(text or "").replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None
