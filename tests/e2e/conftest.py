"""A real Chromium, and sandboxes, brokers and sites for it to visit."""

import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route, sync_playwright

from tests.support.brokers import environ_of
from tests.support.needs import program
from tests.support.processes import Process, running, serving

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
FLAGS = (
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",  # a microphone, allowed without a prompt
    "--use-fake-ui-for-media-stream",
)

OpenPage = Callable[..., Page]


@contextmanager
def chromium(*flags: str) -> Iterator[Browser]:
    """Launch Debian's Chromium."""
    path = program("chromium", "chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=[*FLAGS, *flags])
        yield launched
        launched.close()


@contextmanager
def running_sandbox(*options: str, **environ: str) -> Iterator[tuple[Process, str]]:
    """Run `oneinbox-broker sandbox`; yield the process and its URL."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running("sandbox", "--port", "0", *options, cwd=Path(folder), environ=environ) as process,
    ):
        yield process, url_in(process.wait_for("http://127.0.0.1:"))


@contextmanager
def running_broker(oneinbox: str, **changes: str) -> Iterator[tuple[Process, str]]:
    """Run a broker in front of an emulator, with roomy limits and these settings; yield the process and its URL."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), environ_of(oneinbox, changes)) as served:
        yield served


@contextmanager
def running_site(folder: Path, policy: str = "") -> Iterator[str]:
    """Serve the files of a folder, under this Content-Security-Policy; yield the origin."""
    handler = partial(_QuietFiles, directory=str(folder), policy=policy)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class _QuietFiles(SimpleHTTPRequestHandler):
    def __init__(self, *given: Any, policy: str, **options: Any) -> None:
        self.policy = policy
        super().__init__(*given, **options)

    def end_headers(self) -> None:
        if self.policy:
            self.send_header("Content-Security-Policy", self.policy)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def url_in(text: str) -> str:
    """Return the first loopback URL in `text`."""
    found = re.search(r"http://127\.0\.0\.1:\d+", text)
    assert found is not None, text
    return found[0]


def control(oneinbox: str, path: str, body: Any = None) -> Any:
    """Ask an emulator's control surface: POST `body` if given, else GET. Return the JSON of the answer."""
    answer = httpx.request("GET" if body is None else "POST", f"{oneinbox}/_emulator/{path}", json=body, timeout=20)
    return answer.raise_for_status().json()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for modules without async tests: Playwright's event loop occupies this thread."""
    with chromium() as launched:
        yield launched


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Open pages: `open_page(url, color_scheme="dark")`, with Playwright's options of a context.

    In the end the test fails if a page logged an error or a warning that `complaints_expected` (a pattern) does not
    match, or sent a request to another host. `answered`: URLs to answer from a file, or to fail (None) as if offline.
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
    """The URL of a sandbox."""
    with running_sandbox() as (_, url):
        yield url


@pytest.fixture(scope="module")
def oneinbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an emulated OneInbox."""
    with running("emulator", "--port", "0", cwd=tmp_path_factory.mktemp("emulator"), environ={}) as process:
        yield url_in(process.wait_for("http://127.0.0.1:"))
