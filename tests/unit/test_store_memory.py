"""The store in memory, by an injected clock: ends, sweeping, size."""

import itertools
import random

import pytest

from app.store import Change, Due, LimitRequest, ListEntry, Rate, Slot, open_store
from app.store.memory import FEW, SHARDS, SWEEP_SECONDS, MemoryStore


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(clock)


async def test_values_end(store: MemoryStore, clock: Clock) -> None:
    await store.set("a", b"1", 10)
    clock.now += 9.5
    assert await store.get("a") == b"1"
    assert not await store.add("a", b"2", 10)
    clock.now += 0.5
    assert await store.get("a") is None
    assert not await store.replace("a", b"1", b"2", 10)
    assert not await store.delete("a")
    assert await store.add("a", b"2", 10)
    assert await store.get("a") == b"2"


async def test_a_list_ends_after_its_last_push(store: MemoryStore, clock: Clock) -> None:
    await store.change(Change({}, entry=ListEntry("l", b"1", 3, 10)))
    clock.now += 9
    await store.change(Change({}, entry=ListEntry("l", b"2", 3, 10)))
    clock.now += 9
    assert await store.items("l") == [b"2", b"1"]
    clock.now += 1
    assert await store.items("l") == []
    await store.change(Change({}, entry=ListEntry("l", b"3", 3, 10)))
    assert await store.items("l") == [b"3"]


async def test_a_member_ends_and_its_end_can_move(store: MemoryStore, clock: Clock) -> None:
    slot = Slot("s", 2)
    await store.decide(LimitRequest([], [slot], member="a", lease=10))
    await store.decide(LimitRequest([], [slot], member="b", lease=10))
    assert (await store.decide(LimitRequest([], [slot], member="c", lease=10))).refused == (0,)
    clock.now += 5
    await store.add_member("s", "a", 10)
    clock.now += 5
    assert await store.members("s") == {"a": 5}
    assert (await store.decide(LimitRequest([], [slot], member="c", lease=10))).used == (2,)
    await store.add_member("s", "a", 1)
    clock.now += 1
    assert await store.members("s") == {"c": 9}


@pytest.mark.parametrize("stay", [1, FEW + 1])
@pytest.mark.parametrize("seconds", [1, 1000])
async def test_members_that_come_and_go_leave_nothing(store: MemoryStore, stay: int, seconds: int) -> None:
    for number in range(stay):
        await store.add_member("s", f"stays{number}", 1e6)
    for number in range(10_000):
        await store.add_member("s", f"m{number}", 1e5 + number % seconds)
        await store.remove_member(["s"], f"m{number}")
    many = store._sets.of("s")["s"]._many
    assert (many is None) == (stay == 1)
    assert many is None or many._entries < 200
    for number in range(stay):
        await store.remove_member(["s"], f"stays{number}")
    assert len(store) == 0


async def test_plans_that_move_leave_nothing(store: MemoryStore) -> None:
    for number in range(10_000):
        await store.change(Change({}, due=Due("moves", 1e5 + number % 100)))
    assert store._due._times._entries < 200
    assert store._due.members == ["moves"]


class Model:
    """Members and their ends, kept in the simplest way."""

    def __init__(self) -> None:
        self.ends: dict[str, float] = {}

    def living(self, now: float) -> dict[str, float]:
        self.ends = {member: end for member, end in self.ends.items() if end > now}
        return self.ends


@pytest.mark.parametrize("names", [FEW - 1, FEW, 3 * FEW, 300])
async def test_a_set_is_exact_whatever_its_size(store: MemoryStore, clock: Clock, names: int) -> None:
    chance, model = random.Random(names), Model()
    for _ in range(3000):
        clock.now += chance.choice([0, 0, 0.001, 0.3, 1, 7.5])
        member = f"m{chance.randrange(names)}"
        if chance.random() < 0.7:
            seconds = chance.choice([0.2, 1, 5, 30.5, 30.75])
            await store.add_member("s", member, seconds)
            model.living(clock.now)[member] = clock.now + seconds
        else:
            assert await store.remove_member(["s"], member) == (member in model.living(clock.now))
            model.ends.pop(member, None)
        assert await store.members("s") == {each: end - clock.now for each, end in model.living(clock.now).items()}


async def test_what_is_due_is_taken_in_its_order_and_once(store: MemoryStore, clock: Clock) -> None:
    chance, plans = random.Random(1), dict[str, float]()
    taken = 0
    for _ in range(3000):
        clock.now += chance.choice([0, 0.001, 0.2, 1.5])
        member = f"m{chance.randrange(40)}"
        delay = chance.choice([None, -0.5, 0, 0.3, 0.6, 4, 30])
        await store.change(Change({}, due=Due(member, delay)))
        plans.pop(member, None)
        if delay is not None:
            plans[member] = clock.now + delay
        due = sorted((at, each) for each, at in plans.items() if at <= clock.now)[:3]
        assert await store.take_due(3, 5.0) == [each for _, each in due]
        plans |= {each: clock.now + 5.0 for _, each in due}
        taken += len(due)
    assert taken > 1000


async def test_users_pass_and_nothing_remains(store: MemoryStore, clock: Clock) -> None:
    most = 0
    for number in range(100_000):
        clock.now += 0.002  # five hundred new users a second, each with a window of ten seconds
        await store.decide(LimitRequest((Rate(f"user{number}", 5, 10),)))
        if number % 1000 == 0:
            most = max(most, len(store))
    assert most <= 5_000 + 32_000 + 1_000  # those that count, and a round of sweeping
    clock.now += 10
    for _ in range(SHARDS):
        clock.now += SWEEP_SECONDS
        await store.get("any")
    assert len(store) == 0


async def test_no_step_looks_at_everything(store: MemoryStore, clock: Clock) -> None:
    for number in range(50_000):
        await store.set(f"v{number}", b"", 5)
    clock.now += 5
    await store.get("any")
    assert len(store) > 49_000
    assert max(len(shard) for shard in store._values._shards) < 1000


async def test_every_kind_is_swept(store: MemoryStore, clock: Clock) -> None:
    for number in range(100):
        await store.set(f"v{number}", b"", 5)
        await store.change(Change({}, entry=ListEntry(f"l{number}", b"", 1, 5)))
        await store.add_member(f"s{number}", "m", 5)
        await store.decide(LimitRequest([Rate(f"r{number}", 1, 5)]))
    assert len(store) == 400
    clock.now += 5
    for _ in range(SHARDS):
        clock.now += SWEEP_SECONDS
        await store.get("any")
    assert len(store) == 0


async def test_a_store_in_memory_is_always_ok() -> None:
    async with open_store("memory://") as store:
        assert store.state == "ok"
        assert not store.shared


@pytest.mark.parametrize(
    "url", ["", "memory", "http://s3cret@host", "redis://user:s3cret@host:port", "redis://:s3cret@h:6379?nonsense=1"]
)
def test_a_wrong_url_is_told_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="URL") as caught:
        open_store(url)
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in "".join(itertools.chain.from_iterable(map(str, caught.value.args)))
