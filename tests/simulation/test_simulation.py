"""The simulation itself: its command line, and runs that cannot end."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import app.broker.build
from tests.simulation import loop, scenario
from tests.simulation.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["replay", "seven"], "'seven' is no seed"),
        (["replay", "-7"], "'-7' is no seed"),
        (["run", "--seeds", "0"], "'0' is no count"),
        (["run", "--never", "rain"], "no fault or event 'rain'"),
        (["run", "--only", "hang,rain"], "no fault or event 'rain'"),
        (["run", "--plant", "a-weed"], "no planted bug 'a-weed'"),
        (["shrink", "7", "--kind", "Z-unknown"], "no violation 'Z-unknown'"),
        (["run", "--memory", "--shared"], "not allowed with argument"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_wrong_arguments(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert line in said
    assert len(said.splitlines()) == 1


async def _never_sleeps(*_: Any) -> None:
    while True:
        await asyncio.sleep(0)


async def _never_ends(*_: Any) -> None:
    while True:
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what was cut is collected half-way
@pytest.mark.parametrize("work", [_never_sleeps, _never_ends])
def test_a_run_that_cannot_end_is_cut(work: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scenario.run(3)  # makes the app
    monkeypatch.setattr(app.broker.build, "sweep_forever", work)
    monkeypatch.setattr(loop, "MOST_STEPS", 20_000)
    monkeypatch.setattr(loop, "MOST_CPU_SECONDS", 1.0)
    [cut] = scenario.run(3).violations
    assert cut.kind == "H-stuck"
    assert work.__name__ in cut.what


def test_replay(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "1"]) == 0
    said = capsys.readouterr().out
    assert "r1           is up" in said
    assert f"digest {scenario.run(1).digest}" in said
