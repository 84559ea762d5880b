"""Shutdown on SIGTERM: first announced, then done."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType


@dataclass(repr=False, eq=False)
class Shutdown:
    """The state of the process's shutdown.

    `drain_seconds`: how long after SIGTERM new connections are still served, while `/readyz` says `draining`. `close`:
    then closes what would keep running, such as event streams.
    """

    drain_seconds: float
    close: Callable[[], None]
    draining: bool = field(default=False, init=False)

    def begin(self, end_server: Callable[[], None], at_once: bool = False) -> None:
        """Announce the shutdown; after the drain time, or at once, close and call `end_server`. In the event loop."""
        self.draining = True
        asyncio.get_running_loop().call_later(0 if at_once else self.drain_seconds, self._finish, end_server)

    def _finish(self, end_server: Callable[[], None]) -> None:
        self.close()
        end_server()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT before the server's own handlers, until the context ends."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread gets signals; a server in another thread is ended differently
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def end_server(number: int, frame: FrameType | None) -> None:
            servers_own = before[signal.Signals(number)]
            if callable(servers_own):
                servers_own(number, frame)
            elif servers_own == signal.SIG_DFL:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

        def handle(number: int, frame: FrameType | None) -> None:
            at_once = self.draining or number != signal.SIGTERM
            self.draining = True
            loop.call_soon_threadsafe(self.begin, lambda: end_server(number, frame), at_once)

        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
