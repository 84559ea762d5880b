"""A real Chromium, and a sandbox for it to visit."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from tests.integration.processes import running
from tests.needs import program

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
FLAGS = (
    "--no-sandbox",  # CI is root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium. For modules without async tests: Playwright's event loop runs in this thread meanwhile."""
    path = program("chromium", "chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens pages: `open_page(url, color_scheme="dark")`, with Playwright's options of a context.

    At its end the test fails if a page complained on its console of anything that `complaints_expected` (a pattern)
    does not fit, or if anything was asked of another host than this one.
    """
    complaints: list[str] = []
    strangers: list[str] = []

    with ExitStack() as stack:

        def opens(url: str | None = None, *, complaints_expected: str | None = None, **options: Any) -> Page:
            def note(text: str) -> None:
                if complaints_expected is None or not re.search(complaints_expected, text):
                    complaints.append(text)

            def on_console(message: ConsoleMessage) -> None:
                if message.type in ("error", "warning"):
                    note(f"{message.text} ({message.location['url']})")

            def on_request(request: Request) -> None:
                parts = urlsplit(request.url)
                if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in LOOPBACK:
                    strangers.append(request.url)

            context = browser.new_context(**options)
            stack.callback(context.close)
            page = context.new_page()
            page.on("console", on_console)
            page.on("pageerror", lambda error: note(str(error)))
            context.on("request", on_request)
            if url is not None:
                page.goto(url)
            return page

        yield opens
    assert complaints == []
    assert strangers == []


@pytest.fixture(scope="module")
def sandbox() -> Iterator[str]:
    """`oneinbox-broker sandbox` as a process of its own: its URL."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running("sandbox", "--port", "0", cwd=Path(folder), environ={}) as process,
    ):
        url = re.search(r"http://127\.0\.0\.1:\d+", process.wait_for("http://127.0.0.1:"))
        assert url is not None
        yield url[0]
