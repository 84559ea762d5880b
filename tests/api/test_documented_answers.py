"""What the OpenAPI document promises is what happens: the harness holds every answer of every test against it."""

from collections.abc import Mapping

import httpx
import pytest

from app.sessions.schemas import REQUESTS
from tests.conftest import OpenBroker
from tests.support.harness import CLIENT, Upstream, post_session
from tests.support.shapes import assert_problem, assert_session

HEADER_MODE = {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": f"{CLIENT}/32"}
ADA = {"X-Forwarded-User": "ada", "Sec-Fetch-Site": "same-origin"}
ANSWERS: Mapping[str, httpx.Response | type[httpx.TransportError]] = {
    "upstream-busy": httpx.Response(429),
    "upstream-error": httpx.Response(500),
    "upstream-invalid": httpx.Response(200, json=[]),
    "upstream-misconfigured": httpx.Response(401),
    "upstream-timeout": httpx.ReadTimeout,
    "upstream-unreachable": httpx.ConnectError,
}
OF_A_CALL = {
    "list": ("GET", ""),
    "read": ("GET", "/call_1"),
    "follow": ("GET", "/call_1/events"),
    "stop": ("POST", "/call_1/stop"),
}


@pytest.mark.parametrize("body", REQUESTS.values(), ids=REQUESTS)
async def test_each_request_example_starts_a_call(broker: httpx.AsyncClient, body: object) -> None:
    assert_session(await post_session(broker, body))


@pytest.mark.parametrize(("method", "path"), OF_A_CALL.values(), ids=OF_A_CALL)
@pytest.mark.parametrize("slug", ANSWERS)
async def test_whatever_oneinbox_answers(
    open_broker: OpenBroker, upstream: Upstream, method: str, path: str, slug: str
) -> None:
    broker = await open_broker(HEADER_MODE)
    assert (await broker.post("/session", headers=ADA)).status_code == 201
    answer = ANSWERS[slug]
    upstream.router.get("/v1/calls/call_1").mock(
        **({"return_value": answer} if isinstance(answer, httpx.Response) else {"side_effect": answer("gone")})
    )

    assert_problem(await broker.request(method, f"/calls{path}", headers=ADA), slug)


@pytest.mark.parametrize(("method", "path"), OF_A_CALL.values(), ids=OF_A_CALL)
async def test_every_user(open_broker: OpenBroker, upstream: Upstream, method: str, path: str) -> None:
    broker = await open_broker(HEADER_MODE, BROKER_REQUEST_LIMITS="2/minute")
    assert (await broker.post("/session", headers=ADA)).status_code == 201
    upstream.has_call("call_1")

    async def ask(**headers: str) -> httpx.Response:
        return await broker.request(method, f"/calls{path}", headers={**ADA, **headers})

    assert_problem(await ask(Origin="https://elsewhere.example"), "forbidden-origin")
    nobody = await broker.request(method, f"/calls{path}", headers={"Sec-Fetch-Site": "same-origin"})
    assert nobody.status_code == 401
    if path:
        assert_problem(await ask(**{"X-Forwarded-User": "eve"}), "not-found")
    await broker.get("/calls/call_2", headers=ADA)
    assert_problem(await ask(), "rate-limited")
