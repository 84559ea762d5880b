"""Idempotency-Key over processes: one call on any replica, also when a process or the store dies."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from app.oneinbox.transport import open_transport
from app.sandbox.faults import Latency
from app.sandbox.server import RunningEmulator, running_emulator
from tests.support.brokers import (
    LONG_CALLS,
    asked,
    eventually,
    outcomes,
    post_many,
    running_broker_process,
    running_broker_processes,
    settings_of,
)
from tests.support.harness import running_broker
from tests.support.shapes import assert_problem
from tests.support.valkey import Valkey, running_valkey

KEY = {"Idempotency-Key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with running_valkey() as server:
        yield server


@asynccontextmanager
async def broker_in_process(oneinbox: RunningEmulator, **changes: str) -> AsyncIterator[httpx.AsyncClient]:
    transport = open_transport(oneinbox.url, pool_size=20)
    async with running_broker(settings_of(oneinbox.url, changes), transport, peer="127.0.0.1") as client:
        yield client


@pytest.mark.process
async def test_a_hundred_at_once_of_one_key_are_one_call(valkey: Valkey) -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_processes(2, oneinbox.url, BROKER_STORE_URL=valkey.url) as brokers,
    ):
        oneinbox.emulator.faults.add(Latency(operation="start", seconds=0.3))  # so that all come while it runs

        responses = await post_many(brokers, 100, KEY)

        assert outcomes(responses) == {"201": 100}
        assert len(asked(oneinbox.emulator, "start")) == 1
        assert len({(response.content, response.headers["location"]) for response in responses}) == 1
        assert [response.headers.get("idempotency-replayed") for response in responses].count("true") == 99

        token = responses[0].json()["participant_token"]
        url = responses[0].json()["server_url"]
        with valkey.client() as client:
            names = list(client.scan_iter(count=1000))
            kept = {name: client.dump(name) or b"" for name in names}
        answers = [name for name in kept if b"answer:" in name]
        assert len(answers) == 1
        for name, value in kept.items():
            for secret in (token, token.split(".")[2], url, KEY["Idempotency-Key"]):
                assert secret.encode() not in name + value


@pytest.mark.process
async def test_the_mark_of_a_process_that_died_expires(valkey: Valkey) -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, BROKER_STORE_URL=valkey.url) as first,
        broker_in_process(oneinbox, BROKER_STORE_URL=valkey.url, ONEINBOX_TIMEOUT="0.3") as second,
    ):
        oneinbox.emulator.faults.add(Latency(operation="start", seconds=30, times=1))

        async def die() -> None:
            async def is_asked() -> bool:
                return len(asked(oneinbox.emulator, "start")) == 1

            await eventually(is_asked, within=10)
            first.process.kill()

        with pytest.raises(httpx.TransportError):
            await asyncio.gather(post_many([first], 1, KEY), die())

        began = time.monotonic()
        response = await second.post("/session", json={}, headers=KEY)
        assert_problem(response, "in-progress")
        assert time.monotonic() - began < 3
        assert len(asked(oneinbox.emulator, "start")) == 1
        with valkey.client() as client:
            (mark,) = client.scan_iter(match="oib:v:answer:*")
            assert 0 < client.pttl(mark) <= 25_000, "15 s of the first broker's timeout, and 10"
            client.pexpire(mark, 1)
        again = await second.post("/session", json={}, headers=KEY)
        assert again.status_code == 201
        assert "idempotency-replayed" not in again.headers


@pytest.mark.process
@pytest.mark.parametrize("accident", ["kill", "freeze"])
async def test_a_response_that_cannot_be_kept_is_not_given(valkey: Valkey, accident: str) -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        broker_in_process(oneinbox, BROKER_STORE_URL=valkey.url) as broker,
    ):
        oneinbox.emulator.faults.add(Latency(operation="start", seconds=0.5))

        async def lose() -> None:
            async def is_asked() -> bool:
                return len(oneinbox.emulator.calls) == 1

            await eventually(is_asked, within=10)
            valkey.kill() if accident == "kill" else valkey.freeze()

        response, _ = await asyncio.gather(broker.post("/session", json={}, headers=KEY), lose())

        assert_problem(response, "at-capacity")
        (call,) = oneinbox.emulator.calls
        assert oneinbox.emulator.calls.state(call).status == "completed"
        assert len(asked(oneinbox.emulator, "stop")) == 1
        assert "token" not in response.text


async def test_a_key_needs_the_store(valkey: Valkey) -> None:
    valkey.freeze()
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        broker_in_process(oneinbox, BROKER_STORE_URL=valkey.url) as broker,
    ):
        assert_problem(await broker.post("/session", json={}, headers=KEY), "at-capacity")
        assert len(oneinbox.emulator.calls) == 0
        assert (await broker.post("/session", json={})).status_code == 201, "without one there is nothing to remember"
