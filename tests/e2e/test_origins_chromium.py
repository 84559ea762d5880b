"""A page on another origin than the broker's, in a real browser: what it may do, what it may read, who is kept out."""

import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from playwright.sync_api import Page

from tests.e2e.conftest import OpenPage
from tests.support.processes import Process, running, serving

SECRET = "origins_c4b1f08a6d2e4b7c9a5e3f10"
COOKIE = "who"
STATUS = r"Failed to load resource: the server responded with a status of "
REFUSED = r"blocked by CORS policy|net::ERR_FAILED"

# Asks, and says all that the browser lets a page of another origin see.
ASK = """async ([url, options]) => {
  try {
    const answer = await fetch(url, options);
    return { status: answer.status, headers: Object.fromEntries(answer.headers), body: await answer.text() };
  } catch (error) {
    return { error: error.name };
  }
}"""
# A call's events to their end, hung up at the first one; null for an error that EventSource does not come back from.
FOLLOW = """([call, withCredentials]) => new Promise((resolve) => {
  const seen = [];
  const events = new EventSource(`${call}/events`, { withCredentials });
  events.addEventListener("call", (event) => {
    seen.push([JSON.parse(event.data).status, event.lastEventId]);
    const credentials = withCredentials ? "include" : "omit";
    if (seen.length === 1) fetch(`${call}/stop`, { method: "POST", credentials });
  });
  events.addEventListener("end", () => { events.close(); resolve(seen); });
  events.addEventListener("error", () => { if (events.readyState === EventSource.CLOSED) resolve(null); });
})"""


class _BlankPage(BaseHTTPRequestHandler):
    """A site of somebody's own."""

    def do_GET(self) -> None:
        body = b'<!doctype html><title>A page</title><link rel="icon" href="data:,">'
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def site() -> Iterator[str]:
    """A site on a port of its own: its origin."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _BlankPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    """The site that the brokers allow."""
    with site() as url:
        yield url


@pytest.fixture(scope="module")
def stranger() -> Iterator[str]:
    """A site that they do not."""
    with site() as url:
        yield url


@pytest.fixture(scope="module")
def oneinbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an emulated OneInbox."""
    with running("emulator", "--port", "0", cwd=tmp_path_factory.mktemp("emulator"), environ={}) as process:
        found = re.search(r"http://127\.0\.0\.1:\d+", process.wait_for("http://"))
        assert found is not None
        yield found[0]


@pytest.fixture(scope="module")
def settings(oneinbox: str) -> dict[str, str]:
    """What all brokers here have in common."""
    return {
        "ONEINBOX_API_KEY": "oi_sk_sandbox",
        "ONEINBOX_AGENT_ID": "agt_sandbox",
        "ONEINBOX_BASE_URL": oneinbox,
        "BROKER_MAX_LIVE_CALLS": "100",
        "BROKER_SESSION_LIMITS": "100/minute",
        "BROKER_ALLOWED_VARIABLES": "plan",
    }


@pytest.fixture(scope="module")
def anonymous(
    settings: dict[str, str], origin: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Process, str]]:
    with serving(tmp_path_factory.mktemp("anonymous"), {**settings, "BROKER_ALLOWED_ORIGINS": origin}) as served:
        yield served


@pytest.fixture(scope="module")
def signed_in(
    settings: dict[str, str], origin: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Process, str]]:
    """A broker whose users carry a token, in a cookie or a header."""
    own = {
        "BROKER_AUTH": "jwt",
        "BROKER_JWT_SECRET": SECRET,
        "BROKER_JWT_COOKIE": COOKIE,
        "BROKER_ALLOWED_ORIGINS": f"{origin},{origin.replace('127.0.0.1', 'localhost')}",
    }
    with serving(tmp_path_factory.mktemp("signed-in"), {**settings, **own}) as served:
        yield served


def user_token() -> str:
    """A user's own token, not a call's."""
    return jwt.encode({"sub": "ada", "exp": int(time.time()) + 600}, SECRET, algorithm="HS256")


def sign_in(page: Page, broker: str) -> None:
    """Give the browser the cookie that a login on the broker's host would."""
    page.context.add_cookies(
        [{"name": COOKIE, "value": user_token(), "url": broker, "httpOnly": True, "sameSite": "Strict"}]
    )


def ask(page: Page, url: str, body: Any = None, **options: Any) -> Any:
    """`fetch` on the page, a POST where nothing else is said: what the page sees of the answer."""
    if body is not None:
        options["body"] = json.dumps(body)
        options["headers"] = {"Content-Type": "application/json", **options.get("headers", {})}
    return page.evaluate(ASK, [url, {"method": "POST", **options}])


def problem(answer: Any, status: int, slug: str) -> dict[str, str]:
    """The headers of an error that the page can read."""
    assert answer["status"] == status, answer
    told = json.loads(answer["body"])
    assert told["type"] == f"/problems/{slug}"
    headers: dict[str, str] = answer["headers"]
    assert headers["x-request-id"] == told["request_id"]
    return headers


def preflights(process: Process, since: int, answer: Any) -> list[int]:
    """The statuses of the OPTIONS requests that the broker logged after its first `since` lines, up to an answer's."""
    process.wait_for(answer["headers"]["x-request-id"])
    return [record["status"] for record in process.records[since:] if record.get("method") == "OPTIONS"]


def test_the_page_reads_every_exposed_header(origin: str, anonymous: tuple[Process, str], open_page: OpenPage) -> None:
    process, broker = anonymous
    page, before = open_page(origin), len(process.records)
    key = {"Idempotency-Key": "a-key-for-this-click", "X-Request-ID": "of-the-page"}

    answer = ask(page, f"{broker}/session", {"variables": {"plan": "gold"}}, headers=key)
    assert answer["status"] == 201, answer
    assert json.loads(answer["body"]).keys() == {"server_url", "participant_token"}
    headers = answer["headers"]
    assert headers["x-request-id"] == "of-the-page"
    assert headers["ratelimit-policy"] == '"user-minute";q=100;w=60'
    assert headers["ratelimit"].startswith('"user-minute";r=99;')
    assert "idempotency-replayed" not in headers
    assert preflights(process, before, answer) == [204]  # a body of JSON asks first

    again = ask(page, f"{broker}/session", {"variables": {"plan": "gold"}}, headers=key)
    assert again["headers"]["idempotency-replayed"] == "true"
    assert again["headers"]["location"] == headers["location"]

    call = broker + headers["location"]
    read = ask(page, call, method="GET")
    assert read["status"] == 200
    etag = read["headers"]["etag"]
    stopped = ask(page, f"{call}/stop")
    assert stopped["headers"]["etag"] != etag
    unchanged = ask(page, call, method="GET", headers={"If-None-Match": stopped["headers"]["etag"]}, cache="no-store")
    assert unchanged["status"] == 304


def test_what_needs_no_preflight_sends_none(origin: str, anonymous: tuple[Process, str], open_page: OpenPage) -> None:
    process, broker = anonymous
    page, before = open_page(origin), len(process.records)

    answer = ask(page, f"{broker}/session")

    assert answer["status"] == 201
    assert preflights(process, before, answer) == []


def test_errors_are_as_readable(origin: str, anonymous: tuple[Process, str], open_page: OpenPage) -> None:
    _, broker = anonymous
    page = open_page(origin, complaints_expected=STATUS + "4..")
    url, key = f"{broker}/session", {"Idempotency-Key": "another-key-altogether"}

    problem(ask(page, url, {"variables": {"rank": "1"}}), 403, "variable-not-allowed")
    problem(ask(page, url, {"colour": "green"}), 422, "invalid-request")
    problem(ask(page, url, body=None, headers={"Content-Type": "text/plain"}), 415, "unsupported-media-type")
    problem(ask(page, f"{broker}/calls/nobody", method="GET"), 404, "not-found")
    assert ask(page, url, {}, headers=key)["status"] == 201
    problem(ask(page, url, {"variables": {"plan": "gold"}}, headers=key), 422, "idempotency-mismatch")


def test_a_pause_that_oneinbox_asks_for_is_as_readable(
    origin: str, settings: dict[str, str], oneinbox: str, tmp_path: Path, open_page: OpenPage
) -> None:
    fault = [{"kind": "status", "operation": "start", "status": 429, "retry_after": 1, "times": 1}]
    control = urllib.request.Request(
        f"{oneinbox}/_emulator/faults", json.dumps(fault).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(control, timeout=20).close()
    # A broker of its own: it cools down, and others would be refused meanwhile.
    with serving(tmp_path, {**settings, "BROKER_ALLOWED_ORIGINS": origin}) as (_, broker):
        page = open_page(origin, complaints_expected=STATUS + "503")

        headers = problem(ask(page, f"{broker}/session"), 503, "upstream-busy")

        assert headers["retry-after"] == "1"


def test_a_refusal_says_when_to_try_again(
    origin: str, settings: dict[str, str], tmp_path: Path, open_page: OpenPage
) -> None:
    own = {"BROKER_ALLOWED_ORIGINS": origin, "BROKER_SESSION_LIMITS": "1/hour"}
    with serving(tmp_path, {**settings, **own}) as (_, broker):
        page = open_page(origin, complaints_expected=STATUS + "429")
        assert ask(page, f"{broker}/session")["status"] == 201

        headers = problem(ask(page, f"{broker}/session"), 429, "rate-limited")

        assert 3500 < int(headers["retry-after"]) <= 3600
        assert headers["ratelimit-policy"] == '"user-hour";q=1;w=3600'
        assert headers["ratelimit"].startswith('"user-hour";r=0;t=')


def test_events_without_credentials(origin: str, anonymous: tuple[Process, str], open_page: OpenPage) -> None:
    _, broker = anonymous
    page = open_page(origin)
    call = broker + ask(page, f"{broker}/session")["headers"]["location"]

    seen = page.evaluate(FOLLOW, [call, False])

    assert seen[0][0] in ("queued", "initiated", "in_progress")
    assert seen[-1][0] == "completed"
    assert all(last for _, last in seen)


def test_a_forbidden_origin_is_refused(
    origin: str, stranger: str, anonymous: tuple[Process, str], oneinbox: str, open_page: OpenPage
) -> None:
    process, broker = anonymous
    call = broker + ask(open_page(origin), f"{broker}/session")["headers"]["location"]
    page, before = open_page(stranger, complaints_expected=f"{REFUSED}|{STATUS}403"), len(process.records)

    with urllib.request.urlopen(f"{oneinbox}/_emulator/calls", timeout=20) as answer:
        calls = len(json.load(answer))
    assert ask(page, f"{broker}/session", {}) == {"error": "TypeError"}
    assert ask(page, f"{broker}/session") == {"error": "TypeError"}
    assert ask(page, f"{broker}/session", mode="no-cors")["status"] == 0  # nothing to read there, either
    assert ask(page, call, method="GET") == {"error": "TypeError"}
    assert ask(page, f"{call}/stop") == {"error": "TypeError"}
    assert page.evaluate(FOLLOW, [call, False]) is None

    # The browser's word is not all: the broker itself did none of it.
    with urllib.request.urlopen(f"{oneinbox}/_emulator/calls", timeout=20) as answer:
        assert len(json.load(answer)) == calls
    last = urllib.request.Request(call, headers={"X-Request-ID": "after-the-strangers"})
    urllib.request.urlopen(last, timeout=20).close()
    process.wait_for("after-the-strangers")
    assert [record.get("problem") for record in process.records[before:]] == [*["forbidden-origin"] * 6, None]


def test_any_origin_without_credentials(
    stranger: str, settings: dict[str, str], tmp_path: Path, open_page: OpenPage
) -> None:
    with serving(tmp_path, {**settings, "BROKER_ALLOWED_ORIGINS": "*"}) as (_, broker):
        page = open_page(stranger, complaints_expected=REFUSED)

        answer = ask(page, f"{broker}/session", {})
        with_cookies = ask(page, f"{broker}/session", {}, credentials="include")

        assert answer["status"] == 201
        assert answer["headers"]["location"].startswith("/calls/")
        assert with_cookies == {"error": "TypeError"}  # no Access-Control-Allow-Credentials
        # A sandboxed frame's origin is `null`, which no wildcard means.
        refused = page.evaluate(
            """url => new Promise((resolve) => {
              addEventListener("message", (event) => resolve(event.data));
              const frame = document.createElement("iframe");
              frame.sandbox = "allow-scripts";
              frame.srcdoc = `<script>fetch("${url}/session", { method: "POST" })
                .then(() => "allowed", (error) => error.name)
                .then((said) => parent.postMessage(said, "*"))<\\/script>`;
              document.body.append(frame);
            })""",
            broker,
        )
        assert refused == "TypeError"


def test_a_cookie_signs_in_from_the_same_site(origin: str, signed_in: tuple[Process, str], open_page: OpenPage) -> None:
    """Another port is another origin, but the same site: even a strict cookie is sent, when the page asks for it."""
    _, broker = signed_in
    page = open_page(origin, complaints_expected=STATUS + "401|MIME type")
    sign_in(page, broker)

    answer = ask(page, f"{broker}/session", {}, credentials="include")
    assert answer["status"] == 201, answer
    call = broker + answer["headers"]["location"]
    seen = page.evaluate(FOLLOW, [call, True])
    assert seen[-1][0] == "completed"

    headers = problem(ask(page, f"{broker}/session", {}), 401, "unauthenticated")
    assert "www-authenticate" not in headers  # not among the exposed ones
    assert page.evaluate(FOLLOW, [call, False]) is None


def test_a_strict_cookie_stays_at_home_on_another_site(
    origin: str, signed_in: tuple[Process, str], open_page: OpenPage
) -> None:
    _, broker = signed_in
    page = open_page(origin.replace("127.0.0.1", "localhost"), complaints_expected=STATUS + "401")
    sign_in(page, broker)

    answer = ask(page, f"{broker}/session", {}, credentials="include")

    problem(answer, 401, "unauthenticated")


def test_a_bearer_token_needs_no_cookie(origin: str, signed_in: tuple[Process, str], open_page: OpenPage) -> None:
    process, broker = signed_in
    page, before = open_page(origin, complaints_expected=STATUS + "401"), len(process.records)

    answer = ask(page, f"{broker}/session", headers={"Authorization": f"Bearer {user_token()}"})

    assert answer["status"] == 201, answer
    assert preflights(process, before, answer) == [204]
    problem(ask(page, f"{broker}/session", headers={"Authorization": "Bearer of-nothing"}), 401, "unauthenticated")
