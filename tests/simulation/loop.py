"""An event loop in virtual time, and everything else that must not come from the machine: clocks, randomness, logs."""

import asyncio
import contextlib
import gc
import heapq
import itertools
import os
import random
import secrets
import signal
import socket
import threading
import time
import traceback
from asyncio import base_events
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context, ContextVar, copy_context
from types import FrameType
from typing import Any, Protocol, TypeVar
from unittest.mock import patch

import structlog

from app.broker.shutdown import Shutdown
from app.clock import Clock

EPOCH = 1_800_000_000.0
"""Unix time at the loop's second 0."""
BEGIN = 1000.0
"""The loop's time at which a world begins."""
MOST_STEPS = 3_000_000
MOST_CPU_SECONDS = 60.0
"""After this much CPU a run is cut in the middle of a step: a task that never sleeps lets no step end."""

T = TypeVar("T")


class Process(Protocol):
    """A simulated process. `dead`: killed; none of its steps runs. `skew`: seconds its clock is ahead."""

    dead: bool
    skew: float


HOST: ContextVar[Any] = ContextVar("host", default=None)
"""The process whose code runs; None: the world's own. Each callback carries it, so that a crash can drop them all."""
REQUEST: ContextVar[Any] = ContextVar("request", default=None)
"""The connection that is being served."""


class Stuck(SystemExit):
    """Nothing will ever happen, or too much at one moment. A SystemExit, since a task keeps any other exception."""


class SimTask(asyncio.Task[Any]):
    """A task with a serial number for a hash, so that sets of tasks have the same order in every run."""

    def __init__(self, coro: Any, *, loop: "SimLoop", name: str | None = None, context: Context | None = None) -> None:
        self._serial = next(loop.serials)
        self.host: Process | None = context.get(HOST) if context is not None else HOST.get()
        super().__init__(coro, loop=loop, name=name, context=context)

    def __hash__(self) -> int:
        return self._serial


class _Handle:
    """What asyncio.TimerHandle is, at a third of its cost: most of a run's time goes into timers."""

    __slots__ = ("args", "at", "callback", "context", "is_cancelled")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context, at: float) -> None:
        self.callback, self.args, self.context, self.at = callback, args, context, at
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.at


class SimLoop(base_events.BaseEventLoop):
    """Timers and callbacks only: no selector, no sockets, no threads.

    `shuffle`: run the ready callbacks in a random order. asyncio and uvloop promise first in, first out, so a fault
    that only a shuffled run finds may be impossible in production.
    """

    _ready: deque[_Handle]

    def __init__(self, rng: random.Random, *, shuffle: bool = False) -> None:
        super().__init__()
        self.now = BEGIN
        self.steps = 0
        self.serials = itertools.count(1)
        self._rng = rng
        self._shuffle = shuffle
        self._timers: list[tuple[float, int, _Handle]] = []
        self._order = itertools.count()
        self.parked: list[Any] = []
        """What killed processes would do."""
        self.set_task_factory(lambda loop, coro, **options: SimTask(coro, loop=self, **options))

    def time(self) -> float:
        return self.now

    def call_soon(  # type: ignore[override]  # any callback, as it is called
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        """Call back in the next turn."""
        handle = _Handle(callback, args, copy_context() if context is None else context, self.now)
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]  # any callback, as it is called
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        """Call back at a time; those of one time in the order in which they were asked for."""
        handle = _Handle(callback, args, copy_context() if context is None else context, when)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def call_later(  # type: ignore[override]  # any callback, as it is called
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        """Call back after a time."""
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_soon_threadsafe(  # type: ignore[override]  # any callback, as it is called
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        """Call back in the next turn: there is one thread."""
        return self.call_soon(callback, *args, context=context)

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers
        while timers and timers[0][2].is_cancelled:
            heapq.heappop(timers)
        if ready:
            self.now += 1e-6  # work takes time too, or a pause too short for a float would never end
        elif not timers:
            raise Stuck("nothing will ever happen")
        else:
            self.now = max(self.now, timers[0][0])
        while timers and timers[0][0] <= self.now:
            ready.append(heapq.heappop(timers)[2])
        count = len(ready)
        if self._shuffle and count > 1:
            order = list(ready)
            self._rng.shuffle(order)
            ready.clear()
            ready.extend(order)
        self.steps += count
        if self.steps > MOST_STEPS:
            raise Stuck(f"more than {MOST_STEPS} steps; the next one is of\n{_stack_of(ready[0])}")
        for _ in range(count):
            handle = ready.popleft()
            if handle.is_cancelled:
                continue
            host = handle.context.get(HOST)
            if host is not None and host.dead:
                self.parked.append(handle)  # its process was killed: no step, no `finally`
                continue
            try:
                handle.context.run(handle.callback, *handle.args)
            except Exception as error:
                message = f"a callback failed: {handle.callback}"
                self.call_exception_handler({"message": message, "exception": error})

    def _write_to_self(self) -> None:
        """Wake nothing: there is no selector."""

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> "asyncio.Future[T]":  # type: ignore[override]  # done at once
        """Do the work in this thread: others run in real time."""
        future: asyncio.Future[T] = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except Exception as error:
                future.set_exception(error)

        self.call_later(0.001, work)
        return future


def _stack_of(handle: _Handle) -> str:
    task = getattr(handle.callback, "__self__", None)
    if not isinstance(task, asyncio.Task):
        return repr(handle.callback)
    frames = [traceback.format_stack(frame, limit=1)[0] for frame in task.get_stack()]
    return f"{task!r}\n{''.join(frames)}"


class _Current:
    loop: SimLoop | None = None


def _now() -> float:
    host: Process | None = HOST.get()
    return EPOCH + _monotonic() + (host.skew if host is not None else 0.0)


def _monotonic() -> float:
    return _Current.loop.now if _Current.loop is not None else BEGIN


CLOCK = Clock(_now, _monotonic)
"""The clocks of whichever simulated process asks."""

Log = Callable[[str, str, dict[str, Any]], None]
"""Receives the method, the event and the fields of a log line."""


@contextlib.contextmanager
def _surroundings(seed: int, log: Log) -> Iterator[None]:
    """Replace this process's randomness, logs and signal handlers for one run. Without garbage collection."""
    rng = random.Random(seed)

    def token_bytes(size: int | None = None) -> bytes:
        return rng.randbytes(32 if size is None else size)

    def pass_on(_: Any, method: str, event: Any) -> Any:
        log(method, event.pop("event"), event)
        raise structlog.DropEvent

    logging, state, collects = structlog.get_config(), random.getstate(), gc.isenabled()
    with (
        patch.object(secrets, "token_bytes", token_bytes),
        patch.object(secrets, "token_hex", lambda size=None: token_bytes(size).hex()),
        patch.object(os, "urandom", token_bytes),
        patch.object(socket, "gethostname", lambda: "replica"),  # the same on every machine
        patch.object(Shutdown, "on_signals", lambda _: contextlib.nullcontext()),  # a signal is for one process
        _cpu_limit(),
    ):
        gc.disable()
        random.seed(seed)
        structlog.configure(processors=[pass_on], wrapper_class=structlog.make_filtering_bound_logger("warning"))
        try:
            yield
        finally:
            structlog.configure(**logging)
            random.setstate(state)
            if collects:
                gc.enable()


@contextlib.contextmanager
def _cpu_limit() -> Iterator[None]:
    """Raise Stuck with the stack after MOST_CPU_SECONDS; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def cut(number: int, frame: FrameType | None) -> None:
        raise Stuck("a step does not end:\n" + "".join(traceback.format_stack(frame, limit=12)))

    before = signal.signal(signal.SIGVTALRM, cut)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def run(main: Callable[[SimLoop], Coroutine[Any, Any, T]], seed: int, *, log: Log, shuffle: bool = False) -> T:
    """Run `main(loop)` in virtual time; return its result. Raises Stuck."""
    loop = SimLoop(random.Random(seed ^ 0x5EED), shuffle=shuffle)
    _Current.loop = loop
    with _surroundings(seed, log):
        try:
            result = loop.run_until_complete(main(loop))
            loop.set_exception_handler(lambda *_: None)
            _unwind(loop)
            return result
        finally:
            loop.set_exception_handler(lambda *_: None)
            loop._ready.clear()
            loop._timers.clear()
            _Current.loop = None
            loop.close()


def _unwind(loop: SimLoop) -> None:
    """End what is left, also in killed processes, so that no coroutine is collected half-way."""
    left = sorted(asyncio.all_tasks(loop), key=hash)
    for task in left:
        if isinstance(task, SimTask) and task.host is not None:
            task.host.dead = False
        task.cancel()
    loop._ready.extend(loop.parked)

    async def end() -> None:
        await asyncio.wait_for(asyncio.gather(*left, return_exceptions=True), 300)

    with contextlib.suppress(Stuck, TimeoutError):
        loop.run_until_complete(end())
        loop.run_until_complete(loop.shutdown_asyncgens())


real_seconds = time.perf_counter
WORLD = Context()
"""The context of the world's own callbacks: they outlive every process."""
