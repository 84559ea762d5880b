"""How streams end: by readers that go away, by logins that expire, and by the process going down."""

import asyncio
import ctypes
import signal
import socket
import struct
import time

import httpx
import jwt
import pytest

from app.sandbox.emulator import EmulatorOptions
from app.sandbox.schemas import CallOverride
from app.sandbox.server import running_emulator
from tests.support.brokers import (
    LONG_CALLS,
    BrokerProcess,
    eventually,
    running_broker_process,
    running_broker_processes,
)
from tests.support.followers import Follower, figure, open_many
from tests.support.processes import PATIENCE
from tests.support.shapes import assert_problem
from tests.support.valkey import running_valkey

pytestmark = pytest.mark.process

ISSUER = "an issuer's secret of more than 32 characters"
VANISHED_SECONDS = 20


async def start(broker: BrokerProcess, **headers: str) -> str:
    response = await broker.client.post("/session", json={}, headers=headers)
    assert response.status_code == 201, response.text
    path: str = response.headers["location"]
    return path


def url_of(broker: BrokerProcess) -> str:
    return str(broker.client.base_url)


async def test_a_closed_connection_frees_its_place_at_once() -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, BROKER_MAX_STREAMS="2") as broker,
    ):
        path = await start(broker)
        for how in ("close", "reset", "half-close"):
            followers = [await Follower.open(url_of(broker), path) for _ in range(2)]
            for follower in followers:
                await follower.has("in_progress")
            refused = await broker.client.get(f"{path}/events")
            assert_problem(refused, "too-many-streams")
            assert refused.headers["retry-after"] == "10"
            for follower in followers:
                connection = follower.writer.get_extra_info("socket")
                if how == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if how == "half-close":
                    follower.writer.write_eof()
                else:
                    await follower.hang_up()
            assert await eventually(lambda: has_room(broker, path), within=2) < 2, how
            for follower in followers:
                await follower.hang_up()


async def has_room(broker: BrokerProcess, path: str) -> bool:
    async with broker.client.stream("GET", f"{path}/events") as response:
        return response.status_code == 200


async def test_a_client_that_vanished_frees_its_place() -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, BROKER_MAX_STREAMS="1") as broker,
    ):
        path = await start(broker)
        follower = await Follower.open(url_of(broker), path)
        await follower.has("in_progress")
        make_deaf(follower.writer.get_extra_info("socket").fileno())

        seconds = await eventually(lambda: has_room(broker, path), within=VANISHED_SECONDS)

        figure("seconds until its place is free", round(seconds, 1))
        await follower.hang_up()


def make_deaf(descriptor: int) -> None:
    """Drop whatever arrives for a socket, as if its machine were gone: a filter that takes 0 bytes (man 7 socket)."""
    attach_filter = 26
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    with socket.socket(fileno=socket.dup(descriptor)) as same:
        same.setsockopt(socket.SOL_SOCKET, attach_filter, struct.pack("HP", 1, ctypes.addressof(program)))


async def test_a_client_that_never_reads_costs_no_memory() -> None:
    """Its states are large and many; what it does not read is not stored for it."""
    options = EmulatorOptions(queued=0, initiated=0, in_progress=3600)
    async with (
        running_emulator(options) as oneinbox,
        running_broker_process(oneinbox.url, BROKER_EXPOSE="summary", BROKER_WEBHOOK_SECRET="x" * 30) as broker,
    ):
        path = await start(broker)
        [call] = oneinbox.emulator.calls
        reading = await Follower.open(url_of(broker), path)
        lazy = []
        for _ in range(5):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((broker.client.base_url.host, broker.client.base_url.port))
            connection.sendall(f"GET {path}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            lazy.append(connection)

        async def tell(number: int) -> None:
            summary = f"{number:04}" + "x" * 200_000
            oneinbox.emulator.override(call, CallOverride(set={"ai_summary": summary}))
            await broker.client.post(f"/webhooks/oneinbox/{'x' * 30}", json={"call_id": call.id})
            await eventually(lambda: knows(number), within=10)

        async def knows(number: int) -> bool:
            return any(str(data.get("summary")).startswith(f"{number:04}") for _, _, _, data in reading.events)

        for number in range(10):  # until all buffers on the way are full
            await tell(number)
        before = broker.process.memory()
        for number in range(10, 50):
            await tell(number)
        grown = broker.process.memory() - before
        figure("bytes kept for five who did not read 8 MB each", grown)
        assert grown < 10_000_000
        oneinbox.emulator.override(call, CallOverride(status="completed"))
        await reading.over()
        for connection in lazy:
            connection.close()


async def test_a_stream_ends_with_its_token() -> None:
    settings = {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": ISSUER}
    async with running_emulator(LONG_CALLS) as oneinbox, running_broker_process(oneinbox.url, **settings) as broker:
        expires = time.time() + 3
        signed = {"Authorization": f"Bearer {jwt.encode({'sub': 'ann', 'exp': expires}, ISSUER, 'HS256')}"}
        path = await start(broker, **signed)

        follower = await Follower.open(url_of(broker), path, signed)
        await follower.over(within=10)

        assert 0 <= time.time() - expires < 1
        assert follower.clean
        assert not follower.ended
        assert follower.statuses == ["in_progress"]
        assert_problem(await broker.client.get(path, headers=signed), "unauthenticated")


async def test_a_shutdown_closes_all_streams_cleanly_and_none_misses_the_end() -> None:
    options = EmulatorOptions(queued=0, initiated=0, in_progress=3600)
    with running_valkey() as valkey:
        settings = {"BROKER_STORE_URL": valkey.url, "BROKER_MAX_STREAMS": "1000"}
        async with (
            running_emulator(options) as oneinbox,
            running_broker_processes(2, oneinbox.url, **settings) as (leaving, staying),
        ):
            path = await start(leaving)
            followers = await open_many(url_of(leaving), path, 200)
            await asyncio.gather(*(follower.has("in_progress") for follower in followers))

            began = asyncio.get_running_loop().time()
            leaving.process.send_signal(signal.SIGTERM)
            await asyncio.gather(*(follower.over(within=5) for follower in followers))
            seconds = asyncio.get_running_loop().time() - began
            figure("seconds until 200 streams ended", round(seconds, 2))
            assert all(follower.clean for follower in followers)
            assert not any(follower.ended for follower in followers)
            # The call ends while everybody is on the way to the other replica.
            [call] = oneinbox.emulator.calls
            oneinbox.emulator.override(call, CallOverride(status="completed"))
            assert await leaving.process.ended() == 0
            back = [
                await Follower.open(url_of(staying), path, {"Last-Event-ID": follower.last_id})
                for follower in followers[:20]
            ]
            for follower in back:
                await follower.over(within=5)
                assert follower.ended
                assert follower.statuses[-1] == "completed"
            last = await Follower.open(url_of(staying), path, {"Last-Event-ID": back[0].last_id})
            assert last.status == 204
            await last.hang_up()
        assert [entry for entry in leaving.logs if entry.get("level") == "error"] == []


async def test_draining_is_announced_at_once_and_still_serves() -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, BROKER_DRAIN_SECONDS="2") as broker,
    ):
        path = await start(broker)
        before = await Follower.open(url_of(broker), path)
        loop = asyncio.get_running_loop()
        began = loop.time()
        broker.process.send_signal(signal.SIGTERM)
        await eventually(lambda: is_draining(broker), within=1)
        # Each on a connection of its own: the listener is open.
        async with httpx.AsyncClient(base_url=url_of(broker), timeout=PATIENCE) as fresh:
            assert (await fresh.get("/healthz")).status_code == 200
            assert (await fresh.post("/session")).status_code == 201
            assert (await fresh.get(path)).status_code == 200
        during = await Follower.open(url_of(broker), path)
        await during.has("in_progress")
        assert not before.over_at
        assert loop.time() - began < 2

        for follower in (before, during):
            await follower.over(within=5)
            assert follower.clean
            assert not follower.ended
            assert 2 <= follower.over_at - began < 4
        assert await broker.process.ended() == 0


async def is_draining(broker: BrokerProcess) -> bool:
    response = await broker.client.get("/readyz")
    if response.status_code == 200:
        return False
    assert (response.status_code, response.json()["status"]) == (503, "draining")
    return True
