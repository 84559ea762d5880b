"""Following a call: what streams receive and when, and how often OneInbox is asked."""

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
from app.limits.live_calls import RUMOUR_SECONDS
from app.problems import Problem
from tests.support.call_world import (
    ANN,
    BEN,
    DATE,
    CallWorld,
    Reader,
    Replica,
    disconnect,
    finish,
    follow,
    outcome,
    pseudonym,
)
from tests.support.simulated_time import in_simulated_time

LATE = ("transcript",)
BUSY = httpx.Response(429, headers={"Retry-After": "50"})


def now() -> float:
    return asyncio.get_running_loop().time()


def date(at: float) -> str:
    """A time of the event loop, as OneInbox writes it."""
    return datetime.fromtimestamp(DATE + at, UTC).isoformat()


def world_with_a_call(*, shared: bool = False, **record: Any) -> CallWorld:
    world = CallWorld(shared=shared)
    world.oneinbox.has(owner=pseudonym(ANN), **{"created_at": date(now()), **record})
    return world


async def advance(world: CallWorld, *statuses: str, each: float = 3) -> None:
    """Give the call these states, one after another."""
    for status in statuses:
        await asyncio.sleep(each)
        world.oneinbox.records["call_1"]["status"] = status


@in_simulated_time
async def test_every_state_in_order_and_then_the_end() -> None:
    world = world_with_a_call()
    readers = [follow(world.replica()) for _ in range(2)]

    await advance(world, "initiated", "in_progress", "completed")
    await finish(readers)

    for reader in readers:
        assert reader.statuses == ["queued", "initiated", "in_progress", "completed"]
        assert reader.ended
        assert [name for _, name, _ in reader.events].count("end") == 1
        assert reader.events[-1][2] == {}
        assert now() - 1009 < 2


@in_simulated_time
async def test_a_thousand_streams_cost_as_much_as_one() -> None:
    world = world_with_a_call()
    replica = world.replica()
    readers = [follow(replica, User(mode="jwt", id="ann")) for _ in range(1000)]

    await advance(world, "initiated", "in_progress", "completed", each=10)
    await finish(readers)

    assert {tuple(reader.statuses) for reader in readers} == {("queued", "initiated", "in_progress", "completed")}
    assert len(world.oneinbox.fetches) <= 33
    assert world.oneinbox.most_at_once == 1


@in_simulated_time
async def test_an_older_call_is_polled_less_often() -> None:
    world = world_with_a_call(status="in_progress")
    replica = world.replica()
    reader = follow(replica)

    await asyncio.sleep(1200)
    gaps = [later - earlier for earlier, later in pairwise(world.oneinbox.fetches)]

    assert all(1 <= gap <= 1.1 + 0.1 for gap in gaps[:40])
    assert all(5 <= gap <= 5.51 for gap in gaps[-100:])
    assert all(later > earlier - 0.6 for earlier, later in pairwise(gaps))
    await disconnect(reader)


@in_simulated_time
async def test_the_end_waits_for_a_late_transcript() -> None:
    world = world_with_a_call(status="in_progress")
    reader = follow(world.replica(expose=LATE))

    await advance(world, "completed")
    await asyncio.sleep(12)
    assert not reader.ended
    world.oneinbox.records["call_1"]["transcript"] = "agent: Hello."
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
@in_simulated_time
async def test_the_end_waits_thirty_seconds_for_what_never_comes(said: str) -> None:
    world = world_with_a_call(status="in_progress")
    reader = follow(world.replica(expose=LATE))

    await advance(world, "completed")
    ended = now()
    times = {"right": date(ended), "none": None, "long-ago": date(-9999), "to-come": date(9999)}
    world.oneinbox.records["call_1"]["ended_at"] = times[said]
    await finish([reader])

    assert reader.ended
    assert 27 <= now() - ended <= 32


@pytest.mark.parametrize("name", ["summary", "transcript", "messages", "recording_url"])
@pytest.mark.parametrize("says", ["ended_at", "duration_seconds"])
@pytest.mark.parametrize("shared", [False, True])
@in_simulated_time
async def test_what_an_edition_does_not_have_is_waited_for_once(name: str, says: str, shared: bool) -> None:
    world = world_with_a_call(shared=shared, status="in_progress", started_at=date(now()))
    one, other = world.replica(expose=(name,)), world.replica(expose=(name,))
    started = now()
    first = follow(one)
    await advance(world, "completed")
    ended = now()
    world.oneinbox.records["call_1"] |= {"ended_at": date(ended)} if says == "ended_at" else {says: ended - started}
    await asyncio.sleep(20)
    second = follow(other)
    await finish([first, second])
    waited = now() - ended
    later = [follow(replica) for replica in (one, other, world.replica(expose=(name,)))]
    await finish(later)

    assert 27 <= waited <= 32
    assert now() - ended - waited < 2
    assert all(reader.ended for reader in (first, second, *later))


@in_simulated_time
async def test_a_call_that_ended_long_ago_ends_at_once() -> None:
    world = world_with_a_call(status="completed", ended_at=date(-100))
    began = now()
    reader = follow(world.replica(expose=LATE))

    await finish([reader])

    assert (reader.statuses, reader.ended) == (["completed"], True)
    assert now() - began < 1


@in_simulated_time
async def test_a_client_that_has_seen_the_end_gets_no_stream() -> None:
    world = world_with_a_call(status="completed", transcript="agent: Hi.")
    replica = world.replica(expose=LATE)
    etag = (await replica.calls.read(ANN, "call_1")).etag

    assert await replica.calls.follow(ANN, "call_1", etag) is None
    assert await replica.calls.follow(ANN, "call_1", etag.strip('"')) is None
    for other in (None, "", '"other"', "x" * 100_000, etag + etag, "\x00", "ü"):
        reader = follow(replica, last_event_id=other)
        await finish([reader])
        assert (reader.statuses, reader.ended) == (["completed"], True), other
    assert not replica.poller.is_followed("call_1")


@in_simulated_time
async def test_a_reconnecting_client_gets_the_current_state_again() -> None:
    world = world_with_a_call(status="in_progress")
    replica = world.replica()
    etag = (await replica.calls.read(ANN, "call_1")).etag

    reader = follow(replica, last_event_id=etag)
    await asyncio.sleep(0.1)

    assert reader.statuses == ["in_progress"]
    await disconnect(reader)


@in_simulated_time
async def test_keep_alives_every_fifteen_seconds_and_an_hour_at_most() -> None:
    world = world_with_a_call(status="in_progress")
    began = now()
    reader = follow(world.replica())

    await finish([reader])

    assert not reader.ended
    assert reader.statuses == ["in_progress"]
    assert abs(now() - began - 3600) < 0.1
    assert len(reader.keep_alives) in (239, 240)
    assert all(abs(later - earlier - 15) < 0.1 for earlier, later in pairwise(reader.keep_alives))


@in_simulated_time
async def test_a_stream_ends_with_its_login() -> None:
    world = world_with_a_call(status="in_progress")
    replica = world.replica()
    for left in (20.0, 1.5, 0.0, -5.0):
        began = now()
        reader = follow(replica, User(mode="jwt", id="ann", expires_at=replica.now() + left))
        await finish([reader])
        assert not reader.ended
        assert reader.statuses == ["in_progress"]
        assert abs(now() - began - max(left, 0)) < 0.1
    await asyncio.sleep(0)
    assert not replica.poller.is_followed("call_1")


@in_simulated_time
async def test_a_shutdown_closes_streams_without_an_end() -> None:
    world = world_with_a_call(status="in_progress")
    replica = world.replica()
    readers = [follow(replica) for _ in range(20)]
    await asyncio.sleep(2)

    replica.poller.close()
    began = now()
    await finish(readers)

    assert now() - began < 0.01
    assert not any(reader.ended for reader in readers)
    refused = await outcome(replica.calls.follow(ANN, "call_1", None))
    assert (refused.slug, refused.headers) == ("at-capacity", {"Retry-After": "10"})


@in_simulated_time
async def test_a_shutdown_still_sends_a_new_state() -> None:
    world = world_with_a_call(status="in_progress")
    replica = world.replica()
    reader = follow(replica)
    await asyncio.sleep(0.5)
    world.oneinbox.records["call_1"]["status"] = "completed"

    async with replica.subscribed():
        await replica.cache.fetch("call_1")
        replica.poller.close()
        await finish([reader])

    assert reader.statuses[0] == "in_progress"


@in_simulated_time
async def test_caps() -> None:
    world = world_with_a_call(status="in_progress")
    world.oneinbox.has("call_2", owner=pseudonym(BEN), status="in_progress")
    replica = world.replica(max_streams=3, max_streams_total=4)
    mine = [follow(replica) for _ in range(3)]
    await asyncio.sleep(0.1)

    refused = await outcome(replica.calls.follow(ANN, "call_1", None))
    assert (refused.slug, refused.headers) == ("too-many-streams", {"Retry-After": "10"})
    bens = follow(replica, BEN, "call_2")
    await asyncio.sleep(0.1)
    refused = await outcome(replica.calls.follow(BEN, "call_2", None))
    assert (refused.slug, refused.headers) == ("at-capacity", {"Retry-After": "10"})

    await disconnect(mine.pop())
    mine.append(follow(replica))
    await asyncio.sleep(0.1)
    assert mine[-1].statuses == ["in_progress"]
    for reader in (*mine, bens):
        await disconnect(reader)
    assert isinstance(await outcome(replica.calls.follow(BEN, "call_1", None)), Problem)


@in_simulated_time
async def test_clients_that_come_and_go_leave_nothing_behind() -> None:
    world = world_with_a_call(status="in_progress")
    world.oneinbox.delay = 0.3
    replica = world.replica(max_streams=3)
    tasks = len(asyncio.all_tasks())

    for turn in range(300):
        reader = follow(replica)
        await asyncio.sleep(turn % 17 / 10)
        await disconnect(reader)

    await asyncio.sleep(1)
    assert len(asyncio.all_tasks()) == tasks
    assert not replica.poller.is_followed("call_1")
    places = [follow(replica) for _ in range(3)]
    await asyncio.sleep(0.5)
    assert all(reader.statuses for reader in places)
    for reader in places:
        await disconnect(reader)


@in_simulated_time
async def test_a_client_that_disconnects_takes_nothing_from_the_others() -> None:
    world = world_with_a_call()
    world.oneinbox.delay = 0.5
    replica = world.replica()
    leaving, staying = follow(replica), follow(replica)
    await asyncio.sleep(2.2)
    await disconnect(leaving)  # the first, in the middle of a fetch

    await advance(world, "in_progress", "completed")
    await finish([staying])

    assert staying.statuses == ["queued", "in_progress", "completed"]
    assert staying.ended


@in_simulated_time
async def test_a_new_subscription_continues_where_the_last_one_stopped() -> None:
    world = world_with_a_call()
    world.oneinbox.delay = 2
    replica = world.replica()
    await disconnect_during_a_fetch(replica)

    reader = follow(replica)
    await advance(world, "in_progress", "completed", each=6)
    await finish([reader])

    assert reader.statuses == ["queued", "in_progress", "completed"]
    assert world.oneinbox.most_at_once == 1


async def disconnect_during_a_fetch(replica: Replica) -> None:
    oneinbox = replica.world.oneinbox
    reader = follow(replica)
    while len(oneinbox.requests) < 2 or not oneinbox.running:
        await asyncio.sleep(0.1)
    await disconnect(reader)


class Stuck:
    """A client that stops reading until `go_on`."""

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


@in_simulated_time
async def test_a_slow_client_gets_only_the_latest_state() -> None:
    world = world_with_a_call()
    replica = world.replica()
    stuck, quick = Stuck(), follow(replica)
    reading = asyncio.create_task(stuck.read(replica))

    await advance(world, "initiated", "in_progress", *(f"state-{number}" for number in range(50)), "completed")
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
@in_simulated_time
async def test_a_failing_oneinbox_is_polled_less_and_ends_no_stream(
    failure: httpx.Response | Exception, shared: bool
) -> None:
    world = world_with_a_call(shared=shared)
    replicas = [world.replica() for _ in range(1 + shared)]
    readers = [follow(replica) for replica in replicas]
    await asyncio.sleep(5)

    world.oneinbox.failures, world.oneinbox.fails_on = [failure], True
    began = now()
    with capture_logs() as logs:
        await asyncio.sleep(300)
        failed = [at for at in world.oneinbox.fetches if at >= began]
        # Once a replica notices, the others slow down, too.
        expected = 7 if failure is BUSY else 13
        assert 3 <= len(failed) <= expected * (1 + shared)
        if failure is BUSY:
            assert all(later - earlier >= 50 for earlier, later in pairwise(failed)) or shared
        world.oneinbox.failures.clear()
        world.oneinbox.records["call_1"]["status"] = "in_progress"
        await asyncio.sleep(60)
        assert all(reader.statuses == ["queued", "in_progress"] for reader in readers)
        resumed = len(world.oneinbox.fetches)
        await asyncio.sleep(10)
        assert len(world.oneinbox.fetches) > resumed, "and then as before"
        world.oneinbox.records["call_1"]["status"] = "completed"
        await finish(readers)

    assert all(reader.ended for reader in readers)
    assert {entry["log_level"] for entry in logs} <= {"warning", "error"}
    assert {entry["event"] for entry in logs} <= {"poll_backoff", "poll_failed"}
    assert logs


@in_simulated_time
async def test_hours_of_failures_end_no_subscription() -> None:
    world = world_with_a_call()
    world.oneinbox.has("call_1", owner=pseudonym(ANN))
    replica = world.replica()
    reader = follow(replica)
    await asyncio.sleep(1)
    world.oneinbox.failures, world.oneinbox.fails_on = [httpx.Response(500)], True
    with capture_logs(), ExitStack() as places:
        for _ in range(13):  # one subscription, a series of streams, twelve hours and 1,300 failures
            await asyncio.sleep(3000)
            # New clients cannot read the call; the subscription continues.
            snapshot = replica.cache.latest("call_1")
            assert snapshot is not None
            places.enter_context(replica.poller.subscribe(ANN, "call_1", snapshot))
        world.oneinbox.failures.clear()
        world.oneinbox.records["call_1"]["status"] = "completed"
        await asyncio.sleep(60)
        assert snapshot is not None
        with replica.poller.subscribe(ANN, "call_1", snapshot) as subscription:
            assert subscription.over
            assert subscription.latest.ended
    await finish([reader])


@in_simulated_time
async def test_a_refresh_sends_the_end_during_a_backoff() -> None:
    world = world_with_a_call(status="in_progress")
    replica = world.replica()
    await replica.start_call(ANN)
    async with replica.subscribed():
        reader = follow(replica)
        await asyncio.sleep(5)
        world.oneinbox.failures = [BUSY]
        with capture_logs():
            await asyncio.sleep(3)
        world.oneinbox.records["call_1"]["status"] = "completed"
        refreshed = now()
        await replica.calls.refresh("call_1")
        await finish([reader])

    assert reader.statuses == ["in_progress", "completed"]
    assert now() - refreshed < 0.1


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "two-replicas"])
@in_simulated_time
async def test_a_call_that_is_deleted_ends_its_streams(shared: bool) -> None:
    world = world_with_a_call(shared=shared, status="in_progress")
    replicas = [world.replica() for _ in range(1 + shared)]
    readers = [follow(replica) for replica in replicas]
    await asyncio.sleep(5)

    world.oneinbox.records.clear()
    deleted = now()
    await finish(readers)

    assert all(reader.statuses == ["in_progress"] and reader.ended for reader in readers)
    assert RUMOUR_SECONDS <= now() - deleted < RUMOUR_SECONDS + 10


@in_simulated_time
async def test_replicas_share_one_poll_and_send_the_same() -> None:
    world = world_with_a_call(shared=True)
    world.oneinbox.delay = 0.2
    replicas = [world.replica() for _ in range(4)]
    readers = [follow(replica) for replica in replicas for _ in range(5)]

    await advance(world, "initiated", "in_progress", "completed", each=20)
    await finish(readers)

    assert {tuple(reader.statuses) for reader in readers} == {("queued", "initiated", "in_progress", "completed")}
    assert len(world.oneinbox.fetches) <= 62 + 4
    assert world.oneinbox.most_at_once <= 4  # the first reads; then one at a time
    assert all(reader.ended for reader in readers)


@in_simulated_time
async def test_another_replica_takes_over_from_one_that_died_during_a_fetch() -> None:
    world = world_with_a_call(shared=True, status="in_progress")
    dying, other = world.replica(), world.replica()
    reader = follow(other)
    await asyncio.sleep(5)

    await world.store.set("look:call_1", dying.cache._lease, 3)  # what a killed replica leaves
    world.oneinbox.records["call_1"]["status"] = "completed"
    killed = now()
    await finish([reader])

    assert reader.ended
    assert now() - killed < 3 + 1.1 + 1


@in_simulated_time
async def test_a_change_seen_by_one_replica_reaches_the_streams_of_another_at_once() -> None:
    world = world_with_a_call(shared=True, status="in_progress", created_at=date(-1000))
    one, other = world.replica(), world.replica()
    await one.start_call(ANN)
    async with one.subscribed(), other.subscribed():
        readers = [follow(one), follow(other)]
        await asyncio.sleep(31)
        world.oneinbox.records["call_1"]["status"] = "completed"
        refreshed = now()
        await one.calls.refresh("call_1")
        await finish(readers)

    assert all(reader.statuses == ["in_progress", "completed"] and reader.ended for reader in readers)
    assert now() - refreshed < 0.01


@in_simulated_time
async def test_a_response_older_than_the_last_event_is_not_sent() -> None:
    world = world_with_a_call(status="in_progress")
    replica = world.replica()
    async with replica.subscribed():
        reader = follow(replica, ANN)
        await asyncio.sleep(1.5)
        world.oneinbox.delay = 0.9
        while not world.oneinbox.running:
            await asyncio.sleep(0.01)
        world.oneinbox.delay = 0
        await replica.calls.stop(ANN, "call_1")
        await finish([reader])

    assert reader.statuses == ["in_progress", "completed"]


@in_simulated_time
async def test_a_second_stream_starts_with_the_state_just_read() -> None:
    world = world_with_a_call(status="in_progress", created_at=date(-1000))
    replica = world.replica()
    first = follow(replica)
    await asyncio.sleep(3)
    world.oneinbox.records["call_1"]["status"] = "completed"

    second = follow(replica)
    await asyncio.sleep(0.01)

    assert second.statuses == ["completed"]
    await finish([first, second])
    assert first.statuses == ["in_progress", "completed"]


@in_simulated_time
async def test_an_unknown_message_on_the_channel_is_ignored() -> None:
    world = world_with_a_call(shared=True, status="in_progress")
    replica = world.replica()
    async with replica.subscribed():
        reader = follow(replica)
        await asyncio.sleep(0.5)
        for message in (b"", b"\xff\xfe", b"call_2", b"x" * 100_000):
            await world.store.publish("calls", message)
        await world.store.set("seen:call_1", b"garbage", 100)
        await world.store.publish("calls", b"call_1")
        await advance(world, "completed")
        await finish([reader])

    assert reader.statuses == ["in_progress", "completed"]


# The refresh queue


@in_simulated_time
async def test_duplicates_coalesce_and_none_is_lost() -> None:
    refreshed: list[tuple[float, str]] = []

    async def refresh(call_id: str) -> None:
        refreshed.append((now(), call_id))
        await asyncio.sleep(1)

    refresh_queue = RefreshQueue(refresh)
    began = now()
    for _ in range(1000):
        refresh_queue.add("call_1")
    await asyncio.sleep(0.5)
    for _ in range(1000):
        refresh_queue.add("call_1")
    await asyncio.sleep(10)

    assert [round(at - began, 2) for at, _ in refreshed] == [0, 1]
    await refresh_queue.aclose()


@in_simulated_time
async def test_the_queue_is_bounded_and_refreshes_a_few_calls_at_a_time() -> None:
    running = most = refreshed = 0

    async def refresh(_: str) -> None:
        nonlocal running, most, refreshed
        running += 1
        refreshed += 1
        most = max(most, running)
        await asyncio.sleep(0.1)
        running -= 1

    refresh_queue = RefreshQueue(refresh)
    for number in range(5000):
        refresh_queue.add(f"call_{number}")
    await asyncio.sleep(60)

    assert (refreshed, most) == (refresh_queue_module.MAX_QUEUED, refresh_queue_module.AT_ONCE)
    refresh_queue.add("call_1")
    await asyncio.sleep(1)
    assert refreshed == refresh_queue_module.MAX_QUEUED + 1
    await refresh_queue.aclose()


@in_simulated_time
async def test_a_refresh_that_fails_is_logged_and_dropped() -> None:
    world = world_with_a_call(status="in_progress")
    replica = world.replica()
    await replica.start_call(ANN)
    world.oneinbox.failures = [httpx.Response(500), RuntimeError("a bug")]
    with capture_logs() as logs:
        for _ in range(3):
            replica.refresh_queue.add("call_1")
            await asyncio.sleep(1)

    assert len(world.oneinbox.requests) == 3
    assert [entry["event"] for entry in logs] == ["refresh_failed"]
    await replica.refresh_queue.aclose()


@in_simulated_time
async def test_only_live_and_followed_calls_are_refreshed() -> None:
    world = world_with_a_call(status="in_progress")
    replica = world.replica()
    for call in ("call_1", "call_2", "cursor"):
        replica.refresh_queue.add(call)
    await asyncio.sleep(1)
    assert not world.oneinbox.requests

    await replica.start_call(ANN)
    replica.refresh_queue.add("call_1")
    await asyncio.sleep(1)
    assert len(world.oneinbox.requests) == 1

    world.oneinbox.records["call_1"]["status"] = "completed"
    replica.refresh_queue.add("call_1")
    await asyncio.sleep(1)
    replica.refresh_queue.add("call_1")
    await asyncio.sleep(1)
    assert len(world.oneinbox.requests) == 2, "its slot is free and no stream follows it"

    world.oneinbox.has("call_3", owner=pseudonym(ANN), status="in_progress", created_at=date(-9999))
    reader = follow(replica, call="call_3")
    await asyncio.sleep(2)
    before = len(world.oneinbox.requests)
    replica.refresh_queue.add("call_3")
    await asyncio.sleep(0.01)
    assert len(world.oneinbox.requests) == before + 1
    await disconnect(reader)
    await replica.refresh_queue.aclose()


@in_simulated_time
async def test_the_list_has_only_the_owners_readable_calls() -> None:
    world = CallWorld()
    replica = world.replica()
    for number in range(60):
        owner = ANN if number % 2 else BEN
        world.oneinbox.has(f"call_{number}", owner=pseudonym(owner))
        await replica.start_call(owner, f"call_{number}")
    del world.oneinbox.records["call_59"]  # a rumour: it has just been started
    world.oneinbox.has("call_57", owner="of a secret that is no longer known")

    listed = [body.split(b'"')[3].decode() for body in await replica.calls.list(ANN)]

    assert listed == ["call_59", *(f"call_{number}" for number in range(55, 0, -2))]
    refused = await outcome(replica.calls.list(User(mode="anonymous", id="203.0.113.7")))
    assert refused.slug == "not-found"
