"""CORS in a real browser: what a page of another origin may send and read, and which origins are refused."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from playwright.sync_api import Page

from tests.e2e.conftest import OpenPage, control, running_broker, running_site
from tests.support.processes import Process

pytestmark = pytest.mark.browser

SECRET = "origins_c4b1f08a6d2e4b7c9a5e3f10"
COOKIE = "who"
STATUS = r"Failed to load resource: the server responded with a status of "
REFUSED = r"blocked by CORS policy|net::ERR_FAILED"
SETTINGS = {"BROKER_SESSION_LIMITS": "100/minute", "BROKER_ALLOWED_VARIABLES": "plan"}

# Sends a request; returns everything that the browser shows a page of another origin.
ASK = """async ([url, options]) => {
  try {
    const answer = await fetch(url, options);
    return { status: answer.status, headers: Object.fromEntries(answer.headers), body: await answer.text() };
  } catch (error) {
    return { error: error.name };
  }
}"""
# Hangs up at a call's first event; returns all events, or null if EventSource gives up.
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a site with a blank page."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "index.html").write_text('<!doctype html><title>A page</title><link rel="icon" href="data:,">')
    return folder


@pytest.fixture(scope="module")
def origin(site: Path) -> Iterator[str]:
    """An origin that the brokers allow."""
    with running_site(site) as url:
        yield url


@pytest.fixture(scope="module")
def stranger(site: Path) -> Iterator[str]:
    """An origin that the brokers do not allow."""
    with running_site(site) as url:
        yield url


@pytest.fixture(scope="module")
def anonymous(oneinbox: str, origin: str) -> Iterator[tuple[Process, str]]:
    """A broker that asks for no token."""
    with running_broker(oneinbox, **SETTINGS, BROKER_ALLOWED_ORIGINS=origin) as served:
        yield served


@pytest.fixture(scope="module")
def signed_in(oneinbox: str, origin: str) -> Iterator[tuple[Process, str]]:
    """A broker whose users send a token, in a cookie or a header."""
    own = {
        "BROKER_AUTH": "jwt",
        "BROKER_JWT_SECRET": SECRET,
        "BROKER_JWT_COOKIE": COOKIE,
        "BROKER_ALLOWED_ORIGINS": f"{origin},{origin.replace('127.0.0.1', 'localhost')}",
    }
    with running_broker(oneinbox, **SETTINGS, **own) as served:
        yield served


def user_token() -> str:
    """Return the token of a signed-in user."""
    return jwt.encode({"sub": "ada", "exp": int(time.time()) + 600}, SECRET, algorithm="HS256")


def sign_in(page: Page, broker: str) -> None:
    """Set the cookie that a login on the broker's host would set."""
    page.context.add_cookies(
        [{"name": COOKIE, "value": user_token(), "url": broker, "httpOnly": True, "sameSite": "Strict"}]
    )


def ask(page: Page, url: str, body: Any = None, **options: Any) -> Any:
    """Call `fetch` on the page, with POST by default; return what the page sees of the answer."""
    if body is not None:
        options["body"] = json.dumps(body)
        options["headers"] = {"Content-Type": "application/json", **options.get("headers", {})}
    return page.evaluate(ASK, [url, {"method": "POST", **options}])


def problem(answer: Any, status: int, slug: str) -> dict[str, str]:
    """Check that the page can read an error; return its headers."""
    assert answer["status"] == status, answer
    body = json.loads(answer["body"])
    assert body["type"] == f"/problems/{slug}"
    headers: dict[str, str] = answer["headers"]
    assert headers["x-request-id"] == body["request_id"]
    return headers


def preflights(process: Process, since: int, answer: Any) -> list[int]:
    """Return the statuses of the OPTIONS requests logged after the first `since` lines, up to this answer's."""
    process.wait_for(answer["headers"]["x-request-id"])
    return [record["status"] for record in process.records[since:] if record.get("method") == "OPTIONS"]


def test_page_reads_every_exposed_header(origin: str, anonymous: tuple[Process, str], open_page: OpenPage) -> None:
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
    assert preflights(process, before, answer) == [204]  # a JSON body needs a preflight

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


def test_simple_request_sends_no_preflight(origin: str, anonymous: tuple[Process, str], open_page: OpenPage) -> None:
    process, broker = anonymous
    page, before = open_page(origin), len(process.records)

    answer = ask(page, f"{broker}/session")

    assert answer["status"] == 201
    assert preflights(process, before, answer) == []


def test_page_reads_errors(origin: str, anonymous: tuple[Process, str], open_page: OpenPage) -> None:
    _, broker = anonymous
    page = open_page(origin, complaints_expected=STATUS + "4..")
    url, key = f"{broker}/session", {"Idempotency-Key": "another-key-altogether"}

    problem(ask(page, url, {"variables": {"rank": "1"}}), 403, "variable-not-allowed")
    problem(ask(page, url, {"colour": "green"}), 422, "invalid-request")
    problem(ask(page, url, body=None, headers={"Content-Type": "text/plain"}), 415, "unsupported-media-type")
    problem(ask(page, f"{broker}/calls/nobody", method="GET"), 404, "not-found")
    assert ask(page, url, {}, headers=key)["status"] == 201
    problem(ask(page, url, {"variables": {"plan": "gold"}}, headers=key), 422, "idempotency-mismatch")


def test_page_reads_retry_after_when_oneinbox_is_busy(origin: str, oneinbox: str, open_page: OpenPage) -> None:
    fault = {"kind": "status", "operation": "start", "status": 429, "retry_after": 1, "times": 1}
    control(oneinbox, "faults", [fault])
    # Not the shared broker, whose circuit breaker would then refuse other tests.
    with running_broker(oneinbox, **SETTINGS, BROKER_ALLOWED_ORIGINS=origin) as (_, broker):
        page = open_page(origin, complaints_expected=STATUS + "503")

        headers = problem(ask(page, f"{broker}/session"), 503, "upstream-busy")

        assert headers["retry-after"] == "1"


def test_page_reads_when_to_try_again(origin: str, oneinbox: str, open_page: OpenPage) -> None:
    own = {"BROKER_ALLOWED_ORIGINS": origin, "BROKER_SESSION_LIMITS": "1/hour"}
    with running_broker(oneinbox, **own) as (_, broker):
        page = open_page(origin, complaints_expected=STATUS + "429")
        assert ask(page, f"{broker}/session")["status"] == 201

        headers = problem(ask(page, f"{broker}/session"), 429, "rate-limited")

        assert 3500 < int(headers["retry-after"]) <= 3600
        assert headers["ratelimit-policy"] == '"user-hour";q=1;w=3600'
        assert headers["ratelimit"].startswith('"user-hour";r=0;t=')


def test_page_follows_a_call_without_credentials(
    origin: str, anonymous: tuple[Process, str], open_page: OpenPage
) -> None:
    _, broker = anonymous
    page = open_page(origin)
    call = broker + ask(page, f"{broker}/session")["headers"]["location"]

    seen = page.evaluate(FOLLOW, [call, False])

    assert seen[0][0] in ("queued", "initiated", "in_progress")
    assert seen[-1][0] == "completed"
    assert all(last for _, last in seen)


def test_forbidden_origin_is_refused(
    origin: str, stranger: str, anonymous: tuple[Process, str], oneinbox: str, open_page: OpenPage
) -> None:
    process, broker = anonymous
    call = broker + ask(open_page(origin), f"{broker}/session")["headers"]["location"]
    page, before = open_page(stranger, complaints_expected=f"{REFUSED}|{STATUS}403"), len(process.records)

    calls = len(control(oneinbox, "calls"))
    assert ask(page, f"{broker}/session", {}) == {"error": "TypeError"}
    assert ask(page, f"{broker}/session") == {"error": "TypeError"}
    assert ask(page, f"{broker}/session", mode="no-cors")["status"] == 0  # opaque: nothing to read
    assert ask(page, call, method="GET") == {"error": "TypeError"}
    assert ask(page, f"{call}/stop") == {"error": "TypeError"}
    assert page.evaluate(FOLLOW, [call, False]) is None

    # Not only did the browser hide the answers: the broker refused the requests.
    assert len(control(oneinbox, "calls")) == calls
    httpx.get(call, headers={"X-Request-ID": "after-the-strangers"}, timeout=20)
    process.wait_for("after-the-strangers")
    assert [record.get("problem") for record in process.records[before:]] == [*["forbidden-origin"] * 6, None]


def test_wildcard_origin_excludes_credentials(stranger: str, oneinbox: str, open_page: OpenPage) -> None:
    with running_broker(oneinbox, BROKER_ALLOWED_ORIGINS="*") as (_, broker):
        page = open_page(stranger, complaints_expected=REFUSED)

        answer = ask(page, f"{broker}/session", {})
        with_cookies = ask(page, f"{broker}/session", {}, credentials="include")

        assert answer["status"] == 201
        assert answer["headers"]["location"].startswith("/calls/")
        assert with_cookies == {"error": "TypeError"}  # no Access-Control-Allow-Credentials
        # A sandboxed frame's origin is `null`, which the wildcard does not cover.
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


def test_cookie_signs_in_from_the_same_site(origin: str, signed_in: tuple[Process, str], open_page: OpenPage) -> None:
    """Another port is another origin but the same site: with `credentials`, even a strict cookie is sent."""
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


def test_strict_cookie_is_not_sent_from_another_site(
    origin: str, signed_in: tuple[Process, str], open_page: OpenPage
) -> None:
    _, broker = signed_in
    page = open_page(origin.replace("127.0.0.1", "localhost"), complaints_expected=STATUS + "401")
    sign_in(page, broker)

    answer = ask(page, f"{broker}/session", {}, credentials="include")

    problem(answer, 401, "unauthenticated")


def test_bearer_token_needs_no_cookie(origin: str, signed_in: tuple[Process, str], open_page: OpenPage) -> None:
    process, broker = signed_in
    page, before = open_page(origin, complaints_expected=STATUS + "401"), len(process.records)

    answer = ask(page, f"{broker}/session", headers={"Authorization": f"Bearer {user_token()}"})

    assert answer["status"] == 201, answer
    assert preflights(process, before, answer) == [204]
    problem(ask(page, f"{broker}/session", headers={"Authorization": "Bearer of-nothing"}), 401, "unauthenticated")
