"""What all answers have in common: ids, headers, errors, pages, prefixes."""

import json
import re
from typing import Any

import httpx
import pytest

from app.problems import KINDS, problem_body
from tests.conftest import Logs, OpenBroker
from tests.support.harness import API_KEY, TOKEN, Upstream, post_session, start_call
from tests.support.shapes import STATUS, assert_problem, assert_safe_headers, assert_session

KEPT = ["a", "abc-DEF_1.2", "0" * 128, "..", "-"]
REPLACED = ["", "a" * 129, "a b", "a\tb", 'a"', "a/b", "ä", "a;b", "a\x7f", "<script>", "%41"]


@pytest.mark.parametrize("given", KEPT)
async def test_a_safe_request_id_is_kept(given: str, broker: httpx.AsyncClient, logs: Logs) -> None:
    for response in (
        await broker.get("/healthz", headers={"X-Request-ID": given}),
        await post_session(broker, x_request_id=given),
        await post_session(broker, b"{", x_request_id=given),
        await broker.get("/nowhere", headers={"X-Request-ID": given}),
    ):
        assert response.headers["x-request-id"] == given
    assert {entry["request_id"] for entry in logs if "request_id" in entry} == {given}


@pytest.mark.parametrize("given", REPLACED)
async def test_an_unsafe_request_id_is_replaced(given: str, broker: httpx.AsyncClient) -> None:
    response = await broker.get("/nowhere", headers={b"X-Request-ID": given.encode("latin-1")})

    assert_problem(response, "not-found")
    assert response.headers["x-request-id"] != given


async def test_request_ids_differ(broker: httpx.AsyncClient) -> None:
    ids = {(await broker.get("/healthz")).headers["x-request-id"] for _ in range(20)}

    assert len(ids) == 20


NOWHERE = {
    "root": ("GET", "/"),
    "other": ("GET", "/nowhere"),
    "slash": ("POST", "/session/"),
    "upper-case": ("POST", "/Session"),
    "double": ("POST", "//session"),
    "redoc": ("GET", "/redoc"),
    "oauth": ("GET", "/docs/oauth2-redirect"),
    "asset": ("GET", "/docs/nothing.js"),
    "asset-up": ("GET", "/docs/..%2f..%2f__init__.py"),
    "problem": ("GET", "/problems/nothing"),
    "problem-up": ("GET", "/problems/%2e%2e"),
}


@pytest.mark.parametrize(("method", "path"), NOWHERE.values(), ids=NOWHERE.keys())
async def test_unknown_paths_are_not_found(method: str, path: str, broker: httpx.AsyncClient) -> None:
    assert_problem(await broker.request(method, path), "not-found")


WRONG_METHODS = {
    "session": ("GET", "/session", "POST, OPTIONS"),
    "session-head": ("HEAD", "/session", "POST, OPTIONS"),
    "call": ("POST", "/calls/a.b", "GET, HEAD, OPTIONS"),
    "events": ("POST", "/calls/a.b/events", "GET, OPTIONS"),
    "health": ("POST", "/healthz", "GET, HEAD, OPTIONS"),
    "problem": ("DELETE", "/problems/not-found", "GET, HEAD, OPTIONS"),
    "docs": ("PUT", "/docs", "GET, HEAD, OPTIONS"),
    "document": ("POST", "/openapi.json", "GET, HEAD, OPTIONS"),
}


@pytest.mark.parametrize(("method", "path", "allowed"), WRONG_METHODS.values(), ids=WRONG_METHODS.keys())
async def test_a_wrong_method_gets_the_allowed_ones(
    method: str, path: str, allowed: str, broker: httpx.AsyncClient
) -> None:
    response = await broker.request(method, path)

    if method == "HEAD":
        assert response.status_code == 405
    else:
        assert_problem(response, "method-not-allowed")
    assert response.headers["allow"] == allowed


async def test_a_bug_is_logged_and_hidden_from_the_browser(
    broker: httpx.AsyncClient, upstream: Upstream, logs: Logs
) -> None:
    upstream.start.mock(side_effect=RuntimeError("MARKER /srv/app/secret.py"))

    response = await post_session(broker, {"variables": {"name": "VALUE"}})

    assert_problem(response, "internal-error")
    assert "MARKER" not in response.text
    assert "Traceback" not in response.text
    assert "RuntimeError" not in response.text
    [error] = [entry for entry in logs if entry["log_level"] == "error"]
    assert error["request_id"] == response.headers["x-request-id"]
    assert error["exc_info"]


async def test_the_broker_works_on_after_a_bug(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    upstream.start.mock(side_effect=RuntimeError())
    await post_session(broker)
    upstream.works_again()

    assert_session(await post_session(broker))


def test_every_problem_is_in_the_contracts_table() -> None:
    assert {slug: kind.status for slug, kind in KINDS.items()}.items() <= STATUS.items()


@pytest.mark.parametrize("slug", KINDS)
async def test_a_problem_is_explained_to_programs(slug: str, broker: httpx.AsyncClient) -> None:
    response = await broker.get(f"/problems/{slug}")

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert_safe_headers(response)
    page = response.json()
    assert page["slug"] == slug
    assert page["status"] == STATUS[slug]
    assert all(page[name] for name in ("title", "meaning", "remedy"))
    assert "`" not in response.text
    assert "`" not in problem_body(slug, "id")["detail"]


@pytest.mark.parametrize("slug", KINDS)
async def test_a_problem_is_explained_to_people(slug: str, broker: httpx.AsyncClient) -> None:
    browsers = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"

    response = await broker.get(f"/problems/{slug}", headers={"Accept": browsers})

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert_safe_headers(response)
    assert "script-src" not in response.headers["content-security-policy"]
    assert "<script" not in response.text
    assert slug in response.text
    assert str(STATUS[slug]) in response.text
    assert "`" not in response.text


async def test_the_type_of_a_problem_is_its_page(broker: httpx.AsyncClient) -> None:
    problem = assert_problem(await post_session(broker, b"{"), "malformed-json")

    page = (await broker.get(problem["type"])).json()

    assert page["title"] == problem["title"]


async def test_health(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    response = await broker.get("/healthz")

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json()["status"] == "ok"
    assert_safe_headers(response)
    assert "ratelimit" not in response.headers
    assert not upstream.requests


PREFIX = "/voice"


@pytest.mark.parametrize("stripped", [True, False], ids=["stripped", "not-stripped"])
async def test_a_prefix(stripped: bool, open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_ROOT_PATH=PREFIX)
    front = "" if stripped else PREFIX

    response = await broker.post(f"{front}/session")

    location = assert_session(response, prefix=PREFIX)
    upstream.has_call("call_1")
    call = await broker.get(front + location.removeprefix(PREFIX))
    assert call.status_code == 200
    assert call.json()["id"] == location.removeprefix(f"{PREFIX}/calls/")
    assert_problem(await broker.get(f"{front}/nowhere"), "not-found", prefix=PREFIX)
    problem = assert_problem(await broker.get(f"{front}/session"), "method-not-allowed", prefix=PREFIX)
    page = await broker.get(front + problem["type"].removeprefix(PREFIX))
    assert page.json()["slug"] == "method-not-allowed"
    document = (await broker.get(f"{front}/openapi.json")).json()
    assert document["servers"] == [{"url": PREFIX}]
    assert "/session" in document["paths"]
    assert_links_work_under(PREFIX, (await broker.get(f"{front}/docs")).text)


@pytest.mark.parametrize("setting", ["/voice/", "/voice"])
async def test_a_slash_at_the_end_of_a_prefix_means_nothing(setting: str, open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_ROOT_PATH=setting)

    assert_session(await broker.post("/session"), prefix=PREFIX)


def assert_links_work_under(prefix: str, page: str) -> None:
    """All links of a page lead to this broker, under its prefix."""
    links = re.findall(r'(?:href|src|data-[a-z]+)="([^"]*)"', page)
    assert links
    for link in links:
        assert link.startswith(f"{prefix}/"), link


async def test_the_explorer_works_without_the_internet(broker: httpx.AsyncClient) -> None:
    page = await broker.get("/docs")

    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert_safe_headers(page)
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "connect-src 'self'" in policy
    assert "http" not in policy
    assert all("unsafe-inline" not in scripts for scripts in re.findall(r"script-src [^;]*", policy))
    assert not re.search(r"<script>|\son[a-z]+=|<style", page.text), "nothing inline, which the policy would stop"
    assert not re.search("https?://", page.text)
    types = {"js": "text/javascript", "css": "text/css", "png": "image/png"}
    links = re.findall(r'(?:href|src)="([^"]*)"', page.text)
    assert len(links) >= 3
    for link in links:
        asset = await broker.get(link)
        assert asset.status_code == 200, link
        assert asset.headers["content-type"].startswith(types[link.rpartition(".")[2]])
        assert asset.content
        assert_safe_headers(asset)
    [document] = re.findall(r'data-document="([^"]*)"', page.text)
    assert (await broker.get(document)).json()["openapi"].startswith("3.")


@pytest.mark.parametrize(
    "given", ["bytes=0-0", "bytes=" + ",".join(f"{at}-{at}" for at in range(0, 200, 2)), "lines=1-2"]
)
@pytest.mark.parametrize("asset", ["swagger-ui.css", "explorer.js"])
async def test_an_asset_of_the_explorer_comes_whole(broker: httpx.AsyncClient, asset: str, given: str) -> None:
    whole = await broker.get(f"/docs/{asset}")

    response = await broker.get(f"/docs/{asset}", headers={"Range": given, "If-Range": whole.headers["etag"]})

    assert response.status_code == 200
    assert response.content == whole.content
    assert response.headers["accept-ranges"] == "none"


async def test_docs_can_be_off(open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_DOCS="false")

    for path in ("/docs", "/openapi.json", "/docs/swagger-ui.css"):
        assert_problem(await broker.get(path), "not-found")
    assert (await broker.get("/healthz")).status_code == 200


async def test_the_document_describes_every_route_and_only_problems_as_errors(broker: httpx.AsyncClient) -> None:
    response = await broker.get("/openapi.json")

    assert_safe_headers(response)
    document = response.json()
    assert {"/session", "/calls/{call}", "/healthz", "/problems/{slug}"} <= document["paths"].keys()
    text = json.dumps(document)
    assert "HTTPValidationError" not in text
    assert API_KEY not in text
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["operationId"], (method, path)
            assert operation["summary"], (method, path)
            for status, answer in operation["responses"].items():
                if int(status) >= 400 and path != "/readyz":
                    assert list(answer["content"]) == ["application/problem+json"], (method, path, status)
    assert_references_resolve(document)


def assert_references_resolve(document: Any) -> None:
    """Every `$ref` of a document leads somewhere."""
    for reference in set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(document))):
        place = document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


async def test_session_answers_what_the_document_says(broker: httpx.AsyncClient) -> None:
    document = (await broker.get("/openapi.json")).json()
    session = document["components"]["schemas"]["Session"]
    described = document["paths"]["/session"]["post"]["responses"]

    assert session["properties"].keys() == {"server_url", "participant_token"}
    for body, status in ((None, 201), (b"{", 400), (b"null", 422)):
        assert (await post_session(broker, body)).status_code == status
        assert str(status) in described


async def test_each_request_is_one_line_of_the_log(broker: httpx.AsyncClient, upstream: Upstream, logs: Logs) -> None:
    path = await start_call(broker)
    upstream.has_call("call_1")
    await broker.get(path, params={"secret": "QUERY"})
    await post_session(broker, {"variables": {"a": "{{VALUE"}})
    await broker.get("/nowhere/PATH")
    await broker.get("/healthz")
    await broker.get("/problems/not-found")
    await broker.get("/docs/explorer.css")

    lines = [entry for entry in logs if entry["event"] == "request"]
    told = [
        (line["method"], line["route"], line["status"], line.get("problem"))
        for line in lines
        if line["log_level"] == "info"
    ]
    assert told == [
        ("POST", "/session", 201, None),
        ("GET", "/calls/{call}", 200, None),
        ("POST", "/session", 422, "invalid-request"),
        ("GET", "unmatched", 404, "not-found"),
    ]
    assert [line["log_level"] for line in lines[-2:]] == ["debug", "debug"]
    assert all(line["ms"] >= 0 and line["request_id"] for line in lines)
    assert lines[0]["call"] == "call_1"
    assert lines[0]["user"]


async def test_the_log_holds_no_secret(broker: httpx.AsyncClient, upstream: Upstream, logs: Logs) -> None:
    path = await start_call(broker)
    upstream.has_call("call_1")
    await broker.get(path)
    await broker.get(f"{path}x")
    upstream.start.respond(401, json={"detail": f"Bad key {API_KEY}"})
    await post_session(broker, {"variables": {"name": "VALUE"}, "metadata": {"m": "VALUE"}})

    for secret in (API_KEY, TOKEN, path.rpartition(".")[2], "VALUE", "203.0.113.7"):
        assert secret not in repr(logs)
