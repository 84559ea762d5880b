"""Brokers whose store moves, is emptied, is far away or denies rights: what their users and operators see."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import redis

from app.broker.replicas import STALE_SECONDS
from app.sandbox.server import RunningEmulator, running_emulator
from app.store.failover import PLACE_SECONDS
from app.store.generation import COMPLETE
from tests.support.brokers import (
    LONG_CALLS,
    BrokerProcess,
    environ_of,
    eventually,
    from_address,
    outcomes,
    post_many,
    running_broker_process,
    running_broker_processes,
)
from tests.support.commands import invoke
from tests.support.followers import Follower
from tests.support.processes import Finished
from tests.support.stores import Server, Stores, cluster_is_ok, stores, until, url_of

pytestmark = [pytest.mark.process, pytest.mark.alone]

BACK_SECONDS = 5
CLIENT = {"BROKER_TRUSTED_PROXIES": "127.0.0.0/8"}
RIGHTS = "~oib:* resetchannels +@all -@admin -@dangerous +info"


@pytest.fixture
def start() -> Iterator[Stores]:
    with stores() as started:
        yield started


@asynccontextmanager
async def deployment(count: int, **changes: str) -> AsyncIterator[tuple[RunningEmulator, list[BrokerProcess]]]:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_processes(count, oneinbox.url, **CLIENT, **changes) as brokers,
    ):
        yield oneinbox, brokers


async def command(*arguments: str, oneinbox: str = "http://127.0.0.1:1", **changes: str) -> Finished:
    environ = environ_of(oneinbox, {**CLIENT, **changes})
    return await asyncio.to_thread(invoke, *arguments, environ=environ)


class Keys:
    """A new Idempotency-Key for each session."""

    def __init__(self) -> None:
        self.count = 0

    async def post(self, broker: BrokerProcess) -> httpx.Response:
        self.count += 1
        return await broker.client.post("/session", json={}, headers={"Idempotency-Key": f"{self.count:032}"})


def planned_behind_one_address(start: Stores) -> tuple[str, Callable[[], object]]:
    primary, replica = start.pair()
    relay = start.relay(primary.port)

    def fail_over() -> None:
        replica.replicate(None)
        relay.target = replica.port
        primary.replicate(replica.port)

    return f"redis://127.0.0.1:{relay.port}", fail_over


def planned_by_sentinels(start: Stores) -> tuple[str, Callable[[], object]]:
    primary, _ = start.pair()
    sentinels = start.sentinels(primary)

    def fail_over() -> None:
        sentinels[0].ask("SENTINEL", "FAILOVER", "voice")
        until(lambda: names_another(sentinels, primary))

    return url_of("redis+sentinel", sentinels, "/voice"), fail_over


def killed_under_sentinels(start: Stores) -> tuple[str, Callable[[], object]]:
    primary, _ = start.pair()
    sentinels = start.sentinels(primary)

    def fail_over() -> None:
        primary.kill()
        until(lambda: names_another(sentinels, primary))

    return url_of("redis+sentinel", sentinels, "/voice"), fail_over


def names_another(sentinels: list[Server], primary: Server) -> bool:
    """All Sentinels name another primary, which takes writes."""
    ports = {int(each.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "voice")[1]) for each in sentinels}
    return len(ports) == 1 and primary.port not in ports


@pytest.mark.parametrize("on_loss", ["local", "refuse"])
@pytest.mark.parametrize(
    "accident",
    [planned_behind_one_address, planned_by_sentinels, killed_under_sentinels],
    ids=lambda each: each.__name__,
)
async def test_keyed_sessions_again_within_five_seconds(
    start: Stores, accident: Callable[[Stores], tuple[str, Callable[[], object]]], on_loss: str
) -> None:
    url, fail_over = accident(start)
    keys = Keys()
    async with deployment(1, BROKER_STORE_URL=url, BROKER_ON_STORE_LOSS=on_loss) as (_, [broker]):
        assert (await keys.post(broker)).status_code == 201
        await asyncio.to_thread(fail_over)
        since = time.monotonic()

        async def is_back() -> bool:
            return (await keys.post(broker)).status_code == 201 and await broker.readiness() == "ok"

        await eventually(is_back, within=BACK_SECONDS)
        while time.monotonic() < since + BACK_SECONDS + 2:
            await asyncio.sleep(0.2)  # asked again and again: it has to stay back
            assert await is_back() or time.monotonic() < since + BACK_SECONDS

        paused = await command("pause", "--for", "1h", BROKER_STORE_URL=url)
        assert (paused.code, paused.err) == (0, "")
        assert outcomes([await keys.post(broker)]) == {"at-capacity": 1}
        assert (await command("resume", BROKER_STORE_URL=url)).code == 0
        assert (await keys.post(broker)).status_code == 201


def slot_owner(nodes: list[Server]) -> Server | None:
    """The node of these that serves the broker's slot."""
    slot = nodes[0].ask("CLUSTER", "KEYSLOT", "{oib}")
    for first, last, owner, *_ in nodes[0].ask("CLUSTER", "SLOTS"):
        if first <= slot <= last:
            return next((node for node in nodes if node.port == owner[1]), None)
    return None


async def test_a_cluster_with_two_replicas(start: Stores) -> None:
    """3 + 3 nodes: 40 parallel POSTs of one user over both give exactly 5, also after the slot's owner has died."""
    nodes = start.cluster()
    settings = {"BROKER_STORE_URL": url_of("redis+cluster", nodes[:3]), "BROKER_SESSION_LIMITS": "5/hour"}
    user = from_address("198.51.100.1")
    async with deployment(2, **settings) as (_, brokers):
        assert outcomes(await post_many(brokers, 40, user)) == {"201": 5, "rate-limited": 35}
        owner = slot_owner(nodes)
        assert owner is not None
        await asyncio.to_thread(owner.wait_for_replica)

        def die() -> None:
            owner.kill()
            living = [node for node in nodes if node is not owner]
            until(lambda: slot_owner(living) and all(cluster_is_ok(node) for node in living))

        await asyncio.to_thread(die)

        async def are_back() -> bool:
            return {await broker.readiness() for broker in brokers} == {"ok"}

        await eventually(are_back, within=BACK_SECONDS)
        assert outcomes(await post_many(brokers, 20, user)) == {"rate-limited": 20}
        other = from_address("198.51.100.2")
        assert outcomes(await post_many(brokers, 40, other)) == {"201": 5, "rate-limited": 35}


async def test_a_user_without_channels(start: Stores) -> None:
    """30 keyed POSTs while calls are followed: the store is not lost, and watchers see what happens."""
    server = start.server()
    server.ask(*f"ACL SETUSER broker on >hush {RIGHTS}".split())
    url = f"redis://broker:hush@127.0.0.1:{server.port}"
    keys = Keys()
    async with deployment(2, BROKER_STORE_URL=url) as (_, brokers):
        followed = [(await keys.post(brokers[0])).headers["location"] for _ in range(3)]
        followers = [
            await Follower.open(str(broker.client.base_url).rstrip("/"), path)
            for path in followed
            for broker in brokers
        ]
        answers = [await keys.post(brokers[number % 2]) for number in range(30)]
        assert outcomes(answers) == {"201": 30}
        assert {await broker.readiness() for broker in brokers} == {"ok"}
        assert (await brokers[0].client.post(f"{followed[0]}/stop")).status_code == 200
        for follower in followers[:2]:
            await follower.has("completed")
        for follower in followers:
            await follower.hang_up()
        for broker in brokers:
            assert "store_lost" not in [entry["event"] for entry in broker.logs]


async def test_a_store_far_away(start: Stores) -> None:
    """A round trip of 200 ms, and BROKER_STORE_TIMEOUT=2."""
    relay = start.relay(start.server().port, delay=0.1)
    keys = Keys()
    async with deployment(1, BROKER_STORE_URL=f"redis://127.0.0.1:{relay.port}", BROKER_STORE_TIMEOUT="2") as (
        _,
        [broker],
    ):
        assert (await keys.post(broker)).status_code == 201
        await asyncio.sleep(3 * PLACE_SECONDS)  # so often it looks where the store is, far away too
        assert await broker.readiness() == "ok"
        assert "store_lost" not in [entry["event"] for entry in broker.logs]
        assert (await keys.post(broker)).status_code == 201


async def test_an_emptied_store(start: Stores) -> None:
    """FLUSHALL with four running calls of 25 s at most: all are ended within 90 s; the user's slots hold at once."""
    server = start.server()
    settings = {
        "BROKER_STORE_URL": f"redis://127.0.0.1:{server.port}",
        "BROKER_MAX_CALL_SECONDS": "25",
        "BROKER_MAX_LIVE_CALLS": "4",
        "ONEINBOX_TIMEOUT": "2",
    }
    user = from_address("198.51.100.1")
    async with deployment(2, **settings) as (oneinbox, brokers):
        assert outcomes(await post_many(brokers, 4, user)) == {"201": 4}

        async def is_complete() -> bool:
            return bool(server.ask("GET", "oib:v:generation").endswith(COMPLETE.encode()))

        await eventually(is_complete, within=10)
        server.ask("FLUSHALL")
        since = time.monotonic()

        async def is_full() -> bool:
            with server.client() as client:
                return bool(client.zcard("oib:s:live:all") == 4)

        await eventually(is_full, within=10)
        assert outcomes(await post_many(brokers, 4, user)) == {"too-many-live-calls": 4}

        async def have_ended() -> bool:
            return all(oneinbox.emulator.record(call)["status"] == "completed" for call in oneinbox.emulator.calls)

        await eventually(have_ended, within=90 - (time.monotonic() - since))
        events = [entry["event"] for broker in brokers for entry in broker.logs]
        assert events.count("store_emptied") == 2
        assert events.count("calls_restored") >= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ONEINBOX_API_KEY": "oi_sk_another", "ONEINBOX_AGENT_ID": "agt_another"}, "another OneInbox account"),
        ({"BROKER_SECRET": "another secret, of more than 32 characters"}, "another BROKER_SECRET"),
    ],
)
async def test_two_deployments_with_one_prefix(start: Stores, changes: dict[str, str], words: str) -> None:
    server = start.server()
    url = f"redis://127.0.0.1:{server.port}"
    async with deployment(1, BROKER_STORE_URL=url) as (oneinbox, _):
        refused = await command("serve", "--port", "0", oneinbox=oneinbox.url, BROKER_STORE_URL=url, **changes)
        assert (refused.code, refused.out) == (2, "")
        (line,) = refused.err.splitlines()
        assert line.startswith("BROKER_STORE_PREFIX: ")
        assert words in line
        async with running_broker_process(
            oneinbox.url, BROKER_STORE_URL=url, BROKER_STORE_PREFIX="staging", **changes
        ) as other:
            assert await other.readiness() == "ok"
        async with running_broker_process(oneinbox.url, BROKER_STORE_URL=url) as replica:
            assert await replica.readiness() == "ok"


async def test_a_replica_that_does_not_hear_of_a_pause_is_named(start: Stores) -> None:
    url = f"redis://127.0.0.1:{start.server().port}"
    async with deployment(2, BROKER_STORE_URL=url) as (_, [first, second]):
        paused = await command("pause", "--for", "1h", BROKER_STORE_URL=url)
        assert (paused.code, paused.err) == (0, "")
        assert "in force on 2 of 2 replicas" in paused.out
        second.process.send_signal(signal.SIGSTOP)
        try:
            resumed = await command("resume", BROKER_STORE_URL=url)
            assert resumed.code == 1
            assert "in force on 1 of 2 replicas" in resumed.out
            (missing,) = [line for line in resumed.out.splitlines() if line.startswith("not in force on ")]
            again = await command("resume", BROKER_STORE_URL=url)
            assert again.code == 1, "a repeat knows no better"
            assert again.out.startswith("There was no pause.\nin force on 1 of 2 replicas\nnot in force on ")
            status = (await command("status", BROKER_STORE_URL=url)).out
            assert missing.removeprefix("not in force on ").partition(":")[0] in status

            async def is_silent() -> bool:
                return "silent for " in (await command("status", BROKER_STORE_URL=url)).out

            await eventually(is_silent, within=STALE_SECONDS + 5)
        finally:
            second.process.send_signal(signal.SIGCONT)
        await first.process.stop()

        async def is_gone() -> bool:
            return "replicas: 1" in (await command("status", BROKER_STORE_URL=url)).out

        await eventually(is_gone, within=5)


async def test_a_pause_that_cannot_be_written_says_so(start: Stores) -> None:
    server = start.server()
    server.ask(*["ACL", "SETUSER", "broker", "on", ">hush", "~oib:*", "&oib:*", "+@all", "-zadd"])
    said = await command("pause", BROKER_STORE_URL=f"redis://broker:hush@127.0.0.1:{server.port}")
    assert (said.code, said.out) == (1, "")
    assert said.err.splitlines()[-1].startswith("BROKER_STORE_URL: the store denies its user a right")
    replica = start.server()
    replica.replicate(server.port)
    said = await command("pause", BROKER_STORE_URL=f"redis://127.0.0.1:{replica.port}")
    assert (said.code, said.out) == (1, "")
    assert "nothing was changed" in said.err


async def test_a_password_that_changes(start: Stores, tmp_path: Path) -> None:
    """The server takes another password and cuts connections; the URL's file brings it."""
    server = start.server("--requirepass", "old")
    file = tmp_path / "store"
    file.write_text(f"redis://:old@127.0.0.1:{server.port}")
    keys = Keys()
    async with deployment(1, BROKER_STORE_URL_FILE=str(file)) as (_, [broker]):
        assert (await keys.post(broker)).status_code == 201
        with redis.Redis(port=server.port, password="old") as client:
            client.config_set("requirepass", "new")
            client.client_kill_filter(skipme=True)

        async def is_lost() -> bool:
            return await broker.readiness() == "degraded"

        await eventually(is_lost, within=BACK_SECONDS)
        file.write_text(f"redis://:new@127.0.0.1:{server.port}")

        async def is_back() -> bool:
            return await broker.readiness() == "ok" and (await keys.post(broker)).status_code == 201

        await eventually(is_back, within=BACK_SECONDS)


async def test_doctor_names_what_is_wrong_with_an_address(start: Stores) -> None:
    (node,) = start.cluster(1, replicas=False)
    said = await command("doctor", BROKER_STORE_URL=f"redis://127.0.0.1:{node.port}")
    assert "redis+cluster://" in said.out
    said = await command("doctor", BROKER_STORE_URL=f"redis+cluster://127.0.0.1:{node.port}")
    assert "store: Valkey" in said.out
    sentinel = start.server(sentinel=f"sentinel monitor voice 127.0.0.1 {node.port} 1\n")
    said = await command("doctor", BROKER_STORE_URL=f"redis+sentinel://127.0.0.1:{sentinel.port}/another")
    assert "compare the service" in said.out
