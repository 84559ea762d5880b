"""A bound on waiting for a server that does not count the time in which this process itself was too busy to listen."""

import asyncio
from types import TracebackType
from typing import Self

TICKS = 10
"""Parts in which the bound is counted."""
LONGEST_FACTOR = 4
"""However busy the process is: after so many times the bound it is over."""


class Patience:
    """As `asyncio.timeout(seconds)`, but only ticks that came in time count.

    A burst of requests can hold the event loop for longer than the bound; the answer then lies in the socket, and
    taking the server for lost would let every process count for itself, just when it matters. Raises TimeoutError on
    leaving.
    """

    def __init__(self, seconds: float) -> None:
        self._tick_seconds = seconds / TICKS
        self._left = TICKS
        self._longest = seconds * LONGEST_FACTOR
        self._expired = False

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - of a running coroutine
        self._task = task
        self._cancelling = task.cancelling()
        self._end = self._loop.time() + self._longest
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
        if now - self._due < self._tick_seconds:
            self._left -= 1
        if self._left > 0 and now < self._end:
            self._arm()
            return
        self._expired = True
        self._task.cancel()
