"""Many streams, several replicas: the requests to OneInbox, and the events that each stream gets."""

import asyncio
import math
import time
from collections import Counter

import pytest

from app.sandbox.emulator import EmulatorOptions
from app.sandbox.faults import Latency
from app.sandbox.schemas import CallOverride, RegisterWebhook
from app.sandbox.server import running_emulator
from tests.support.brokers import asked, running_broker_process, running_broker_processes
from tests.support.followers import Follower, figure, open_many, room_for_sockets
from tests.support.valkey import running_valkey

pytestmark = pytest.mark.process

FOLLOWERS = 1000
STREAMS = {"BROKER_MAX_STREAMS": "2000"}
HOOK = "a-webhook-secret-of-the-tests-0123456789"
STATES = ("queued", "initiated", "in_progress", "completed")


async def test_a_thousand_watchers_of_one_call() -> None:
    room_for_sockets()
    options = EmulatorOptions(queued=3600, transcript_delay=0.2)
    async with (
        running_emulator(options) as oneinbox,
        running_broker_process(oneinbox.url, **STREAMS, BROKER_EXPOSE="transcript") as broker,
    ):
        url = str(broker.client.base_url)
        # Another call first: what the first stream costs, all others share.
        warm = (await broker.client.post("/session", json={})).headers["location"]
        await asyncio.gather(*(each.hang_up() for each in await open_many(url, warm, 20)))
        path = (await broker.client.post("/session", json={})).headers["location"]
        before = broker.process.memory()
        oneinbox.emulator.requests.clear()
        began = time.monotonic()

        followers = await open_many(url, path, FOLLOWERS)
        assert Counter(follower.status for follower in followers) == {200: FOLLOWERS}
        call = oneinbox.emulator.calls.get(path.removeprefix("/calls/").split(".")[0])
        assert call is not None
        for status in STATES[1:]:
            oneinbox.emulator.override(call, CallOverride(status=status))
            await asyncio.sleep(2)  # as long as a state must last to be seen for sure
            if status == "in_progress":
                each = (broker.process.memory() - before) / FOLLOWERS
        await asyncio.gather(*(follower.over() for follower in followers))
        seconds = time.monotonic() - began

        polls = len([request for request in asked(oneinbox.emulator, "get") if call.id in request.path])
        figure("polls per second", round(polls / seconds, 2))
        figure("bytes per follower", round(each))
        # No stream missed anything, and all were closed.
        seen = Counter(tuple(dict.fromkeys(follower.statuses)) for follower in followers)
        assert seen == {STATES: FOLLOWERS}
        assert all(follower.ended and follower.clean for follower in followers)
        assert all(follower.events[-2][3]["transcript"] for follower in followers)
        assert polls <= 1.2 * seconds
        assert each < 60_000
        # All places are free again.
        again = await Follower.open(url, path, {"Last-Event-ID": followers[0].last_id})
        assert again.status == 204
        await again.hang_up()


async def test_the_polling_replica_may_be_killed() -> None:
    options = EmulatorOptions(queued=0, initiated=0, in_progress=3600)
    with running_valkey() as valkey:
        async with (
            running_emulator(options) as oneinbox,
            # Distinguished by the host that each requests.
            running_broker_process(oneinbox.url, BROKER_STORE_URL=valkey.url, **STREAMS) as one,
            running_broker_process(
                oneinbox.url.replace("127.0.0.1", "localhost"), BROKER_STORE_URL=valkey.url, **STREAMS
            ) as other,
        ):
            path = (await one.client.post("/session", json={})).headers["location"]
            hosts = {"127.0.0.1": one, "localhost": other}
            followers = {host: await open_many(str(broker.client.base_url), path, 10) for host, broker in hosts.items()}
            for each in (*followers["127.0.0.1"], *followers["localhost"]):
                await each.has("in_progress")
            # Slow enough to be killed in the middle of.
            oneinbox.emulator.faults.add(Latency(operation="get", seconds=0.3, times=1))
            oneinbox.emulator.requests.clear()
            async with asyncio.timeout(10):
                while not asked(oneinbox.emulator, "get"):
                    await asyncio.sleep(0.01)
            polling = asked(oneinbox.emulator, "get")[0].headers["host"].split(":")[0]
            hosts[polling].process.kill()
            [call] = oneinbox.emulator.calls
            oneinbox.emulator.override(call, CallOverride(status="completed"))
            killed = time.monotonic()

            for each in followers.pop(polling):
                await each.over()
                assert not each.ended
                assert not each.clean
            [left] = followers.values()
            await asyncio.gather(*(each.over() for each in left))
            seconds = time.monotonic() - killed
            figure("seconds until the others saw the end", round(seconds, 2))
            assert all(each.ended and each.statuses == ["in_progress", "completed"] for each in left)
            # The dead one's lease (3 s), and a tick.
            assert seconds < 5


async def test_a_webhook_reaches_the_watchers_of_all_replicas_at_once() -> None:
    # Calls that are ten minutes old: polled every five seconds.
    options = EmulatorOptions(queued=3600, initiated=0, in_progress=3600, now=lambda: time.time() - 600)
    loop = asyncio.get_running_loop()
    with running_valkey() as valkey:
        settings = {"BROKER_STORE_URL": valkey.url, "BROKER_WEBHOOK_SECRET": HOOK, **STREAMS}
        async with (
            running_emulator(options) as oneinbox,
            running_broker_processes(2, oneinbox.url, **settings) as brokers,
        ):
            urls = [str(broker.client.base_url) for broker in brokers]
            oneinbox.emulator.webhooks.register(
                RegisterWebhook(
                    name="x", url=f"{urls[0]}/webhooks/oneinbox/{HOOK}", events=["call.started", "call.ended"]
                )
            )
            paths = [(await brokers[0].client.post("/session", json={})).headers["location"] for _ in range(25)]
            followers = {path: [await Follower.open(url, path) for url in urls] for path in paths}
            calls = {path: oneinbox.emulator.calls.get(path.split(".")[0][7:]) for path in paths}
            took: list[float] = []
            for path in paths:
                call = calls[path]
                assert call is not None
                for status in ("in_progress", "completed"):
                    changed = loop.time()
                    oneinbox.emulator.override(call, CallOverride(status=status))
                    took += [await follower.has(status) - changed for follower in followers[path]]
            for follower in (each for both in followers.values() for each in both):
                await follower.over()
                assert follower.ended
                assert follower.statuses == ["queued", "in_progress", "completed"]

    took.sort()
    p99 = took[math.ceil(len(took) * 0.99) - 1]
    figure("p50 seconds", round(took[len(took) // 2], 3))
    figure("p99 seconds", round(p99, 3))
    assert p99 < 0.3


async def test_the_store_may_die_in_the_middle_of_a_stream() -> None:
    options = EmulatorOptions(queued=0, initiated=0, in_progress=3600)
    with running_valkey() as valkey:
        settings = {"BROKER_STORE_URL": valkey.url, **STREAMS}
        async with (
            running_emulator(options) as oneinbox,
            running_broker_processes(2, oneinbox.url, **settings) as brokers,
        ):
            path = (await brokers[0].client.post("/session", json={})).headers["location"]
            followers = [await Follower.open(str(broker.client.base_url), path) for broker in brokers]
            [call] = oneinbox.emulator.calls
            valkey.kill()
            oneinbox.emulator.override(call, CallOverride(status="new-without-the-store"))
            for follower in followers:
                await follower.has("new-without-the-store", within=4)
            valkey.restart()
            oneinbox.emulator.override(call, CallOverride(status="new-with-it"))
            for follower in followers:
                await follower.has("new-with-it", within=4)
            oneinbox.emulator.override(call, CallOverride(status="completed"))
            for follower in followers:
                await follower.over(within=5)
                assert follower.ended
                assert follower.clean
                assert follower.statuses == ["in_progress", "new-without-the-store", "new-with-it", "completed"]


async def test_a_frozen_oneinbox_ends_no_stream() -> None:
    """OneInbox answers nothing for a while: streams stay, and see the end later."""
    options = EmulatorOptions(queued=0, initiated=0, in_progress=3600)
    async with (
        running_emulator(options) as oneinbox,
        running_broker_process(oneinbox.url, ONEINBOX_TIMEOUT="0.5", **STREAMS) as broker,
    ):
        path = (await broker.client.post("/session", json={})).headers["location"]
        followers = await open_many(str(broker.client.base_url), path, 2)
        oneinbox.emulator.faults.add(Latency(operation="get", seconds=2, times=1))
        oneinbox.emulator.requests.clear()
        async with asyncio.timeout(10):
            while not asked(oneinbox.emulator, "get"):
                await asyncio.sleep(0.01)
        [call] = oneinbox.emulator.calls
        oneinbox.emulator.override(call, CallOverride(status="completed"))
        for follower in followers:
            await follower.over()
            assert follower.ended
            assert follower.statuses == ["in_progress", "completed"]
        assert [entry["event"] for entry in broker.logs if entry.get("level") == "warning"].count("poll_backoff") == 1
