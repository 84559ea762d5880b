"""Log lines: one format for the broker's and the libraries' records, with any content."""

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Literal

import pytest
import structlog

from app.telemetry.logging import Level, configure_logging
from tests.support.commands import logging_restored


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Restore the configuration afterwards."""
    with logging_restored():
        yield


@pytest.fixture
def stderr() -> io.StringIO:
    """The log, once `configure` was called."""
    return io.StringIO()


def configure(stderr: io.StringIO, level: Level = "info", log_format: Literal["json", "text"] | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", stderr)
        configure_logging(level, log_format)


def test_json_off_a_terminal(stderr: io.StringIO) -> None:
    configure(stderr)

    structlog.get_logger("app").info("request", route="/session", odd={1}, text="two\nlines \u2028 \x1b[31m")
    logging.getLogger("some.library").warning("of %s own", "its")

    own, library = map(json.loads, stderr.getvalue().splitlines())
    assert (own["event"], own["route"], own["level"], own["odd"]) == ("request", "/session", "info", "{1}")
    assert own["text"] == "two\nlines \u2028 \x1b[31m"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", own["timestamp"])
    assert (library["event"], library["logger"], library["level"]) == ("of its own", "some.library", "warning")


def test_nothing_in_a_line_can_write_another_or_colour_a_terminal(stderr: io.StringIO) -> None:
    formats: tuple[Literal["json", "text"], ...] = ("json", "text")
    for log_format in formats:
        configure(stderr, "info", log_format)
        structlog.get_logger("app").info("odd", text="two\nlines\r\x1b[31m")

    assert len(stderr.getvalue().splitlines()) == 2
    assert "\x1b" not in stderr.getvalue()


def test_the_least_level(stderr: io.StringIO) -> None:
    configure(stderr, "error")

    structlog.get_logger("app").warning("small")
    logging.getLogger("some.library").warning("small")
    structlog.get_logger("app").error("large")

    assert [json.loads(line)["event"] for line in stderr.getvalue().splitlines()] == ["large"]


def test_the_servers_access_log_stays_silent(stderr: io.StringIO) -> None:
    configure(stderr, "debug")

    logging.getLogger("uvicorn.access").error("GET /calls/call_1.key")

    assert stderr.getvalue() == ""
