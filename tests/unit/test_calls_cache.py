"""Fetching calls: how often OneInbox is asked, what is cached, and for how long."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import httpx
import pytest

from app.calls import cache as module
from app.calls.snapshots import Snapshot
from app.limits.live_calls import RUMOUR_SECONDS
from app.oneinbox.errors import OneInboxError
from app.problems import Problem
from tests.support.call_world import (
    ANN,
    ANONYMOUS,
    BEN,
    DATE,
    CallWorld,
    Replica,
    outcome,
    pseudonym,
)
from tests.support.simulated_time import in_simulated_time


async def fetches_after(replica: Replica, *pauses: float, call: str = "call_1", known: bool = True) -> list[int]:
    """Read a call after each pause; return how often each read asked OneInbox."""
    fetches = []
    for pause in pauses:
        await asyncio.sleep(pause)
        before = len(replica.world.oneinbox.requests)
        await (replica.cache.get(call) if known else replica.cache.get_if(bool, call))
        fetches.append(len(replica.world.oneinbox.requests) - before)
    return fetches


async def slug_of(replica: Replica, call: str, *, known: bool = False) -> str:
    """The slug of the outcome of reading a call."""
    found = await outcome(replica.cache.get(call) if known else replica.cache.get_if(bool, call))
    if isinstance(found, Problem):
        return found.slug
    if isinstance(found, OneInboxError):
        return found.slug
    return "not-found" if found is None else "found"


@in_simulated_time
async def test_a_running_call_is_fetched_once_a_second() -> None:
    world = CallWorld()
    world.oneinbox.has(status="in_progress")

    assert await fetches_after(world.replica(), 0, 0.5, 0.49, 0.02, 0.9, 0.2) == [1, 0, 0, 1, 0, 1]


@in_simulated_time
async def test_an_ended_call_is_fetched_every_two_seconds_for_a_minute_and_then_every_hour() -> None:
    world = CallWorld()
    world.oneinbox.has(status="completed")
    replica = world.replica()

    assert await fetches_after(replica, 0, 1.9, 0.2, 1.9, 0.2) == [1, 0, 1, 0, 1]
    assert await fetches_after(replica, 60, 3000, 599, 2, 3599) == [1, 0, 0, 1, 0]


@in_simulated_time
async def test_a_call_that_ends_late_settles_a_minute_after_its_end() -> None:
    world = CallWorld()
    record = world.oneinbox.has(status="in_progress")
    replica = world.replica()
    await fetches_after(replica, 0, 100)

    record["status"] = "completed"

    assert await fetches_after(replica, 2, 3, 3) == [1, 1, 1]


@in_simulated_time
async def test_absence_is_remembered_for_a_minute() -> None:
    world = CallWorld()

    assert await fetches_after(world.replica(), 0, 1, 58, 2, 59, known=False) == [1, 0, 0, 1, 0]


@in_simulated_time
async def test_absence_of_a_started_call_is_remembered_for_a_second() -> None:
    world = CallWorld()
    replica = world.replica()
    await replica.start_call(ANN)

    assert await fetches_after(replica, 0, 0.9, 0.2, 0.9) == [1, 0, 1, 0]
    # In anonymous mode only the key says so.
    assert await fetches_after(replica, 0, 0.9, 0.2, 0.9, call="call_2") == [1, 0, 1, 0]


@in_simulated_time
async def test_another_users_request_for_a_future_call_does_not_hide_it() -> None:
    world = CallWorld()
    replica = world.replica()
    assert await outcome(replica.calls.read(BEN, "call_1")) != ()
    assert await slug_of(replica, "call_1") == "not-found"

    world.oneinbox.has(owner=pseudonym(ANN))
    await replica.start_call(ANN)

    snapshot = await replica.calls.read(ANN, "call_1")
    assert snapshot.owner == pseudonym(ANN)


@in_simulated_time
async def test_a_call_that_is_deleted_is_gone_although_it_was_known() -> None:
    world = CallWorld()
    world.oneinbox.has()
    replica = world.replica()
    assert await slug_of(replica, "call_1", known=True) == "found"

    world.oneinbox.records.clear()
    await asyncio.sleep(2)
    assert await slug_of(replica, "call_1", known=True) == "found", "one 404 is a rumour"
    await asyncio.sleep(RUMOUR_SECONDS)

    # Not even in the second in which OneInbox is not asked again.
    assert [await slug_of(replica, "call_1", known=True) for _ in range(3)] == ["not-found"] * 3


@in_simulated_time
async def test_a_cached_owner_refuses_other_users_without_a_fetch() -> None:
    world = CallWorld()
    world.oneinbox.has(owner=pseudonym(ANN), status="in_progress")
    replica = world.replica()
    await replica.calls.read(ANN, "call_1")

    for _ in range(100):
        await asyncio.sleep(0.5)
        assert isinstance(await outcome(replica.calls.read(BEN, "call_1")), Problem)

    assert len(world.oneinbox.requests) == 1
    await asyncio.sleep(20)
    assert isinstance(await outcome(replica.calls.read(BEN, "call_1")), Problem)
    assert len(world.oneinbox.requests) == 2


@pytest.mark.parametrize("status", [404, 422])
@in_simulated_time
async def test_an_id_that_oneinbox_would_never_give_out_is_not_found(status: int) -> None:
    world = CallWorld()
    world.oneinbox.failures = [
        httpx.Response(status, json={"detail": [{"loc": ["path", "call_id"], "msg": "no uuid"}]})
    ]
    world.oneinbox.fails_on = True

    assert await slug_of(world.replica(), "not-a-uuid") == "not-found"


@in_simulated_time
async def test_concurrent_reads_share_one_fetch() -> None:
    world = CallWorld()
    world.oneinbox.has()
    world.oneinbox.delay = 2
    replica = world.replica()

    first = asyncio.create_task(replica.cache.get("call_1"))
    others = [asyncio.create_task(replica.cache.get("call_1")) for _ in range(200)]
    await asyncio.sleep(1)
    first.cancel()
    late = [asyncio.create_task(replica.cache.get_if(bool, "call_1")) for _ in range(200)]
    found = await asyncio.gather(*others, *late)

    assert len(world.oneinbox.requests) == 2, "the first was cancelled with its fetch; all others share another one"
    assert all(isinstance(snapshot, Snapshot) for snapshot in found)


@in_simulated_time
async def test_a_fetch_that_fails_after_its_caller_was_cancelled_raises_nothing() -> None:
    world = CallWorld()
    world.oneinbox.delay = 2
    world.oneinbox.failures = [httpx.ConnectError("no"), RuntimeError("a bug")]
    replica = world.replica()

    for call in ("call_1", "call_2"):
        asking = asyncio.create_task(replica.cache.get(call))
        await asyncio.sleep(1)
        asking.cancel()
        await asyncio.sleep(3)

    assert len(world.oneinbox.requests) == 2  # in_simulated_time checks that no exception was left unretrieved


@in_simulated_time
async def test_a_call_costs_one_fetch_a_second_even_while_fetches_fail() -> None:
    world = CallWorld()
    world.oneinbox.failures, world.oneinbox.fails_on = [httpx.Response(500)], True
    replica = world.replica()

    results = []
    for _ in range(30):
        results.append(await slug_of(replica, "call_1", known=True))
        await asyncio.sleep(0.1)

    assert len(world.oneinbox.requests) <= 3
    assert set(results) == {"upstream-error", "at-capacity"}


@in_simulated_time
async def test_unknown_calls_cost_twenty_fetches_a_second_and_known_ones_are_answered() -> None:
    world = CallWorld()
    replica = world.replica()
    world.oneinbox.has("mine", owner=pseudonym(ANN), status="in_progress")
    await replica.calls.read(ANN, "mine")
    await asyncio.sleep(5)

    results = [await slug_of(replica, f"invented-{number}") for number in range(500)]

    assert results.count("not-found") == 20
    assert results.count("at-capacity") == 480
    refused = await outcome(replica.cache.get_if(bool, "invented"))
    assert refused.headers == {"Retry-After": "1"}
    before = len(world.oneinbox.requests)
    await replica.calls.read(ANN, "mine")
    assert len(world.oneinbox.requests) == before + 1, "known calls have their own budget"


SEEN: dict[str, Callable[[Replica], Awaitable[object]]] = {
    "never": lambda _: asyncio.sleep(0),
    "just-started": lambda replica: replica.start_call(ANN),
    "read-by-its-owner": lambda replica: replica.calls.read(ANN, "call_1"),
    "asked-for-by-a-stranger": lambda replica: outcome(replica.calls.read(BEN, "call_1")),
}


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("status", ["in_progress", "completed"])
@pytest.mark.parametrize("pause", [0, 2, 59, 61, 4000])
@in_simulated_time
async def test_a_strangers_call_and_no_call_look_the_same(seen: str, status: str, pause: float) -> None:
    async def answers(*names: str) -> list[str]:
        found = [await outcome(replica.calls.read(BEN, name)) for name in names]
        return [each.slug if isinstance(each, Problem) else "found" for each in found]

    world = CallWorld()
    world.oneinbox.has(owner=pseudonym(ANN), status=status)
    world.oneinbox.has("call_2", owner=pseudonym(ANN), status=status)
    replica = world.replica()
    await SEEN[seen](replica)
    if seen == "asked-for-by-a-stranger":
        await answers("no-call")
    await asyncio.sleep(pause)

    await answers(*(f"invented-{number}" for number in range(20)))
    used_up = await answers("call_1", "call_2", "no-call", "no-call-2", "call_1", "no-call")
    owner = await outcome(replica.calls.read(ANN, "call_1"))
    await asyncio.sleep(1.1)
    again = await answers("call_1", "no-call", "call_1", "no-call")

    remembered = "not-found" if seen == "asked-for-by-a-stranger" and pause < 60 else "at-capacity"
    assert used_up == [remembered, "at-capacity", remembered, "at-capacity", remembered, remembered]
    assert again == ["not-found"] * 4
    assert isinstance(owner, Snapshot) or seen in {"never", "asked-for-by-a-stranger"}


@in_simulated_time
async def test_strangers_who_ask_at_once_share_one_fetch_and_its_outcome() -> None:
    world = CallWorld()
    world.oneinbox.has(owner=pseudonym(ANN))
    world.oneinbox.delay = 1
    replica = world.replica()

    for name in ("call_1", "no-call"):
        before = len(world.oneinbox.requests)
        found = await asyncio.gather(*(outcome(replica.calls.read(BEN, name)) for _ in range(50)))
        assert {each.slug for each in found if isinstance(each, Problem)} == {"not-found"}
        assert len(world.oneinbox.requests) == before + 1


@in_simulated_time
async def test_all_reads_cost_a_hundred_fetches_a_second_and_then_known_calls_come_from_the_cache() -> None:
    world = CallWorld()
    replica = world.replica()
    calls = [f"mine-{number}" for number in range(150)]
    for call in calls:
        world.oneinbox.has(call, status="queued")
    for call in calls[:100]:
        assert await slug_of(replica, call, known=True) == "found"
    await asyncio.sleep(30)
    for call in calls:
        world.oneinbox.has(call, status="in_progress")
    before = len(world.oneinbox.requests)

    results = [await slug_of(replica, call, known=True) for call in reversed(calls)]

    assert len(world.oneinbox.requests) - before == 100
    # Fifty were fetched for the first time, fifty again, and fifty come from the cache.
    assert results == ["found"] * 150
    statuses = [replica.cache.latest(call) for call in calls]
    assert [b'"queued"' in (status.fields if status else b"") for status in statuses] == [True] * 50 + [False] * 100
    assert await slug_of(replica, "mine-new", known=True) == "at-capacity"


@in_simulated_time
async def test_memory_is_bounded_by_count() -> None:
    world = CallWorld()
    replica = world.replica()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CACHED_CALLS", 10)
        for number in range(25):
            world.oneinbox.has(f"call_{number}")
            await asyncio.sleep(1)
            await replica.cache.get(f"call_{number}")
            await replica.cache.get("call_0")  # used entries stay

    kept = [number for number in range(25) if replica.cache.latest(f"call_{number}")]
    assert kept == [0, *range(16, 25)]


@in_simulated_time
async def test_memory_is_bounded_by_bytes_however_calls_come_grow_shrink_and_go() -> None:
    most = 50_000
    dice = random.Random(7)
    world = CallWorld()
    replica = world.replica(expose=("summary",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CACHED_BYTES", most)
        for step in range(600):
            call = f"call_{dice.randrange(20)}"
            if step % 11 == 3:
                world.oneinbox.records.pop(call, None)
            else:
                world.oneinbox.has(call, ai_summary="x" * dice.randrange(9000))
            await asyncio.sleep(2)
            await replica.cache.get(call)
            kept = [found for n in range(40) if (found := replica.cache.latest(f"call_{n}"))]
            assert sum(len(snapshot.fields) for snapshot in kept) <= most
        # Nor does the count drift upwards until nothing fits.
        assert sum(len(snapshot.fields) for snapshot in kept) > most - 2 * 9300


@in_simulated_time
async def test_one_call_may_be_larger_than_the_memory_for_all() -> None:
    world = CallWorld()
    world.oneinbox.has(ai_summary="x" * 10_000, status="in_progress")
    replica = world.replica(expose=("summary",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CACHED_BYTES", 1000)

        assert await fetches_after(replica, 0, 0.5, 0.6) == [1, 0, 1]


@in_simulated_time
async def test_a_response_older_than_the_cached_state_changes_nothing() -> None:
    world = CallWorld()
    world.oneinbox.has(owner=pseudonym(ANN), status="in_progress")
    replica = world.replica()
    await replica.calls.read(ANN, "call_1")
    await asyncio.sleep(0.5)

    world.oneinbox.delay = 3
    slow = asyncio.create_task(replica.cache.fetch("call_1"))
    await asyncio.sleep(0.1)
    world.oneinbox.delay = 0
    stopped = await replica.calls.stop(ANN, "call_1")
    assert stopped.ended
    results = await slow

    assert results is not None
    assert results.ended
    assert (await replica.calls.read(ANN, "call_1")).ended


@in_simulated_time
async def test_a_refresh_does_not_use_a_fetch_that_began_before_it() -> None:
    world = CallWorld()
    record = world.oneinbox.has(owner=pseudonym(ANN), status="in_progress")
    replica = world.replica()
    await replica.start_call(ANN)

    world.oneinbox.delay = 1
    slow = asyncio.create_task(replica.cache.fetch("call_1"))
    await asyncio.sleep(0.5)
    record["status"] = "completed"
    await replica.calls.refresh("call_1")

    latest = replica.cache.latest("call_1")
    assert latest is not None
    assert latest.ended
    assert (await slow) is not None
    assert len(world.oneinbox.requests) == 2
    assert world.oneinbox.most_at_once == 1


@in_simulated_time
async def test_replicas_share_what_they_see() -> None:
    world = CallWorld(shared=True)
    world.oneinbox.has(status="in_progress")
    one, other = world.replica(), world.replica()

    assert await fetches_after(one, 0) == [1]
    assert await fetches_after(other, 0.5, 0.4, 0.2) == [0, 0, 1]
    assert await fetches_after(one, 0) == [0]


@in_simulated_time
async def test_a_large_call_is_not_shared() -> None:
    world = CallWorld(shared=True)
    record = world.oneinbox.has(ai_summary="short")
    one, other = world.replica(expose=("summary",)), world.replica(expose=("summary",))
    await one.cache.get("call_1")

    record["ai_summary"] = "x" * module.SHARED_BYTES
    await asyncio.sleep(2)
    await one.cache.get("call_1")

    assert await fetches_after(other, 0) == [1]
    latest = other.cache.latest("call_1")
    assert latest is not None
    assert len(latest.fields) > module.SHARED_BYTES


@pytest.mark.parametrize("skew", [-7200.0, -3.0, 3.0, 7200.0])
@in_simulated_time
async def test_no_replicas_wrong_date_makes_an_old_state_fresh(skew: float) -> None:
    world = CallWorld(shared=True)
    record = world.oneinbox.has(status="in_progress")
    wrong, right = world.replica(skew=skew), world.replica()

    for status in ("queued", "initiated", "in_progress", "completed"):
        for reader, before in ((wrong, right), (right, wrong), (wrong, wrong), (right, right)):
            await asyncio.sleep(2.1)
            await before.cache.get("call_1")
            # A slightly wrong date makes a state look younger by as much.
            await asyncio.sleep(4.1)
            record["status"] = status
            snapshot = await reader.cache.get("call_1")
            assert snapshot is not None
            assert f'"{status}"'.encode() in snapshot.fields


@in_simulated_time
async def test_a_clock_that_is_put_back_or_forward_does_not_stop_updates() -> None:
    world = CallWorld()
    record = world.oneinbox.has(status="queued")
    replica = world.replica()
    for jump, status in ((-3600.0, "initiated"), (7200.0, "in_progress"), (-10.0, "completed")):
        await replica.cache.get("call_1")
        replica.skew += jump
        record["status"] = status
        await asyncio.sleep(2.1)
        snapshot = await replica.cache.get("call_1")
        assert snapshot is not None
        assert f'"{status}"'.encode() in snapshot.fields


@pytest.mark.parametrize("value", [b"", b"{}\n{}", b'{"etag": "x"}\n{}', b"[]\n", b"\xff", b'{"etag": 1, "more": 2}\n'])
@in_simulated_time
async def test_a_state_that_another_version_shared_is_fetched_again(value: bytes) -> None:
    world = CallWorld(shared=True)
    world.oneinbox.has()
    replica = world.replica()
    await world.store.set("seen:call_1", replica.cache.keyring.encrypt(value), 100)
    assert await fetches_after(replica, 0) == [1]

    await world.store.set("seen:call_2", value, 100)  # nor is unencrypted data read
    world.oneinbox.has("call_2")
    assert await fetches_after(replica, 0, call="call_2") == [1]


@in_simulated_time
async def test_only_its_holder_releases_a_lease() -> None:
    world = CallWorld(shared=True)
    one, other = world.replica(), world.replica()

    assert await one.cache.take_lease("call_1")
    assert not await other.cache.take_lease("call_1")
    await other.cache.drop_lease("call_1")
    assert not await other.cache.take_lease("call_1")
    await asyncio.sleep(module.LEASE_SECONDS + 0.1)
    assert await other.cache.take_lease("call_1"), "its holder may have died"
    await one.cache.drop_lease("call_1")
    await one.cache.drop_lease("call_1", 100)
    assert not await one.cache.take_lease("call_1")
    await other.cache.drop_lease("call_1")
    assert await one.cache.take_lease("call_1")


@in_simulated_time
async def test_the_end_lies_between_two_fetches_whatever_oneinboxs_clock_says() -> None:
    loop = asyncio.get_running_loop()
    for said in ("2001-01-01T00:00:00Z", "2101-01-01T00:00:00Z", None):
        world = CallWorld()
        record = world.oneinbox.has(status="in_progress", ended_at=None)
        replica = world.replica()
        await replica.cache.get("call_1")
        seen_running = DATE + loop.time()
        await asyncio.sleep(3)
        record |= {"status": "completed", "ended_at": said}
        ended = await replica.cache.get("call_1")
        await asyncio.sleep(10)
        later = await replica.cache.get("call_1")

        assert ended is not None
        assert ended.ended_at is not None
        assert later is not None
        assert -0.1 <= ended.ended_at - seen_running <= 3.1
        assert later.ended_at == ended.ended_at


@in_simulated_time
async def test_an_unobserved_end_is_when_oneinbox_says() -> None:
    world = CallWorld()
    world.oneinbox.has(status="completed", ended_at="2001-01-01T00:00:00Z")
    world.oneinbox.has("call_2", status="completed", ended_at="2101-01-01T00:00:00Z")
    replica = world.replica()

    old, new = await replica.cache.get("call_1"), await replica.cache.get("call_2")

    assert old is not None
    assert old.ended_at == 978307200
    assert new is not None
    assert new.ended_at == new.seen


@in_simulated_time
async def test_an_answer_without_metadata_does_not_take_a_call_from_its_owner() -> None:
    world = CallWorld()
    record = world.oneinbox.has(owner=pseudonym(ANN), status="in_progress")
    replica = world.replica()
    await replica.calls.read(ANN, "call_1")

    del record["metadata"]
    await replica.calls.stop(ANN, "call_1")

    assert (await replica.calls.read(ANN, "call_1")).ended
    assert isinstance(await outcome(replica.calls.read(BEN, "call_1")), Problem)


@in_simulated_time
async def test_an_observed_end_frees_the_slot_in_every_mode() -> None:
    for user in (ANN, ANONYMOUS):
        world = CallWorld()
        record = world.oneinbox.has(owner=pseudonym(user), status="in_progress")
        replica = world.replica()
        await replica.start_call(user)
        assert await replica.live.is_live("call_1")
        await replica.cache.get("call_1")
        assert await replica.live.is_live("call_1")

        record["status"] = "completed"
        await asyncio.sleep(2)
        await replica.cache.get("call_1")

        assert not await replica.live.is_live("call_1")
        assert await replica.live.started_here("call_1")
