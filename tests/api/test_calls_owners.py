"""Whose a call is: every route of a call, by everybody, in every mode of signing in."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import jwt
import pytest

from tests.conftest import OpenBroker
from tests.support.harness import AGENT_ID, CLIENT, Upstream, post_session
from tests.support.shapes import assert_problem, assert_safe_headers

SECRET = "an issuer's secret of more than 32 characters"
ELSEWHERE = "198.51.100.9"
STOP = r"^/v1/calls/[^/]+/stop$"


def token(user: str, **claims: Any) -> str:
    return jwt.encode({"sub": user, "exp": time.time() + 600, **claims}, SECRET, "HS256")


@dataclass(frozen=True)
class Mode:
    """A way to sign in: settings, and what a user sends."""

    settings: Mapping[str, str]
    headers: Callable[[str], dict[str, str]]


SAME_SITE = {"Sec-Fetch-Site": "same-origin"}
MODES = {
    "anonymous": Mode({}, lambda user: {}),
    "jwt": Mode(
        {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": SECRET},
        lambda user: {"Authorization": f"Bearer {token(user)}"} if user else {},
    ),
    "header": Mode(
        {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": f"{CLIENT}/32,{ELSEWHERE}/32"},
        lambda user: {"X-Forwarded-User": user, **SAME_SITE} if user else SAME_SITE,
    ),
}
ROUTES = {"read": ("GET", ""), "follow": ("GET", "/events"), "stop": ("POST", "/stop")}


class Site:
    """A broker in one mode, with a call of Ann's."""

    def __init__(self, mode: str, broker: httpx.AsyncClient, elsewhere: httpx.AsyncClient, upstream: Upstream) -> None:
        self.mode, self.broker, self.elsewhere, self.upstream = mode, broker, elsewhere, upstream
        self.path = ""

    async def start(self) -> None:
        response = await post_session(self.broker, None, **MODES[self.mode].headers("ann"))
        assert response.status_code == 201, response.text
        self.path = response.headers["location"]
        self.upstream.has_call("call_1", metadata=self.upstream.asked["metadata"], status="completed")

    async def ask(self, who: str, route: str, path: str) -> httpx.Response:
        method, rest = ROUTES[route]
        client = self.elsewhere if who == "elsewhere" else self.broker
        user = {"owner": "ann", "elsewhere": "ann", "other": "ben", "nobody": ""}[who]
        headers = {**MODES[self.mode].headers(user), "X-Request-ID": "the-same"}
        return await client.request(method, path + rest, headers=headers)


@pytest.fixture(params=MODES)
async def site(request: pytest.FixtureRequest, open_broker: OpenBroker, upstream: Upstream) -> Site:
    settings = MODES[request.param].settings
    upstream.router.get(path__regex=r"^/v1/calls/no-such-call$").respond(404, json={"detail": "Call not found"})
    secret = {"BROKER_SECRET": "s" * 32}
    site = Site(
        request.param,
        await open_broker({**settings, **secret}),
        await open_broker({**settings, **secret}, peer=ELSEWHERE),
        upstream,
    )
    await site.start()
    return site


def seen(response: httpx.Response) -> tuple[int, str, dict[str, str]]:
    """All of an answer that says something about the call."""
    counters = ("ratelimit", "ratelimit-policy")
    headers = {name: value for name, value in response.headers.items() if name not in counters}
    return response.status_code, response.text, headers


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("who", ["owner", "elsewhere"])
async def test_the_owner_may_from_anywhere(who: str, route: str, site: Site) -> None:
    response = await site.ask(who, route, site.path)

    assert response.status_code == 200, response.text
    assert_safe_headers(response)
    if route == "follow":
        assert response.headers["content-type"] == "text/event-stream"
        assert response.text.startswith("event: call\nid: ")
        assert response.text.endswith("event: end\nid: " + response.text.split("\n")[1][4:] + "\ndata: {}\n\n")
    else:
        assert response.json()["id"] == site.path.removeprefix("/calls/")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("who", ["other", "nobody"])
@pytest.mark.parametrize("owner_first", [False, True], ids=["first", "after-the-owner"])
async def test_other_users_learn_nothing(who: str, route: str, owner_first: bool, site: Site) -> None:
    if owner_first:
        assert (await site.ask("owner", "read", site.path)).status_code == 200
    bare = "/calls/call_1"
    wrong_key = f"{bare}.{'A' * 43}"

    answers = [await site.ask(who, route, path) for path in (bare, wrong_key, "/calls/no-such-call")]

    slug = "unauthenticated" if who == "nobody" and site.mode != "anonymous" else "not-found"
    for response in answers:
        assert "call_1" not in response.text
        if site.mode == "header" and slug == "unauthenticated":
            assert response.status_code == 401
        else:
            assert_problem(response, slug)
    assert seen(answers[0]) == seen(answers[1]) == seen(answers[2])
    assert not [request for request in site.upstream.requests if request.url.path.endswith("/stop")]
    # Nor does it change what the owner sees.
    assert (await site.ask("owner", "read", site.path)).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ending", ["." + "A" * 43, ".", "%0A", "%00", "/", "é", "%2e%2e"])
async def test_the_owners_id_with_anything_behind_it_is_no_call(route: str, ending: str, site: Site) -> None:
    before = len(site.upstream.requests)

    response = await site.ask("owner", route, f"/calls/call_1{ending}")

    assert_problem(response, "not-found")
    assert len(site.upstream.requests) == before, "OneInbox was not asked"


async def test_the_list_is_the_owners(site: Site) -> None:
    async def listed(user: str) -> httpx.Response:
        return await site.broker.get("/calls", headers=MODES[site.mode].headers(user))

    if site.mode == "anonymous":
        assert_problem(await listed("ann"), "not-found")
        return
    mine, others, nobodys = [await listed(user) for user in ("ann", "ben", "")]
    assert [call["id"] for call in mine.json()["items"]] == ["call_1"]
    assert mine.json()["items"][0] == (await site.ask("owner", "read", site.path)).json()
    assert_safe_headers(mine)
    assert others.json() == {"items": []}
    assert nobodys.status_code == 401


async def test_a_users_id_of_another_issuer_is_another_user(open_broker: OpenBroker, upstream: Upstream) -> None:
    mode = {**MODES["jwt"].settings, "BROKER_SECRET": "s" * 32}
    ours, theirs = [await open_broker({**mode, "BROKER_JWT_ISSUER": issuer}) for issuer in ("https://a", "https://b")]
    signed = {issuer: {"Authorization": f"Bearer {token('ann', iss=issuer)}"} for issuer in ("https://a", "https://b")}
    path = (await post_session(ours, None, **signed["https://a"])).headers["location"]
    upstream.has_call("call_1", metadata=upstream.asked["metadata"])

    assert (await ours.get(path, headers=signed["https://a"])).status_code == 200
    assert_problem(await theirs.get(path, headers=signed["https://b"]), "not-found")


@pytest.mark.parametrize("broker_user", [None, "", 7, ["x"], {"x": 1}, "\u0000", "ü", "x" * 100_000])
async def test_a_record_without_an_owner_belongs_to_no_user(
    broker_user: Any, open_broker: OpenBroker, upstream: Upstream
) -> None:
    broker = await open_broker(MODES["jwt"].settings)
    upstream.has_call("call_9", metadata={"broker_user": broker_user})

    response = await broker.get("/calls/call_9", headers=MODES["jwt"].headers("ann"))

    assert_problem(response, "not-found")


async def test_a_call_of_anothers_key_is_not_stopped(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker()
    one, two = [(await post_session(broker)).headers["location"] for _ in range(2)]
    mixed = f"{one.split('.')[0]}.{two.split('.')[1]}"

    assert_problem(await broker.post(f"{mixed}/stop"), "not-found")
    assert not [request for request in upstream.requests if request.url.path.endswith("/stop")]


STOPS: dict[str, tuple[dict[str, Any], str]] = {
    "gone": ({"status_code": 404}, "upstream-error"),  # a rumour
    "busy": ({"status_code": 429, "headers": {"Retry-After": "7"}}, "upstream-busy"),
    "key": ({"status_code": 401}, "upstream-misconfigured"),
    "broken": ({"status_code": 500}, "upstream-error"),
    "nonsense": ({"content": b"{"}, "upstream-invalid"),
    "another-call": ({"json": {"id": "call_2", "status": "completed"}}, "upstream-invalid"),
    "conflict-while-it-runs": ({"status_code": 409}, "upstream-error"),
    "timeout": ({"side_effect": httpx.ReadTimeout}, "upstream-timeout"),
    "unreachable": ({"side_effect": httpx.ConnectError}, "upstream-unreachable"),
}


@pytest.mark.parametrize(("answer", "slug"), STOPS.values(), ids=STOPS.keys())
async def test_a_stop_that_fails(
    answer: dict[str, Any], slug: str, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    path = (await post_session(broker)).headers["location"]
    upstream.has_call("call_1")
    route = upstream.router.post(path__regex=STOP)
    if "side_effect" in answer:
        route.mock(**answer)
    else:
        route.respond(**answer)

    response = await broker.post(f"{path}/stop")

    assert_problem(response, slug)
    if slug == "upstream-busy":
        assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize("status", [400, 409, 422])
async def test_a_stop_of_a_call_that_has_just_ended(status: int, broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = (await post_session(broker)).headers["location"]
    upstream.has_call("call_1", status="in_progress")
    assert (await broker.get(path)).json()["status"] == "in_progress"
    upstream.router.post(path__regex=STOP).respond(status, json={"detail": "Call is not running"})
    upstream.has_call("call_1", status="completed")

    response = await broker.post(f"{path}/stop")

    assert (response.status_code, response.json()["status"]) == (200, "completed")


async def test_a_stop_hangs_up_once_and_frees_the_slot(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_MAX_LIVE_CALLS="1")
    path = (await post_session(broker)).headers["location"]
    record = {"agent_id": AGENT_ID, "metadata": upstream.asked["metadata"]}
    upstream.has_call("call_1", **record)
    upstream.router.post(path__regex=STOP).respond(json={"id": "call_1", "status": "completed", **record})
    assert_problem(await post_session(broker), "too-many-live-calls")

    stopped = await broker.post(f"{path}/stop")
    upstream.has_call("call_1", status="completed", **record)
    again = await broker.post(f"{path}/stop")
    read = await broker.get(path)

    assert stopped.json()["status"] == "completed"
    assert stopped.json() == again.json() == read.json()
    assert stopped.headers["etag"] == read.headers["etag"]
    assert [request.url.path for request in upstream.requests].count("/v1/calls/call_1/stop") == 1
    assert (await post_session(broker)).status_code == 201


async def test_a_stop_needs_no_body_and_reads_none(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = (await post_session(broker)).headers["location"]
    upstream.has_call("call_1")

    response = await broker.post(f"{path}/stop", content=b"\xff{", headers={"Content-Type": "image/png"})

    assert response.status_code == 200


async def test_the_owner_may_without_the_records_metadata(site: Site) -> None:
    """OneInbox may leave any field out, and the store knows who started the call."""
    site.upstream.has_call("call_1", metadata=None, status="in_progress")
    assert (await site.ask("owner", "read", site.path)).status_code == 200
    assert_problem(await site.ask("other", "read", "/calls/call_1"), "not-found")
    if site.mode != "anonymous":
        listed = await site.broker.get("/calls", headers=MODES[site.mode].headers("ann"))
        assert [each["id"] for each in listed.json()["items"]] == ["call_1"]
    assert (await site.ask("owner", "stop", site.path)).status_code == 200
    assert [request for request in site.upstream.requests if request.url.path.endswith("/stop")]
