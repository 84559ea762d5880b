"""A real Chromium, and a sandbox for it to visit."""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route, sync_playwright

from tests.support.needs import program
from tests.support.processes import Process, running

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
FLAGS = (
    "--no-sandbox",  # CI is root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",  # a microphone, and nobody who has to allow it
    "--use-fake-ui-for-media-stream",
)

OpenPage = Callable[..., Page]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium."""
    path = program("chromium", "chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield launched
        launched.close()


@contextmanager
def running_sandbox(*options: str, environ: Mapping[str, str] | None = None) -> Iterator[tuple[Process, str]]:
    """`oneinbox-broker sandbox` as a process of its own, and its URL."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running("sandbox", "--port", "0", *options, cwd=Path(folder), environ=environ or {}) as process,
    ):
        url = re.search(r"http://127\.0\.0\.1:\d+", process.wait_for("http://127.0.0.1:"))
        assert url is not None
        yield process, url[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For modules without async tests: Playwright's event loop runs in this thread meanwhile."""
    with chromium() as launched:
        yield launched


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens pages: `open_page(url, color_scheme="dark")`, with Playwright's options of a context.

    At its end the test fails if a page complained on its console of anything that `complaints_expected` (a pattern)
    does not fit, or if anything was asked of another host than this one. `answered`: what answers a URL instead of its
    host; a file, or None where there shall be no network.
    """
    complaints: list[str] = []
    strangers: list[str] = []

    with ExitStack() as stack:

        def opens(
            url: str | None = None,
            *,
            complaints_expected: str | None = None,
            answered: Mapping[str, Path | None] | None = None,
            **options: Any,
        ) -> Page:
            instead = answered or {}

            def note(text: str) -> None:
                if complaints_expected is None or not re.search(complaints_expected, text):
                    complaints.append(text)

            def on_console(message: ConsoleMessage) -> None:
                if message.type in ("error", "warning"):
                    note(f"{message.text} ({message.location['url']})")

            def on_request(request: Request) -> None:
                parts = urlsplit(request.url)
                if (
                    parts.scheme in ("http", "https", "ws", "wss")
                    and parts.hostname not in LOOPBACK
                    and request.url not in instead
                ):
                    strangers.append(request.url)

            context = browser.new_context(**options)
            stack.callback(context.close)
            page = context.new_page()
            page.on("console", on_console)
            page.on("pageerror", lambda error: note(str(error)))
            context.on("request", on_request)
            for address, file in instead.items():
                context.route(address, partial(_answer, file=file))
            if url is not None:
                page.goto(url)
            return page

        yield opens
    assert complaints == []
    assert strangers == []


def _answer(route: Route, file: Path | None) -> None:
    if file is None:
        route.abort("internetdisconnected")
    else:
        route.fulfill(path=file, headers={"Access-Control-Allow-Origin": "*", "Content-Type": "text/javascript"})


@pytest.fixture(scope="module")
def sandbox() -> Iterator[str]:
    """A sandbox's URL."""
    with running_sandbox() as (_, url):
        yield url
