"""An agents file, over HTTP: what each agent fixes, allows, requires and bounds."""

from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from tests.conftest import OpenBroker
from tests.support.harness import Upstream, post_session
from tests.support.shapes import assert_limited, assert_problem, assert_session, policies, states

SECRET = "a secret shared with the issuer, long enough"

SEVERAL = """
[agents.support]
agent_id = "agt_support"
default = true
variables = ["order_id", "participant_name"]
overrides = ["first_message"]
fixed_variables = { tier = "gold", level = 3, vip = true }
fixed_overrides = { tts = { speed = 1.1, voice_id = "calm" } }

[agents.sales]
agent_id = "agt_sales"
session_limits = "1/minute"
max_live_calls = 2

[agents.quiet]
agent_id = "agt_quiet"
variables = []
overrides = []
"""
BY_PLAN = """
[agents.free]
agent_id = "agt_free"
default = true

[agents.pro]
agent_id = "agt_pro"
require_claims = { plan = ["pro", "team"], verified = [true] }
"""
NO_DEFAULT = """
[agents.one]
agent_id = "agt_one"
"""


class OpenWithAgents:
    """Starts brokers that have an agents file."""

    def __init__(self, open_broker: OpenBroker, directory: Path) -> None:
        self._open_broker = open_broker
        self._file = directory / "agents.toml"

    async def __call__(self, text: str, **environ: Any) -> httpx.AsyncClient:
        self._file.write_text(text, encoding="utf-8")
        return await self._open_broker(ONEINBOX_AGENT_ID="", BROKER_AGENTS_FILE=str(self._file), **environ)


@pytest.fixture
def open_with(open_broker: OpenBroker, tmp_path: Path) -> OpenWithAgents:
    return OpenWithAgents(open_broker, tmp_path)


CHOICES: dict[str, tuple[Any, str]] = {
    "none": (None, "agt_support"),
    "by-name": ({"agent": "quiet"}, "agt_quiet"),
    "by-id": ({"agent_id": "agt_quiet"}, "agt_quiet"),
    "both": ({"agent": "quiet", "agent_id": "agt_quiet"}, "agt_quiet"),
    "livekit": ({"room_config": {"agents": [{"agent_name": "quiet"}]}}, "agt_quiet"),
}


@pytest.mark.parametrize(("body", "agent_id"), CHOICES.values(), ids=CHOICES.keys())
async def test_the_agent_that_is_asked_for(
    open_with: OpenWithAgents, upstream: Upstream, body: Any, agent_id: str
) -> None:
    broker = await open_with(SEVERAL)
    path = assert_session(await post_session(broker, body))
    assert upstream.asked["agent_id"] == agent_id
    upstream.has_call("call_1", agent_id=agent_id)
    assert (await broker.get(path)).json()["agent"] == agent_id.removeprefix("agt_")


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown-name": ({"agent": "admin"}, "agent-not-allowed"),
    "unknown-id": ({"agent_id": "agt_of_somebody_else"}, "agent-not-allowed"),
    "an-id-is-no-name": ({"agent": "agt_sales"}, "agent-not-allowed"),
    "a-name-is-no-id": ({"agent_id": "sales"}, "agent-not-allowed"),
    "default-is-no-name": ({"agent": "default"}, "agent-not-allowed"),
    "case-counts": ({"agent": "Sales"}, "agent-not-allowed"),
    "disagreeing": ({"agent": "sales", "agent_id": "agt_support"}, "invalid-request"),
    "disagreeing-with-livekit": (
        {"agent_id": "agt_support", "room_config": {"agents": [{"agent_name": "sales"}]}},
        "invalid-request",
    ),
    "disagreeing-names": (
        {"agent": "support", "room_config": {"agents": [{"agent_name": "sales"}]}},
        "invalid-request",
    ),
}


@pytest.mark.parametrize(("body", "slug"), REFUSED.values(), ids=REFUSED.keys())
async def test_agents_that_cannot_be_had(open_with: OpenWithAgents, upstream: Upstream, body: Any, slug: str) -> None:
    problem = assert_problem(await post_session(await open_with(SEVERAL), body), slug)
    assert "quiet" not in str(problem), "other agents are not named"
    assert not upstream.requests


async def test_without_a_default_one_must_be_named(open_with: OpenWithAgents, upstream: Upstream) -> None:
    broker = await open_with(NO_DEFAULT)
    for body in (None, {}, {"variables": {"a": "b"}}):
        problem = assert_problem(await post_session(broker, body), "invalid-request")
        assert [error["loc"] for error in problem["errors"]] == [["body", "agent"]]
    assert_session(await post_session(broker, {"agent": "one"}))
    assert upstream.start.call_count == 1


async def test_what_is_fixed_is_in_every_call(open_with: OpenWithAgents, upstream: Upstream) -> None:
    broker = await open_with(SEVERAL)
    body = {"variables": {"order_id": "7"}, "participant_name": "Ann", "overrides": {"first_message": "Hello"}}
    assert_session(await post_session(broker, body))
    assert upstream.asked["variables"] == {
        "order_id": "7",
        "participant_name": "Ann",
        "tier": "gold",
        "level": 3,
        "vip": True,
    }
    assert upstream.asked["overrides"] == {"first_message": "Hello", "tts": {"speed": 1.1, "voice_id": "calm"}}


NOT_THE_BROWSERS: dict[str, tuple[Any, str, str]] = {
    "fixed-variable": ({"variables": {"tier": "free"}}, "variable-not-allowed", "tier"),
    "fixed-as-an-attribute": ({"participant_attributes": {"tier": "free"}}, "variable-not-allowed", "tier"),
    "variable-of-no-list": ({"variables": {"order_id": "7", "x": 1}}, "variable-not-allowed", "x"),
    "variable-where-none-is-allowed": (
        {"agent": "quiet", "variables": {"order_id": "7"}},
        "variable-not-allowed",
        "order_id",
    ),
    "override-of-no-list": ({"overrides": {"llm": {"model": "m"}}}, "override-not-allowed", "llm.model"),
    "fixed-override": ({"overrides": {"tts": {"voice_id": "loud"}}}, "override-not-allowed", "tts.voice_id"),
    "another-fixed-override": ({"overrides": {"tts": {"speed": 4}}}, "override-not-allowed", "tts.speed"),
    "override-where-none-is-allowed": (
        {"agent": "quiet", "overrides": {"first_message": "x"}},
        "override-not-allowed",
        "first_message",
    ),
}


@pytest.mark.parametrize(("body", "slug", "named"), NOT_THE_BROWSERS.values(), ids=NOT_THE_BROWSERS.keys())
async def test_what_browsers_may_not_set(
    open_with: OpenWithAgents, upstream: Upstream, body: Any, slug: str, named: str
) -> None:
    broker = await open_with(SEVERAL, BROKER_ALLOWED_VARIABLES="*", BROKER_ALLOWED_OVERRIDES="first_message,llm.model")
    problem = assert_problem(await post_session(broker, body), slug)
    assert named in problem["detail"]
    assert "order_id" not in problem["detail"].replace(named, "")
    assert not upstream.requests


async def test_an_entry_without_lists_takes_the_settings(open_with: OpenWithAgents, upstream: Upstream) -> None:
    broker = await open_with(SEVERAL, BROKER_ALLOWED_VARIABLES="a", BROKER_ALLOWED_OVERRIDES="llm.model")
    body = {"agent": "sales", "variables": {"a": 1}, "overrides": {"llm": {"model": "m"}}}
    assert_session(await post_session(broker, body))
    assert_problem(await post_session(broker, {"agent": "sales", "variables": {"order_id": 1}}), "variable-not-allowed")


# --- claims ---

PLANS: dict[str, tuple[dict[str, Any], bool]] = {
    "pro": ({"plan": "pro", "verified": True}, True),
    "one-of-a-list": ({"plan": ["free", "team"], "verified": True}, True),
    "free": ({"plan": "free", "verified": True}, False),
    "half": ({"plan": "pro"}, False),
    "nothing": ({}, False),
    "text-is-no-truth": ({"plan": "pro", "verified": "true"}, False),
    "one-is-no-truth": ({"plan": "pro", "verified": 1}, False),
    "part-of-a-word": ({"plan": "professional", "verified": True}, False),
    "object": ({"plan": {"pro": True}, "verified": True}, False),
}


@pytest.mark.parametrize(("claims", "admitted"), PLANS.values(), ids=PLANS.keys())
async def test_agents_for_some(
    open_with: OpenWithAgents, upstream: Upstream, claims: dict[str, Any], admitted: bool
) -> None:
    broker = await open_with(BY_PLAN, BROKER_AUTH="jwt", BROKER_JWT_SECRET=SECRET)
    login = f"Bearer {jwt.encode({'sub': 'ann', 'exp': 4_000_000_000, **claims}, SECRET, 'HS256')}"
    for body in ({"agent": "pro"}, {"agent_id": "agt_pro"}):
        response = await post_session(broker, body, authorization=login)
        if admitted:
            assert response.status_code == 201
        else:
            problem = assert_problem(response, "agent-not-allowed")
            assert "plan" not in problem["detail"]
    assert (await post_session(broker, authorization=login)).status_code == 201
    assert upstream.asked["agent_id"] == "agt_free"
    assert upstream.start.call_count == (3 if admitted else 1)


# --- limits ---


async def test_an_agents_own_rate(open_with: OpenWithAgents, upstream: Upstream) -> None:
    broker = await open_with(SEVERAL)
    first = await post_session(broker, {"agent": "sales"})
    assert policies(first)["agent-minute"] == (1, 60)
    assert next(iter(states(first))) == "agent-minute"

    assert 1 <= assert_limited(await post_session(broker, {"agent": "sales"})) <= 60

    other = await post_session(broker)
    assert_session(other)
    assert "agent-minute" not in policies(other)
    assert states(other)["user-minute"][0] == 3, "the refusal spent nothing"
    assert upstream.start.call_count == 2


async def test_an_agents_live_calls_are_shared(open_with: OpenWithAgents, upstream: Upstream) -> None:
    broker = await open_with(SEVERAL, BROKER_TRUSTED_PROXIES="203.0.113.0/24")
    for number in range(2):
        assert_session(await post_session(broker, {"agent": "sales"}, x_forwarded_for=f"192.0.2.{number}"))

    refused = await post_session(broker, {"agent": "sales"}, x_forwarded_for="192.0.2.9")
    problem = assert_problem(refused, "at-capacity")
    assert refused.headers["retry-after"] == "10"
    assert "sales" not in str(problem)
    assert policies(refused).keys() == {"agent-minute", "user-minute", "user-day"}
    assert_session(await post_session(broker, x_forwarded_for="192.0.2.9"))
    assert upstream.start.call_count == 3
