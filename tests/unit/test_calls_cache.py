"""Looking calls up: how often OneInbox is asked, what is remembered, and for how long."""

import asyncio
import random

import httpx
import pytest

from app.calls import cache as module
from app.calls.snapshots import Snapshot
from app.oneinbox.errors import OneInboxError
from app.problems import Problem
from tests.support.following import (
    ANN,
    BEN,
    DATE,
    NOBODY,
    House,
    Replica,
    in_own_time,
    outcome,
    pseudonym,
)


async def looks_after(replica: Replica, *pauses: float, call: str = "call_1", known: bool = True) -> list[int]:
    """Read a call after each pause; whether that asked OneInbox."""
    asked = []
    for pause in pauses:
        await asyncio.sleep(pause)
        before = len(replica.house.oneinbox.asked)
        await replica.cache.get(call, known=known)
        asked.append(len(replica.house.oneinbox.asked) - before)
    return asked


async def slug_of(replica: Replica, call: str, *, known: bool = False) -> str:
    """What a reader of the call is told."""
    found = await outcome(replica.cache.get(call, known=known))
    if isinstance(found, Problem):
        return found.slug
    if isinstance(found, OneInboxError):
        return found.slug
    return "not-found" if found is None else "found"


@in_own_time
async def test_a_running_call_is_looked_up_once_a_second() -> None:
    house = House()
    house.oneinbox.has(status="in_progress")

    assert await looks_after(house.replica(), 0, 0.5, 0.49, 0.02, 0.9, 0.2) == [1, 0, 0, 1, 0, 1]


@in_own_time
async def test_an_ended_call_is_looked_up_every_two_seconds_for_a_minute_and_then_every_hour() -> None:
    house = House()
    house.oneinbox.has(status="completed")
    replica = house.replica()

    assert await looks_after(replica, 0, 1.9, 0.2, 1.9, 0.2) == [1, 0, 1, 0, 1]
    assert await looks_after(replica, 60, 3000, 599, 2, 3599) == [1, 0, 0, 1, 0]


@in_own_time
async def test_a_call_that_ends_late_settles_a_minute_after_its_end() -> None:
    house = House()
    record = house.oneinbox.has(status="in_progress")
    replica = house.replica()
    await looks_after(replica, 0, 100)

    record["status"] = "completed"

    assert await looks_after(replica, 2, 3, 3) == [1, 1, 1]


@in_own_time
async def test_absence_is_remembered_for_a_minute() -> None:
    house = House()

    assert await looks_after(house.replica(), 0, 1, 58, 2, 59, known=False) == [1, 0, 0, 1, 0]


@in_own_time
async def test_absence_of_a_call_that_was_handed_out_is_remembered_for_a_second() -> None:
    house = House()
    replica = house.replica()
    await replica.hand_out(ANN)

    assert await looks_after(replica, 0, 0.9, 0.2, 0.9, known=False) == [1, 0, 1, 0]
    # In anonymous mode the key says so.
    assert await looks_after(replica, 0, 0.9, 0.2, 0.9, call="call_2", known=True) == [1, 0, 1, 0]


@in_own_time
async def test_a_strangers_question_about_a_call_to_come_does_not_hide_it() -> None:
    house = House()
    replica = house.replica()
    assert await outcome(replica.calls.read(BEN, "call_1")) != ()
    assert await slug_of(replica, "call_1") == "not-found"

    house.oneinbox.has(owner=pseudonym(ANN))
    await replica.hand_out(ANN)

    _, snapshot = await replica.calls.read(ANN, "call_1")
    assert snapshot.owner == pseudonym(ANN)


@in_own_time
async def test_a_call_that_is_deleted_is_gone_although_it_was_known() -> None:
    house = House()
    house.oneinbox.has()
    replica = house.replica()
    assert await slug_of(replica, "call_1", known=True) == "found"

    house.oneinbox.records.clear()
    await asyncio.sleep(2)

    # Not even in the second in which OneInbox is not asked again.
    assert [await slug_of(replica, "call_1", known=True) for _ in range(3)] == ["not-found"] * 3


@in_own_time
async def test_a_remembered_owner_turns_strangers_away_without_a_look() -> None:
    house = House()
    house.oneinbox.has(owner=pseudonym(ANN), status="in_progress")
    replica = house.replica()
    await replica.calls.read(ANN, "call_1")

    for _ in range(100):
        await asyncio.sleep(0.5)
        assert isinstance(await outcome(replica.calls.read(BEN, "call_1")), Problem)

    assert len(house.oneinbox.asked) == 1
    await asyncio.sleep(20)
    assert isinstance(await outcome(replica.calls.read(BEN, "call_1")), Problem)
    assert len(house.oneinbox.asked) == 2


@pytest.mark.parametrize("status", [404, 422])
@in_own_time
async def test_an_id_that_oneinbox_would_never_give_out_is_not_found(status: int) -> None:
    house = House()
    house.oneinbox.failures = [
        httpx.Response(status, json={"detail": [{"loc": ["path", "call_id"], "msg": "no uuid"}]})
    ]
    house.oneinbox.fails_on = True

    assert await slug_of(house.replica(), "not-a-uuid") == "not-found"


@pytest.mark.parametrize("name", ["cursor", "web"])
@in_own_time
async def test_a_route_of_oneinbox_is_no_call(name: str) -> None:
    house = House()
    replica = house.replica()

    refused = await outcome(replica.calls.read(ANN, name))

    assert isinstance(refused, Problem)
    assert refused.slug == "not-found"
    assert not house.oneinbox.asked


@in_own_time
async def test_all_who_ask_at_once_share_one_look() -> None:
    house = House()
    house.oneinbox.has()
    house.oneinbox.delay = 2
    replica = house.replica()

    first = asyncio.create_task(replica.cache.get("call_1", known=True))
    others = [asyncio.create_task(replica.cache.get("call_1", known=True)) for _ in range(200)]
    await asyncio.sleep(1)
    first.cancel()
    late = [asyncio.create_task(replica.cache.get("call_1", known=False)) for _ in range(200)]
    found = await asyncio.gather(*others, *late)

    assert len(house.oneinbox.asked) == 2, "the first was given up with its look; all the others share one of theirs"
    assert all(isinstance(snapshot, Snapshot) for snapshot in found)


@in_own_time
async def test_a_look_that_fails_when_nobody_waits_any_more_is_nobodys_problem() -> None:
    house = House()
    house.oneinbox.delay = 2
    house.oneinbox.failures = [httpx.ConnectError("no"), RuntimeError("a bug")]
    replica = house.replica()

    for call in ("call_1", "call_2"):
        asking = asyncio.create_task(replica.cache.get(call, known=True))
        await asyncio.sleep(1)
        asking.cancel()
        await asyncio.sleep(3)

    assert len(house.oneinbox.asked) == 2  # and nothing was reported as never retrieved: in_own_time looks


@in_own_time
async def test_a_call_costs_one_look_a_second_even_while_looks_fail() -> None:
    house = House()
    house.oneinbox.failures, house.oneinbox.fails_on = [httpx.Response(500)], True
    replica = house.replica()

    told = []
    for _ in range(30):
        told.append(await slug_of(replica, "call_1", known=True))
        await asyncio.sleep(0.1)

    assert len(house.oneinbox.asked) <= 3
    assert set(told) == {"upstream-error", "at-capacity"}


@in_own_time
async def test_unknown_calls_cost_twenty_looks_a_second_and_known_ones_are_answered() -> None:
    house = House()
    replica = house.replica()
    house.oneinbox.has("mine", status="in_progress")
    assert await slug_of(replica, "mine", known=True) == "found"
    await asyncio.sleep(5)

    told = [await slug_of(replica, f"invented-{number}") for number in range(500)]

    assert told.count("not-found") == 20
    assert told.count("at-capacity") == 480
    refused = await outcome(replica.cache.get("invented", known=False))
    assert refused.headers == {"Retry-After": "1"}
    before = len(house.oneinbox.asked)
    assert await slug_of(replica, "mine") == "found"
    assert len(house.oneinbox.asked) == before + 1, "a known call has room of its own"


@in_own_time
async def test_all_reads_cost_a_hundred_looks_a_second_and_then_known_calls_come_from_memory() -> None:
    house = House()
    replica = house.replica()
    calls = [f"mine-{number}" for number in range(150)]
    for call in calls:
        house.oneinbox.has(call, status="queued")
    for call in calls[:100]:
        assert await slug_of(replica, call, known=True) == "found"
    await asyncio.sleep(30)
    for call in calls:
        house.oneinbox.has(call, status="in_progress")
    before = len(house.oneinbox.asked)

    told = [await slug_of(replica, call, known=True) for call in reversed(calls)]

    assert len(house.oneinbox.asked) - before == 100
    # Fifty were seen for the first time, fifty again, fifty are answered as they were.
    assert told == ["found"] * 150
    statuses = [replica.cache.latest(call) for call in calls]
    assert [b'"queued"' in (status.fields if status else b"") for status in statuses] == [True] * 50 + [False] * 100
    assert await slug_of(replica, "mine-new", known=True) == "at-capacity"


@in_own_time
async def test_memory_is_bounded_by_count() -> None:
    house = House()
    replica = house.replica()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CACHED_CALLS", 10)
        for number in range(25):
            house.oneinbox.has(f"call_{number}")
            await asyncio.sleep(1)
            await replica.cache.get(f"call_{number}", known=True)
            await replica.cache.get("call_0", known=True)  # what is used stays

    kept = [number for number in range(25) if replica.cache.latest(f"call_{number}")]
    assert kept == [0, *range(16, 25)]


@in_own_time
async def test_memory_is_bounded_by_bytes_however_calls_come_grow_shrink_and_go() -> None:
    most = 50_000
    dice = random.Random(7)
    house = House()
    replica = house.replica(expose=("summary",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CACHED_BYTES", most)
        for step in range(600):
            call = f"call_{dice.randrange(20)}"
            if step % 11 == 3:
                house.oneinbox.records.pop(call, None)
            else:
                house.oneinbox.has(call, ai_summary="x" * dice.randrange(9000))
            await asyncio.sleep(2)
            await replica.cache.get(call, known=True)
            kept = [found for n in range(40) if (found := replica.cache.latest(f"call_{n}"))]
            assert sum(len(snapshot.fields) for snapshot in kept) <= most
        # Nor does the count drift upwards until nothing fits any more.
        assert sum(len(snapshot.fields) for snapshot in kept) > most - 2 * 9300


@in_own_time
async def test_one_call_may_be_larger_than_the_memory_for_all() -> None:
    house = House()
    house.oneinbox.has(ai_summary="x" * 10_000, status="in_progress")
    replica = house.replica(expose=("summary",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CACHED_BYTES", 1000)

        assert await looks_after(replica, 0, 0.5, 0.6) == [1, 0, 1]


@in_own_time
async def test_an_answer_that_was_overtaken_changes_nothing() -> None:
    house = House()
    house.oneinbox.has(owner=pseudonym(ANN), status="in_progress")
    replica = house.replica()
    await replica.calls.read(ANN, "call_1")
    await asyncio.sleep(0.5)

    house.oneinbox.delay = 3
    slow = asyncio.create_task(replica.cache.fetch("call_1"))
    await asyncio.sleep(0.1)
    house.oneinbox.delay = 0
    stopped = await replica.calls.stop(ANN, "call_1")
    assert stopped.ended
    told = await slow

    assert told is not None
    assert told.ended
    assert (await replica.calls.read(ANN, "call_1"))[1].ended


@in_own_time
async def test_a_hint_is_not_satisfied_by_an_answer_that_is_on_its_way() -> None:
    house = House()
    record = house.oneinbox.has(owner=pseudonym(ANN), status="in_progress")
    replica = house.replica()
    await replica.hand_out(ANN)

    house.oneinbox.delay = 1
    slow = asyncio.create_task(replica.cache.fetch("call_1"))
    await asyncio.sleep(0.5)
    record["status"] = "completed"
    await replica.calls.hint("call_1")

    latest = replica.cache.latest("call_1")
    assert latest is not None
    assert latest.ended
    assert (await slow) is not None
    assert len(house.oneinbox.asked) == 2
    assert house.oneinbox.most_under_way == 1


@in_own_time
async def test_replicas_share_what_they_see() -> None:
    house = House(shared=True)
    house.oneinbox.has(status="in_progress")
    one, other = house.replica(), house.replica()

    assert await looks_after(one, 0) == [1]
    assert await looks_after(other, 0.5, 0.4, 0.2) == [0, 0, 1]
    assert await looks_after(one, 0) == [0]


@in_own_time
async def test_a_large_call_is_not_shared() -> None:
    house = House(shared=True)
    record = house.oneinbox.has(ai_summary="short")
    one, other = house.replica(expose=("summary",)), house.replica(expose=("summary",))
    await one.cache.get("call_1", known=True)

    record["ai_summary"] = "x" * module.SHARED_BYTES
    await asyncio.sleep(2)
    await one.cache.get("call_1", known=True)

    assert await looks_after(other, 0) == [1]
    latest = other.cache.latest("call_1")
    assert latest is not None
    assert len(latest.fields) > module.SHARED_BYTES


@pytest.mark.parametrize("skew", [-7200.0, -3.0, 3.0, 7200.0])
@in_own_time
async def test_no_replicas_wrong_date_makes_old_news_fresh(skew: float) -> None:
    house = House(shared=True)
    record = house.oneinbox.has(status="in_progress")
    wrong, right = house.replica(skew=skew), house.replica()

    for status in ("queued", "initiated", "in_progress", "completed"):
        for reader, before in ((wrong, right), (right, wrong), (wrong, wrong), (right, right)):
            await asyncio.sleep(2.1)
            await before.cache.get("call_1", known=True)
            # A date that is wrong by a little makes news look younger by as much.
            await asyncio.sleep(4.1)
            record["status"] = status
            snapshot = await reader.cache.get("call_1", known=True)
            assert snapshot is not None
            assert f'"{status}"'.encode() in snapshot.fields


@in_own_time
async def test_a_clock_that_is_put_back_or_forward_does_not_stop_the_news() -> None:
    house = House()
    record = house.oneinbox.has(status="queued")
    replica = house.replica()
    for jump, status in ((-3600.0, "initiated"), (7200.0, "in_progress"), (-10.0, "completed")):
        await replica.cache.get("call_1", known=True)
        replica.skew += jump
        record["status"] = status
        await asyncio.sleep(2.1)
        snapshot = await replica.cache.get("call_1", known=True)
        assert snapshot is not None
        assert f'"{status}"'.encode() in snapshot.fields


@pytest.mark.parametrize("value", [b"", b"{}\n{}", b'{"etag": "x"}\n{}', b"[]\n", b"\xff", b'{"etag": 1, "more": 2}\n'])
@in_own_time
async def test_what_another_version_shared_is_looked_up(value: bytes) -> None:
    house = House(shared=True)
    house.oneinbox.has()
    replica = house.replica()
    await house.store.set("seen:call_1", replica.cache.keyring.encrypt(value), 100)
    assert await looks_after(replica, 0) == [1]

    await house.store.set("seen:call_2", value, 100)  # nor does anybody read what is not ours
    house.oneinbox.has("call_2")
    assert await looks_after(replica, 0, call="call_2") == [1]


@in_own_time
async def test_a_lease_is_given_back_by_its_holder_only() -> None:
    house = House(shared=True)
    one, other = house.replica(), house.replica()

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


@in_own_time
async def test_the_end_lies_between_two_looks_whatever_oneinboxs_clock_says() -> None:
    loop = asyncio.get_running_loop()
    for said in ("2001-01-01T00:00:00Z", "2101-01-01T00:00:00Z", None):
        house = House()
        record = house.oneinbox.has(status="in_progress", ended_at=None)
        replica = house.replica()
        await replica.cache.get("call_1", known=True)
        seen_running = DATE + loop.time()
        await asyncio.sleep(3)
        record |= {"status": "completed", "ended_at": said}
        ended = await replica.cache.get("call_1", known=True)
        await asyncio.sleep(10)
        later = await replica.cache.get("call_1", known=True)

        assert ended is not None
        assert ended.ended_at is not None
        assert later is not None
        assert -0.1 <= ended.ended_at - seen_running <= 3.1
        assert later.ended_at == ended.ended_at


@in_own_time
async def test_an_end_that_nobody_saw_is_when_oneinbox_says() -> None:
    house = House()
    house.oneinbox.has(status="completed", ended_at="2001-01-01T00:00:00Z")
    house.oneinbox.has("call_2", status="completed", ended_at="2101-01-01T00:00:00Z")
    replica = house.replica()

    old, new = await replica.cache.get("call_1", known=True), await replica.cache.get("call_2", known=True)

    assert old is not None
    assert old.ended_at == 978307200
    assert new is not None
    assert new.ended_at == new.seen


@in_own_time
async def test_an_answer_without_metadata_does_not_take_a_call_from_its_owner() -> None:
    house = House()
    record = house.oneinbox.has(owner=pseudonym(ANN), status="in_progress")
    replica = house.replica()
    await replica.calls.read(ANN, "call_1")

    del record["metadata"]
    await replica.calls.stop(ANN, "call_1")

    assert (await replica.calls.read(ANN, "call_1"))[1].ended
    assert isinstance(await outcome(replica.calls.read(BEN, "call_1")), Problem)


@in_own_time
async def test_an_end_frees_the_slot_whoever_sees_it() -> None:
    for user in (ANN, NOBODY):
        house = House()
        record = house.oneinbox.has(owner=pseudonym(user), status="in_progress")
        replica = house.replica()
        await replica.hand_out(user)
        assert await replica.live.is_live("call_1")
        await replica.cache.get("call_1", known=True)
        assert await replica.live.is_live("call_1")

        record["status"] = "completed"
        await asyncio.sleep(2)
        await replica.cache.get("call_1", known=True)

        assert not await replica.live.is_live("call_1")
        assert await replica.live.handed_out("call_1")
