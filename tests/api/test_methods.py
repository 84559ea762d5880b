"""HEAD and OPTIONS, for load balancers and monitoring (RFC 9110, section 9)."""

import httpx
import pytest

from tests.conftest import Logs, OpenBroker
from tests.documents import document
from tests.support.harness import Upstream, start_call
from tests.support.shapes import assert_problem, assert_safe_headers

TOKEN = "a-token-of-metrics"
UNDOCUMENTED = ["/docs", "/openapi.json", "/docs/swagger-ui.css", "/docs/explorer.js"]
OF_THIS_ANSWER = ("x-request-id", "ratelimit", "date")


def with_method(method: str) -> list[str]:
    """The documented routes that take a method."""
    return [path for path, operations in document()["paths"].items() if method in operations]


@pytest.fixture
async def path_of(broker: httpx.AsyncClient, upstream: Upstream) -> dict[str, str]:
    """What to put into a route's path."""
    call = (await start_call(broker)).removeprefix("/calls/")
    upstream.has_call("call_1")
    return {"{call}": call, "{slug}": "not-found", "{secret}": "x" * 22}


def fill(route: str, path_of: dict[str, str]) -> str:
    for name, value in path_of.items():
        route = route.replace(name, value)
    return route


@pytest.mark.parametrize("route", [*(each for each in with_method("get") if "events" not in each), *UNDOCUMENTED])
async def test_head_is_answered_like_get(route: str, broker: httpx.AsyncClient, path_of: dict[str, str]) -> None:
    path = fill(route, path_of)

    get, head = await broker.get(path), await broker.head(path)

    assert head.status_code == get.status_code
    assert {name: value for name, value in head.headers.items() if name not in OF_THIS_ANSWER} == {
        name: value for name, value in get.headers.items() if name not in OF_THIS_ANSWER
    }
    assert_safe_headers(head)


@pytest.mark.parametrize("given", ["", "a-token-of-metric", TOKEN])
async def test_head_opens_nothing_that_get_does_not(open_broker: OpenBroker, given: str) -> None:
    broker = await open_broker(BROKER_METRICS_TOKEN=TOKEN)

    response = await broker.head("/metrics", headers={"Authorization": f"Bearer {given}"})

    assert response.status_code == (200 if given == TOKEN else 401)


async def test_head_of_an_unchanged_call(broker: httpx.AsyncClient, path_of: dict[str, str]) -> None:
    path = fill("/calls/{call}", path_of)
    etag = (await broker.head(path)).headers["etag"]

    assert (await broker.head(path, headers={"If-None-Match": etag})).status_code == 304


async def test_head_opens_no_stream(broker: httpx.AsyncClient, path_of: dict[str, str]) -> None:
    response = await broker.head(fill("/calls/{call}/events", path_of))

    assert response.status_code == 405
    assert response.headers["allow"] == "GET, OPTIONS"


@pytest.mark.parametrize(("path", "route"), [("/healthz", "/healthz"), ("/calls/x.y", "/calls/{call}")])
async def test_head_is_counted_and_logged_as_head_of_its_route(
    broker: httpx.AsyncClient, logs: Logs, path: str, route: str
) -> None:
    await broker.head(path)

    [line] = [entry for entry in logs if entry["event"] == "request"]
    assert (line["method"], line["route"]) == ("HEAD", route)


ALLOWED = {
    **dict.fromkeys([*with_method("get"), *UNDOCUMENTED], "GET, HEAD, OPTIONS"),
    **dict.fromkeys(with_method("post"), "POST, OPTIONS"),
    "/calls/{call}/events": "GET, OPTIONS",
    "/": "GET, HEAD, POST, OPTIONS",  # the whole server's: HAProxy asks for `/` unless told otherwise
}


@pytest.mark.parametrize("route", ALLOWED)
async def test_options_names_the_methods(
    route: str, broker: httpx.AsyncClient, path_of: dict[str, str], upstream: Upstream
) -> None:
    asked = len(upstream.requests)

    response = await broker.options(fill(route, path_of))

    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["allow"] == ALLOWED[route]
    if not route.startswith("/webhooks/"):  # they are not for browsers
        assert_safe_headers(response)
    assert "ratelimit" not in response.headers  # it cost nothing
    assert len(upstream.requests) == asked


@pytest.mark.parametrize("mode", ["anonymous", "jwt", "header"])
async def test_options_needs_no_login(open_broker: OpenBroker, mode: str) -> None:
    login = {
        "anonymous": {},
        "jwt": {"BROKER_JWT_SECRET": "s" * 32},
        "header": {"BROKER_TRUSTED_PROXIES": "10.0.0.0/8"},
    }
    broker = await open_broker({"BROKER_AUTH": mode, "BROKER_REQUIRE_ORIGIN": "true", **login[mode]})

    for path in ("/session", "/calls", "/healthz"):
        assert (await broker.options(path)).status_code == 204


@pytest.mark.parametrize("path", ["/nowhere", "/session/", "/v1/calls"])
async def test_options_of_what_does_not_exist(broker: httpx.AsyncClient, path: str) -> None:
    assert_problem(await broker.options(path), "not-found")


@pytest.mark.parametrize("path", ["/voice", "/voice/", "/"])
async def test_options_behind_a_prefix(open_broker: OpenBroker, path: str) -> None:
    broker = await open_broker(BROKER_ROOT_PATH="/voice")

    assert (await broker.options(path)).status_code == 204
