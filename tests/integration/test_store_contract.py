"""Behaviour that all stores share: in memory, on Valkey, and on Valkey with a local one to fall back on."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from app.store import (
    KEPT,
    PAGE,
    Budget,
    Change,
    Due,
    Leave,
    LimitRequest,
    ListEntry,
    Member,
    Rate,
    Slot,
    Store,
    Value,
    open_store,
)
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
    await store.change(Change({}, entry=ListEntry(name, b"b", 2, 60)))
    await store.add_member(name, "c", 60)
    await store.decide(LimitRequest([Rate(name, 1, 60)]))
    assert await store.get(name) == b"a"
    assert await store.items(name) == [b"b"]


async def test_lists_keep_the_newest(store: Store, name: str) -> None:
    assert await store.items(name) == []
    for value in (b"1", b"2", b"3", b"4"):
        await store.change(Change({}, entry=ListEntry(name, value, 3, 60)))
    assert await store.items(name) == [b"4", b"3", b"2"]


def whole_change(name: str, expected: bytes | None) -> Change:
    """A change with one write of each kind."""
    return Change(
        {name: expected, f"{name}-none": None},
        [Value(name, b"new", 60), Value(f"{name}-short", b"short", 0.02)],
        [Member(name, "joins", 60)],
        [Leave(name, "leaves")],
        ListEntry(name, b"entry", 3, 60),
    )


async def test_a_change_makes_all_its_writes(store: Store, name: str) -> None:
    await store.set(name, b"is", 60)
    await store.add_member(name, "leaves", 60)

    assert await store.change(whole_change(name, b"is"))

    assert await store.get(name) == b"new"
    assert set(await store.members(name)) == {"joins"}
    assert await store.items(name) == [b"entry"]
    await gone(store, f"{name}-short")


@pytest.mark.parametrize("differs", ["value", "absent", "present"])
async def test_a_change_makes_no_write_if_a_value_is_not_as_expected(store: Store, name: str, differs: str) -> None:
    if differs != "absent":
        await store.set(name, b"is" if differs == "present" else b"other", 60)
    if differs == "present":
        await store.set(f"{name}-none", b"", 60)
    await store.add_member(name, "leaves", 60)
    before = await store.get(name)

    assert not await store.change(whole_change(name, b"is"))

    assert await store.get(name) == before
    assert set(await store.members(name)) == {"leaves"}
    assert await store.items(name) == []
    assert await store.get(f"{name}-short") is None


async def test_of_two_changes_of_one_value_one_is_made(store: Store, name: str) -> None:
    await store.set(name, b"0", 60)
    changes = [Change({name: b"0"}, [Value(name, f"{number}".encode(), 60)]) for number in range(1, 20)]
    assert sum(await asyncio.gather(*map(store.change, changes))) == 1


async def test_a_counted_request_sets_its_record_and_gives_it_back(store: Store, name: str) -> None:
    request = LimitRequest([Rate(name, 1, 60)], [Slot(name, None)], "m", 60, record=Value(name, b"record", 60))
    first = await store.decide(request)
    assert await store.get(name) == b"record"

    assert await store.give_back(request, first)

    assert await store.get(name) is None
    assert await store.members(name) == {}


async def test_a_refused_request_sets_no_record_and_a_late_one_overwrites_none(store: Store, name: str) -> None:
    request = LimitRequest([Rate(name, 1, 60)], [Slot(name, None)], "m", 60, record=Value(name, b"record", 60))
    await store.set(name, b"moved on", 60)
    assert (await store.decide(request)).counted
    assert await store.get(name) == b"moved on"
    await store.delete(name)
    assert (await store.decide(request)).refused
    assert await store.get(name) is None


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


# --- the index of due times ---


async def take(store: Store, most: int = 100, claim: float = 60, held: Sequence[str] = ()) -> list[str]:
    return await store.take_due(most, claim, held)


async def test_what_is_due_is_taken_once_and_again_after_its_claim(store: Store, name: str) -> None:
    for member, delay in (("later", 60.0), ("second", -1), ("first", -2)):
        await store.change(Change({}, due=Due(f"{name} {member}", delay)))
    mine = [each for each in await take(store, claim=0.05) if each.startswith(name)]
    assert mine == [f"{name} first", f"{name} second"]
    assert not [each for each in await take(store) if each.startswith(name)]
    await asyncio.sleep(0.06)  # the claim's time
    assert {each for each in await take(store) if each.startswith(name)} == set(mine)


async def test_a_claim_that_is_held_starts_again(store: Store, name: str) -> None:
    await store.change(Change({}, due=Due(name, 0)))
    assert name in await take(store, claim=0.01)
    await take(store, most=0, claim=60, held=[name, f"{name}-unknown"])
    await asyncio.sleep(0.02)  # the first claim's time
    assert name not in await take(store)
    assert await store.due_in([f"{name}-unknown"]) == [None]


async def test_an_entry_is_moved_and_taken_out(store: Store, name: str) -> None:
    await store.change(Change({}, due=Due(name, 30)))
    await store.change(Change({}, due=Due(name, 50)))
    left = (await store.due_in([name, f"{name}-other"]))[0]
    assert left is not None
    assert 49 < left <= 50
    await store.change(Change({}, due=Due(name, None)))
    assert await store.due_in([name]) == [None]


# --- budgets ---


def session(name: str, member: str, start: float, seconds: int = 100, **options: Any) -> LimitRequest:
    """A start that takes a slot with a budget."""
    budgets = [Budget(0, seconds, **options)]
    return LimitRequest([], [Slot(name, None)], f"{member} {int(start)} main", 600, budgets=budgets)


async def left_of(store: Store, name: str, seconds: int = 100) -> float:
    look = LimitRequest([], [Slot(name, None)], cost=0, budgets=[Budget(0, seconds)])
    return (await store.decide(look)).budgets[0].remaining


async def leave(store: Store, name: str, member: str, start: float, seconds: float) -> None:
    await store.change(Change({}, leaves=[Leave(name, f"{member} {int(start)} main", seconds)]))


async def test_members_use_their_budget_from_their_start_on(store: Store, name: str) -> None:
    now = store.now()
    assert (await store.decide(session(name, "a", now - 30))).allowed
    assert 68 < await left_of(store, name) <= 70
    assert (await store.decide(session(name, "b", now - 20))).allowed
    assert 48 < await left_of(store, name) <= 50


async def test_what_a_member_used_stays_when_it_leaves_and_is_counted_once(store: Store, name: str) -> None:
    now = store.now()
    await store.decide(session(name, "a", now - 30))
    for _ in range(2):
        await leave(store, name, "a", now - 30, 45)
    assert await left_of(store, name) == 55


async def test_a_budget_without_rest_refuses_and_counts_nothing(store: Store, name: str) -> None:
    now = store.now()
    await store.decide(session(name, "a", now - 120))
    refused = await store.decide(session(name, "b", now))
    assert (refused.refused, refused.counted) == ((1,), False)
    assert refused.budgets[0] == (0, 0), "no end is known"
    await leave(store, name, "a", now - 120, 100)
    refused = await store.decide(session(name, "b", now))
    assert refused.refused == (1,)
    assert 86_000 < refused.budgets[0].reset <= 86_401


async def test_an_observed_budget_counts_and_ends_nothing(store: Store, name: str) -> None:
    request = session(name, "a", store.now() - 120, enforced=False)._replace(enforce=False)
    await store.decide(request)
    again = await store.decide(request._replace(member=f"b {int(store.now())} main"))
    assert (again.refused, again.counted) == ((1,), True)
    assert await store.due_in([f"budget:{name}"]) == [None]


async def test_a_budget_is_due_when_it_runs_out_and_not_without_members(store: Store, name: str) -> None:
    now = store.now()
    await store.decide(session(name, "a", now - 20))
    await store.decide(session(name, "b", now - 20))
    (left,) = await store.due_in([f"budget:{name}"])
    assert left is not None
    assert 28.5 < left <= 30.1, "two use 60 s together in 30 s"
    await leave(store, name, "a", now - 20, 10)
    (left,) = await store.due_in([f"budget:{name}"])
    assert left is not None
    assert 68.5 < left <= 70.1
    await leave(store, name, "b", now - 20, 10)
    assert await store.due_in([f"budget:{name}"]) == [None]


async def test_a_start_that_is_given_back_used_nothing(store: Store, name: str) -> None:
    request = session(name, "a", store.now() - 30)
    await store.give_back(request, await store.decide(request))
    assert await left_of(store, name) == 100


async def test_a_member_that_came_unseen_counts(store: Store, name: str) -> None:
    now = store.now()
    await store.decide(session(name, "a", now))
    await store.add_member(name, f"b {int(now) - 50} main", 60)
    assert 48 < await left_of(store, name) <= 50


async def test_a_claimed_budget_keeps_its_claim_while_it_is_out(store: Store, name: str) -> None:
    now = store.now()
    await store.decide(session(name, "a", now - 60))
    await store.decide(session(name, "b", now - 60))
    assert f"budget:{name}" in await take(store, claim=5)
    await leave(store, name, "a", now - 60, 60)
    (left,) = await store.due_in([f"budget:{name}"])
    assert left is not None
    assert 1.5 < left <= 2


@pytest.mark.parametrize("count", [5, 2 * PAGE + 1])
async def test_every_member_is_read_however_many_there_are(store: Store, name: str, count: int) -> None:
    added = [f"m{number}" for number in range(count)]
    for start in range(0, count, 50):  # each has 250 ms, also on a busy machine
        await asyncio.gather(*(store.add_member(name, member, 60) for member in added[start : start + 50]))
    assert {member async for page in pages_of(store, name) for member in page} == set(added)
    members = await store.members(name)
    assert members.keys() == set(added)
    assert all(50 < left <= 60 for left in members.values())


def pages_of(store: Store, name: str) -> AsyncIterator[list[str]]:
    return store.pages(name)


async def test_an_unlimited_budget_refuses_nothing_and_counts(store: Store, name: str) -> None:
    now = store.now()
    for member in ("a", "b"):
        request = session(name, member, now - 50)._replace(budgets=[Budget(0, None)])
        assert (await store.decide(request)).allowed
    assert await store.due_in([f"budget:{name}"]) == [None]
    assert await left_of(store, name, 130) < 30


async def test_a_limit_that_is_gone_ends_nothing(store: Store, name: str) -> None:
    now = store.now()
    await store.decide(session(name, "a", now - 90))
    await store.decide(session(name, "b", now - 90))
    assert await store.has_run_out(name, KEPT)
    assert not await store.has_run_out(name, 1000)
    assert not await store.has_run_out(name, None)
    assert await store.due_in([f"budget:{name}"]) == [None]


async def test_members_that_a_change_brings_plan_when_the_budget_runs_out(store: Store, name: str) -> None:
    now = store.now()
    await store.has_run_out(name, 100)
    await store.decide(session(name, "a", now - 10))
    await store.change(Change({}, joins=[Member(name, f"b {int(now) - 10} main", 600, timed=True)]))
    (left,) = await store.due_in([f"budget:{name}"])
    assert left is not None
    assert 38.5 < left <= 40.1


async def test_a_member_whose_lease_ends_unseen_has_used_its_time(store: Store, name: str) -> None:
    now = store.now()
    await store.decide(session(name, "a", now - 60)._replace(lease=0.02))
    await store.decide(session(name, "b", now - 5))
    await asyncio.sleep(0.03)  # the lease of the first
    assert not await store.has_run_out(name, KEPT)
    assert 30 < await left_of(store, name) <= 35
    await leave(store, name, "b", now - 5, 5)
    assert await store.due_in([f"budget:{name}"]) == [None]
