"""The store in memory, by an injected clock: ends, sweeping, size."""

import itertools

import pytest

from app.store import Change, Entry, LimitRequest, Rate, Slot, open_store
from app.store.memory import SHARDS, SWEEP_SECONDS, MemoryStore


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
    await store.change(Change({}, entry=Entry("l", b"1", 3, 10)))
    clock.now += 9
    await store.change(Change({}, entry=Entry("l", b"2", 3, 10)))
    clock.now += 9
    assert await store.items("l") == [b"2", b"1"]
    clock.now += 1
    assert await store.items("l") == []
    await store.change(Change({}, entry=Entry("l", b"3", 3, 10)))
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


async def test_members_that_come_and_go_leave_nothing(store: MemoryStore) -> None:
    await store.add_member("s", "stays", 1e6)
    for number in range(10_000):
        await store.add_member("s", f"m{number}", 1e6)
        await store.remove_member(["s"], f"m{number}")
    assert len(store._sets.of("s")["s"]._queue) < 200
    await store.remove_member(["s"], "stays")
    assert len(store) == 0


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
        await store.change(Change({}, entry=Entry(f"l{number}", b"", 1, 5)))
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
