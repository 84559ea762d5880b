"""A walk through OWASP's API Security Top 10 of 2023: one test or more for each item.

https://owasp.org/API-Security/editions/2023/en/0x11-t10/. Each test is the item's own scenario, from outside; the
tests of the parts go into the corners.
"""

import asyncio
import json
from typing import Any

import httpx
import jwt
import pytest
import respx

from app.config.loading import secret_lines
from tests.conftest import Logs, OpenBroker
from tests.support.harness import AGENT_ID, API_KEY, ONEINBOX, TOKEN, Upstream, post_session, settings, started
from tests.support.shapes import assert_problem, assert_safe_headers, assert_session

SECRET = "a secret shared with the issuer, long enough"
SIGNED_IN: dict[str, Any] = {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": SECRET}
APP = "https://app.example"


def login(user: str, **claims: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {jwt.encode({'sub': user, 'exp': 4_000_000_000, **claims}, SECRET, 'HS256')}"}


# --- API1:2023 Broken object level authorization ---


async def test_api1_a_call_is_shown_to_its_owner_only(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(**SIGNED_IN)
    path = (await broker.post("/session", headers=login("ann"))).headers["location"]
    upstream.has_call("call_1", metadata=upstream.asked["metadata"])

    stranger = assert_problem(await broker.get(path, headers=login("ben")), "not-found")

    upstream.router.get("/v1/calls/call_9").respond(404)
    nothing = assert_problem(await broker.get("/calls/call_9", headers=login("ben")), "not-found")
    for answer in (stranger, nothing):
        del answer["request_id"]
    assert stranger == nothing, "not even that it exists"
    assert (await broker.get(path, headers=login("ann"))).status_code == 200


async def test_api1_an_id_alone_opens_nothing_without_a_login(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = assert_session(await post_session(broker))
    upstream.has_call("call_1", metadata=upstream.asked["metadata"])
    call, key = path.removeprefix("/calls/").split(".")
    asked = len(upstream.requests)
    for guess in (
        call,
        f"{call}.",
        f"{call}.{key[::-1]}",
        f"{call}.{key[:-1]}",
        f"call_2.{key}",
        f"{call}.{key}.{key}",
    ):
        assert_problem(await broker.get(f"/calls/{guess}"), "not-found")
    assert len(upstream.requests) == asked, "OneInbox is not even asked"


@pytest.mark.parametrize("call", ["..", "%2e%2e", "call_1%2fstop", "call_1/../../agents", "call_1%00", "a b", "*"])
async def test_api1_an_id_leads_to_calls_and_nowhere_else(
    open_broker: OpenBroker, upstream: Upstream, call: str
) -> None:
    broker = await open_broker(**SIGNED_IN)
    assert (await broker.get(f"/calls/{call}", headers=login("ann"))).status_code in (404, 405)
    assert not upstream.requests


# --- API2:2023 Broken authentication ---


async def test_api2_a_forged_login_is_refused_alike_everywhere(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(**SIGNED_IN)
    head, _, signature = login("ann")["Authorization"].removeprefix("Bearer ").split(".")
    another = login("admin")["Authorization"].removeprefix("Bearer ").split(".")[1]
    for forged in (f"{head}.{another}.{signature}", f"{head}.{another}.", "x"):
        for method, path in (("POST", "/session"), ("GET", "/calls/call_1")):
            response = await broker.request(method, path, headers={"Authorization": f"Bearer {forged}"})
            assert_problem(response, "unauthenticated")
    assert not upstream.requests


async def test_api2_guessing_is_slowed_and_locks_no_user_out(open_broker: OpenBroker) -> None:
    broker = await open_broker(**SIGNED_IN)
    statuses = [(await broker.get("/calls/x", headers={"Authorization": f"Bearer {n}"})).status_code for n in range(70)]
    assert statuses == [401] * 60 + [429] * 10
    assert (await broker.post("/session", headers=login("ann"))).status_code == 201


async def test_api2_a_login_ends(open_broker: OpenBroker) -> None:
    broker = await open_broker(**SIGNED_IN)
    assert_problem(await broker.post("/session", headers=login("ann", exp=1_700_000_000)), "unauthenticated")
    endless = jwt.encode({"sub": "ann"}, SECRET, "HS256")
    assert_problem(await broker.post("/session", headers={"Authorization": f"Bearer {endless}"}), "unauthenticated")


# --- API3:2023 Broken object property level authorization ---


async def test_api3_a_new_call_shows_two_fields_whatever_oneinbox_adds(
    broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    more = {"api_key": API_KEY, "cost_cents": 12, "room_name": "r", "agent": {"system_prompt": "secret"}}
    upstream.start.respond(201, json=started(**more))
    assert (await post_session(broker)).json().keys() == {"server_url", "participant_token"}


async def test_api3_a_call_shows_the_listed_fields_and_no_others(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = assert_session(await post_session(broker))
    more = {"transcript": "user: hi", "variables": {"card": "4111"}, "credits_used": 3, "metadata": {"a": "b"}}
    upstream.has_call("call_1", **more, something_new={"secret": 1})
    call = (await broker.get(path)).json()
    assert call.keys() == {
        *("id", "agent", "status", "created_at", "started_at", "ended_at", "duration_seconds", "end_reason"),
        *("ends_at", "stopped_because"),
    }


MASS_ASSIGNMENTS: dict[str, tuple[Any, str]] = {
    "owner": ({"metadata": {"broker_user": "ann"}}, "invalid-request"),
    "request-id": ({"metadata": {"broker_request_id": "0"}}, "invalid-request"),
    "unknown-field": ({"status": "completed"}, "invalid-request"),
    "prototype": ({"__proto__": {"agent": "x"}}, "invalid-request"),
    "price": ({"variables": {"a": {"cost": 0}}}, "invalid-request"),
    "prompt": ({"overrides": {"llm": {"system_prompt": "obey"}}}, "override-not-allowed"),
    "whole-branch": ({"overrides": {"llm": {}}}, "override-not-allowed"),
    "room": ({"room_name": "of-somebody-else"}, "invalid-request"),
    "agent": ({"agent_id": "agt_of_somebody_else"}, "agent-not-allowed"),
}


@pytest.mark.parametrize(("body", "slug"), MASS_ASSIGNMENTS.values(), ids=MASS_ASSIGNMENTS.keys())
async def test_api3_a_browser_sets_what_it_may_and_nothing_else(
    broker: httpx.AsyncClient, upstream: Upstream, body: Any, slug: str
) -> None:
    assert_problem(await post_session(broker, body), slug)
    assert not upstream.requests


# --- API4:2023 Unrestricted resource consumption ---


async def test_api4_sessions_are_bounded_however_many_ask(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_SESSION_LIMITS="5/minute")
    responses = await asyncio.gather(*(post_session(broker) for _ in range(200)))
    assert sorted(response.status_code for response in responses) == [201] * 5 + [429] * 195
    assert upstream.start.call_count == 5


async def test_api4_live_calls_are_bounded(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_MAX_LIVE_CALLS="2", BROKER_SESSION_LIMITS="1000/minute")
    for number in (1, 2):
        upstream.has_call(f"call_{number}")
    responses = await asyncio.gather(*(post_session(broker) for _ in range(50)))
    assert sorted(response.status_code for response in responses) == [201] * 2 + [429] * 48
    assert upstream.start.call_count == 2


async def test_api4_bodies_are_bounded(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1024

    assert_problem(await post_session(broker, b" " * 16_385), "body-too-large")
    chunked = await broker.post("/session", content=chunks(), headers={"Content-Type": "application/json"})
    assert_problem(chunked, "body-too-large")
    assert_problem(await post_session(broker, b'{"metadata":' * 40 + b"1" + b"}" * 40), "malformed-json")
    many = {"variables": {f"v{number}": "" for number in range(33)}}
    assert_problem(await post_session(broker, many), "invalid-request")
    assert not upstream.requests


async def test_api4_waiting_is_bounded(open_broker: OpenBroker, upstream: Upstream) -> None:
    go_on, waiting = asyncio.Event(), 0

    async def start(_: httpx.Request) -> httpx.Response:
        nonlocal waiting
        waiting += 1
        await go_on.wait()
        return httpx.Response(201, json=started())

    upstream.start.mock(side_effect=start)
    broker = await open_broker(BROKER_MAX_WAITING="3", BROKER_SESSION_LIMITS="1000/minute")
    asking = [asyncio.create_task(post_session(broker)) for _ in range(3)]
    async with asyncio.timeout(5):
        while waiting < 3:
            await asyncio.sleep(0.01)  # until all three are under way, within the bound above
    assert_problem(await post_session(broker), "at-capacity")
    go_on.set()
    assert [response.status_code for response in await asyncio.gather(*asking)] == [201] * 3
    # Who has been answered waits no more, whatever the answer was.
    upstream.start.respond(500)
    for _ in range(5):
        assert_problem(await post_session(broker), "upstream-error")


# --- API5:2023 Broken function level authorization ---


@pytest.mark.parametrize(
    "path", ["/pause", "/resume", "/block", "/status", "/admin", "/v1/calls", "/v1/calls/web", "/_emulator/calls"]
)
async def test_api5_operators_work_has_no_route(open_broker: OpenBroker, upstream: Upstream, path: str) -> None:
    broker = await open_broker(**SIGNED_IN)
    for method in ("GET", "POST", "DELETE"):
        response = await broker.request(method, path, headers=login("ann", role="admin", admin=True))
        assert_problem(response, "not-found")
    assert not upstream.requests


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "POST", "TRACE", "PROPFIND"])
async def test_api5_reading_changes_nothing(broker: httpx.AsyncClient, upstream: Upstream, method: str) -> None:
    path = assert_session(await post_session(broker))
    for headers in ({}, {"X-HTTP-Method-Override": "GET"}):
        assert_problem(await broker.request(method, path, headers=headers), "method-not-allowed")
    assert len(upstream.requests) == 1


async def test_api5_an_agent_for_some_is_not_for_all(
    open_broker: OpenBroker, upstream: Upstream, tmp_path: Any
) -> None:
    agents = tmp_path / "agents.toml"
    agents.write_text('[agents.pro]\nagent_id = "agt_pro"\nrequire_claims = { plan = ["pro"] }\n')
    broker = await open_broker(**SIGNED_IN, ONEINBOX_AGENT_ID="", BROKER_AGENTS_FILE=str(agents))
    for body in ({"agent": "pro"}, {"agent_id": "agt_pro"}):
        assert_problem(
            await post_session(broker, body, authorization=login("ann")["Authorization"]), "agent-not-allowed"
        )
    assert not upstream.requests


# --- API6:2023 Unrestricted access to sensitive business flows ---


async def test_api6_starting_calls_can_require_a_challenge(open_broker: OpenBroker, upstream: Upstream) -> None:
    url = "https://verify.example/siteverify"
    verify = upstream.router.post(url).respond(json={"success": False})
    broker = await open_broker(BROKER_CHALLENGE_SECRET="a-secret", BROKER_CHALLENGE_VERIFY_URL=url)
    assert_problem(await post_session(broker), "challenge-failed")
    assert_problem(await post_session(broker, x_challenge_token="guessed"), "challenge-failed")
    assert not upstream.start.called
    verify.respond(json={"success": True})
    assert_session(await post_session(broker, x_challenge_token="solved"))


async def test_api6_all_users_together_are_limited_too(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_GLOBAL_SESSION_LIMITS="10/minute", BROKER_TRUSTED_PROXIES="203.0.113.0/24")
    responses = [await post_session(broker, x_forwarded_for=f"192.0.2.{number}") for number in range(20)]
    assert [response.status_code for response in responses] == [201] * 10 + [503] * 10
    for refused in responses[10:]:
        assert_problem(refused, "at-capacity")
    assert upstream.start.call_count == 10


async def test_api6_another_site_cannot_make_a_visitor_call(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_ALLOWED_ORIGINS=APP)
    for origin in ("https://evil.example", "null", f"{APP}.evil.example", "http://app.example"):
        response = await post_session(broker, origin=origin)
        assert_problem(response, "forbidden-origin")
        assert "access-control-allow-origin" not in response.headers
    form = await broker.post("/session", data={"a": "b"})
    assert_problem(form, "unsupported-media-type")
    assert not upstream.requests


# --- API7:2023 Server side request forgery ---

ELSEWHERE = "http://169.254.169.254/latest/meta-data"


async def test_api7_no_input_chooses_where_the_broker_asks(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    texts = {"variables": {"url": ELSEWHERE}, "metadata": {"callback_url": ELSEWHERE, "webhook": ELSEWHERE}}
    headers = {"host": "169.254.169.254", "x_forwarded_host": "evil.example", "forwarded": "host=evil.example"}
    assert_session(await post_session(broker, texts, **headers))
    assert {str(request.url) for request in upstream.requests} == {f"{ONEINBOX}/v1/calls/web"}


async def test_api7_a_redirect_is_not_followed(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    upstream.start.respond(307, headers={"location": ELSEWHERE})
    assert_problem(await post_session(broker), "upstream-error")
    assert len(upstream.requests) == 1


async def test_api7_a_token_does_not_choose_where_its_key_comes_from(
    open_broker: OpenBroker, upstream: Upstream
) -> None:
    broker = await open_broker(**SIGNED_IN)
    headers = {"jku": ELSEWHERE, "x5u": ELSEWHERE}
    forged = jwt.encode({"sub": "ann", "exp": 4_000_000_000}, "x" * 32, "HS256", headers=headers)
    with respx.mock(assert_all_called=False) as everywhere:
        assert_problem(await broker.post("/session", headers={"Authorization": f"Bearer {forged}"}), "unauthenticated")
        assert not everywhere.calls
    assert not upstream.requests


# --- API8:2023 Security misconfiguration ---


@pytest.mark.parametrize("path", ["/session", "/calls/x", "/nowhere", "/healthz", "/readyz", "/openapi.json", "/docs"])
async def test_api8_every_answer_has_its_safe_headers(broker: httpx.AsyncClient, path: str) -> None:
    response = await broker.get(path)
    if path == "/docs":  # a page of ours brings a policy of its own
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    else:
        assert_safe_headers(response)


async def test_api8_a_bug_reveals_nothing(broker: httpx.AsyncClient, upstream: Upstream, logs: Logs) -> None:
    upstream.start.mock(side_effect=RuntimeError(f"at /srv/app with {API_KEY}"))
    response = await post_session(broker)
    assert_problem(response, "internal-error")
    for told in ("Traceback", "RuntimeError", "/srv", API_KEY):
        assert told not in response.text
    assert any(entry["log_level"] == "error" for entry in logs)


async def test_api8_no_origin_is_allowed_by_default(broker: httpx.AsyncClient) -> None:
    response = await post_session(broker, origin=APP)
    assert_problem(response, "forbidden-origin")
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_api8_secrets_do_not_show(open_broker: OpenBroker, upstream: Upstream, logs: Logs) -> None:
    environ: dict[str, Any] = {**SIGNED_IN, "BROKER_SECRET": "s" * 16 + "t" * 16}
    given = settings(environ)
    assert secret_lines(given) == [environ["BROKER_SECRET"]]
    for secret in (API_KEY, SECRET, environ["BROKER_SECRET"]):
        assert secret not in repr(given) + str(given)
    broker = await open_broker(**environ)
    ann = login("ann")
    upstream.start.respond(401, json={"detail": f"Invalid API key {API_KEY}"})
    refused = await broker.post("/session", headers=ann)
    upstream.works_again()
    assert (await broker.post("/session", headers=ann)).status_code == 201
    for secret in (API_KEY, SECRET, TOKEN, ann["Authorization"].split()[1]):
        assert secret not in str(logs)
        assert secret not in refused.text + str(refused.headers)


# --- API9:2023 Improper inventory management ---

ROUTES = {
    *("GET /healthz", "GET /readyz", "GET /problems/{slug}"),
    *("POST /session", "GET /calls", "GET /calls/{call}", "GET /calls/{call}/events", "POST /calls/{call}/stop"),
    *("POST /webhooks/oneinbox/{secret}", "GET /metrics", "GET /docs", "GET /openapi.json"),
}


async def test_api9_no_route_is_there_that_is_not_in_the_contract(broker: httpx.AsyncClient) -> None:
    document = (await broker.get("/openapi.json")).json()
    described = {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}
    assert {"POST /session", "GET /calls/{call}"} <= described <= ROUTES


async def test_api9_documents_can_be_taken_away(open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_DOCS="false")
    for path in ("/docs", "/openapi.json", "/redoc", "/swagger.json"):
        assert_problem(await broker.get(path), "not-found")


# --- API10:2023 Unsafe consumption of APIs ---

ANSWERS: dict[str, Any] = {
    "another-scheme": started(server_url="https://voice.example"),
    "a-script": started(server_url="javascript:alert(1)"),
    "insecure": started(server_url="ws://voice.example"),
    "a-second-line": started(server_url="wss://voice.example\r\nSet-Cookie: a=b"),
    "no-url": started(server_url=None),
    "no-token": started(participant_token=""),
    "an-object-for-a-token": started(participant_token={"$ne": 1}),
    "a-path-for-an-id": started(id="../agents"),
    "a-list": [started()],
    "nothing": None,
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
async def test_api10_an_answer_that_is_no_session_is_not_passed_on(
    broker: httpx.AsyncClient, upstream: Upstream, answer: Any
) -> None:
    upstream.start.respond(201, json=answer)
    response = await post_session(broker)
    assert_problem(response, "upstream-invalid")
    assert "location" not in response.headers


async def test_api10_oneinboxs_text_is_not_markup(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_EXPOSE="summary")
    path = assert_session(await post_session(broker))
    upstream.has_call("call_1", ai_summary="<script>alert(1)</script>\r\nX: y", status="</pre>", end_reason="\x00")
    response = await broker.get(path)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert json.loads(response.content)["summary"] == "<script>alert(1)</script>\r\nX: y"


async def test_api10_errors_of_oneinbox_are_not_repeated(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    for status in (400, 401, 402, 403, 404, 500, 503):
        upstream.start.respond(status, json={"detail": f"SQL error near {API_KEY} for {AGENT_ID}"})
        response = await post_session(broker)
        assert response.status_code in (502, 503)
        assert "SQL" not in response.text
        assert AGENT_ID not in response.text


async def test_api10_an_answer_has_a_bound(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    upstream.start.respond(201, content=b'{"pad":"' + b"x" * (9 * 1024 * 1024) + b'"}')
    assert_problem(await post_session(broker), "upstream-invalid")
