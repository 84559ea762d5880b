"""The shared store alone: several processes, one script per operation, ends on every key, bounded waits."""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest

from app.clock import Clock
from app.store import (
    KEPT,
    Budget,
    Change,
    Decision,
    Due,
    Leave,
    LimitRequest,
    ListEntry,
    Member,
    Rate,
    Slot,
    StoreUnavailable,
    Value,
    scripts,
)
from app.store.memory import MemoryStore
from app.store.scripts import Script
from app.store.valkey import ValkeyStore
from tests.support.valkey import Valkey


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[ValkeyStore]:
    async with ValkeyStore(valkey.url) as opened:
        yield opened


RACE = """
import asyncio, sys
from app.store import LimitRequest, Rate, Slot
from app.store.valkey import ValkeyStore

async def main():
    rates = [Rate("user", 5, 60), Rate("all", 500, 60)]
    async with ValkeyStore(sys.argv[1]) as store:
        await store.get("warm")
        print("ready", flush=True)
        sys.stdin.readline()
        answers = await asyncio.gather(*(
            store.decide(LimitRequest(rates, [Slot("s", 50)], member=f"{sys.argv[2]}{n}", lease=60)) for n in range(100)
        ))
        print(sum(answer.allowed for answer in answers), flush=True)

asyncio.run(main())
"""


@pytest.mark.process
async def test_two_processes_and_two_hundred_questions_at_once(valkey: Valkey, store: ValkeyStore) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, valkey.url, racer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for racer in "ab"
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    allowed = [int(racer.communicate(timeout=10)[0]) for racer in racers]
    assert sum(allowed) == 5
    look = await store.decide(LimitRequest([Rate("user", 5, 60), Rate("all", 500, 60)], [Slot("s", 50)], cost=0))
    assert ([state.remaining for state in look.rates], look.used) == ([0, 495], (5,))


def tell_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all scripts read the time from the key `clock`."""
    told = "local now = tonumber(redis.call('GET', 'clock'))\n"
    for name, script in vars(scripts).copy().items():
        if isinstance(script, Script) and scripts._NOW in script.text:
            monkeypatch.setattr(scripts, name, Script(script.text.replace(scripts._NOW, told)))


@pytest.mark.parametrize("seed", range(6))
async def test_the_scripts_decide_as_memory_does(
    store: ValkeyStore, valkey: Valkey, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The same questions at the same times, the server's clock being set by the test (in 1/64 s, exact in doubles)."""
    tell_the_time(monkeypatch)
    chance = random.Random(seed)
    now = float(int(time.time()) + 1)
    memory = MemoryStore(lambda: now)
    rates = [Rate("one", 1, 10), Rate("five", 5, 20), Rate("exact", 64, 30), Rate("grid", 65, 30), Rate("big", 300, 30)]
    slots = [Slot("few", 3), Slot("many", None)]
    given: list[tuple[LimitRequest, Decision, Decision]] = []
    with valkey.client() as client:
        for _ in range(600):
            now += chance.choice([0, 0, 1, 2, 5, 40]) / 64
            client.set("clock", f"{now * 1e6:.0f}")
            asked = chance.sample(rates, chance.randint(1, 4))
            entered = chance.sample(slots, chance.randint(0, 2))
            member = f"m{chance.randrange(6)}"
            match chance.randrange(12):
                case 0 if given:
                    request, shared, own = given.pop(chance.randrange(len(given)))
                    await store.give_back(request, shared)
                    await memory.give_back(request, own)
                case 1:
                    assert await store.remove_member(["few", "many"], member) == await memory.remove_member(
                        ["few", "many"], member
                    )
                case 2:
                    assert await store.members("few") == pytest.approx(await memory.members("few"))
                case _:
                    cost, enforce, lease = chance.choice([0, 1, 1, 1, 3]), chance.random() < 0.8, chance.choice([1, 9])
                    request = LimitRequest(asked, entered, member, lease, cost, enforce)
                    shared, own = await store.decide(request), await memory.decide(request)
                    assert (shared.refused, shared.used, shared.counted) == (own.refused, own.used, own.counted)
                    assert [s.remaining for s in shared.rates] == [s.remaining for s in own.rates]
                    assert [s.reset for s in shared.rates] == pytest.approx([s.reset for s in own.rates])
                    if own.counted:
                        given.append((request, shared, own))
                        del given[:-10]


@pytest.mark.parametrize("seed", range(6))
async def test_budgets_and_due_times_are_those_of_memory(
    store: ValkeyStore, valkey: Valkey, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The same starts and ends at the same times (in 1/8 s: whole milliseconds), over three windows."""
    tell_the_time(monkeypatch)
    chance = random.Random(seed)
    now = float(int(time.time()) + 1)
    memory = MemoryStore(lambda: now)
    slots = [Slot("few", 4), Slot("many", None)]
    running: list[tuple[LimitRequest, Decision, Decision]] = []
    index = ["budget:few", "budget:many", "one", "two"]
    with valkey.client() as client:
        client.delete("oib:s:due")
        for number in range(600):
            now += chance.choice([0, 1, 8, 80, 800, 8000]) / 8
            client.set("clock", f"{now * 1e6:.0f}")
            match chance.randrange(10):
                case 8:
                    about, limit = chance.choice(slots).name, chance.choice([KEPT, KEPT, None, 600])
                    assert await store.has_run_out(about, limit) == await memory.has_run_out(about, limit)
                case 9:
                    lease = 10**6
                    joins = [Member(slot.name, f"j{number} {int(now)} main", lease, timed=True) for slot in slots]
                    assert await store.change(Change({}, joins=joins)) == await memory.change(Change({}, joins=joins))
                case 0 | 1 if running:
                    request, *_ = running.pop(chance.randrange(len(running)))
                    used = chance.choice([0, 1.5, 30, 400])
                    change = Change({}, leaves=[Leave(slot.name, request.member, used) for slot in slots])
                    assert await store.change(change) == await memory.change(change)
                case 2 if running:
                    request, shared, own = running.pop()
                    await store.give_back(request, shared)
                    await memory.give_back(request, own)
                case 3:
                    change = Change({}, due=Due(chance.choice(["one", "two"]), chance.choice([0, 5, 100, None])))
                    assert await store.change(change) == await memory.change(change)
                case 4:
                    most, claim, held = chance.randrange(4), chance.choice([1, 5]), chance.sample(index, 1)
                    assert await store.take_due(most, claim, held) == await memory.take_due(most, claim, held)
                case _:
                    seconds = chance.choice([30, 600, 5000, None])
                    enforced = chance.random() < 0.8
                    budgets = [Budget(0, seconds, enforced), Budget(1, 20_000)]
                    member = f"m{number} {int(now) - chance.choice([0, 0, 20])} main"
                    request = LimitRequest([], slots, member, 10**6, chance.choice([0, 1, 1]), enforced, None, budgets)
                    shared, own = await store.decide(request), await memory.decide(request)
                    assert (shared.refused, shared.used, shared.counted) == (own.refused, own.used, own.counted)
                    assert [each for s in shared.budgets for each in s] == pytest.approx(
                        [each for s in own.budgets for each in s], abs=0.002
                    )
                    if own.counted:
                        running.append((request, shared, own))
            assert await store.due_in(index) == pytest.approx(await memory.due_in(index), abs=0.002)


@pytest.mark.parametrize("ahead", [-600, 600])
async def test_the_time_is_the_servers_whatever_the_clock_of_the_process_says(valkey: Valkey, ahead: int) -> None:
    clock = Clock(lambda: time.time() + ahead, time.monotonic)
    async with ValkeyStore(valkey.url, clock=clock) as opened:
        assert abs(opened.now() - time.time() - ahead) < 1
        await opened.mark("generation", "beat:a", "first", 1, 60)
        assert abs(opened.now() - time.time()) < 1


async def test_a_window_moves_on(store: ValkeyStore) -> None:
    rates = [Rate("few", 5, 1), Rate("many", 500, 1)]
    loop = asyncio.get_running_loop()
    began = loop.time()
    await store.decide(LimitRequest(rates, cost=5))
    await store.decide(LimitRequest(rates[1:], cost=495))
    refused = await store.decide(LimitRequest(rates))
    assert refused.refused == (0, 1)
    await asyncio.sleep(max(state.reset for state in refused.rates) + 0.002)
    assert (await store.decide(LimitRequest(rates, cost=5))).allowed
    assert loop.time() - began >= 1


async def test_every_key_has_the_prefix_and_an_end(store: ValkeyStore, valkey: Valkey) -> None:
    rates, slots = [Rate("a", 5, 60), Rate("b", 500, 86400)], [Slot("s", 5), Slot("t", None)]
    first = await store.decide(LimitRequest(rates, slots, member="m", lease=3600))
    await store.decide(LimitRequest(rates, slots, member="n", lease=60))
    await store.give_back(LimitRequest(rates), first)
    await store.add_member("s", "o", 5)
    await store.set("v", b"", 60)
    await store.add("w", b"", 60)
    await store.replace("w", b"", b"x", 50)
    await store.change(Change({}, [Value("x", b"", 30)], entry=ListEntry("l", b"", 1, 40)))
    await store.decide(LimitRequest(record=Value("y", b"", 20)))
    await store.decide(LimitRequest([], [Slot("u", 5)], "m 1 main", 40, budgets=[Budget(0, 60)]))
    with valkey.client() as client:
        ends = {key.decode(): client.pttl(key) / 1000 for key in client.keys("*")}
    expected = {
        "r:a": 60,
        "r:b": 86400,
        "s:s": 3600,
        "s:t": 3600,
        "v:v": 60,
        "v:w": 50,
        "l:l": 40,
        "v:x": 30,
        "v:y": 20,
        "s:u": 40,
        "b:u": 8 * 86400,
        "s:due": 8 * 86400,
    }
    assert ends == pytest.approx({f"oib:{name}": end for name, end in expected.items()}, abs=2)


async def test_a_question_is_one_command(store: ValkeyStore, valkey: Valkey) -> None:
    rates, slots = [Rate(f"r{n}", 5, 60) for n in range(4)], [Slot("s", 5), Slot("t", 5)]
    request = LimitRequest(rates, slots, member="n", lease=60)
    with valkey.client() as client:
        client.script_flush()
        await store.decide(request._replace(member="m"))
        client.config_resetstat()
        decision = await store.decide(request)
        await store.give_back(request, decision)  # the first of its kind: unknown, then told
        await store.decide(request)
        stats = client.info("commandstats")
        assert stats["cmdstat_evalsha"]["calls"] == 3
        assert stats["cmdstat_eval"]["calls"] == 1
        client.script_flush()
    assert (await store.decide(request._replace(member="o"))).allowed


async def test_questions_cut_short_harm_nobody(store: ValkeyStore, valkey: Valkey) -> None:
    """Every answer belongs to its question, also after many callers went away in the middle of theirs."""

    async def ask(number: int) -> None:
        name = f"n{number}"
        await store.set(name, name.encode(), 60)
        assert await store.get(name) == name.encode()

    for round_ in range(10):
        tasks = [asyncio.create_task(ask(number)) for number in range(round_ * 100, round_ * 100 + 100)]
        await asyncio.sleep(0.001 * round_)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [
            result for result in results if result is not None and not isinstance(result, asyncio.CancelledError)
        ] == []
        assert results[1::2] == [None] * 50
    with valkey.client() as client:
        assert len(client.client_list(_type="normal")) == 2, "this one, and one for all questions"


async def test_questions_of_one_moment_leave_together(store: ValkeyStore, valkey: Valkey) -> None:
    await store.get("warm")
    with valkey.client() as client:
        before = client.info("stats")["total_reads_processed"]
        await asyncio.gather(*(store.get(f"n{number}") for number in range(200)))
        reads = client.info("stats")["total_reads_processed"] - before
    assert reads < 20


async def test_a_connection_cut_in_the_middle_fails_its_questions_and_no_others(
    store: ValkeyStore, valkey: Valkey
) -> None:
    await store.set("a", b"1", 60)
    valkey.freeze()
    asked = [asyncio.create_task(store.get("a")) for _ in range(20)]
    await asyncio.sleep(0.02)  # they are on their way; that some are not yet changes nothing below
    valkey.thaw()
    with valkey.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(answer) for answer in answers} <= {bytes, StoreUnavailable}
    assert await asyncio.gather(*(store.get("a") for _ in range(20))) == [b"1"] * 20


async def test_a_connection_closed_while_idle_is_not_noticed(store: ValkeyStore, valkey: Valkey) -> None:
    await store.set("a", b"1", 60)
    with valkey.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)
    await asyncio.sleep(0.05)
    assert await store.get("a") == b"1"


async def test_a_frozen_server_is_given_up_in_time(store: ValkeyStore, valkey: Valkey) -> None:
    await store.set("a", b"1", 60)
    loop = asyncio.get_running_loop()
    valkey.freeze()
    try:
        began = loop.time()
        answers = await asyncio.gather(*(store.get("a") for _ in range(100)), return_exceptions=True)
        took = loop.time() - began
    finally:
        valkey.thaw()
    assert {type(answer) for answer in answers} == {StoreUnavailable}
    assert 0.2 < took < 0.5
    assert await store.get("a") == b"1"


async def test_nobody_there(unused_tcp_port: int) -> None:
    async with ValkeyStore(f"redis://user:s3cret@127.0.0.1:{unused_tcp_port}") as store:
        with pytest.raises(StoreUnavailable) as caught:
            await store.get("a")
        assert "s3cret" not in repr(caught.value)
        async with store.subscribe("channel"):
            pass


async def test_a_server_that_wants_a_password(valkey: Valkey) -> None:
    with valkey.client() as client:
        client.config_set("requirepass", "s3cret-and-long")
        try:
            for credentials in ("", ":wr0ng@"):
                async with ValkeyStore(f"redis://{credentials}127.0.0.1:{valkey.port}") as store:
                    with pytest.raises(StoreUnavailable) as caught:
                        await store.get("a")
                    assert "wr0ng" not in repr(caught.value)
            async with ValkeyStore(f"valkey://:s3cret-and-long@127.0.0.1:{valkey.port}/3") as store:
                await store.set("in-db-3", b"1", 60)
        finally:
            client.config_set("requirepass", "")
        assert not client.exists("oib:v:in-db-3")


async def test_a_server_that_takes_no_writes(store: ValkeyStore, valkey: Valkey) -> None:
    with valkey.client() as client:
        client.config_set("maxmemory", "1")
        try:
            with pytest.raises(StoreUnavailable, match="OutOfMemory"):
                await store.decide(LimitRequest([Rate("full", 1, 60)]))
        finally:
            client.config_set("maxmemory", "0")
    assert (await store.decide(LimitRequest([Rate("full", 1, 60)]))).allowed


async def test_subscriptions_come_back(store: ValkeyStore, valkey: Valkey) -> None:
    async with store.subscribe("one") as one, store.subscribe("two") as two:
        with valkey.client() as client:
            client.client_kill_filter(_type="pubsub")

            async def told(channel: str) -> None:
                while not client.publish(f"oib:c:{channel}", b"again"):
                    await asyncio.sleep(0.01)

            async with asyncio.timeout(5):
                await told("one")
                await told("two")
                assert await anext(one) == b"again"
                assert await anext(two) == b"again"


async def test_a_silent_subscription_is_made_anew(
    store: ValkeyStore, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.store.subscriber.SILENCE_SECONDS", 0.05)
    async with store.subscribe("one") as one:
        connection = store._subscriber._connection
        await asyncio.sleep(0.2)
        assert store._subscriber._connection is connection  # it answers when asked
        valkey.freeze()
        try:
            async with asyncio.timeout(5):
                while store._subscriber._connection is connection:
                    await asyncio.sleep(0.01)
        finally:
            valkey.thaw()
        async with asyncio.timeout(5):
            while store._subscriber._connection is None:
                await asyncio.sleep(0.01)
            await store._subscriber.follow("one")
            await store.publish("one", b"again")
            assert await anext(one) == b"again"


async def test_only_wanted_channels_are_subscribed(store: ValkeyStore, valkey: Valkey) -> None:
    with valkey.client() as client:
        async with store.subscribe("one"):
            async with store.subscribe("one"), store.subscribe("two"):
                assert client.pubsub_numsub("oib:c:one", "oib:c:two") == [(b"oib:c:one", 1), (b"oib:c:two", 1)]
            async with asyncio.timeout(2):
                while client.pubsub_channels() != [b"oib:c:one"]:
                    await asyncio.sleep(0.005)
