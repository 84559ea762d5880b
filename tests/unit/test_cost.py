"""What a request may cost: counted, not timed, so that a busy machine changes nothing."""

import json
from typing import Any

import pytest

from tests.support.processes import run

CALLS = {"session": 920, "read": 290}
"""Function calls of a request, Python's and C's; an empty FastAPI route takes 275. Whoever needs more says so here."""
TIMES_EMPTY = {"session": 10.0, "read": 4.0}
"""CPU of a request beside an empty FastAPI route's in the same process; generous, since it is timed."""


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    # A process of its own: the tests' coverage would be measured, too.
    done = run(cwd=tmp_path_factory.mktemp("cost"), environ={}, module="tests.benchmarks.counting")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.mark.parametrize("request_name", CALLS)
def test_a_request_makes_no_more_calls_than_it_needs(costs: dict[str, dict[str, float]], request_name: str) -> None:
    assert costs[request_name]["calls"] <= CALLS[request_name], costs


@pytest.mark.parametrize("request_name", CALLS)
def test_a_request_leaves_nothing_to_the_garbage_collector(
    costs: dict[str, dict[str, float]], request_name: str
) -> None:
    assert costs[request_name]["garbage"] < 1, costs


@pytest.mark.parametrize("request_name", TIMES_EMPTY)
def test_a_request_stays_near_an_empty_route(costs: dict[str, dict[str, float]], request_name: str) -> None:
    assert costs[request_name]["cpu"] <= TIMES_EMPTY[request_name] * costs["empty"]["cpu"], costs
