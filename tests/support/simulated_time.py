"""An event loop whose time passes only while every task waits, and then at once.

@in_simulated_time
async def test_something() -> None:
    await asyncio.sleep(3600)  # takes no time
"""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

P = ParamSpec("P")


class _Selector(selectors.DefaultSelector):
    """Skips the time in which nothing would happen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:  # pragma: no cover
            raise AssertionError("nothing will ever happen")
        # Work takes time too, or a pause too short for a float would never end.
        self.now += 1e-6 if ready else max(timeout or 0, 1e-6)
        return ready


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop in simulated time."""

    def __init__(self) -> None:
        self._skipping = _Selector()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now

    def pass_time(self, seconds: float) -> None:
        """Simulate a callback that takes this long."""
        self._skipping.now += seconds


def in_simulated_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test in simulated time. Unhandled exceptions and tasks left running fail it."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        uncaught: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: uncaught.append(context))
            runner.run(_tidy(test(*args, **kwargs)))
        assert not uncaught

    return run


async def _tidy(test: Coroutine[Any, Any, None]) -> None:
    await test
    await asyncio.sleep(120)  # abandoned requests end by themselves
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left
