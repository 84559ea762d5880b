"""The end of a process, by signals that the test sends to itself."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from app.broker.shutdown import Shutdown

BOTH = (signal.SIGTERM, signal.SIGINT)


class Server:
    """Stands for uvicorn: its handlers were there first."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.over = asyncio.Event()

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.told.append(number)
        self.over.set()


@contextmanager
def handling(server: Server) -> Iterator[None]:
    before = {number: signal.signal(number, server.handle) for number in BOTH}
    try:
        yield
        assert signal.getsignal(signal.SIGTERM) == server.handle, "what was there is put back"
        assert signal.getsignal(signal.SIGINT) == server.handle
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", BOTH)
async def test_without_a_drain_time_the_end_comes_at_once(number: signal.Signals) -> None:
    server, closed = Server(), 0

    def close() -> None:
        nonlocal closed
        closed += 1
        assert not server.told, "streams are ended before the server waits for them"

    with handling(server):
        shutdown = Shutdown(0, close)
        with shutdown.on_signals():
            assert not shutdown.draining
            signal.raise_signal(number)
            assert shutdown.draining, "said first"
            async with asyncio.timeout(5):
                await server.over.wait()

    assert (server.told, closed) == ([number], 1)


async def test_a_drain_time_is_waited_for() -> None:
    server, closed = Server(), []
    loop = asyncio.get_running_loop()
    with handling(server):
        shutdown = Shutdown(0.2, lambda: closed.append(loop.time()))
        with shutdown.on_signals():
            began = loop.time()
            signal.raise_signal(signal.SIGTERM)
            assert shutdown.draining
            await asyncio.sleep(0.1)
            assert not server.told
            assert not closed
            async with asyncio.timeout(5):
                await server.over.wait()

    assert server.told == [signal.SIGTERM]
    assert closed[0] - began >= 0.2


@pytest.mark.parametrize("second", BOTH)
async def test_a_second_signal_ends_the_draining(second: signal.Signals) -> None:
    server = Server()
    with handling(server):
        shutdown = Shutdown(3600, lambda: None)
        with shutdown.on_signals():
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(0.05)
            assert not server.told
            signal.raise_signal(second)
            async with asyncio.timeout(5):
                await server.over.wait()

    assert server.told == [second]


async def test_an_interrupt_does_not_drain() -> None:
    server = Server()
    with handling(server):
        shutdown = Shutdown(3600, lambda: None)
        with shutdown.on_signals():
            signal.raise_signal(signal.SIGINT)
            async with asyncio.timeout(5):
                await server.over.wait()

    assert server.told == [signal.SIGINT]


def test_beside_the_main_thread_signals_are_not_touched() -> None:
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    async def run() -> None:
        with Shutdown(0, lambda: None).on_signals():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    thread.join(10)

    assert inside == [before]
