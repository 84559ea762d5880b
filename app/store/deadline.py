"""A bound on waiting for a server that does not take it for lost while this process itself is too busy to listen."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

TICKS = 10
"""Parts in which the bound is counted."""
LATE_TICKS = 3
"""So many late ones in a row give what lies in the sockets its turn, as one that came in time does."""
LONGEST_FACTOR = 4
"""However busy the process is: after so many times the bound it is over."""


class Deadline:
    """As `asyncio.timeout(seconds)`, but of a server that is heard only ticks that came in time count.

    A burst of requests can hold the event loop for longer than the bound; the answer then lies in the socket, and
    taking the server for lost would let every process count for itself, just when it matters. A server that has said
    nothing to anybody here for `seconds` (`heard`: when it last did, by the loop's clock) is lost all the same, as soon
    as what may lie in the sockets has had its turn. Raises TimeoutError on leaving.
    """

    def __init__(self, seconds: float, heard: Callable[[], float]) -> None:
        self._seconds = seconds
        self._tick_seconds = seconds / TICKS
        self._heard = heard
        self._left = TICKS
        self._late = 0
        self._expired = False

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - of a running coroutine
        self._task = task
        self._cancelling = task.cancelling()
        self._begun = self._loop.time()
        self._arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.cancel()
        # Somebody else's cancellation stays one (as in asyncio.timeout).
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _arm(self) -> None:
        self._due = self._loop.time() + self._tick_seconds
        self._handle = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        in_time = now - self._due < self._tick_seconds
        self._left -= in_time
        silence, waited = now - max(self._begun, self._heard()), now - self._begun
        over = silence >= self._seconds or waited >= self._seconds * LONGEST_FACTOR
        self._late = self._late + 1 if over and not in_time else 0
        if self._left > 0 and not (over and in_time) and self._late < LATE_TICKS:
            self._arm()
            return
        self._expired = True
        self._task.cancel()
