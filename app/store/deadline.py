"""A timeout for a server, which does not expire just because this process is too busy to read the answer."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

TICKS = 10
"""Parts of the timeout, counted one by one."""
LATE_TICKS = 3
"""After this many late ticks in a row the sockets have surely been read."""
LONGEST_FACTOR = 4
"""The deadline expires after this many times the timeout, however busy the process is."""


class Deadline:
    """Like `asyncio.timeout(seconds)`, but while the server answers others, only ticks that came in time count.

    A burst of requests can hold the event loop for longer than the timeout, while the answer waits in the socket.
    Giving up then would leave every process counting alone under load. A server that has sent nothing to this process
    for `seconds` (`heard`: when it last did, by the loop's clock) is given up anyway, once the sockets have been read.
    Raises TimeoutError on leaving.
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
        self._started = self._loop.time()
        self._arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.cancel()
        # A cancellation from outside stays one (as in asyncio.timeout).
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _arm(self) -> None:
        self._due = self._loop.time() + self._tick_seconds
        self._handle = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        in_time = now - self._due < self._tick_seconds
        self._left -= in_time
        silence, waited = now - max(self._started, self._heard()), now - self._started
        over = silence >= self._seconds or waited >= self._seconds * LONGEST_FACTOR
        self._late = self._late + 1 if over and not in_time else 0
        if self._left > 0 and not (over and in_time) and self._late < LATE_TICKS:
            self._arm()
            return
        self._expired = True
        self._task.cancel()
