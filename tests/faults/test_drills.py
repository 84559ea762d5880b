"""Every drill in its short form. The full drills are commands, described at the top of each module."""

import os

import pytest

from tests.faults import drain, faults, schema, soak

SOAK_SECONDS = 60 if os.environ.get("CI") else 15


# First: the others run beside it, where several run at once.
async def test_soak() -> None:
    await soak.drill(SOAK_SECONDS, browsers=20, pace=5, seed=1)


@pytest.mark.parametrize("kind", drain.RUNS)
async def test_drain(kind: str) -> None:
    # The full drill checks the reads' latency, on an idle machine.
    await drain.drill(kind, seconds=6, attackers=40, count=10_000, replicas=1, p99=10)


async def test_drain_of_two_replicas() -> None:
    await drain.drill("rotation", seconds=6, attackers=40, count=10_000, replicas=2, p99=10)


@pytest.mark.parametrize("moves", [False, True], ids=["killed", "moved"])
async def test_faults(*, moves: bool) -> None:
    # Without failing stops, which only the next sweep repairs.
    await faults.drill(
        sessions=200,
        browsers=30,
        faulty=0.33,
        patience=70,
        seed=1,
        operations=("start", "get"),
        short=True,
        moves=moves,
    )


async def test_schema() -> None:
    await schema.drill(examples=12, seed=1, seconds=120)
