"""Limits hold over processes: however many ask at once, and wherever they ask."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import jwt
import pytest
import pytest_asyncio

from app.cli.operator import Operator, operate
from app.sandbox.server import RunningEmulator, running_emulator
from tests.support.brokers import (
    LONG_CALLS,
    BrokerProcess,
    asked,
    eventually,
    from_address,
    outcomes,
    post_many,
    running_broker_process,
    running_broker_processes,
    settings_of,
)
from tests.support.shapes import policies, remaining, states
from tests.support.valkey import Valkey, running_valkey

pytestmark = pytest.mark.process

GLOBAL_MINUTE = 5000
LOGIN_SECRET = "a secret shared with the issuer, long enough"
PROXIED = {"BROKER_TRUSTED_PROXIES": "127.0.0.0/8"}
RATED = {**PROXIED, "BROKER_SESSION_LIMITS": "5/minute", "BROKER_GLOBAL_SESSION_LIMITS": f"{GLOBAL_MINUTE}/minute"}

in_modules_loop = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Replicas:
    """Two brokers on one store, in front of one OneInbox."""

    brokers: list[BrokerProcess]
    oneinbox: RunningEmulator
    store_url: str

    async def used_by_all(self) -> int:
        """Sessions of all users that count towards the global limit."""

        async def used(operator: Operator) -> str:
            ((_, used, amount),) = await operator.limits.usage()
            assert amount == GLOBAL_MINUTE
            return str(used)

        return int(await operate(settings_of(self.oneinbox.url, {**RATED, "BROKER_STORE_URL": self.store_url}), used))


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with running_valkey() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rated(valkey: Valkey) -> AsyncIterator[Replicas]:
    """At most five sessions a minute for each user, behind a trusted proxy."""
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_processes(2, oneinbox.url, **RATED, BROKER_STORE_URL=valkey.url) as brokers,
    ):
        yield Replicas(brokers, oneinbox, valkey.url)


@in_modules_loop
async def test_two_hundred_at_once_get_five(rated: Replicas) -> None:
    before = len(rated.oneinbox.emulator.calls)

    responses = await post_many(rated.brokers, 200, from_address("198.51.100.1"))

    assert outcomes(responses) == {"201": 5, "rate-limited": 195}
    assert len(rated.oneinbox.emulator.calls) - before == 5
    for refused in (response for response in responses if response.is_error):
        assert states(refused)["user-minute"][0] == 0
        assert int(refused.headers["retry-after"]) >= states(refused)["user-minute"][1] > 50


@in_modules_loop
async def test_fifty_users_at_once_get_five_each(rated: Replicas) -> None:
    users = [from_address(f"198.51.100.{100 + number}") for number in range(50)]
    before = len(rated.oneinbox.emulator.calls)

    async def ask(user: dict[str, str]) -> Counter[str]:
        return outcomes([(await post_many(rated.brokers[turn % 2 :], 1, user))[0] for turn in range(7)])

    assert await asyncio.gather(*map(ask, users)) == [{"201": 5, "rate-limited": 2}] * 50
    assert len(rated.oneinbox.emulator.calls) - before == 250


def asked_by_users(rated: Replicas) -> int:
    """Requests to OneInbox without lists: those are read for a new store."""
    return sum(request.operation != "list" for request in rated.oneinbox.emulator.requests)


@in_modules_loop
async def test_a_refused_users_hammering_costs_nobody_anything(rated: Replicas) -> None:
    noisy, quiet = from_address("198.51.100.2"), from_address("198.51.100.3")
    await post_many(rated.brokers, 5, noisy)
    assert remaining((await post_many(rated.brokers, 1, quiet))[0]) == 4
    used, requests = await rated.used_by_all(), asked_by_users(rated)

    for _ in range(10):
        assert outcomes(await post_many(rated.brokers, 40, noisy)) == {"rate-limited": 40}

    assert await rated.used_by_all() == used
    assert asked_by_users(rated) == requests
    assert remaining((await post_many(rated.brokers, 1, quiet))[0]) == 3
    assert await rated.used_by_all() == used + 1


@in_modules_loop
async def test_nobody_learns_how_many_sessions_all_users_have(rated: Replicas) -> None:
    (response,) = await post_many(rated.brokers, 1, from_address("198.51.100.4"))

    assert policies(response).keys() == {"user-minute"}
    assert str(GLOBAL_MINUTE) not in str(response.headers)


async def test_two_hundred_at_once_get_two_live_calls(valkey: Valkey) -> None:
    limits = {**PROXIED, "BROKER_MAX_LIVE_CALLS": "2", "BROKER_STORE_URL": valkey.url}
    first, second = from_address("203.0.113.1"), from_address("203.0.113.2")
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_processes(2, oneinbox.url, **limits) as brokers,
    ):
        emulator = oneinbox.emulator
        responses = await post_many(brokers, 200, first)
        assert outcomes(responses) == {"201": 2, "too-many-live-calls": 198}
        assert len(emulator.calls) == 2

        # One call ends and is seen to: there is room for one more, and for no more than one.
        ended = next(iter(emulator.calls))
        emulator.calls.stop(ended)
        locations = (response.headers.get("location", "") for response in responses)
        location = next(each for each in locations if each.startswith(f"/calls/{ended.id}."))
        assert (await brokers[1].client.get(location, headers=first)).json()["status"] == "completed"
        assert outcomes(await post_many(brokers, 20, first)) == {"201": 1, "too-many-live-calls": 19}

        # A refused user's hammering starts nothing, and makes us look at each of the calls once per 10 s.
        assert outcomes(await post_many(brokers, 2, second)) == {"201": 2}
        began = time.monotonic()
        for _ in range(10):
            assert outcomes(await post_many(brokers, 30, second)) == {"too-many-live-calls": 30}
        assert len(asked(emulator, "start")) == 5
        own = {f"/v1/calls/{call.id}" for call in list(emulator.calls)[:2]}
        looks = Counter(request.path for request in asked(emulator, "get") if request.path in own)
        assert looks.keys() == own
        assert max(looks.values()) <= 1 + (time.monotonic() - began) // 10


PLANS = """
claim = "plan"
default = "free"
[plans.free]
[organizations]
claim = "org_id"
max_live_calls = 3
"""


async def test_users_of_one_organization_share_its_live_calls_on_two_replicas(valkey: Valkey, tmp_path: Path) -> None:
    plans = tmp_path / "plans.toml"
    plans.write_text(PLANS)
    environ = {
        "BROKER_AUTH": "jwt",
        "BROKER_JWT_SECRET": LOGIN_SECRET,
        "BROKER_PLANS_FILE": str(plans),
        "BROKER_STORE_URL": valkey.url,
        "BROKER_STORE_PREFIX": "shops",
    }

    def login(number: int, organization: str) -> dict[str, str]:
        claims = {"sub": f"user-{number}", "exp": 4_000_000_000, "org_id": organization}
        return {"Authorization": f"Bearer {jwt.encode(claims, LOGIN_SECRET, 'HS256')}"}

    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_processes(2, oneinbox.url, **environ) as brokers,
    ):
        turns = [brokers[number % 2 :] for number in range(30)]
        asked = (post_many(turn, 1, login(number, "the-shop")) for number, turn in enumerate(turns))
        responses = [response for (response,) in await asyncio.gather(*asked)]
        other = await post_many(brokers, 1, login(99, "the-bank"))

        assert outcomes(responses) == {"201": 3, "too-many-live-calls": 27}
        assert outcomes(other) == {"201": 1}
        assert len(oneinbox.emulator.calls) == 4
        with valkey.client() as client:
            names = client.keys("shops*")
            assert sum(b":live:org:" in name for name in names) == 2
            assert not [name for name in names if b"the-shop" in name], "by its hash only"


ONE_PROCESS = {
    "rate": ({"BROKER_SESSION_LIMITS": "5/minute"}, {"201": 5, "rate-limited": 195}),
    "live-calls": ({"BROKER_MAX_LIVE_CALLS": "2"}, {"201": 2, "too-many-live-calls": 198}),
}


@pytest.mark.parametrize(("limit", "expected"), ONE_PROCESS.values(), ids=ONE_PROCESS.keys())
async def test_two_hundred_at_once_of_one_process_in_memory(limit: dict[str, str], expected: dict[str, int]) -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, **limit) as broker,
    ):
        assert outcomes(await post_many([broker], 200)) == expected
        assert len(oneinbox.emulator.calls) == expected["201"]


async def test_two_hundred_at_once_of_two_workers_get_five() -> None:
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(running_valkey())
        oneinbox = await stack.enter_async_context(running_emulator(LONG_CALLS))
        broker = await stack.enter_async_context(
            running_broker_process(
                oneinbox.url, "--workers", "2", BROKER_SESSION_LIMITS="5/minute", BROKER_STORE_URL=valkey.url
            )
        )
        with valkey.client() as client:

            async def both_are_up() -> bool:
                return len(client.client_list()) > 2  # this one's connection aside, one of each worker at least

            await eventually(both_are_up, within=30)

        assert outcomes(await post_many([broker], 200)) == {"201": 5, "rate-limited": 195}
        assert len(oneinbox.emulator.calls) == 5
