"""Sites that may use the broker from a browser, and the headers they get."""

from typing import Any

import httpx
import pytest

from tests.conftest import OpenBroker
from tests.support.harness import Upstream, post_session, start_call
from tests.support.shapes import assert_problem, assert_session, remaining

APP = "https://app.example"
EXPOSED = {
    "location",
    "date",
    "retry-after",
    "ratelimit",
    "ratelimit-policy",
    "etag",
    "x-request-id",
    "idempotency-replayed",
}
REQUEST_HEADERS = {
    "authorization",
    "content-type",
    "idempotency-key",
    "x-challenge-token",
    "x-request-id",
    "if-none-match",
    "last-event-id",
}


def words(header: str) -> set[str]:
    """The members of a comma-separated header."""
    return {word.strip().lower() for word in header.split(",")}


def assert_readable(response: httpx.Response, origin: str) -> None:
    """A browser lets the script of this origin, and of no other, read the answer."""
    assert response.headers.get_list("access-control-allow-origin") == [origin]
    assert words(response.headers["access-control-expose-headers"]) == EXPOSED
    assert "access-control-allow-credentials" not in response.headers
    assert "origin" in words(response.headers["vary"])


def assert_unreadable(response: httpx.Response) -> None:
    """No script may read the answer."""
    assert not [name for name in response.headers if name.startswith("access-control-")]


ALLOWED: dict[str, tuple[str, str]] = {
    "listed": ("https://app.example", APP),
    "one-of-several": ("https://other.example , https://app.example", APP),
    "default-port-in-the-setting": ("https://app.example:443", APP),
    "upper-case-in-the-setting": ("HTTPS://App.Example", APP),
    "another-port": ("https://app.example:8443", "https://app.example:8443"),
    "http": ("http://intranet.example", "http://intranet.example"),
    "an-app": ("capacitor://localhost", "capacitor://localhost"),
    "another-app": ("TAURI://localhost,ionic://localhost", "tauri://localhost"),
    "an-extension": ("chrome-extension://abcdefghijklmnopabcdefghijklmnop",) * 2,
    "an-extension-by-uuid": ("moz-extension://7b1d9f7e-0d5c-4b2c-9a35-3f6f0f1a2b3c",) * 2,
    "an-app-with-a-port": ("app://editor.example:80", "app://editor.example:80"),
    "any": ("*", APP),
    "any-among-others": ("https://other.example,*", APP),
    "loopback-port-wildcard": ("http://localhost:*", "http://localhost:5173"),
    "loopback-without-a-port": ("http://localhost:*", "http://localhost"),
    "loopback-address-wildcard": ("http://127.0.0.1:*", "http://127.0.0.1:3000"),
    "loopback-ipv6-wildcard": ("http://[::1]:*", "http://[::1]:3000"),
}


@pytest.mark.parametrize(("allowed", "origin"), ALLOWED.values(), ids=ALLOWED.keys())
async def test_an_allowed_origin_may(allowed: str, origin: str, open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_ALLOWED_ORIGINS=allowed)

    response = await post_session(broker, origin=origin)

    assert_session(response)
    assert_readable(response, origin)


FORBIDDEN: dict[str, tuple[str | None, str]] = {
    "none-is-allowed": (None, APP),
    "another": ("https://app.example", "https://evil.example"),
    "another-scheme": ("https://app.example", "http://app.example"),
    "another-port": ("https://app.example", "https://app.example:8443"),
    "the-host-of-an-app": ("capacitor://localhost", "https://localhost"),
    "another-app": ("capacitor://localhost", "tauri://localhost"),
    "a-subdomain": ("https://app.example", "https://sub.app.example"),
    "a-longer-name": ("https://app.example", "https://app.example.evil.example"),
    "a-name-before": ("https://app.example", "https://evilapp.example"),
    "a-user": ("https://app.example", "https://app.example@evil.example"),
    "a-path": ("https://app.example", "https://app.example/"),
    "a-list": ("https://app.example", "https://app.example https://app.example"),
    "null": ("https://app.example", "null"),
    "null-under-any": ("*", "null"),
    "empty": ("https://app.example", ""),
    "empty-under-any": ("*", ""),
    "the-star-itself": ("https://app.example", "*"),
    "wildcard-of-another-host": ("http://localhost:*", "http://localhost.evil.example:80"),
    "wildcard-with-a-name": ("http://localhost:*", "http://localhost:80@evil.example"),
    "wildcard-with-no-port": ("http://localhost:*", "http://localhost:"),
    "wildcard-with-a-star": ("http://localhost:*", "http://localhost:*"),
    "wildcard-with-another-scheme": ("http://localhost:*", "https://localhost:3000"),
    "wildcard-with-another-address": ("http://localhost:*", "http://127.0.0.1:3000"),
    "the-brokers-host-which-is-not-loopback": (None, "https://broker.example"),
}


@pytest.mark.parametrize(("allowed", "origin"), FORBIDDEN.values(), ids=FORBIDDEN.keys())
async def test_any_other_origin_may_not(
    allowed: str | None, origin: str, open_broker: OpenBroker, upstream: Upstream
) -> None:
    broker = await open_broker({} if allowed is None else {"BROKER_ALLOWED_ORIGINS": allowed})

    response = await post_session(broker, origin=origin)

    assert_problem(response, "forbidden-origin")
    assert_unreadable(response)
    assert not upstream.requests
    assert remaining(await post_session(broker)) == 4


async def test_a_port_that_is_no_number_is_no_port(open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_ALLOWED_ORIGINS="http://localhost:*")

    for port in (b"\xb2", b"\xb9", b"3000\xa0"):
        response = await broker.post("/session", headers=[(b"origin", b"http://localhost:" + port)])

        assert_problem(response, "forbidden-origin")


@pytest.mark.parametrize("second", [APP, "https://evil.example"])
async def test_two_origins_are_one_too_many(second: str, open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_ALLOWED_ORIGINS=APP)

    response = await broker.post("/session", headers=[("Origin", APP), ("Origin", second)])

    assert_problem(response, "forbidden-origin")
    assert not upstream.requests


OWN: dict[str, tuple[str | None, str, str, bool]] = {
    "public-url": ("https://voice.example", "https://voice.example", "10.0.0.1:8000", True),
    "public-url-with-a-prefix": ("https://voice.example/broker/", "https://voice.example", "10.0.0.1:8000", True),
    "public-url-with-the-default-port": ("https://voice.example:443", "https://voice.example", "x.example", True),
    "public-url-is-not-the-host": ("https://voice.example", "https://10.0.0.1:8000", "10.0.0.1:8000", False),
    "public-url-makes-loopback-foreign": ("https://voice.example", "http://localhost:8000", "localhost:8000", False),
    "loopback": (None, "http://localhost:8000", "localhost:8000", True),
    "loopback-address": (None, "http://127.0.0.1:8000", "127.0.0.1:8000", True),
    "loopback-ipv6": (None, "http://[::1]:8000", "[::1]:8000", True),
    "another-loopback-port": (None, "http://localhost:3000", "localhost:8000", False),
    "another-loopback-name": (None, "http://localhost:8000", "127.0.0.1:8000", False),
    "a-host-that-says-so": (None, "https://evil.example", "evil.example", False),
    "a-host-that-looks-so": (None, "http://localhost.evil.example", "localhost.evil.example", False),
    "a-user-that-looks-so": (None, "http://localhost@evil.example", "localhost@evil.example", False),
    "another-scheme": (None, "ftp://localhost:8000", "localhost:8000", False),
    "a-broken-address": (None, "http://[::1", "[::1", False),
}


@pytest.mark.parametrize(("public_url", "origin", "host", "admitted"), OWN.values(), ids=OWN.keys())
async def test_the_brokers_own_origin(
    public_url: str | None, origin: str, host: str, admitted: bool, open_broker: OpenBroker
) -> None:
    broker = await open_broker({} if public_url is None else {"BROKER_PUBLIC_URL": public_url})

    response = await post_session(broker, origin=origin, host=host)

    if admitted:
        assert_session(response)
        assert_readable(response, origin)
    else:
        assert_problem(response, "forbidden-origin")


ROUTES = {
    "session": ("POST", "/session"),
    "call": ("GET", "/calls/call_1.key"),
    "health": ("GET", "/healthz"),
    "readiness": ("GET", "/readyz"),
    "docs": ("GET", "/docs"),
    "document": ("GET", "/openapi.json"),
    "problem": ("GET", "/problems/not-found"),
    "nowhere": ("GET", "/nowhere"),
    "wrong-method": ("DELETE", "/session"),
    "head": ("HEAD", "/healthz"),
    "options": ("OPTIONS", "/session"),
}


@pytest.mark.parametrize(("method", "path"), ROUTES.values(), ids=ROUTES.keys())
async def test_a_foreign_origin_gets_nowhere(method: str, path: str, open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_ALLOWED_ORIGINS=APP)

    response = await broker.request(method, path, headers={"Origin": "https://evil.example"})

    assert response.status_code == 403
    assert_unreadable(response)


@pytest.mark.parametrize(("method", "path"), ROUTES.values(), ids=ROUTES.keys())
async def test_every_answer_to_an_allowed_origin_is_readable(method: str, path: str, open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_ALLOWED_ORIGINS=APP)

    assert_readable(await broker.request(method, path, headers={"Origin": APP}), APP)


async def test_errors_are_readable(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_ALLOWED_ORIGINS=APP, BROKER_SESSION_LIMITS="1/minute")
    path = await start_call(broker)
    upstream.has_call("call_1")
    etag = (await broker.get(path)).headers["etag"]

    answers: dict[int, httpx.Response] = {
        400: await post_session(broker, b"{", origin=APP),
        403: await post_session(broker, {"agent": "nobody"}, origin=APP),
        404: await broker.get("/nowhere", headers={"Origin": APP}),
        405: await broker.put("/session", headers={"Origin": APP}),
        413: await post_session(broker, b" " * 20_000, origin=APP),
        415: await broker.post("/session", content=b"{}", headers={"Origin": APP, "Content-Type": "text/plain"}),
        422: await post_session(broker, b"null", origin=APP),
        429: await post_session(broker, origin=APP),
        304: await broker.get(path, headers={"Origin": APP, "If-None-Match": etag}),
    }

    for status, response in answers.items():
        assert response.status_code == status
        assert_readable(response, APP)


async def test_upstream_failures_and_bugs_are_readable(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_ALLOWED_ORIGINS=APP)
    failures: list[tuple[Any, int]] = [
        (httpx.ReadTimeout(""), 504),
        (httpx.ConnectError(""), 502),
        (RuntimeError(), 500),
    ]

    for failure, status in failures:
        upstream.start.mock(side_effect=failure)
        response = await post_session(broker, origin=APP)
        assert response.status_code == status
        assert_readable(response, APP)


async def test_no_origin_is_no_browser_of_another_site(broker: httpx.AsyncClient) -> None:
    response = await post_session(broker)

    assert_session(response)
    assert_unreadable(response)
    assert "origin" in words(response.headers["vary"])


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-anything"}


@pytest.mark.parametrize("path", ["/session", "/calls/a.b", "/healthz"])
async def test_a_preflight_says_what_may_be_sent(path: str, open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_ALLOWED_ORIGINS=APP, BROKER_REQUIRE_ORIGIN="true")

    response = await broker.options(path, headers={"Origin": APP, **PREFLIGHT})

    assert response.status_code in (200, 204)
    assert response.content == b""
    assert response.headers.get_list("access-control-allow-origin") == [APP]
    assert {"get", "post"} <= words(response.headers["access-control-allow-methods"])
    assert words(response.headers["access-control-allow-headers"]) == REQUEST_HEADERS
    assert int(response.headers["access-control-max-age"]) > 0
    assert "origin" in words(response.headers["vary"])
    assert not upstream.requests
    assert "ratelimit" not in response.headers
    assert remaining(await post_session(broker, origin=APP)) == 4


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
async def test_a_preflight_of_another_site_is_refused(origin: str, open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_ALLOWED_ORIGINS=APP)

    response = await broker.options("/session", headers={"Origin": origin, **PREFLIGHT})

    assert_problem(response, "forbidden-origin")
    assert_unreadable(response)


async def test_a_required_origin(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_ALLOWED_ORIGINS=APP, BROKER_REQUIRE_ORIGIN="true")

    assert_problem(await post_session(broker), "forbidden-origin")
    assert not upstream.requests
    path = assert_session(await post_session(broker, origin=APP))

    # Only starting a call is refused.
    upstream.has_call("call_1")
    assert (await broker.get(path)).status_code == 200
    assert (await broker.get("/healthz")).status_code == 200
    assert_problem(await broker.post("/nowhere"), "not-found")


async def test_a_required_origin_behind_a_prefix(open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_ROOT_PATH="/voice", BROKER_REQUIRE_ORIGIN="true")

    for path in ("/session", "/voice/session"):
        assert_problem(await broker.post(path), "forbidden-origin", prefix="/voice")
