"""The store moves, under load: failover behind one address, Sentinels, a cluster. Nobody waits; it is found again."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis
from structlog.testing import capture_logs

from app.store import LimitRequest, Rate, Slot, StoreUnavailable
from app.store.failover import PROBE_SECONDS, FailoverStore
from app.store.memory import MemoryStore
from app.store.valkey import ValkeyStore
from tests.support.brokers import eventually
from tests.support.certificates import Authority
from tests.support.ports import free_port
from tests.support.stores import Engine, Server, Stores, cluster_is_ok, stores, until, url_of

pytestmark = [pytest.mark.process, pytest.mark.alone]

BACK_SECONDS = 5
SLOT_TAG = "{oib}"
RIGHTS = "~oib:* &oib:* +@all -@admin -@dangerous +info"


@pytest.fixture(params=["valkey", "redis"])
def start(request: pytest.FixtureRequest) -> Iterator[Stores]:
    engine: Engine = request.param
    with stores(engine) as started:
        yield started


@pytest.fixture
def start_valkey() -> Iterator[Stores]:
    with stores() as started:
        yield started


@dataclass
class Load:
    """A decision and a key every 10 ms. `alone_at`: when decisions were taken without the shared store."""

    store: FailoverStore
    asked: int = 0
    slowest: float = 0
    alone_at: list[float] = field(default_factory=list)
    refused_keys: list[float] = field(default_factory=list)
    heard: list[bytes] = field(default_factory=list)

    async def run(self) -> None:
        rates, slots = [Rate("user", 10**6, 60), Rate("all", 10**6, 86400)], [Slot("calls", None)]
        while True:
            began = time.monotonic()
            request = LimitRequest(rates, slots, member=f"m{self.asked}", lease=60)
            if (await self.store.decide(request)).local:
                self.alone_at.append(began)
            try:
                await self.store.add(f"key{self.asked}", b"", 30)
            except StoreUnavailable:
                self.refused_keys.append(began)
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.asked += 1
            await asyncio.sleep(0.01)

    async def is_under_way(self) -> bool:
        """It has asked for a while: several probes fit into it."""
        return self.asked > 100

    async def listen(self) -> None:
        async with self.store.subscribe("news") as messages:
            async for message in messages:
                self.heard.append(message)

    async def hears(self, message: bytes, within: float = BACK_SECONDS) -> None:
        """What is published arrives, soon: the subscription has moved too."""
        async with asyncio.timeout(within):
            while message not in self.heard:
                await self.store.publish("news", message)
                await asyncio.sleep(0.05)  # a message may get lost: Store.publish says so

    async def is_back(self, since: float, within: float = BACK_SECONDS) -> None:
        """Nothing is decided alone any more after so many seconds, for at least one."""
        await asyncio.sleep(max(0.0, since + within - time.monotonic()) + 1)  # the load goes on meanwhile
        assert self.store.state == "ok"
        assert max([*self.alone_at, *self.refused_keys], default=0) < since + within
        assert self.asked > 100
        assert self.slowest < 1


@asynccontextmanager
async def loaded(url: str, timeout: float = 0.25) -> AsyncIterator[Load]:
    async with FailoverStore(ValkeyStore(url, timeout=timeout), MemoryStore()) as store:
        load = Load(store)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(load.run()), group.create_task(load.listen())]
            await eventually(load.is_under_way, within=20)
            assert not load.alone_at
            await load.hears(b"before")
            yield load
            for task in tasks:
                task.cancel()


async def becomes(store: FailoverStore, state: str, within: float = BACK_SECONDS) -> None:
    """Wait for the store's state."""

    async def has_become() -> bool:
        return store.state == state

    await eventually(has_become, within)


async def acted(act: Callable[[], object]) -> float:
    """Do it in a thread; when it was done."""
    await asyncio.to_thread(act)
    return time.monotonic()


async def test_a_planned_failover_behind_one_address(start: Stores) -> None:
    """The address moves, the old primary stays up as a replica, and its connections stay open."""
    primary, replica = start.pair()
    relay = start.relay(primary.port)

    def fail_over() -> None:
        replica.replicate(None)
        relay.target = replica.port
        primary.replicate(replica.port)

    async with loaded(f"redis://127.0.0.1:{relay.port}") as load:
        since = await acted(fail_over)
        await load.hears(b"after")
        await load.is_back(since)
    with replica.client() as client:
        assert client.zcard("oib:s:calls") > 0


async def test_the_address_moves_later_than_the_primary(start_valkey: Stores) -> None:
    primary, replica = start_valkey.pair()
    relay = start_valkey.relay(primary.port)

    def fail_over() -> None:
        replica.replicate(None)
        primary.replicate(replica.port)
        time.sleep(2)  # the address is late, as a name with a long life is
        relay.target = replica.port

    async with loaded(f"redis://127.0.0.1:{relay.port}") as load:
        since = await acted(fail_over)
        await load.hears(b"after")
        await load.is_back(since)


async def test_a_name_leads_elsewhere_while_the_old_server_takes_writes(start_valkey: Stores) -> None:
    old, new = start_valkey.server(), start_valkey.server()
    relay = start_valkey.relay(old.port)

    def move() -> None:
        relay.target = new.port

    async with loaded(f"redis://127.0.0.1:{relay.port}") as load:
        since = await acted(move)
        await load.hears(b"after")
        await load.is_back(since)
        assert not load.alone_at, "both took writes all the time"
        await load.store.set("after", b"1", 60)
    with new.client() as client:
        assert client.exists("oib:v:after")


async def test_a_member_that_the_new_primary_has_not_seen_is_replayed(start_valkey: Stores) -> None:
    primary, replica = start_valkey.pair()
    relay = start_valkey.relay(primary.port)
    async with FailoverStore(ValkeyStore(f"redis://127.0.0.1:{relay.port}"), MemoryStore()) as store:
        await store.add_member("pause", "seen", 60)
        await asyncio.to_thread(primary.wait_for_replica)
        replica.freeze()
        primary.ask("CLIENT", "KILL", "TYPE", "REPLICA")  # else the next write waits in the replica's socket
        await store.add_member("pause", "unseen", 60)
        primary.kill()
        replica.process.send_signal(signal.SIGCONT)
        replica.replicate(None)
        assert replica.ask("ZCARD", "oib:s:pause") == 1
        relay.target = replica.port
        await asyncio.to_thread(until, lambda: replica.ask("ZCARD", "oib:s:pause") == 2, BACK_SECONDS)


@pytest.mark.parametrize("accident", ["planned", "kill"])
async def test_sentinels(start: Stores, accident: str) -> None:
    primary, _ = start.pair()
    sentinels = start.sentinels(primary)

    def fail_over() -> None:
        if accident == "kill":
            primary.kill()
        else:
            sentinels[0].ask("SENTINEL", "FAILOVER", "voice")
        name = str(primary.port).encode()
        until(lambda: sentinels[0].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "voice")[1] != name)

    async with loaded(url_of("redis+sentinel", sentinels, "/voice")) as load:
        since = await acted(fail_over)
        await load.hears(b"after")
        await load.is_back(since)


async def test_one_sentinel_of_three_is_a_black_hole_and_one_is_gone(start_valkey: Stores) -> None:
    primary, _ = start_valkey.pair()
    sentinels = start_valkey.sentinels(primary)
    sentinels[0].freeze()
    sentinels[1].kill()
    async with loaded(url_of("valkey+sentinel", sentinels, "/voice")) as load:
        await load.is_back(time.monotonic(), within=1)


async def test_sentinels_that_disagree(start_valkey: Stores) -> None:
    """One still names the demoted primary, another a dead one: the server that takes writes is the one."""
    primary, replica = start_valkey.pair()
    dead = start_valkey.server()
    named = [dead.port, replica.port, primary.port]
    dead.kill()
    disagreeing = [start_valkey.server(sentinel=f"sentinel monitor voice 127.0.0.1 {port} 1\n") for port in named]
    async with loaded(url_of("redis+sentinel", disagreeing, "/voice")) as load:
        await load.is_back(time.monotonic(), within=1)
    with primary.client() as client:
        assert client.zcard("oib:s:calls") > 0


@pytest.mark.parametrize("names", ["another", ""])
async def test_sentinels_that_know_no_primary(start_valkey: Stores, names: str) -> None:
    primary = start_valkey.server()
    sentinel = start_valkey.server(sentinel=f"sentinel monitor voice 127.0.0.1 {primary.port} 1\n")
    if not names:
        primary.kill()
    url = url_of("redis+sentinel", [sentinel], f"/{names or 'voice'}")
    async with FailoverStore(ValkeyStore(url), MemoryStore()) as store:
        assert (await store.decide(LimitRequest([Rate("r", 1, 60)]))).local
        assert store.state == "down"


async def test_sentinel_and_store_with_logins(start_valkey: Stores) -> None:
    primary = start_valkey.server()
    primary.ask(*f"ACL SETUSER broker on >hush {RIGHTS}".split())
    more = "sentinel auth-user voice broker\nsentinel auth-pass voice hush\nrequirepass guard\n"
    sentinel = start_valkey.server(sentinel=f"sentinel monitor voice 127.0.0.1 {primary.port} 1\n{more}")
    good = url_of("redis+sentinel", [sentinel], "/voice?sentinel_password=guard", login="broker:hush@")
    async with ValkeyStore(good) as store:
        await store.set("a", b"1", 60)
        assert await store.get("a") == b"1"
    for wrong in (
        url_of("redis+sentinel", [sentinel], "/voice?sentinel_password=wr0ng", login="broker:hush@"),
        url_of("redis+sentinel", [sentinel], "/voice?sentinel_password=guard", login="broker:wr0ng@"),
    ):
        async with ValkeyStore(wrong) as store:
            with pytest.raises(StoreUnavailable) as caught:
                await store.get("a")
            assert "wr0ng" not in repr(caught.value)


def owner_of_slot(nodes: list[Server]) -> Server | None:
    """The node of these that serves the broker's hash slot."""
    living = next(node for node in nodes if node.process.poll() is None)
    slot = living.ask("CLUSTER", "KEYSLOT", SLOT_TAG)
    ranges = living.ask("CLUSTER", "SLOTS")
    for first, last, owner, *_ in ranges:
        if first <= slot <= last:
            return next((node for node in nodes if node.port == owner[1]), None)
    return None


async def test_the_slots_owner_in_a_cluster_dies(start: Stores) -> None:
    nodes = start.cluster()
    owner = owner_of_slot(nodes)
    assert owner is not None

    def die() -> None:
        owner.kill()
        living = [node for node in nodes if node is not owner]
        until(lambda: owner_of_slot(living) and all(cluster_is_ok(node) for node in living))

    url = url_of("redis+cluster", nodes[:2])
    async with loaded(url) as load:
        since = await acted(die)
        await load.hears(b"after")
        await load.is_back(since)
    heir = owner_of_slot([node for node in nodes if node is not owner])
    assert heir is not None
    with heir.client() as client:
        assert client.zcard("{oib}:s:calls") > 0


async def test_the_slot_moves_in_a_cluster(start: Stores) -> None:
    nodes = start.cluster(replicas=False)
    owner = owner_of_slot(nodes)
    assert owner is not None
    target = next(node for node in nodes if node is not owner)

    def reshard() -> None:
        slot = owner.ask("CLUSTER", "KEYSLOT", SLOT_TAG)
        ids = {node: str(node.ask("CLUSTER", "MYID"), "ascii") for node in nodes}
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[owner])
        owner.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        for _ in range(100):
            keys = owner.ask("CLUSTER", "GETKEYSINSLOT", slot, 1000)
            if not keys:
                break
            owner.ask("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, owner, *nodes):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[target])

    async with loaded(url_of("redis+cluster", nodes)) as load:
        since = await acted(reshard)
        await load.hears(b"after")
        await load.is_back(since)
    assert owner_of_slot(nodes) is target


async def test_a_cluster_with_an_uncovered_slot(start_valkey: Stores) -> None:
    nodes = start_valkey.cluster(replicas=False)
    owner = owner_of_slot(nodes)
    assert owner is not None
    async with loaded(url_of("redis+cluster", nodes)) as load:
        owner.kill()
        await becomes(load.store, "down")
        await asyncio.sleep(2.5 * PROBE_SECONDS)  # no probe may call it back
        assert load.store.state == "down"
        assert load.slowest < 1
        owner.start()
        await becomes(load.store, "ok", within=15)


async def test_a_cluster_without_sharded_channels(start: Stores) -> None:
    """As Redis 6 is."""
    rename = ("--rename-command", "SSUBSCRIBE", "", "--rename-command", "SPUBLISH", "")
    nodes = start.cluster(3, *rename, replicas=False)
    async with loaded(url_of("redis+cluster", nodes)) as load:
        await load.is_back(time.monotonic(), within=1)


async def test_a_login_that_changes(start_valkey: Stores) -> None:
    """The server wants another password; connections are cut; the file of the URL brings it."""
    server = start_valkey.server("--requirepass", "old")
    async with loaded(f"redis://:old@127.0.0.1:{server.port}") as load:
        with redis.Redis(port=server.port, password="old") as client:
            client.config_set("requirepass", "new")
            client.client_kill_filter(skipme=True)
        await becomes(load.store, "down")
        load.store.use(f"redis://:new@127.0.0.1:{server.port}")
        since = time.monotonic()
        await load.is_back(since)
        await load.hears(b"after")


async def test_a_new_login_while_the_old_one_works(start_valkey: Stores) -> None:
    """Nothing is lost: the old connection answers what it was asked."""
    server = start_valkey.server()
    async with loaded(f"redis://127.0.0.1:{server.port}") as load:
        load.store.use(f"valkey://127.0.0.1:{server.port}")
        await load.hears(b"after")
        await asyncio.sleep(PROBE_SECONDS)  # a probe has used the new connection
        assert not load.alone_at
        assert not load.refused_keys
        with pytest.raises(ValueError, match="restart"):
            load.store.use(f"redis+cluster://127.0.0.1:{server.port}")


async def test_a_store_far_away(start_valkey: Stores) -> None:
    """200 ms of round trip."""
    server = start_valkey.server()
    relay = start_valkey.relay(server.port, delay=0.1)
    url = f"redis://127.0.0.1:{relay.port}"
    async with FailoverStore(ValkeyStore(url, timeout=2), MemoryStore()) as store:
        request = LimitRequest([Rate("r", 5, 60)], [Slot("s", None)], member="a", lease=60)
        assert not (await store.decide(request)).local
        for number in range(200):
            store._queue_change(["far"], f"m{number}", 60)
        with capture_logs() as logs:
            await asyncio.to_thread(until, lambda: server.ask("ZCARD", "oib:s:far") == 200)
        assert store.state == "ok"
        assert "store_lost" not in [entry["event"] for entry in logs]
    async with FailoverStore(ValkeyStore(url, timeout=0.15), MemoryStore()) as store:
        assert (await store.decide(request)).local


async def test_a_socket(start_valkey: Stores) -> None:
    folder = start_valkey._folder
    start_valkey.server("--unixsocket", str(folder / "s"))
    async with loaded(f"redis+unix://{folder}/s?db=2") as load:
        await load.is_back(time.monotonic(), within=1)
    assert os.path.exists(folder / "s")


TLS = "--tls-replication yes --tls-auth-clients no"


@pytest.fixture
def start_tls() -> Iterator[Stores]:
    """Redis's server: the wheel's Valkey has no TLS."""
    with stores("redis") as started:
        yield started


async def works(url: str) -> None:
    """A value is written and read, and a message arrives."""
    async with ValkeyStore(url, timeout=1) as store, store.subscribe("news") as messages:
        await store.set("a", b"1", 60)
        assert await store.get("a") == b"1"
        hearing = asyncio.ensure_future(anext(messages))
        async with asyncio.timeout(BACK_SECONDS):
            while not hearing.done():
                await store.publish("news", b"2")
                await asyncio.sleep(0.1)  # a message may get lost: Store.publish says so
        assert hearing.result() == b"2"


async def test_tls_with_a_login(start_tls: Stores, tmp_path: Path) -> None:
    """One server, a Sentinel and a cluster, each with TLS, a private authority, a user and a password."""
    authority = Authority(tmp_path)
    files = f"--tls-cert-file {authority.certificate} --tls-key-file {authority.key}"
    files += f" --tls-ca-cert-file {authority.certificate}"
    port = free_port()
    primary = start_tls.server(*f"{files} {TLS} --tls-port {port}".split())
    primary.ask(*f"ACL SETUSER broker on >hush {RIGHTS}".split())
    trust = f"ssl_ca_certs={authority.certificate}"
    await works(f"rediss://broker:hush@127.0.0.1:{port}/?{trust}")
    with pytest.raises(StoreUnavailable):
        await works(f"rediss://broker:hush@127.0.0.1:{port}/")
    with pytest.raises(StoreUnavailable):
        await works(f"rediss://broker:wrong@127.0.0.1:{port}/?{trust}")

    options = f"{files} {TLS}".split("--")
    lines = "".join(f"{option.strip()}\n" for option in options if option)
    sentinel_port = free_port()
    start_tls.server(
        sentinel=f"{lines}tls-port {sentinel_port}\nsentinel monitor voice 127.0.0.1 {port} 1\n"
        "sentinel auth-user voice default\n"
    )
    await works(f"rediss+sentinel://broker:hush@127.0.0.1:{sentinel_port}/voice?{trust}")
    with pytest.raises(StoreUnavailable):
        await works(f"rediss+sentinel://broker:hush@127.0.0.1:{sentinel_port}/voice")

    ports = [free_port() for _ in range(3)]
    nodes = start_tls.cluster(3, *f"{files} {TLS} --tls-port".split(), replicas=False, each=ports)
    for node in nodes:
        node.ask(*f"ACL SETUSER broker on >hush {RIGHTS.replace('oib', '{oib}')}".split())
    await works(f"rediss+cluster://broker:hush@127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}?{trust}")
    with pytest.raises(StoreUnavailable):
        await works(f"rediss+cluster://broker:wrong@127.0.0.1:{ports[0]}?{trust}")
