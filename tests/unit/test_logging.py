"""Log lines: one format for the broker's and the libraries' records, with any content."""

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Literal

import httpx
import pytest
import structlog

from app.identity.jwks import KeySet, KeySetError
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


LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")
LIBRARIES = ("httpx", "httpcore.connection", "asyncio", "uvicorn", "uvicorn.error", "opentelemetry.sdk", "some.library")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_speak_from_warning_on(stderr: io.StringIO, level: Level, library: str) -> None:
    logger = logging.getLogger(library)
    before = logger.level
    try:
        logger.setLevel("DEBUG")  # as some do by a variable of their own
        configure(stderr, level)
        for said in ("debug", "info", "warning", "error"):
            logger.log(logging.getLevelNamesMapping()[said.upper()], said)
    finally:
        logger.setLevel(before)

    heard = [json.loads(line)["event"] for line in stderr.getvalue().splitlines()]
    assert heard == (["error"] if level == "error" else ["warning", "error"])


URLS = {
    "GET https://login.example/keys?token=hush HTTP/1.1": "GET https://login.example/keys?… HTTP/1.1",
    "url 'HTTPS://login.example?a=hush&b=%20c#d'": "url 'HTTPS://login.example?…'",
    "(http://[::1]:8000/a?hush) and <redis+unix:///path?password=hush>": "(http://[::1]:8000/a?… and <redis+unix:///path?…>",
    "two: https://a.example/?x=hush https://b.example/?y=hush": "two: https://a.example/?… https://b.example/?…",
    "https://a.example/b is all right? yes": "https://a.example/b is all right? yes",
    "what? no URL": "what? no URL",
}


@pytest.mark.parametrize(("said", "logged"), URLS.items())
def test_no_query_of_a_url_is_logged(stderr: io.StringIO, said: str, logged: str) -> None:
    formats: tuple[Literal["json", "text"], ...] = ("json", "text")
    for log_format in formats:
        configure(stderr, "debug", log_format)
        logging.getLogger("some.library").warning("%s", said)
        try:
            raise ValueError(said)
        except ValueError:
            logging.getLogger("some.library").exception("broken")
            structlog.get_logger("app").exception("broken")

    assert "hush" not in stderr.getvalue()
    first = json.loads(stderr.getvalue().splitlines()[0])
    assert first["event"] == logged


async def test_a_fetch_of_keys_by_a_url_with_a_secret(stderr: io.StringIO) -> None:
    """httpx logs every request's URL at info."""
    for level in LEVELS:
        configure(stderr, level)
        answers = httpx.MockTransport(lambda request: httpx.Response(200, json={"keys": []}, request=request))
        keys = KeySet("https://login.example/keys?token=hush", transport=answers)
        with pytest.raises(KeySetError):
            await keys.fetch()
        await keys.aclose()

    assert stderr.getvalue() == ""
