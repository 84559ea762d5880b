"""The judge is judged: a planted bug is found within few seeds. All of them: python -m tests.simulation plants."""

import pytest

from tests.simulation import plants, scenario

FEW = 200


@pytest.mark.parametrize("name", ["lost-calls-are-not-found", "a-key-is-no-lock", "slots-are-never-freed"])
def test_a_planted_bug_is_found(name: str) -> None:
    planted = plants.PLANTS[name]

    def breaks(seed: int) -> bool:
        return planted.kind in scenario.run(seed, planted.options).kinds()

    def is_found(seed: int) -> bool:
        with plants.planted(name):
            broken = breaks(seed)
        return broken and not breaks(seed)

    assert any(map(is_found, range(1, FEW + 1))), f"{name} is not found within {FEW} seeds"


def test_each_kind_of_promise_has_a_plant() -> None:
    letters = {each.kind[0] for each in plants.PLANTS.values()}
    assert len(letters) >= 12
