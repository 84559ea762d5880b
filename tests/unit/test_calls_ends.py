"""What the owner of a call sees of its end: `ends_at`, `stopped_because`, and the event `ending`."""

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from app.calls.events import EndNotice
from app.calls.snapshots import Snapshot
from app.limits import Bounds
from app.limits import record as records
from app.limits.live_calls import REASONS, STOPPED_BECAUSE, TOO_LONG, UNJOINED
from app.oneinbox import CallRecord
from app.store import StoreUnavailable
from app.store.memory import MemoryStore
from tests.support.call_world import ANN, DATE, CallWorld, Reader, Replica, disconnect, finish, follow, pseudonym
from tests.support.simulated_time import in_simulated_time

STARTED = DATE + 1000
"""The Unix time at which each test begins: whole seconds."""


def time_of(at: float) -> str:
    """A Unix time, as browsers get it."""
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


async def started(world: CallWorld, **settings: Any) -> Replica:
    """A replica that has just started Ann's call."""
    world.oneinbox.has(owner=pseudonym(ANN), status="in_progress", created_at=time_of(STARTED))
    replica = world.replica(**settings)
    await replica.start_call(ANN)
    return replica


async def read(replica: Replica) -> tuple[str, Mapping[str, Any]]:
    """The call's ETag and JSON, as of now."""
    await asyncio.sleep(1)  # no state is older than a second
    snapshot = await replica.calls.read(ANN, "call_1")
    return snapshot.etag, json.loads(snapshot.body("call_1"))


def endings(reader: Reader) -> list[tuple[float, Mapping[str, Any]]]:
    """The events `ending`: when each came, in seconds since the start, and its data."""
    return [(round(at - 1000, 1), data) for at, name, data in reader.events if name == "ending"]


def ending(ends_in: float, seconds_left: int) -> Mapping[str, Any]:
    """The data of an `ending`. `ends_in`: seconds since the start."""
    return {"ends_at": time_of(STARTED + ends_in), "seconds_left": seconds_left, "reason": "max-call-seconds"}


# The fields


@in_simulated_time
async def test_a_running_call_says_when_it_ends_at_the_latest() -> None:
    replica = await started(CallWorld(), max_seconds=300)

    _, call = await read(replica)

    assert call["ends_at"] == time_of(STARTED + 300)
    assert call["stopped_because"] is None


@in_simulated_time
async def test_a_call_that_nothing_bounds_has_no_end() -> None:
    _, call = await read(await started(CallWorld(), max_seconds=0))

    assert (call["ends_at"], call["stopped_because"]) == (None, None)


@in_simulated_time
async def test_a_call_of_another_deployment_has_no_end() -> None:
    world = CallWorld()
    world.oneinbox.has(owner=pseudonym(ANN), status="in_progress")

    _, call = await read(world.replica(max_seconds=300))

    assert (call["ends_at"], call["stopped_because"]) == (None, None)


@in_simulated_time
async def test_a_call_that_oneinbox_does_not_show_yet_has_its_end() -> None:
    world = CallWorld()
    replica = await started(world, max_seconds=300)
    world.oneinbox.records.clear()

    _, call = await read(replica)

    assert (call["status"], call["ends_at"]) == ("queued", time_of(STARTED + 300))


@in_simulated_time
async def test_a_call_that_ended_by_itself_was_not_stopped() -> None:
    world = CallWorld()
    replica = await started(world, max_seconds=300)
    await read(replica)
    world.oneinbox.records["call_1"]["status"] = "completed"

    _, call = await read(replica)

    assert (call["status"], call["ends_at"], call["stopped_because"]) == ("completed", None, None)


@in_simulated_time
async def test_a_call_that_its_owner_hung_up_was_not_stopped_by_the_broker() -> None:
    replica = await started(CallWorld(), max_seconds=300)

    stopped = await replica.calls.stop(ANN, "call_1")

    call = json.loads(stopped.body("call_1"))
    assert (call["status"], call["ends_at"], call["stopped_because"]) == ("completed", None, None)


@in_simulated_time
async def test_a_call_that_the_broker_took_for_ended_has_no_end() -> None:
    replica = await started(CallWorld(), max_seconds=300)
    await replica.live.ledger.move("request-call_1", records.end(5))

    _, call = await read(replica)

    assert (call["status"], call["ends_at"], call["stopped_because"]) == ("in_progress", None, None)


@pytest.mark.parametrize(("why", "told"), [(TOO_LONG, "max-call-seconds"), (UNJOINED, "not-joined")])
@in_simulated_time
async def test_a_stopped_call_says_why_and_keeps_saying_it(why: str, told: str) -> None:
    world = CallWorld()
    replica = await started(world, max_seconds=300)
    await replica.live.ledger.move("request-call_1", records.condemn(why))

    _, refused = await read(replica)
    assert (refused["status"], refused["ends_at"], refused["stopped_because"]) == ("in_progress", None, told)

    world.oneinbox.records["call_1"]["status"] = "completed"
    etag, ended = await read(replica)
    assert (ended["ends_at"], ended["stopped_because"]) == (None, told)

    world.store = MemoryStore(asyncio.get_running_loop().time)  # the record has expired
    replica.live.ledger.store = world.store
    await asyncio.sleep(3600)
    assert await read(replica) == (etag, ended)


def test_each_reason_for_a_stop_has_a_word_for_the_calls_owner() -> None:
    assert STOPPED_BECAUSE.keys() == REASONS.keys()
    assert set(STOPPED_BECAUSE.values()) <= {
        "max-call-seconds",
        "talk-minutes",
        "not-joined",
        "operator",
        "caller-gone",
    }


# A move of the end


@pytest.mark.parametrize("direction", [1, -1], ids=["later", "earlier"])
@in_simulated_time
async def test_a_move_of_less_than_ten_seconds_is_no_change(direction: int) -> None:
    replica = await started(CallWorld(), max_seconds=300)
    before = await read(replica)

    replica.live.max_seconds = 300 + direction * 9
    assert await read(replica) == before

    replica.live.max_seconds = 300 + direction * 11
    etag, call = await read(replica)
    assert etag != before[0]
    assert call["ends_at"] == time_of(STARTED + 300 + direction * 11)


@in_simulated_time
async def test_small_moves_add_up_to_a_change() -> None:
    replica = await started(CallWorld(), max_seconds=300)
    await read(replica)

    shown = []
    for moved in (4, 8, 12, 16, 20, 24):
        replica.live.max_seconds = 300 + moved
        shown.append((await read(replica))[1]["ends_at"])

    assert shown == [time_of(STARTED + 300 + moved) for moved in (0, 0, 12, 12, 12, 24)]


@in_simulated_time
async def test_replicas_show_the_same_end_while_it_moves_a_little() -> None:
    world = CallWorld(shared=True)
    one = await started(world, max_seconds=300)
    other = world.replica(max_seconds=309)
    hooked = world.replica(max_seconds=305)

    seen = [await read(one), await read(other), await read(one)]
    await hooked.cache.refetch("call_1")
    seen.append(await read(other))

    assert seen == [seen[0]] * 4


@in_simulated_time
async def test_a_store_that_does_not_answer_changes_nothing() -> None:
    replica = await started(CallWorld(), max_seconds=300)
    before = await read(replica)

    replica.live.ledger.store = LostStore(asyncio.get_running_loop().time)

    assert await read(replica) == before


class LostStore(MemoryStore):
    """A store that does not answer."""

    async def get(self, name: str) -> bytes | None:
        raise StoreUnavailable


@in_simulated_time
async def test_a_move_is_one_event_and_a_small_one_is_none() -> None:
    replica = await started(CallWorld(), max_seconds=300)
    reader = follow(replica)
    await asyncio.sleep(5)

    for seconds in (309, 291, 320, 320):
        replica.live.max_seconds = seconds
        await asyncio.sleep(5)
    await disconnect(reader)

    assert [data["ends_at"] for _, _, data in reader.events] == [time_of(STARTED + 300), time_of(STARTED + 320)]


# The event


@in_simulated_time
async def test_the_end_is_announced_once_to_each_stream() -> None:
    world = CallWorld()
    replica = await started(world, max_seconds=300, warn_seconds=60)
    readers = [follow(replica) for _ in range(2)]

    await asyncio.sleep(298)
    world.oneinbox.records["call_1"]["status"] = "completed"
    await finish(readers)

    for reader in readers:
        assert endings(reader) == [(240.0, ending(300, 60))]
        assert [name for _, name, _ in reader.events] == ["call", "ending", "call", "end"]


@in_simulated_time
async def test_the_announcement_does_not_wait_for_a_poll() -> None:
    world = CallWorld()
    replica = await started(world, max_seconds=300, warn_seconds=60)
    reader = follow(replica)
    await asyncio.sleep(200)

    world.oneinbox.delay = 90  # OneInbox does not answer meanwhile
    await asyncio.sleep(80)
    await disconnect(reader)

    assert [at for at, _ in endings(reader)] == [240.0]


@in_simulated_time
async def test_keep_alives_go_on_while_the_end_is_awaited() -> None:
    replica = await started(CallWorld(), max_seconds=67, warn_seconds=30)
    reader = follow(replica)

    await asyncio.sleep(66)
    await disconnect(reader)

    assert [at for at, _ in endings(reader)] == [37.0]
    assert [round(at - 1000) for at in reader.keep_alives] == [15, 30, 52]


@in_simulated_time
async def test_no_announcement_if_switched_off() -> None:
    replica = await started(CallWorld(), max_seconds=300, warn_seconds=0)
    reader = follow(replica)

    await asyncio.sleep(400)
    await disconnect(reader)

    assert [name for _, name, _ in reader.events] == ["call"]


@in_simulated_time
async def test_the_announcement_comes_at_once_if_less_is_left_and_again_after_a_reconnect() -> None:
    replica = await started(CallWorld(), max_seconds=20, warn_seconds=60)

    first = follow(replica)
    await asyncio.sleep(5.5)
    await disconnect(first)
    etag = (await replica.calls.read(ANN, "call_1")).etag
    again = follow(replica, last_event_id=etag)
    await asyncio.sleep(0.1)
    await disconnect(again)

    assert endings(first) == [(0.0, ending(20, 20))]
    assert endings(again) == [(5.5, ending(20, 15))]
    assert [name for _, name, _ in again.events] == ["call", "ending"]


@in_simulated_time
async def test_a_call_that_runs_past_its_end_has_no_seconds_left() -> None:
    replica = await started(CallWorld(), max_seconds=20)
    await asyncio.sleep(25)

    reader = follow(replica)
    await asyncio.sleep(0.1)
    await disconnect(reader)

    assert endings(reader) == [(25.0, ending(20, 0))]


@in_simulated_time
async def test_the_end_is_announced_again_only_if_it_comes_nearer_by_more_than_ten_seconds() -> None:
    replica = await started(CallWorld(), max_seconds=100, warn_seconds=60)
    reader = follow(replica)
    await asyncio.sleep(42)
    assert endings(reader) == [(40.0, ending(100, 60))]

    for seconds in (105, 95, 91, 90):  # nearer by ten seconds at most
        replica.live.max_seconds = seconds
        await asyncio.sleep(2)
    replica.live.max_seconds = 79  # 21 s nearer than announced, 11 s nearer than shown
    await asyncio.sleep(2)
    await disconnect(reader)

    (_, _), (at, data) = endings(reader)
    assert 50 <= at <= 51.3
    assert data["ends_at"] == time_of(STARTED + 79)
    assert 0 <= data["seconds_left"] - (79 - at) < 1.001


@in_simulated_time
async def test_an_end_that_was_put_off_is_announced_again_when_it_comes_back() -> None:
    replica = await started(CallWorld(), max_seconds=100, warn_seconds=60)
    reader = follow(replica)
    await asyncio.sleep(42)

    replica.live.max_seconds = 400
    await asyncio.sleep(2)
    replica.live.max_seconds = 110
    await asyncio.sleep(8)
    await disconnect(reader)

    assert [(data["ends_at"], at > 49) for at, data in endings(reader)] == [
        (time_of(STARTED + 100), False),
        (time_of(STARTED + 110), True),
    ]


@in_simulated_time
async def test_an_ended_call_announces_nothing_and_its_final_id_still_ends_the_stream() -> None:
    world = CallWorld()
    replica = await started(world, max_seconds=20, warn_seconds=60)
    reader = follow(replica)
    await asyncio.sleep(3)
    world.oneinbox.records["call_1"]["status"] = "completed"
    await finish([reader])

    after = follow(replica, last_event_id="another")
    await finish([after])
    etag = (await replica.calls.read(ANN, "call_1")).etag

    assert [name for _, name, _ in reader.events] == ["call", "ending", "call", "end"]
    assert [name for _, name, _ in after.events] == ["call", "end"]
    assert await replica.calls.follow(ANN, "call_1", etag) is None


def test_the_announcement_says_why() -> None:
    record = CallRecord(id="call_1", status="in_progress")
    snapshot = Snapshot.of(
        record, seen=0, agent_names={}, expose=(), bounds=Bounds(STARTED + 30.5, None, "talk-minutes")
    )
    shared = Snapshot.from_bytes(snapshot.to_bytes())
    assert shared == snapshot

    event = EndNotice(60, lambda: STARTED).take(shared.bounds)

    data = json.dumps({"ends_at": time_of(STARTED + 30), "seconds_left": 30, "reason": "talk-minutes"})
    assert event == b"event: ending\ndata: " + data.replace(": ", ":").replace(", ", ",").encode() + b"\n\n"


def test_a_state_that_another_version_shared_is_skipped() -> None:
    snapshot = Snapshot.of(CallRecord(id="call_1"), seen=0, agent_names={}, expose=())
    head, _, fields = snapshot.to_bytes().partition(b"\n")
    without = json.loads(head)
    del without["bounds"]
    more = {**json.loads(head), "bounds": [None, None, "", "more"]}

    others: list[Any] = [without, more, {**without, "bounds": None}, [], 7, None]
    for other in others:
        assert Snapshot.from_bytes(json.dumps(other).encode() + b"\n" + fields) is None
