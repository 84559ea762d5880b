"""The shared store dies, freezes and comes back, under load: no one waits long, nothing starts from zero."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, MutableMapping, Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from app.config.agents import Agent
from app.config.plans import Entitlement
from app.identity import User
from app.limits import CallAttempt, Limits, Reservation
from app.limits.ledger import Ledger
from app.limits.record import nothing
from app.problems import Problem
from app.store import Change, LimitRequest, Member, Rate, Slot, StoreUnavailable, Value
from app.store.failover import MISSED, FailoverStore
from app.store.memory import MemoryStore
from app.store.valkey import ValkeyStore
from tests.support.valkey import Valkey, running_valkey


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with running_valkey() as server:
        yield server


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[FailoverStore]:
    async with FailoverStore(ValkeyStore(valkey.url), MemoryStore()) as opened:
        yield opened


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the time to come back is not the question. Wanted before `store`."""
    monkeypatch.setattr("app.store.failover.PROBE_SECONDS", 0.1)


def store_events(logs: Sequence[MutableMapping[str, Any]]) -> list[str]:
    """What happened to the store; without what is said about its set-up."""
    return [entry["event"] for entry in logs if entry["event"] != "store_warning"]


async def until(store: FailoverStore, state: str) -> float:
    """Seconds until the store says so, five at most."""
    began = time.monotonic()
    async with asyncio.timeout(5):
        while store.state != state:
            await asyncio.sleep(0.005)
    return time.monotonic() - began


@contextlib.asynccontextmanager
async def load(store: FailoverStore) -> AsyncIterator[list[float]]:
    """Twenty callers at it all the time; the seconds that each question took. None may fail."""
    took: list[float] = []
    over = asyncio.Event()
    rates = [Rate("load-minute", 10**6, 60), Rate("load-day", 10**6, 86400)]

    async def ask(caller: int) -> None:
        while not over.is_set():
            began = time.monotonic()
            request = LimitRequest(rates, [Slot("load", None)], member=f"m{caller}", lease=60)
            decision = await store.decide(request)
            await store.remove_member(["load"], f"m{caller}")
            await store.give_back(request, decision)
            assert f"m{caller}" not in await store.members("load")
            await store.publish("load", b"")
            took.append(time.monotonic() - began)
            await asyncio.sleep(0.005)

    async with asyncio.TaskGroup() as callers:
        for caller in range(20):
            callers.create_task(ask(caller))
        try:
            yield took
        finally:
            over.set()


@pytest.fixture
def callbacks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """CPU seconds of every callback that the event loop runs."""
    took: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        took.append(time.thread_time() - began)

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    return took


@pytest.mark.process
@pytest.mark.alone
@pytest.mark.parametrize("accident", ["kill", "freeze"])
async def test_a_lost_store(store: FailoverStore, valkey: Valkey, accident: str, callbacks: list[float]) -> None:
    user = Rate("user", 5, 60)
    for _ in range(3):
        assert not (await store.decide(LimitRequest([user]))).local
    with capture_logs() as logs:
        async with load(store) as took:
            await asyncio.sleep(0.2)
            valkey.kill() if accident == "kill" else valkey.freeze()
            assert await until(store, "down") < 0.5
            began = time.monotonic()
            answers = [await store.decide(LimitRequest([user])) for _ in range(4)]
            assert time.monotonic() - began < 0.1
            assert [answer.allowed for answer in answers] == [True, True, False, False]  # three were counted before
            assert {answer.local for answer in answers} == {True}
            with pytest.raises(StoreUnavailable):
                await store.get("a")
            await asyncio.sleep(1.2)  # a probe fails meanwhile
            assert store_events(logs) == ["store_lost"]
            valkey.restart() if accident == "kill" else valkey.thaw()
            assert await until(store, "ok") < 2
            after = len(took)
            assert not (await store.decide(LimitRequest([user], cost=0))).local
            await asyncio.sleep(0.2)
        assert max(took) < 0.5
        assert len(took) > after > 1000
    emptied = ["store_emptied"] if accident == "kill" else []
    assert store_events(logs) == ["store_lost", *emptied, "store_recovered"]
    assert "127.0.0.1" not in str(logs)
    assert max(callbacks) < 0.05
    with valkey.client() as client:
        keys = client.keys("*")
        assert keys
        assert all(key.startswith(b"oib:") and client.pttl(key) > 0 for key in keys)


@pytest.mark.usefixtures("quick_probe")
async def test_what_entered_and_left_meanwhile_is_told(store: FailoverStore, valkey: Valkey) -> None:
    await store.add_member("calls", "before", 60)
    valkey.freeze()
    try:
        assert await store.remove_member(["calls"], "before")
        await store.add_member("calls", "entered", 60)
        await store.add_member("calls", "over", 0.01)
        assert (await store.members("calls")).keys() >= {"entered"}
        await asyncio.sleep(0.02)
    finally:
        valkey.thaw()
    await until(store, "ok")
    members = await store.members("calls")
    assert members.keys() == {"entered"}
    assert all(50 < left <= 60 for left in members.values())


async def test_a_give_back_reaches_both(store: FailoverStore, valkey: Valkey) -> None:
    request = LimitRequest([Rate("r", 1, 60)], [Slot("s", 1)], member="a", lease=60)
    decision = await store.decide(request)
    await store.give_back(request, decision)
    assert (await store.decide(request._replace(cost=0))).used == (0,)
    valkey.kill()
    alone = await store.decide(request)
    assert alone.local
    assert alone.allowed


@pytest.mark.usefixtures("quick_probe")
async def test_slots_and_records_are_settled_together_after_a_loss(store: FailoverStore, valkey: Valkey) -> None:
    """A frozen server carries out what it was sent: a session that was then refused locally must not keep its slot."""
    ledger = Ledger(store, lease=60)
    limits = Limits(
        store,
        ledger,
        [Agent("main", "agt_1", None, frozenset())],
        global_session_limits="100/minute",
        request_limits="100/minute",
        max_live_calls_total=None,
    )
    ann = User(mode="jwt", id="ann")

    async def reserve(name: str) -> Reservation:
        attempt = CallAttempt(name, int(time.time()), "main", ann.store_name, "owner")
        entitlement = Entitlement("100/minute", 2, None, 60)
        return await limits.reserve(ann, limits.agents[0], attempt, entitlement)

    undone = await reserve("undone")
    valkey.freeze()
    try:
        await reserve("during")
        with pytest.raises(Problem, match="too-many-live-calls"):
            await reserve("refused")
        await limits.release(undone)
        await limits.release(await reserve("brief"))
    finally:
        valkey.thaw()
    await until(store, "ok")
    for request_id in list(ledger.unconfirmed):
        await ledger.move(request_id, nothing)

    assert [member.split()[0] for member in await store.members("live:all")] == ["during"]
    states = {name: await ledger.find(name) for name in ("during", "refused", "undone", "brief")}
    assert {name: record.state for name, record in states.items() if record is not None and record.running} == {
        "during": "reserved"
    }


@pytest.mark.usefixtures("quick_probe")
async def test_what_cannot_be_told_yet_is_told_later(store: FailoverStore, valkey: Valkey) -> None:
    await store.add_member("calls", "one", 60)
    with valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-zrem")
        assert await store.remove_member(["calls"], "one")
        await asyncio.sleep(0.3)
        assert store.state == "down"
        client.execute_command("ACL", "SETUSER", "default", "+zrem")
    await until(store, "ok")
    assert await store.members("calls") == {}


async def test_what_is_missed_is_bounded(store: FailoverStore, valkey: Valkey) -> None:
    valkey.kill()
    for number in range(MISSED + 50):
        await store.add_member("s", f"m{number}", 60)
    assert len(store._missed) == MISSED
    await store.remove_member(["s"], f"m{MISSED + 49}")
    assert len(store._missed) == MISSED


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("get", ("a",)),
        ("set", ("a", b"", 1)),
        ("add", ("a", b"", 1)),
        ("replace", ("a", b"", b"", 1)),
        ("delete", ("a",)),
        ("items", ("a",)),
    ],
)
async def test_what_replicas_agree_on_is_not_guessed(
    unused_tcp_port: int, operation: str, arguments: tuple[Any, ...]
) -> None:
    async with FailoverStore(ValkeyStore(f"redis://127.0.0.1:{unused_tcp_port}"), MemoryStore()) as store:
        with pytest.raises(StoreUnavailable):
            await getattr(store, operation)(*arguments)
        with pytest.raises(StoreUnavailable):
            await store.change(Change({}, [Value("a", b"", 1)], joins=[Member("s", "m", 60)]))
        assert set(await store.members("s")) == {"m"}, "this replica's own calls still take their places"


@pytest.mark.usefixtures("quick_probe")
async def test_messages_reach_this_process_meanwhile(store: FailoverStore, valkey: Valkey) -> None:
    async with store.subscribe("c") as messages:
        valkey.kill()
        await store.publish("c", b"1")
        async with asyncio.timeout(1):
            assert await anext(messages) == b"1"
        async with store.subscribe("other"):
            pass
        valkey.restart()
        await until(store, "ok")
        async with asyncio.timeout(5):
            while not await store._shared._ask("PUBLISH", "oib:c:c", b"2"):
                await asyncio.sleep(0.01)
            assert await anext(messages) == b"2"


@pytest.mark.usefixtures("quick_probe")
async def test_a_store_that_takes_no_writes_counts_as_lost(store: FailoverStore, valkey: Valkey) -> None:
    """It answers pings all the while; a probe that only pinged would call it back each second."""
    with valkey.client() as client, capture_logs() as logs:
        client.config_set("maxmemory", "1")
        assert (await store.decide(LimitRequest([Rate("r", 1, 60)]))).local
        await asyncio.sleep(0.5)
        assert store.state == "down"
        client.config_set("maxmemory", "0")
        await until(store, "ok")
    assert store_events(logs) == ["store_lost", "store_recovered"]
    assert logs[0]["reason"] == "OutOfMemoryError"


async def test_nothing_is_left_running(valkey: Valkey) -> None:
    before = asyncio.all_tasks()
    async with FailoverStore(ValkeyStore(valkey.url), MemoryStore()) as store:
        await store.decide(LimitRequest([Rate("r", 1, 60)]))
        async with store.subscribe("c"):
            assert len(asyncio.all_tasks()) > len(before)
    assert asyncio.all_tasks() == before
    with valkey.client() as client:
        async with asyncio.timeout(2):
            while len(client.client_list()) > 1:
                await asyncio.sleep(0.005)
