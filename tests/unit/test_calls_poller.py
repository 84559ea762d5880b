"""Following a call: what watchers are told and when, and how often OneInbox is asked."""

import asyncio
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from app.calls import refresh_queue as refresh_queue_module
from app.calls.refresh_queue import RefreshQueue
from app.identity import User
from app.problems import Problem
from tests.support.following import (
    ANN,
    BEN,
    DATE,
    House,
    Reader,
    Replica,
    finish,
    follow,
    in_own_time,
    leave,
    outcome,
    pseudonym,
)

LATE = ("transcript",)
BUSY = httpx.Response(429, headers={"Retry-After": "50"})


def now() -> float:
    return asyncio.get_running_loop().time()


def date(at: float) -> str:
    """A moment of the loop's as OneInbox writes it."""
    return datetime.fromtimestamp(DATE + at, UTC).isoformat()


def house_with_a_call(*, shared: bool = False, **record: Any) -> House:
    house = House(shared=shared)
    house.oneinbox.has(owner=pseudonym(ANN), **{"created_at": date(now()), **record})
    return house


async def live(house: House, *statuses: str, each: float = 3) -> None:
    """Let the call live through these."""
    for status in statuses:
        await asyncio.sleep(each)
        house.oneinbox.records["call_1"]["status"] = status


@in_own_time
async def test_every_state_in_order_and_then_the_end() -> None:
    house = house_with_a_call()
    readers = [follow(house.replica()) for _ in range(2)]

    await live(house, "initiated", "in_progress", "completed")
    await finish(readers)

    for reader in readers:
        assert reader.statuses == ["queued", "initiated", "in_progress", "completed"]
        assert reader.ended
        assert [name for _, name, _ in reader.events].count("end") == 1
        assert reader.events[-1][2] == {}
        assert now() - 1009 < 2


@in_own_time
async def test_a_thousand_watchers_cost_as_much_as_one() -> None:
    house = house_with_a_call()
    replica = house.replica()
    readers = [follow(replica, User(mode="jwt", id="ann")) for _ in range(1000)]

    await live(house, "initiated", "in_progress", "completed", each=10)
    await finish(readers)

    assert {tuple(reader.statuses) for reader in readers} == {("queued", "initiated", "in_progress", "completed")}
    assert len(house.oneinbox.looks) <= 33
    assert house.oneinbox.most_under_way == 1


@in_own_time
async def test_an_older_call_is_looked_at_less_often() -> None:
    house = house_with_a_call(status="in_progress")
    replica = house.replica()
    reader = follow(replica)

    await asyncio.sleep(1200)
    gaps = [later - earlier for earlier, later in pairwise(house.oneinbox.looks)]

    assert all(1 <= gap <= 1.1 + 0.1 for gap in gaps[:40])
    assert all(5 <= gap <= 5.51 for gap in gaps[-100:])
    assert all(later > earlier - 0.6 for earlier, later in pairwise(gaps))
    await leave(reader)


@in_own_time
async def test_the_end_waits_for_a_late_transcript() -> None:
    house = house_with_a_call(status="in_progress")
    reader = follow(house.replica(expose=LATE))

    await live(house, "completed")
    await asyncio.sleep(12)
    assert not reader.ended
    house.oneinbox.records["call_1"]["transcript"] = "agent: Hello."
    await finish([reader])

    assert [data.get("transcript") for _, _, data in reader.events] == [
        None,
        None,
        [{"role": "agent", "content": "Hello."}],
        None,
    ]
    assert reader.ended
    assert now() - 1015 < 2.5


@pytest.mark.parametrize("said", ["right", "none", "long-ago", "to-come"])
@in_own_time
async def test_the_end_waits_thirty_seconds_for_what_never_comes(said: str) -> None:
    house = house_with_a_call(status="in_progress")
    reader = follow(house.replica(expose=LATE))

    await live(house, "completed")
    ended = now()
    times = {"right": date(ended), "none": None, "long-ago": date(-9999), "to-come": date(9999)}
    house.oneinbox.records["call_1"]["ended_at"] = times[said]
    await finish([reader])

    assert reader.ended
    assert 27 <= now() - ended <= 32


@in_own_time
async def test_a_call_that_ended_long_ago_ends_at_once() -> None:
    house = house_with_a_call(status="completed", ended_at=date(-100))
    began = now()
    reader = follow(house.replica(expose=LATE))

    await finish([reader])

    assert (reader.statuses, reader.ended) == (["completed"], True)
    assert now() - began < 1


@in_own_time
async def test_a_reader_that_has_seen_the_end_is_told_to_stay_away() -> None:
    house = house_with_a_call(status="completed", transcript="agent: Hi.")
    replica = house.replica(expose=LATE)
    etag = (await replica.calls.read(ANN, "call_1"))[1].etag

    assert await replica.calls.follow(ANN, "call_1", etag) is None
    assert await replica.calls.follow(ANN, "call_1", etag.strip('"')) is None
    for other in (None, "", '"other"', "x" * 100_000, etag + etag, "\x00", "ü"):
        reader = follow(replica, last_event_id=other)
        await finish([reader])
        assert (reader.statuses, reader.ended) == (["completed"], True), other
    assert not replica.poller.is_watched("call_1")


@in_own_time
async def test_a_running_call_is_told_again_to_whoever_comes_back() -> None:
    house = house_with_a_call(status="in_progress")
    replica = house.replica()
    etag = (await replica.calls.read(ANN, "call_1"))[1].etag

    reader = follow(replica, last_event_id=etag)
    await asyncio.sleep(0.1)

    assert reader.statuses == ["in_progress"]
    await leave(reader)


@in_own_time
async def test_keep_alives_every_fifteen_seconds_and_an_hour_at_most() -> None:
    house = house_with_a_call(status="in_progress")
    began = now()
    reader = follow(house.replica())

    await finish([reader])

    assert not reader.ended
    assert reader.statuses == ["in_progress"]
    assert abs(now() - began - 3600) < 0.1
    assert len(reader.keep_alives) in (239, 240)
    assert all(abs(later - earlier - 15) < 0.1 for earlier, later in pairwise(reader.keep_alives))


@in_own_time
async def test_a_stream_ends_with_its_login() -> None:
    house = house_with_a_call(status="in_progress")
    replica = house.replica()
    for left in (20.0, 1.5, 0.0, -5.0):
        began = now()
        reader = follow(replica, User(mode="jwt", id="ann", expires_at=replica.now() + left))
        await finish([reader])
        assert not reader.ended
        assert reader.statuses == ["in_progress"]
        assert abs(now() - began - max(left, 0)) < 0.1
    await asyncio.sleep(0)
    assert not replica.poller.is_watched("call_1")


@in_own_time
async def test_going_down_ends_streams_without_an_end() -> None:
    house = house_with_a_call(status="in_progress")
    replica = house.replica()
    readers = [follow(replica) for _ in range(20)]
    await asyncio.sleep(2)

    replica.poller.close()
    began = now()
    await finish(readers)

    assert now() - began < 0.01
    assert not any(reader.ended for reader in readers)
    refused = await outcome(replica.calls.follow(ANN, "call_1", None))
    assert (refused.slug, refused.headers) == ("at-capacity", {"Retry-After": "10"})


@in_own_time
async def test_going_down_still_tells_what_is_new() -> None:
    house = house_with_a_call(status="in_progress")
    replica = house.replica()
    reader = follow(replica)
    await asyncio.sleep(0.5)
    house.oneinbox.records["call_1"]["status"] = "completed"

    async with replica.listening():
        await replica.cache.fetch("call_1")
        replica.poller.close()
        await finish([reader])

    assert reader.statuses[0] == "in_progress"


@in_own_time
async def test_caps() -> None:
    house = house_with_a_call(status="in_progress")
    house.oneinbox.has("call_2", owner=pseudonym(BEN), status="in_progress")
    replica = house.replica(max_streams=3, max_streams_total=4)
    mine = [follow(replica) for _ in range(3)]
    await asyncio.sleep(0.1)

    refused = await outcome(replica.calls.follow(ANN, "call_1", None))
    assert (refused.slug, refused.headers) == ("too-many-streams", {"Retry-After": "10"})
    bens = follow(replica, BEN, "call_2")
    await asyncio.sleep(0.1)
    refused = await outcome(replica.calls.follow(BEN, "call_2", None))
    assert (refused.slug, refused.headers) == ("at-capacity", {"Retry-After": "10"})

    await leave(mine.pop())
    mine.append(follow(replica))
    await asyncio.sleep(0.1)
    assert mine[-1].statuses == ["in_progress"]
    for reader in (*mine, bens):
        await leave(reader)
    assert isinstance(await outcome(replica.calls.follow(BEN, "call_1", None)), Problem)


@in_own_time
async def test_watchers_that_come_and_go_leave_nothing_behind() -> None:
    house = house_with_a_call(status="in_progress")
    house.oneinbox.delay = 0.3
    replica = house.replica(max_streams=3)
    tasks = len(asyncio.all_tasks())

    for turn in range(300):
        reader = follow(replica)
        await asyncio.sleep(turn % 17 / 10)
        await leave(reader)

    await asyncio.sleep(1)
    assert len(asyncio.all_tasks()) == tasks
    assert not replica.poller.is_watched("call_1")
    places = [follow(replica) for _ in range(3)]
    await asyncio.sleep(0.5)
    assert all(reader.statuses for reader in places)
    for reader in places:
        await leave(reader)


@in_own_time
async def test_a_watcher_that_leaves_takes_nothing_from_the_others() -> None:
    house = house_with_a_call()
    house.oneinbox.delay = 0.5
    replica = house.replica()
    leaving, staying = follow(replica), follow(replica)
    await asyncio.sleep(2.2)
    await leave(leaving)  # the first, in the middle of a look

    await live(house, "in_progress", "completed")
    await finish([staying])

    assert staying.statuses == ["queued", "in_progress", "completed"]
    assert staying.ended


@in_own_time
async def test_a_new_watch_begins_where_the_last_one_was_left() -> None:
    house = house_with_a_call()
    house.oneinbox.delay = 2
    replica = house.replica()
    await leave_in_the_middle_of_a_look(replica)

    reader = follow(replica)
    await live(house, "in_progress", "completed", each=6)
    await finish([reader])

    assert reader.statuses == ["queued", "in_progress", "completed"]
    assert house.oneinbox.most_under_way == 1


async def leave_in_the_middle_of_a_look(replica: Replica) -> None:
    account = replica.house.oneinbox
    reader = follow(replica)
    while len(account.asked) < 2 or not account.under_way:
        await asyncio.sleep(0.1)
    await leave(reader)


class Stuck:
    """A reader that does not read, until `go_on`."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.reader = Reader()

    async def read(self, replica: Replica) -> None:
        stream = await replica.calls.follow(ANN, "call_1", None)
        assert stream is not None
        async for chunk in stream.body_iterator:
            assert isinstance(chunk, bytes)
            self.reader.take(chunk)
            await self.go_on.wait()
        with stream._place:
            pass


@in_own_time
async def test_a_slow_reader_gets_the_latest_state_and_is_kept_nothing_else() -> None:
    house = house_with_a_call()
    replica = house.replica()
    stuck, quick = Stuck(), follow(replica)
    reading = asyncio.create_task(stuck.read(replica))

    await live(house, "initiated", "in_progress", *(f"state-{number}" for number in range(50)), "completed")
    await finish([quick])
    assert stuck.reader.statuses == ["queued"]
    stuck.go_on.set()
    await reading

    assert stuck.reader.statuses == ["queued", "completed"]
    assert stuck.reader.ended
    assert len(quick.statuses) == 54


@pytest.mark.parametrize(
    "failure", [BUSY, httpx.Response(503), httpx.ReadTimeout(""), RuntimeError("a bug"), OSError()]
)
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "two-replicas"])
@in_own_time
async def test_a_failing_oneinbox_is_asked_less_and_ends_no_stream(
    failure: httpx.Response | Exception, shared: bool
) -> None:
    house = house_with_a_call(shared=shared)
    replicas = [house.replica() for _ in range(1 + shared)]
    readers = [follow(replica) for replica in replicas]
    await asyncio.sleep(5)

    house.oneinbox.failures, house.oneinbox.fails_on = [failure], True
    began = now()
    with capture_logs() as logs:
        await asyncio.sleep(300)
        failed = [at for at in house.oneinbox.looks if at >= began]
        # Whichever replica notices, the others keep off too.
        expected = 7 if failure is BUSY else 13
        assert 3 <= len(failed) <= expected * (1 + shared)
        if failure is BUSY:
            assert all(later - earlier >= 50 for earlier, later in pairwise(failed)) or shared
        house.oneinbox.failures.clear()
        house.oneinbox.records["call_1"]["status"] = "in_progress"
        await asyncio.sleep(60)
        assert all(reader.statuses == ["queued", "in_progress"] for reader in readers)
        resumed = len(house.oneinbox.looks)
        await asyncio.sleep(10)
        assert len(house.oneinbox.looks) > resumed, "and then as before"
        house.oneinbox.records["call_1"]["status"] = "completed"
        await finish(readers)

    assert all(reader.ended for reader in readers)
    assert {entry["log_level"] for entry in logs} <= {"warning", "error"}
    assert {entry["event"] for entry in logs} <= {"poll_backoff", "poll_failed"}
    assert logs


@in_own_time
async def test_hours_of_failures_end_no_watch() -> None:
    house = house_with_a_call()
    house.oneinbox.has("call_1", owner=pseudonym(ANN))
    replica = house.replica()
    reader = follow(replica)
    await asyncio.sleep(1)
    house.oneinbox.failures, house.oneinbox.fails_on = [httpx.Response(500)], True
    with capture_logs(), ExitStack() as places:
        for _ in range(13):  # watchers relieve each other: one watch, twelve hours and 1,300 failures
            await asyncio.sleep(3000)
            # Whoever comes now cannot read the call; the watch goes on.
            snapshot = replica.cache.latest("call_1")
            assert snapshot is not None
            places.enter_context(replica.poller.subscribe(ANN, "call_1", snapshot))
        house.oneinbox.failures.clear()
        house.oneinbox.records["call_1"]["status"] = "completed"
        await asyncio.sleep(60)
        assert snapshot is not None
        with replica.poller.subscribe(ANN, "call_1", snapshot) as watch:
            assert watch.over
            assert watch.latest.ended
    await finish([reader])


@in_own_time
async def test_the_end_comes_through_a_pause_when_somebody_else_sees_it() -> None:
    house = house_with_a_call(status="in_progress")
    replica = house.replica()
    await replica.hand_out(ANN)
    async with replica.listening():
        reader = follow(replica)
        await asyncio.sleep(5)
        house.oneinbox.failures = [BUSY]
        with capture_logs():
            await asyncio.sleep(3)
        house.oneinbox.records["call_1"]["status"] = "completed"
        told = now()
        await replica.calls.hint("call_1")
        await finish([reader])

    assert reader.statuses == ["in_progress", "completed"]
    assert now() - told < 0.1


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "two-replicas"])
@in_own_time
async def test_a_call_that_is_deleted_ends_its_streams(shared: bool) -> None:
    house = house_with_a_call(shared=shared, status="in_progress")
    replicas = [house.replica() for _ in range(1 + shared)]
    readers = [follow(replica) for replica in replicas]
    await asyncio.sleep(5)

    house.oneinbox.records.clear()
    deleted = now()
    await finish(readers)

    assert all(reader.statuses == ["in_progress"] and reader.ended for reader in readers)
    assert now() - deleted < 5


@in_own_time
async def test_replicas_watch_with_one_poll_and_tell_the_same() -> None:
    house = house_with_a_call(shared=True)
    house.oneinbox.delay = 0.2
    replicas = [house.replica() for _ in range(4)]
    readers = [follow(replica) for replica in replicas for _ in range(5)]

    await live(house, "initiated", "in_progress", "completed", each=20)
    await finish(readers)

    assert {tuple(reader.statuses) for reader in readers} == {("queued", "initiated", "in_progress", "completed")}
    assert len(house.oneinbox.looks) <= 62 + 4
    assert house.oneinbox.most_under_way <= 4  # the first reads; then one at a time
    assert all(reader.ended for reader in readers)


@in_own_time
async def test_another_replica_takes_over_from_one_that_died_in_the_middle_of_a_look() -> None:
    house = house_with_a_call(shared=True, status="in_progress")
    dying, other = house.replica(), house.replica()
    reader = follow(other)
    await asyncio.sleep(5)

    await house.store.set("look:call_1", dying.cache._lease, 3)  # what a killed replica leaves
    house.oneinbox.records["call_1"]["status"] = "completed"
    killed = now()
    await finish([reader])

    assert reader.ended
    assert now() - killed < 3 + 1.1 + 1


@in_own_time
async def test_news_of_one_replica_reach_the_watchers_of_another_at_once() -> None:
    house = house_with_a_call(shared=True, status="in_progress", created_at=date(-1000))
    one, other = house.replica(), house.replica()
    await one.hand_out(ANN)
    async with one.listening(), other.listening():
        readers = [follow(one), follow(other)]
        await asyncio.sleep(31)
        house.oneinbox.records["call_1"]["status"] = "completed"
        hinted = now()
        await one.calls.hint("call_1")
        await finish(readers)

    assert all(reader.statuses == ["in_progress", "completed"] and reader.ended for reader in readers)
    assert now() - hinted < 0.01


@in_own_time
async def test_an_answer_that_was_overtaken_is_not_told() -> None:
    house = house_with_a_call(status="in_progress")
    replica = house.replica()
    async with replica.listening():
        reader = follow(replica, ANN)
        await asyncio.sleep(1.5)
        house.oneinbox.delay = 0.9
        while not house.oneinbox.under_way:
            await asyncio.sleep(0.01)
        house.oneinbox.delay = 0
        await replica.calls.stop(ANN, "call_1")
        await finish([reader])

    assert reader.statuses == ["in_progress", "completed"]


@in_own_time
async def test_who_joins_a_watch_is_told_what_was_just_read() -> None:
    house = house_with_a_call(status="in_progress", created_at=date(-1000))
    replica = house.replica()
    first = follow(replica)
    await asyncio.sleep(3)
    house.oneinbox.records["call_1"]["status"] = "completed"

    second = follow(replica)
    await asyncio.sleep(0.01)

    assert second.statuses == ["completed"]
    await finish([first, second])
    assert first.statuses == ["in_progress", "completed"]


@in_own_time
async def test_a_wrong_word_on_the_channel_is_nothing() -> None:
    house = house_with_a_call(shared=True, status="in_progress")
    replica = house.replica()
    async with replica.listening():
        reader = follow(replica)
        await asyncio.sleep(0.5)
        for message in (b"", b"\xff\xfe", b"call_2", b"x" * 100_000):
            await house.store.publish("calls", message)
        await house.store.set("seen:call_1", b"garbage", 100)
        await house.store.publish("calls", b"call_1")
        await live(house, "completed")
        await finish([reader])

    assert reader.statuses == ["in_progress", "completed"]


# Hints


@in_own_time
async def test_duplicates_coalesce_and_none_is_lost() -> None:
    looked: list[tuple[float, str]] = []

    async def look(call_id: str) -> None:
        looked.append((now(), call_id))
        await asyncio.sleep(1)

    refresh_queue = RefreshQueue(look)
    began = now()
    for _ in range(1000):
        refresh_queue.add("call_1")
    await asyncio.sleep(0.5)
    for _ in range(1000):
        refresh_queue.add("call_1")
    await asyncio.sleep(10)

    assert [round(at - began, 2) for at, _ in looked] == [0, 1]
    await refresh_queue.aclose()


@in_own_time
async def test_hints_are_bounded_and_followed_a_few_at_a_time() -> None:
    under_way = most = looked = 0

    async def look(_: str) -> None:
        nonlocal under_way, most, looked
        under_way += 1
        looked += 1
        most = max(most, under_way)
        await asyncio.sleep(0.1)
        under_way -= 1

    refresh_queue = RefreshQueue(look)
    for number in range(5000):
        refresh_queue.add(f"call_{number}")
    await asyncio.sleep(60)

    assert (looked, most) == (refresh_queue_module.MOST_HINTS, refresh_queue_module.AT_ONCE)
    refresh_queue.add("call_1")
    await asyncio.sleep(1)
    assert looked == refresh_queue_module.MOST_HINTS + 1
    await refresh_queue.aclose()


@in_own_time
async def test_a_hint_that_goes_wrong_is_logged_and_forgotten() -> None:
    house = house_with_a_call(status="in_progress")
    replica = house.replica()
    await replica.hand_out(ANN)
    house.oneinbox.failures = [httpx.Response(500), RuntimeError("a bug")]
    with capture_logs() as logs:
        for _ in range(3):
            replica.refresh_queue.add("call_1")
            await asyncio.sleep(1)

    assert len(house.oneinbox.asked) == 3
    assert [entry["event"] for entry in logs] == ["refresh_failed"]
    await replica.refresh_queue.aclose()


@in_own_time
async def test_only_live_and_watched_calls_are_looked_up() -> None:
    house = house_with_a_call(status="in_progress")
    replica = house.replica()
    for call in ("call_1", "call_2", "cursor"):
        replica.refresh_queue.add(call)
    await asyncio.sleep(1)
    assert not house.oneinbox.asked

    await replica.hand_out(ANN)
    replica.refresh_queue.add("call_1")
    await asyncio.sleep(1)
    assert len(house.oneinbox.asked) == 1

    house.oneinbox.records["call_1"]["status"] = "completed"
    replica.refresh_queue.add("call_1")
    await asyncio.sleep(1)
    replica.refresh_queue.add("call_1")
    await asyncio.sleep(1)
    assert len(house.oneinbox.asked) == 2, "its slot is free, nobody watches"

    house.oneinbox.has("call_3", owner=pseudonym(ANN), status="in_progress", created_at=date(-9999))
    reader = follow(replica, call="call_3")
    await asyncio.sleep(2)
    before = len(house.oneinbox.asked)
    replica.refresh_queue.add("call_3")
    await asyncio.sleep(0.01)
    assert len(house.oneinbox.asked) == before + 1
    await leave(reader)
    await replica.refresh_queue.aclose()


@in_own_time
async def test_the_list_is_the_owners_and_keeps_to_what_can_be_read() -> None:
    house = House()
    replica = house.replica()
    for number in range(60):
        owner = ANN if number % 2 else BEN
        house.oneinbox.has(f"call_{number}", owner=pseudonym(owner))
        await replica.hand_out(owner, f"call_{number}")
    del house.oneinbox.records["call_59"]
    house.oneinbox.has("call_57", owner="of a secret that is no longer known")

    listed = [body.split(b'"')[3].decode() for body in await replica.calls.list(ANN)]

    assert listed == [f"call_{number}" for number in range(55, 0, -2)]
    refused = await outcome(replica.calls.list(User(mode="anonymous", id="203.0.113.7")))
    assert refused.slug == "not-found"
