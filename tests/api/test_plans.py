"""A plans file, over HTTP: which limits a token's user has, and what the users of an organization share."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import pytest_asyncio

from tests.conftest import Logs, OpenBroker
from tests.support.harness import AGENT_ID, JSON, Upstream, post_session
from tests.support.shapes import assert_limited, assert_problem, policies, remaining, states

SECRET = "a secret shared with the issuer, long enough"
METRICS_TOKEN = "a-token-for-the-metrics"
PLANS = """
claim = "/app/plan"
default = "free"
max_call_seconds_claim = "voice_seconds"

[plans.free]
session_limits = "3/hour"
max_live_calls = 1

[plans.pro]
session_limits = "9/minute;90/day"

[plans.team]

[organizations]
claim = "org_id"
session_limits = "4/day"
max_live_calls = 3
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, Any]:
    """Settings with the plans, and with limits that they replace."""
    file = tmp_path / "plans.toml"
    file.write_text(PLANS)
    return {
        "BROKER_AUTH": "jwt",
        "BROKER_JWT_SECRET": SECRET,
        "BROKER_PLANS_FILE": str(file),
        "BROKER_SESSION_LIMITS": "2/minute",
        "BROKER_MAX_LIVE_CALLS": "5",
        "BROKER_METRICS_TOKEN": METRICS_TOKEN,
    }


def token(user: str = "ann", **claims: Any) -> str:
    return jwt.encode({"sub": user, "exp": 4_000_000_000, **claims}, SECRET, "HS256")


def on(plan: str, user: str = "ann", **claims: Any) -> str:
    return token(user, app={"plan": plan}, **claims)


class Page:
    """A page of one user. OneInbox knows the calls that it starts."""

    def __init__(self, broker: httpx.AsyncClient, upstream: Upstream, token: str) -> None:
        self.broker = broker
        self.upstream = upstream
        self.authorization = f"Bearer {token}"
        self.records: dict[str, dict[str, Any]] = {}

    async def asks(self, body: Any = None) -> httpx.Response:
        return await post_session(self.broker, body, authorization=self.authorization)

    async def starts(self, body: Any = None) -> httpx.Response:
        response = await self.asks(body)
        assert response.status_code == 201, response.text
        call = response.headers["location"].rpartition("/")[2]
        self.records[call] = {"id": call, "agent_id": AGENT_ID, "metadata": self.upstream.asked["metadata"]}
        self.upstream.has_call(call, **self.records[call])
        return response

    async def hangs_up(self) -> None:
        """End the last call."""
        call, record = self.records.popitem()
        self.upstream.stop.respond(json={**record, "status": "completed"})
        headers = {**JSON, "Authorization": self.authorization}
        assert (await self.broker.post(f"/calls/{call}/stop", headers=headers)).status_code == 200


OpenPage = Callable[[str], Page]


@pytest_asyncio.fixture
async def page(open_broker: OpenBroker, environ: dict[str, Any], upstream: Upstream) -> OpenPage:
    """Pages in front of one broker, by their token."""
    broker = await open_broker(**environ)
    return partial(Page, broker, upstream)


async def test_a_plans_limits_replace_the_settings(page: OpenPage) -> None:
    pro = await page(on("pro")).starts()
    team = await page(on("team", "ben")).starts()
    free = await page(token("eve")).starts()

    assert {name: quota for name, quota in policies(pro).items() if name.startswith("user-")} == {
        "user-minute": (9, 60),
        "user-day": (90, 86400),
    }
    assert policies(team)["user-minute"] == (2, 60), "a plan that says nothing has the broker's settings"
    assert policies(free)["user-hour"] == (3, 3600)
    assert "user-minute" not in policies(free)


async def test_a_plans_sessions_are_used_up(page: OpenPage) -> None:
    ann = page(on("free"))
    for _ in range(3):
        await ann.starts()
        await ann.hangs_up()
    assert assert_limited(await ann.asks()) > 3000
    assert remaining(await page(on("pro")).starts(), "user-minute") == 8, "a change of plan takes effect at once"


async def test_a_plans_live_calls_replace_the_setting(page: OpenPage) -> None:
    for user, most in ((page(on("free")), 1), (page(on("pro", "ben")), 5)):
        for _ in range(most):
            await user.starts()
        problem = assert_problem(await user.asks(), "too-many-live-calls")
        assert "organization" not in problem["detail"]


ODD: dict[str, dict[str, Any]] = {
    "no-claim": {},
    "unknown": {"app": {"plan": "gold"}},
    "a-list": {"app": {"plan": ["pro"]}},
    "an-object": {"app": {"plan": {"pro": True}}},
    "true": {"app": {"plan": True}},
    "another-case": {"app": {"plan": "PRO"}},
    "at-the-top": {"plan": "pro", "/app/plan": "pro"},
    "no-object": {"app": "pro"},
}


@pytest.mark.parametrize("claims", ODD.values(), ids=ODD.keys())
async def test_an_odd_claim_is_the_default(page: OpenPage, claims: dict[str, Any]) -> None:
    assert policies(await page(token(**claims)).starts())["user-hour"] == (3, 3600)


async def test_a_page_cannot_choose_a_plan(page: OpenPage, upstream: Upstream) -> None:
    claims = {"sub": "ann", "exp": 4_000_000_000, "app": {"plan": "pro"}}
    forged = jwt.encode(claims, "another secret than the issuer's, and as long", "HS256")
    assert_problem(await page(forged).asks(), "unauthenticated")
    assert not upstream.requests

    response = await page(token()).starts({"metadata": claims, "variables": {"plan": "pro"}})

    assert policies(response)["user-hour"] == (3, 3600)


async def test_users_of_one_organization_share_its_sessions(page: OpenPage, upstream: Upstream) -> None:
    ann, ben = page(on("pro", "ann", org_id="shop")), page(on("pro", "ben", org_id="shop"))
    left = []
    for user in (ann, ben, ann, ben):
        response = await user.starts()
        left.append(remaining(response, "org-day"))
        await user.hangs_up()
    assert left == [3, 2, 1, 0]
    assert policies(response)["org-day"] == (4, 86400)
    assert next(iter(states(response))) == "org-day", "the closest limit first"

    refused = await ann.asks()

    assert assert_limited(refused) > 86000
    assert "organization" in refused.json()["detail"]
    assert remaining(refused, "user-minute") == 7, "a refused request spends nothing"
    assert upstream.start.call_count == 4
    assert remaining(await page(on("pro", "ann", org_id="bank")).starts(), "org-day") == 3
    alone = await page(on("pro", "eve")).starts()
    assert not [name for name in policies(alone) if name.startswith("org-")]


async def test_users_of_one_organization_share_its_live_calls(page: OpenPage) -> None:
    ann, ben, eve, zoe = (page(on("pro", user, org_id=7)) for user in ("ann", "ben", "eve", "zoe"))
    for user in (ann, ben, eve):
        await user.starts()

    problem = assert_problem(await zoe.asks(), "too-many-live-calls")

    assert "organization" in problem["detail"]
    await page(on("pro", "zoe", org_id=8)).starts()
    await ann.hangs_up()
    await zoe.starts()


async def test_at_once_is_no_way_around_an_organizations_limits(page: OpenPage, upstream: Upstream) -> None:
    pages = [page(on("pro", f"user-{number}", org_id="shop")) for number in range(12)]

    responses = await asyncio.gather(*(each.asks() for each in pages))

    assert sorted(response.status_code for response in responses) == [201] * 3 + [429] * 9
    assert upstream.start.call_count == 3


@pytest.mark.parametrize("org", [None, "", True, ["shop"], {"id": "shop"}])
async def test_an_odd_organization_is_none(page: OpenPage, logs: Logs, org: Any) -> None:
    for _ in range(2):
        response = await page(on("pro", org_id=org)).starts()
    assert not [name for name in policies(response) if name.startswith("org-")]
    told = [entry for entry in logs if entry["event"] == "plan_claim_ignored"]
    assert [entry["claim"] for entry in told] == ([] if org is None else ["org_id"])


async def test_sessions_are_counted_by_plan_and_never_by_user_or_organization(page: OpenPage, logs: Logs) -> None:
    user = page(token("user-marker", org_id="org-marker"))
    await user.starts()
    assert_problem(await user.asks(), "too-many-live-calls")
    assert_problem(await page("x").asks(), "unauthenticated")

    text = (await user.broker.get("/metrics", headers={"Authorization": f"Bearer {METRICS_TOKEN}"})).text

    lines = [line for line in text.splitlines() if line.startswith("broker_plan_sessions_total")]
    assert lines == [
        'broker_plan_sessions_total{outcome="started",plan="free"} 1.0',
        'broker_plan_sessions_total{outcome="too-many-live-calls",plan="free"} 1.0',
    ]
    assert "marker" not in text
    assert "org-marker" not in str(logs)


async def test_without_a_plans_file_a_claim_says_nothing(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_AUTH="jwt", BROKER_JWT_SECRET=SECRET, BROKER_SESSION_LIMITS="2/minute")
    response = await Page(broker, upstream, on("free", org_id="shop")).starts()
    assert {name for name in policies(response) if not name.startswith("request-")} == {"user-minute"}
