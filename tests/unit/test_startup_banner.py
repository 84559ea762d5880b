"""What `serve` says at its start: words for a terminal, records for everything else."""

import io

import pytest

from app.cli.startup_banner import announce
from tests.conftest import Logs
from tests.support.harness import settings

URL = "http://127.0.0.1:8000"


class Terminal(io.TextIOWrapper):
    """A stream that a person reads."""

    def __init__(self) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True


def said(monkeypatch: pytest.MonkeyPatch, *, workers: int = 1, host: str = "127.0.0.1", **environ: str) -> str:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    announce(settings(environ), host, url=URL, workers=workers)
    return terminal.bytes.getvalue().decode()


def test_a_terminal_is_spoken_to_in_words(monkeypatch: pytest.MonkeyPatch, logs: Logs) -> None:
    words = said(monkeypatch, BROKER_SESSION_LIMITS="3/minute", BROKER_MAX_LIVE_CALLS="4")

    assert words.startswith(f"The broker listens on {URL}, as one process. Ctrl-C stops it.\n")
    assert "anonymous, told apart by address (BROKER_AUTH=anonymous)" in words
    assert "3/minute per user" in words
    assert "4 calls per user, any number in all" in words
    assert "Talk:" not in words
    assert logs == []


def test_minutes_and_workers_are_said_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    words = said(
        monkeypatch,
        workers=3,
        BROKER_TALK_MINUTES="30",
        BROKER_GLOBAL_TALK_MINUTES="600",
        BROKER_MAX_LIVE_CALLS_TOTAL="50",
    )

    assert "with 3 workers" in words
    assert "30 minutes in 24 h per user, 600 minutes in 24 h for all users together" in words
    assert "50 in all" in words


def test_what_deserves_a_second_thought_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    words = said(monkeypatch, host="0.0.0.0", BROKER_ALLOWED_ORIGINS="*")

    assert "BROKER_AUTH" in words
    assert "variables" in words


def test_a_named_format_is_kept_on_a_terminal_too(monkeypatch: pytest.MonkeyPatch, logs: Logs) -> None:
    assert said(monkeypatch, BROKER_LOG_FORMAT="json") == ""

    assert (logs[0]["event"], logs[0]["url"], logs[0]["auth"]) == ("listening", URL, "anonymous")
    assert {each["event"] for each in logs[1:]} == {"settings_warning"}
    assert all(each["remedy"] for each in logs[1:])
