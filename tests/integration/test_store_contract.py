"""Behaviour that all stores share: in memory, on Valkey, and on Valkey with a local one to fall back on."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from app.store import LimitRequest, Rate, Slot, Store, Value, open_store
from app.store.valkey import ValkeyStore


@pytest.fixture(params=["memory", "valkey", "failover"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        opened: Store = open_store("memory://")
    else:
        url = request.getfixturevalue("valkey").url
        opened = ValkeyStore(url) if request.param == "valkey" else open_store(url)
    async with opened as entered:
        assert entered.shared == (request.param != "memory")
        yield entered
        assert entered.state == "ok"


@pytest.fixture
def name() -> str:
    """A name that no other test uses: cheaper than waiting for ends."""
    return uuid.uuid4().hex


async def gone(store: Store, name: str) -> None:
    """Wait until the value has ended, two seconds at most."""
    async with asyncio.timeout(2):
        while await store.get(name) is not None:
            await asyncio.sleep(0.005)


async def test_a_rate_lets_in_its_amount(store: Store, name: str) -> None:
    rate = Rate(name, 3, 60)
    remaining = []
    for _ in range(3):
        decision = await store.decide(LimitRequest([rate]))
        assert decision.allowed
        assert decision.counted
        assert 59 < decision.rates[0].reset <= 60
        remaining.append(decision.rates[0].remaining)
    assert remaining == [2, 1, 0]
    refused = await store.decide(LimitRequest([rate]))
    assert (refused.refused, refused.counted, refused.rates[0].remaining) == ((0,), False, 0)
    assert 59 < refused.rates[0].reset <= 60


@pytest.mark.parametrize("amount", [5, 500])
async def test_all_or_nothing(store: Store, name: str, amount: int) -> None:
    full, open_, slot = Rate(name, 1, 60), Rate(name + "open", amount, 60), Slot(name, 1)
    await store.decide(LimitRequest([full]))
    refused = await store.decide(LimitRequest([open_, full], [slot], member="a", lease=60))
    assert (refused.refused, refused.counted, refused.used) == ((1,), False, (0,))
    assert (await store.decide(LimitRequest([open_], cost=0))).rates[0].remaining == amount
    await store.add_member(name, "other", 60)
    refused = await store.decide(LimitRequest([open_], [slot], member="a", lease=60))
    assert (refused.refused, refused.used) == ((1,), (1,))
    assert (await store.decide(LimitRequest([open_], cost=0))).rates[0].remaining == amount
    assert (await store.decide(LimitRequest([full], [slot], member="a", lease=60))).refused == (0, 1)


async def test_a_look_counts_nothing(store: Store, name: str) -> None:
    rate, slot = Rate(name, 2, 60), Slot(name, 1)
    for _ in range(3):
        look = await store.decide(LimitRequest([rate], [slot], cost=0))
        assert (look.refused, look.counted, look.used, look.rates[0].remaining) == ((), False, (0,), 2)
        assert look.rates[0].reset == 60
    await store.decide(LimitRequest([rate], [slot], member="a", lease=60, cost=2))
    look = await store.decide(LimitRequest([rate], [slot], cost=0))
    assert (look.refused, look.used, look.rates[0].remaining) == ((), (1,), 0)


@pytest.mark.parametrize("amount", [2, 200])
async def test_observing_counts_past_the_amount(store: Store, name: str, amount: int) -> None:
    rate, slot = Rate(name, amount, 60), Slot(name, 1)
    for number in range(amount + 100):
        decision = await store.decide(LimitRequest([rate], [slot], member=f"m{number}", lease=60, enforce=False))
        assert decision.counted
        assert decision.used == (number + 1,)
        assert (0 in decision.refused) == (number >= amount)
        assert (1 in decision.refused) == (number >= 1)


async def test_cost(store: Store, name: str) -> None:
    rate = Rate(name, 10, 60)
    assert (await store.decide(LimitRequest([rate], cost=7))).rates[0].remaining == 3
    assert not (await store.decide(LimitRequest([rate], cost=4))).allowed
    assert (await store.decide(LimitRequest([rate], cost=3))).allowed
    assert not (await store.decide(LimitRequest([Rate(name + "2", 2, 60)], cost=3))).allowed


@pytest.mark.parametrize("amount", [5, 500])
async def test_give_back(store: Store, name: str, amount: int) -> None:
    rate, slot = Rate(name, amount, 60), Slot(name, 1)
    two, three = LimitRequest([rate], cost=2), LimitRequest([rate], [slot], member="a", lease=60, cost=3)
    first, second = await store.decide(two), await store.decide(three)
    await store.give_back(three, second)
    look = await store.decide(LimitRequest([rate], [slot], cost=0))
    assert (look.rates[0].remaining, look.used) == (amount - 2, (0,))
    await store.give_back(two, first)
    look = await store.decide(LimitRequest([rate], cost=0))
    assert (look.rates[0].remaining, look.rates[0].reset) == (amount, 60)
    await store.give_back(two, look)  # counted nothing
    assert (await store.decide(LimitRequest([rate], cost=0))).rates[0].remaining == amount


async def test_slots(store: Store, name: str) -> None:
    slot, open_ = Slot(name, 2), Slot(name + "all", None)
    assert (await store.decide(LimitRequest([], [slot, open_], member="a", lease=60))).used == (1, 1)
    assert (await store.decide(LimitRequest([], [slot, open_], member="a", lease=30))).used == (1, 1)  # in already
    assert (await store.decide(LimitRequest([], [slot, open_], member="b", lease=60))).used == (2, 2)
    refused = await store.decide(LimitRequest([], [slot, open_], member="c", lease=60))
    assert (refused.refused, refused.used) == ((0,), (2, 2))
    members = await store.members(name)
    assert members.keys() == {"a", "b"}
    assert 29 < members["a"] <= 30
    assert await store.remove_member([name, name + "all"], "a")
    assert not await store.remove_member([name, name + "all"], "a")
    assert (await store.members(name + "all")).keys() == {"b"}
    assert (await store.decide(LimitRequest([], [slot, open_], member="c", lease=60))).allowed


async def test_slots_want_a_member(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="member"):
        await store.decide(LimitRequest([], [Slot(name, 1)], lease=60))


async def test_members_end(store: Store, name: str) -> None:
    await store.add_member(name, "short", 0.03)
    await store.add_member(name, "long", 60)
    async with asyncio.timeout(2):
        while (await store.members(name)).keys() != {"long"}:
            await asyncio.sleep(0.005)
    assert not await store.remove_member([name], "short")
    assert (await store.decide(LimitRequest([], [Slot(name, 2)], member="new", lease=60))).used == (2,)


async def test_values(store: Store, name: str) -> None:
    assert await store.get(name) is None
    await store.set(name, b"\x00\xff", 60)
    assert await store.get(name) == b"\x00\xff"
    assert not await store.add(name, b"b", 60)
    assert not await store.replace(name, b"other", b"b", 60)
    assert await store.replace(name, b"\x00\xff", b"b", 60)
    assert not await store.delete(name, b"other")
    assert await store.delete(name, b"b")
    assert not await store.delete(name)
    assert not await store.delete(name, b"b")
    assert await store.add(name, b"c", 60)
    assert await store.delete(name)
    assert not await store.replace(name, b"c", b"d", 60)


async def test_values_end(store: Store, name: str) -> None:
    await store.set(name, b"a", 0.02)
    await gone(store, name)
    assert await store.add(name, b"b", 60)
    assert await store.replace(name, b"b", b"c", 0.02)
    await gone(store, name)


async def test_one_name_for_every_kind(store: Store, name: str) -> None:
    await store.set(name, b"a", 60)
    await store.push(name, b"b", keep=2, ttl=60)
    await store.add_member(name, "c", 60)
    await store.decide(LimitRequest([Rate(name, 1, 60)]))
    assert await store.get(name) == b"a"
    assert await store.items(name) == [b"b"]


async def test_lists_keep_the_newest(store: Store, name: str) -> None:
    assert await store.items(name) == []
    for value in (b"1", b"2", b"3", b"4"):
        await store.push(name, value, keep=3, ttl=60)
    assert await store.items(name) == [b"4", b"3", b"2"]


async def test_values_are_set_with_what_is_pushed(store: Store, name: str) -> None:
    setting = [Value(f"{name}1", b"one", 60), Value(f"{name}2", b"two", 0.02)]

    await store.push(name, b"pushed", keep=3, ttl=60, setting=setting)

    assert await store.items(name) == [b"pushed"]
    assert await store.get(f"{name}1") == b"one"
    await gone(store, f"{name}2")


async def test_names_are_any_text(store: Store, name: str) -> None:
    odd = f"{name} \n\x00ü\ud800 {{x}}"
    await store.add_member(odd, odd, 60)
    assert (await store.members(odd)).keys() == {odd}
    assert (await store.decide(LimitRequest([Rate(odd, 1, 60)], [Slot(odd, 5)], member="b\n c", lease=60))).used == (2,)


async def test_messages(store: Store, name: str) -> None:
    await store.publish(name, b"before anybody listened")
    async with store.subscribe(name) as one, store.subscribe(name) as two, store.subscribe(name + "x") as other:
        for message in (b"1", b"2"):
            await store.publish(name, message)
        await store.publish(name + "x", b"3")
        async with asyncio.timeout(2):
            assert [await anext(one), await anext(one)] == [b"1", b"2"]
            assert [await anext(two), await anext(two)] == [b"1", b"2"]
            assert await anext(other) == b"3"
    async with store.subscribe(name) as again:
        await store.publish(name, b"4")
        async with asyncio.timeout(2):
            assert await anext(again) == b"4"


async def test_a_slow_reader_loses_the_oldest(store: Store, name: str) -> None:
    async with store.subscribe(name) as slow, store.subscribe(name + "end") as end:
        for number in range(100):
            await store.publish(name, b"%d" % number)
        await store.publish(name + "end", b"")
        async with asyncio.timeout(2):
            await anext(end)
            assert await anext(slow) == b"36"
