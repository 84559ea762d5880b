"""The shared store dies or freezes under real brokers: nobody waits long, nothing starts from zero, it comes back."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from app.cli.operator import Operator, operate
from app.oneinbox.transport import open_transport
from app.sandbox.server import RunningEmulator, running_emulator
from app.store.failover import FailoverStore
from app.store.memory import MemoryStore
from app.store.protocol import LimitRequest, Rate
from app.store.valkey import ValkeyStore
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
from tests.support.harness import running_broker
from tests.support.shapes import assert_problem
from tests.support.valkey import Valkey, running_valkey

SETTINGS = {"BROKER_TRUSTED_PROXIES": "127.0.0.0/8", "BROKER_SESSION_LIMITS": "5/hour"}
USER, BLOCKED, FRESH = (from_address(f"198.51.100.{number}") for number in (1, 2, 3))
LONGEST_SECONDS = 1
BACK_SECONDS = 5


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with running_valkey() as server:
        yield server


@asynccontextmanager
async def load(brokers: list[BrokerProcess]) -> AsyncIterator[list[float]]:
    """Ten users at it all the time, a session and a look at it each; the seconds that each request took."""
    took: list[float] = []
    over = asyncio.Event()

    async def timed(request: httpx.Request, client: httpx.AsyncClient) -> httpx.Response:
        began = time.monotonic()
        response = await client.send(request)
        took.append(time.monotonic() - began)
        return response

    async def ask(caller: int) -> None:
        client = brokers[caller % len(brokers)].client
        number = 0
        while not over.is_set():
            number += 1
            user = from_address(f"203.0.{caller}.{number % 200}")
            answer = await timed(client.build_request("POST", "/session", json={}, headers=user), client)
            assert answer.status_code in (201, 429)
            if answer.status_code == 201:
                read = await timed(client.build_request("GET", answer.headers["location"], headers=user), client)
                assert read.status_code in (200, 503)
            await asyncio.sleep(0.02)

    async with asyncio.TaskGroup() as callers:
        for caller in range(10):
            callers.create_task(ask(caller))
        try:
            yield took
        finally:
            over.set()


async def each_is(brokers: list[BrokerProcess], status: str) -> bool:
    return all([await broker.readiness() == status for broker in brokers])


@pytest.mark.process
@pytest.mark.alone
@pytest.mark.parametrize("accident", ["kill", "freeze"])
async def test_a_lost_store_under_load(valkey: Valkey, accident: str) -> None:
    settings = {**SETTINGS, "BROKER_STORE_URL": valkey.url}
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_processes(2, oneinbox.url, **settings) as brokers,
    ):

        async def block(operator: Operator) -> str:
            await operator.block(BLOCKED["X-Forwarded-For"], 3600, "")
            return ""

        await operate(settings_of(oneinbox.url, settings), block)
        assert outcomes(await post_many(brokers[:1], 2, USER)) == {"201": 2}
        assert outcomes(await post_many(brokers[1:], 1, USER)) == {"201": 1}
        for broker in brokers:
            await eventually(lambda broker=broker: _is_blocked(broker), within=2)  # type: ignore[misc]

        async with load(brokers) as took:
            valkey.kill() if accident == "kill" else valkey.freeze()
            await eventually(lambda: each_is(brokers, "degraded"), within=2)

            # Each goes on from what it counted itself: two and one of five.
            assert outcomes(await post_many(brokers[:1], 10, USER)) == {"201": 3, "rate-limited": 7}
            assert outcomes(await post_many(brokers[1:], 10, USER)) == {"201": 4, "rate-limited": 6}
            assert outcomes(await post_many(brokers, 4, BLOCKED)) == {"blocked": 4}
            starts = len(asked(oneinbox.emulator, "start"))
            for broker in brokers:
                key = {**FRESH, "Idempotency-Key": "0123456789abcdef"}
                assert_problem(await broker.client.post("/session", json={}, headers=key), "at-capacity")
            calls = [request.json["metadata"]["broker_user"] for request in asked(oneinbox.emulator, "start")[starts:]]
            assert await each_is(brokers, "degraded")

            valkey.restart() if accident == "kill" else valkey.thaw()
            await eventually(lambda: each_is(brokers, "ok"), within=BACK_SECONDS)
        assert len(took) > 50
        assert max(took) < LONGEST_SECONDS
        fresh = outcomes(await post_many(brokers, 20, FRESH))
        assert fresh == {"201": 5, "rate-limited": 15}, "shared again, and a refused key had cost nothing"
        fresh_name = asked(oneinbox.emulator, "start")[-1].json["metadata"]["broker_user"]
        assert fresh_name not in calls
        for broker in brokers:
            events = [entry["event"] for entry in broker.logs if entry["event"].startswith("store_")]
            emptied = ["store_emptied"] if accident == "kill" else []
            assert events == ["store_warning", "store_lost", *emptied, "store_recovered"]


async def _is_blocked(broker: BrokerProcess) -> bool:
    (response,) = await post_many([broker], 1, BLOCKED)
    return response.status_code == 403


@pytest.mark.process
@pytest.mark.alone
async def test_a_pause_stays_in_force(valkey: Valkey) -> None:
    settings = {"BROKER_STORE_URL": valkey.url}
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, **settings) as broker,
    ):

        async def pause(operator: Operator) -> str:
            await operator.kill_switch.pause(3600)
            return ""

        async def resume(operator: Operator) -> str:
            assert await operator.kill_switch.resume()
            return ""

        async def is_paused() -> bool:
            (response,) = await post_many([broker], 1)
            return response.status_code == 503

        async def is_not() -> bool:
            return not await is_paused()

        await operate(settings_of(oneinbox.url, settings), pause)
        await eventually(is_paused, within=2)
        valkey.freeze()
        await eventually(lambda: each_is([broker], "degraded"), within=2)
        asked_before = len(asked(oneinbox.emulator, "start"))
        until = time.monotonic() + 1.5  # longer than the brake waits between two looks
        while time.monotonic() < until:
            assert_problem((await post_many([broker], 1))[0], "at-capacity")
            await asyncio.sleep(0.1)
        assert len(asked(oneinbox.emulator, "start")) == asked_before

        valkey.thaw()
        await eventually(lambda: each_is([broker], "ok"), within=BACK_SECONDS)
        assert await is_paused()
        await operate(settings_of(oneinbox.url, settings), resume)
        await eventually(is_not, within=2)


@asynccontextmanager
async def broker_in_process(oneinbox: RunningEmulator, **changes: str) -> AsyncIterator[httpx.AsyncClient]:
    transport = open_transport(oneinbox.url, pool_size=20)
    async with running_broker(settings_of(oneinbox.url, changes), transport) as client:
        yield client


async def test_sessions_can_be_refused_while_the_store_is_gone(valkey: Valkey) -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        broker_in_process(oneinbox, BROKER_STORE_URL=valkey.url, BROKER_ON_STORE_LOSS="refuse") as client,
    ):
        started = await client.post("/session")
        assert started.status_code == 201
        valkey.freeze()
        for _ in range(3):
            assert_problem(await client.post("/session"), "at-capacity")
        assert len(oneinbox.emulator.calls) == 1
        assert (await client.get(started.headers["location"])).status_code == 200, "reading goes on"
        valkey.thaw()

        async def gives_sessions() -> bool:
            return (await client.post("/session")).status_code == 201

        await eventually(gives_sessions, within=BACK_SECONDS)


async def test_a_store_that_was_never_there(valkey: Valkey) -> None:
    valkey.kill()
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        broker_in_process(oneinbox, BROKER_STORE_URL=valkey.url, BROKER_SESSION_LIMITS="2/minute") as client,
    ):
        assert (await client.get("/readyz")).json()["status"] == "degraded"
        assert outcomes([await client.post("/session") for _ in range(4)]) == {"201": 2, "rate-limited": 2}
        valkey.restart()

        async def is_ok() -> bool:
            return bool((await client.get("/readyz")).json()["status"] == "ok")

        await eventually(is_ok, within=BACK_SECONDS)


async def test_a_busy_broker_does_not_take_the_store_for_lost(valkey: Valkey) -> None:
    """The answer is there in time; that the process has had no time to read it is not the store's fault."""
    async with FailoverStore(ValkeyStore(valkey.url), MemoryStore()) as store:
        rate = Rate("busy", 5, 60)
        await store.decide(LimitRequest([rate]))
        with valkey.client() as client:
            before = client.get("oib:r:busy")
            asking = asyncio.create_task(store.decide(LimitRequest([rate])))
            for _ in range(1000):
                await asyncio.sleep(0)
                if client.get("oib:r:busy") != before:
                    break
        time.sleep(0.4)  # such as two hundred requests that arrive at once
        assert not (await asking).local
        assert store.state == "ok"
