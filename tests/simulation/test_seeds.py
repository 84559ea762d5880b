"""Fixed seeds of the simulated world, about 30 s of one process: no promise is broken but as the contract allows."""

import pytest

from tests.simulation import scenario
from tests.simulation.invariants import allowed

SEEDS = 400
AT_ONCE = 25


@pytest.mark.process
@pytest.mark.parametrize("first", range(1, SEEDS + 1, AT_ONCE))
def test_seeds(first: int) -> None:
    broken = [
        f"python -m tests.simulation replay {seed}: {each.kind} at {each.at:.3f}: {each.what}"
        for seed in range(first, first + AT_ONCE)
        for each in scenario.run(seed).violations
        if not allowed(each.kind)
    ]
    assert not broken, "\n".join(broken)


def test_a_seed_replays_to_the_byte() -> None:
    first, again = scenario.run(7), scenario.run(7)
    assert first.history == again.history
    assert first.digest == again.digest
    assert first.counts == again.counts


def test_leaving_one_thing_out_moves_no_other() -> None:
    whole = scenario.run(7, scenario.Options(keep_history=True))
    *others, last = whole.actors
    part = scenario.run(7, scenario.Options(keep_history=True, without=frozenset({last})))

    def first_lines(result: scenario.Result) -> list[tuple[float, str, str]]:
        names = [name.removeprefix("actor@") for name in others]
        lines = [[line for line in result.history if line[1].startswith(f"{name}.")] for name in names]
        return [found[0] for found in lines if found]

    assert len(first_lines(whole)) > 1
    assert [line[1:] for line in first_lines(whole)] == [line[1:] for line in first_lines(part)]
