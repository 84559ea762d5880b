"""The benchmarks measure: short forms of each, whose figures mean nothing."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import rig
from tests.benchmarks.rig import Server
from tests.support import needs
from tests.support.ports import free_port
from tests.support.processes import surroundings

pytestmark = pytest.mark.process

PATIENCE = 150.0


@pytest.fixture(autouse=True)
def programs() -> None:
    needs.program("wrk", "wrk")
    needs.program("nginx", "nginx")


@pytest.fixture
def oneinbox() -> Iterator[Server]:
    with rig.oneinbox() as server:
        yield server


def measured(folder: Path, module: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """A benchmark's JSON, and what it printed."""
    file = folder / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments, "--json", str(file)],
        cwd=folder,
        env=surroundings({}),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    return found, done.stdout


def test_the_broker_is_measured_beside_what_a_user_would_pick_instead(tmp_path: Path) -> None:
    if not (rig.PEERS / "node_modules" / "express").is_dir():
        needs.cannot("express is not installed: npm install --prefix tests/benchmarks/peers")

    found, printed = measured(tmp_path, "tests.benchmarks", "--quick", "--seconds", "1")

    assert found["contenders"].keys() == {"broker", "express", "empty"}
    for contender in found["contenders"].values():
        assert contender["many"]["per_second"] > 0
        assert contender["many"]["cpu"] > 0
        assert 0 < contender["one"]["p50"] <= contender["one"]["p99"]
        assert contender["name"] in printed
    assert found["ratios"]["sessions/s, broker ÷ an empty route"] > 0


def test_waiting_browsers_are_all_answered(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, "tests.benchmarks.waiting", "--browsers", "50", "--seconds", "1")

    assert found["answers"] == {"201": 50}
    assert 0 < found["waiting for OneInbox at once, at most"] <= 50


def test_reads_and_watchers_are_measured(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, "tests.benchmarks.reading", "--rounds", "1", "--seconds", "1", "--watchers", "20")

    assert found["reads/s, 200"] > 0
    assert found["reads/s, 304"] > 0
    assert found["20 watchers: events"] >= 20


def test_two_workers_are_measured_beside_one(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, "tests.benchmarks.scaling", "--rounds", "1", "--seconds", "1")

    assert found["2 workers ÷ 1"] > 0
    assert found["on paper: replicas until Valkey is full"] > 0


def test_the_start_is_measured(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, "tests.benchmarks.starting", "--rounds", "1")

    assert found["import, s"] > 0
    assert found["start to first answer, s"] > 0
    assert found["RSS at rest, MB"] > 10


def test_sessions_after_a_quiet_time_are_measured(tmp_path: Path) -> None:
    arguments = ("--rtt", "50", "--idle", "1", "--rounds", "1")
    found, printed = measured(tmp_path, "tests.benchmarks.idle", *arguments)

    for took in found["took, ms"].values():
        assert took.keys() == {"first after start", "back to back", "after 1 s"}
        assert min(took.values()) >= 50
    assert found["handshakes/h"] > 0
    assert "the broker" in printed


def test_an_answer_that_was_not_expected_is_no_figure(oneinbox: Server) -> None:
    with pytest.raises(AssertionError, match="should answer 200"):
        rig.load(oneinbox, "/v1/calls/web", connections=1, seconds=1, expect=200)


def test_each_started_call_has_an_id_of_its_own(oneinbox: Server) -> None:
    ids = {json.load(rig.ask(f"{oneinbox.url}/v1/calls/web", "POST"))["id"] for _ in range(3)}

    assert len(ids) == 3


def test_what_does_not_start_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(rig.Missing, match="did not start"),
        rig.running([sys.executable, "-c", ""], port=free_port()),
    ):
        pass
