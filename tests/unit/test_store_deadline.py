"""A store operation may take 250 ms, but a process too busy to read does not give up a healthy store."""

import asyncio
import socket
from collections.abc import Callable

import pytest

from app.store.deadline import LATE_TICKS, LONGEST_FACTOR, TICKS, Deadline
from tests.support.simulated_time import SimulatedLoop, in_simulated_time

BOUND = 0.25
TICK = BOUND / TICKS
TURNS = 2
"""Of the event loop, in which a tick comes at the latest: one may be under way when it is due."""


def now() -> float:
    return asyncio.get_running_loop().time()


def never() -> float:
    """When a server was heard that says nothing."""
    return 0.0


def work(seconds: float) -> None:
    """Hold the event loop for so long."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimulatedLoop)
    loop.pass_time(seconds)


async def busy(turn: float) -> None:
    """Hold it turn after turn, with no more between them than one look at the sockets."""
    while True:
        work(turn)
        await asyncio.sleep(0)


async def waited(heard: Callable[[], float], *, turn: float = 0) -> float:
    """Seconds after which an answer that never comes is given up, in a process with turns of such a length."""
    began = now()
    working = asyncio.create_task(busy(turn)) if turn else None
    with pytest.raises(TimeoutError), Deadline(BOUND, heard):
        await asyncio.Event().wait()
    if working is not None:
        working.cancel()
    return now() - began


@pytest.mark.parametrize("heard", [never, now], ids=["it-is-silent", "it-answers-others"])
@in_simulated_time
async def test_a_process_with_time_waits_for_the_bound_and_no_longer(heard: Callable[[], float]) -> None:
    assert await waited(heard) == pytest.approx(BOUND, abs=0.01)


@pytest.mark.parametrize("turn", [0.01, 0.03, 0.05, 0.1, 0.6])
@in_simulated_time
async def test_a_silent_server_is_given_up_by_a_busy_process_too(turn: float) -> None:
    took = await waited(never, turn=turn)
    assert BOUND - 0.01 < took < BOUND + (LATE_TICKS + 1) * max(TURNS * turn, TICK)


@in_simulated_time
async def test_silence_counts_from_the_last_answer_to_anybody() -> None:
    began = now()
    took = await waited(lambda: began + 0.1, turn=0.03)
    assert BOUND + 0.1 - 0.01 < took < BOUND + 0.1 + (LATE_TICKS + 1) * TURNS * 0.03


@pytest.mark.parametrize("turn", [0.03, 0.3, 0.6, 2])
@in_simulated_time
async def test_an_answer_that_lies_in_the_socket_counts(turn: float) -> None:
    """However long the process was too busy to read it."""
    here, there = socket.socketpair()
    here.setblocking(False)
    with here, there, Deadline(BOUND, never):
        reading = asyncio.create_task(asyncio.get_running_loop().sock_recv(here, 100))
        await asyncio.sleep(0)
        there.sendall(b"an answer")
        working = asyncio.create_task(busy(turn))
        assert await reading == b"an answer"
        working.cancel()


@in_simulated_time
async def test_whoever_waits_for_a_turn_is_patient_while_others_are_answered() -> None:
    with Deadline(BOUND, now):
        for _ in range(25):
            work(0.03)
            await asyncio.sleep(0)


@in_simulated_time
async def test_even_then_there_is_an_end() -> None:
    took = await waited(now, turn=0.03)
    assert BOUND * LONGEST_FACTOR <= took < BOUND * LONGEST_FACTOR + (LATE_TICKS + 1) * TURNS * 0.03


@in_simulated_time
async def test_somebody_elses_cancellation_stays_one() -> None:
    async def ask() -> None:
        with Deadline(BOUND, never):
            await asyncio.Event().wait()

    asking = asyncio.create_task(ask())
    await asyncio.sleep(0.1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
