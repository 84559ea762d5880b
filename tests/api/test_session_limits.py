"""Session limits and their headers."""

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.conftest import Logs, OpenBroker
from tests.support.harness import Upstream, post_session
from tests.support.shapes import assert_limited, assert_problem, assert_session, policies, remaining, states


async def test_five_a_minute_and_fifty_a_day(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    left = []
    for _ in range(5):
        response = await post_session(broker)
        assert_session(response)
        left.append((remaining(response, "user-minute"), remaining(response, "user-day")))
    assert left == [(4, 49), (3, 48), (2, 47), (1, 46), (0, 45)]

    refused = await post_session(broker)

    assert 1 <= assert_limited(refused) <= 60
    assert upstream.start.call_count == 5


async def test_the_headers_name_the_policies_and_the_closest_first(broker: httpx.AsyncClient) -> None:
    response = await post_session(broker)

    assert policies(response)["user-minute"] == (5, 60)
    assert policies(response)["user-day"] == (50, 86400)
    assert next(iter(states(response))) == "user-minute"
    assert all(name.startswith("user-") for name in policies(response)), "no global counter is named"
    assert 0 < states(response)["user-minute"][1] <= 60
    assert 0 < states(response)["user-day"][1] <= 86400


async def test_a_refused_request_spends_nothing(open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_SESSION_LIMITS="2/hour;10/day")
    for _ in range(2):
        assert_session(await post_session(broker))

    waits = []
    for _ in range(12):
        refused = await post_session(broker)
        waits.append(assert_limited(refused))
        assert remaining(refused, "user-day") == 8

    # A moving window: waiting is not made longer by asking.
    assert waits == sorted(waits, reverse=True)


async def test_the_longer_wait_counts(open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_SESSION_LIMITS="1/minute;1/hour")
    assert_session(await post_session(broker))

    assert 60 < assert_limited(await post_session(broker)) <= 3600


async def test_at_once_is_no_way_around(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_SESSION_LIMITS="3/minute")

    responses = await asyncio.gather(*(post_session(broker) for _ in range(20)))

    assert sorted(response.status_code for response in responses) == [201] * 3 + [429] * 17
    assert upstream.start.call_count == 3


PEERS = {
    "another-address": ("203.0.113.7", "203.0.113.8", True),
    "the-same-address": ("203.0.113.7", "203.0.113.7", False),
    "the-same-network-of-ipv6": ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", False),
    "another-network-of-ipv6": ("2001:db8:1:2::1", "2001:db8:1:3::1", True),
    "ipv4-written-as-ipv6": ("203.0.113.7", "::ffff:203.0.113.7", False),
}


@pytest.mark.parametrize(("first", "second", "apart"), PEERS.values(), ids=PEERS.keys())
async def test_limits_go_by_address(first: str, second: str, apart: bool, open_broker: OpenBroker) -> None:
    broker = await open_broker(peer="10.0.0.1", BROKER_TRUSTED_PROXIES="10.0.0.0/8", BROKER_SESSION_LIMITS="1/minute")
    assert_session(await post_session(broker, x_forwarded_for=first))

    response = await post_session(broker, x_forwarded_for=second)

    if apart:
        assert_session(response)
    else:
        assert_limited(response)


FORGED = {
    "x-forwarded-for": {"x_forwarded_for": "198.51.100.1"},
    "x-real-ip": {"x_real_ip": "198.51.100.1"},
    "forwarded": {"forwarded": "for=198.51.100.1"},
    "user": {"x_forwarded_user": "somebody"},
    "authorization": {"authorization": "Bearer abc"},
    "cookie": {"cookie": "session=abc"},
    "user-agent": {"user_agent": "another"},
}


@pytest.mark.parametrize("headers", FORGED.values(), ids=FORGED.keys())
async def test_headers_that_any_client_can_write_are_no_way_around(
    headers: dict[str, str], open_broker: OpenBroker
) -> None:
    broker = await open_broker(BROKER_SESSION_LIMITS="1/minute")
    assert_session(await post_session(broker))

    assert_limited(await post_session(broker, **headers))


async def test_a_query_or_another_body_is_no_way_around(open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_SESSION_LIMITS="1/minute")
    assert_session(await post_session(broker))

    assert_limited(await post_session(broker, {"agent": "default"}))
    assert_limited(await broker.post("/session?x=1"))


async def test_a_limit_is_checked_after_the_body(open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_SESSION_LIMITS="1/minute")
    assert_session(await post_session(broker))

    assert_problem(await post_session(broker, {"agent": "nobody"}), "agent-not-allowed")


REFUSALS = {
    "one-limit": ({"BROKER_SESSION_LIMITS": "1/minute;10/day"}, ("rate-limited", "user-minute")),
    "two-limits": ({"BROKER_SESSION_LIMITS": "1/minute;1/day"}, ("rate-limited", "user-minute, user-day")),
    "requests": ({"BROKER_REQUEST_LIMITS": "1/hour"}, ("rate-limited", "request-hour")),
    "running-calls": ({"BROKER_MAX_LIVE_CALLS": "1"}, ("too-many-live-calls", "user-live-calls")),
    "everybody": ({"BROKER_GLOBAL_SESSION_LIMITS": "1/day"}, ("at-capacity", "global-day")),
    "all-running-calls": ({"BROKER_MAX_LIVE_CALLS_TOTAL": "1"}, ("at-capacity", "global-live-calls")),
}


@pytest.mark.parametrize(("bounds", "refusal"), REFUSALS.values(), ids=REFUSALS.keys())
async def test_the_log_alone_says_which_limit_refused(
    bounds: dict[str, str], refusal: tuple[str, str], open_broker: OpenBroker, logs: Logs, upstream: Upstream
) -> None:
    broker = await open_broker(bounds)
    upstream.has_call("call_1")
    assert_session(await post_session(broker))

    refused = await post_session(broker)

    assert refused.json().keys() == {"type", "title", "status", "detail", "request_id"}
    told = [(line.get("problem"), line.get("reason")) for line in logs if line["event"] == "request"]
    assert told == [(None, None), refusal]


SLOWAPI = {
    "RATELIMIT_ENABLED": "false",
    "RATELIMIT_DEFAULT": "1/day",
    "RATELIMIT_APPLICATION": "1/day",
    "RATELIMIT_HEADERS_ENABLED": "false",
    "RATELIMIT_HEADER_LIMIT": "X-Marker",
    "RATELIMIT_STORAGE_URL": "redis://127.0.0.1:1",
    "RATELIMIT_STORAGE_URI": "redis://127.0.0.1:1",
    "RATELIMIT_STRATEGY": "nonsense",
    "RATELIMIT_SWALLOW_ERRORS": "true",
    "RATELIMIT_IN_MEMORY_FALLBACK_ENABLED": "true",
}


@pytest.mark.parametrize("where", ["environment", ".env"])
async def test_slowapis_own_switches_are_ignored(
    where: str, open_broker: OpenBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == ".env":
        Path(".env").write_text("".join(f"{name}={value}\n" for name, value in SLOWAPI.items()))
    else:
        for name, value in SLOWAPI.items():
            monkeypatch.setenv(name, value)
    broker = await open_broker(BROKER_SESSION_LIMITS="2/minute")

    for left in (1, 0):
        response = await post_session(broker)
        assert_session(response)
        assert remaining(response) == left
        assert "x-marker" not in response.headers
    assert_limited(await post_session(broker))
