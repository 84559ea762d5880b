"""How calls were lost, each as a story: the shrunk histories that the simulation found, by what outsiders see.

The letters are those of the findings. Where a fault hits a write of the store, every write of that moment is tried.
"""

import asyncio
from typing import Literal

import pytest

from tests.simulation.stories import KEY, Story, told

WRITES = range(6)
"""More than a request writes after OneInbox's answer."""


# a: the note that a caller is gone came after a repeat had been given the call


@told(memory=True, token_life=80)  # what is kept expires 20 s after the start
async def test_a_call_that_a_repeat_was_given_is_not_hung_up(story: Story) -> None:
    story.oneinbox("start-slow-answer", seconds=11)
    first = story.post("first", key=KEY)
    await story.wait(0.6)
    first.hang_up()
    await story.wait(0.3)
    repeat = story.post("repeat", key=KEY)
    assert await repeat.status() == 201
    await story.wait(120)
    story.assert_just(repeat)


@told(token_life=80)
async def test_a_call_that_a_repeat_on_another_replica_was_given_is_not_hung_up(story: Story) -> None:
    story.stores()[0].lag = 0.02
    story.oneinbox("start-slow-answer", seconds=3)
    first = story.post("first", key=KEY)
    await story.wait(0.6)
    first.hang_up()
    repeat = story.post("repeat", key=KEY, at="r2")
    assert await repeat.status() == 201
    await story.wait(120)
    story.assert_just(repeat)


# b: one 404 is a rumour


@told(live_calls=1)
async def test_one_404_for_a_look_frees_no_slot_of_a_running_call(story: Story) -> None:
    first = story.post("first")
    assert await first.status() == 201
    await story.wait(12)
    story.oneinbox("get-404")
    assert await story.post("second", at="r2").status() == 429
    await story.wait(65)
    assert await story.post("third").status() == 429
    story.assert_just(first)


@told()
async def test_one_404_for_a_stop_does_not_end_the_stopping(story: Story) -> None:
    story.oneinbox("start-slow-answer", seconds=1)
    story.oneinbox("stop-404")
    first = story.post("first")
    await story.until(story.running)
    first.hang_up()
    await story.wait(200)
    assert story.running() == []
    assert story.unstopped() == []


@told(call_seconds=100)
async def test_a_call_of_which_a_404_was_said_ends_on_time(story: Story) -> None:
    first = story.post("first")
    assert await first.status() == 201
    await story.wait(35)
    story.oneinbox("get-404", times=2)
    story.webhook("call_1")
    await story.wait(160)
    assert story.running() == []


# c: a note belongs to a call, not to its key


@told(token_life=70)
async def test_a_later_call_of_the_key_does_not_save_an_earlier_one(story: Story) -> None:
    story.oneinbox("start-slow-answer", seconds=0.5)
    first = story.post("first", key=KEY)
    await story.until(story.running)
    first.hang_up()
    await story.wait(15)  # the kept answer expires a minute before its token
    second = story.post("second", key=KEY)
    await story.until(lambda: len(story.calls) == 2)
    story.hears_late(1)
    second.hang_up()
    await story.wait(0.5)
    third = story.post("third", key=KEY)
    assert await third.status() == 201
    await story.wait(150)
    story.assert_just(third)


# d, N6: SIGTERM


async def _restart(story: Story, slot: str = "r1") -> None:
    await story.scene.terminate(slot)
    await story.wait(0.5)
    await story.scene.boot(slot)


@told(memory=True)
async def test_sigterm_looks_for_a_lost_call(story: Story) -> None:
    story.oneinbox("start-hang-after")
    first = story.post("first")
    await story.wait(7)
    restart = asyncio.create_task(_restart(story))
    assert await first.status() == 504
    await restart
    await story.wait(60)
    assert story.running() == []


@told(memory=True)
async def test_sigterm_looks_for_a_call_that_was_lost_before(story: Story) -> None:
    story.oneinbox("start-5xx-after")
    assert await story.post("first").status() == 502
    await _restart(story)
    await story.wait(60)
    assert story.running() == []


@told(memory=True)
async def test_sigterm_stops_an_uncollected_call(story: Story) -> None:
    story.oneinbox("start-slow-answer", seconds=1)
    first = story.post("first", key=KEY)
    await story.until(story.running)
    first.hang_up()
    await story.wait(5)
    await _restart(story)
    await story.wait(60)
    assert story.running() == []


@told(memory=True)
async def test_sigterm_stops_an_unwanted_call_once_more(story: Story) -> None:
    story.oneinbox("start-5xx-after")
    story.oneinbox("stop-404")
    assert await story.post("first").status() == 502
    await story.wait(5)
    await _restart(story)
    await story.wait(60)
    assert story.running() == []


@told(call_seconds=150)
async def test_sigterm_right_after_an_outage_writes_what_the_store_missed(story: Story) -> None:
    await story.clock(2.5)
    story.scene.server.begin("refused")
    await story.clock(8)
    first = story.post("first")
    assert await first.status() == 201
    await story.clock(12.8)
    story.scene.server.recover()
    await _restart(story)
    await story.wait(150 + 95)
    assert story.running() == []


@told()
async def test_sigterm_right_after_an_outage_leaves_no_lost_call(story: Story) -> None:
    await story.clock(2.5)
    story.scene.server.begin("refused")
    await story.clock(8)
    story.oneinbox("start-5xx-after")
    assert await story.post("first").status() == 502
    story.scene.server.recover()
    await _restart(story)
    await story.wait(290)
    assert story.running() == []


# N1: a stop that acted, and whose answer was lost


@told()
async def test_a_stop_whose_answer_was_lost_is_asked_about(story: Story) -> None:
    story.oneinbox("start-5xx-after")
    story.oneinbox("stop-hang-after")
    assert await story.post("first").status() == 502
    await story.until(lambda: story.calls["call_1"].ended)
    story.webhook("call_1", at="r2")
    await story.wait(120)
    assert story.running() == []
    assert story.unstopped() == []


# N2: one lost write, and a stopped call is replayed


@pytest.mark.parametrize("fault", ["st-lost", "st-lost-after", "st-late"])
@pytest.mark.parametrize("nth", WRITES)
@told()
async def test_a_repeat_is_not_given_a_stopped_call(story: Story, nth: int, fault: str) -> None:
    story.oneinbox("start-slow-answer", seconds=4)
    first = story.post("first", key=KEY)
    await story.until(story.running)
    story.lose_write(fault, of="first", after=lambda: story.calls["call_1"].answered, nth=nth, seconds=2)
    first.hang_up()
    await story.wait(25)
    repeat = story.post("repeat", key=KEY, at="r2")
    await repeat.status()
    await story.wait(200)
    story.assert_just(repeat)


# N3: one lost answer of the store, and a call that was given is stopped


@pytest.mark.parametrize("later", [0.0, 0.1, 0.2, 0.3, 0.4])  # a repeat looks twice a second
@pytest.mark.parametrize("nth", WRITES)
@told()
async def test_a_call_that_was_given_is_not_stopped(story: Story, nth: int, later: float) -> None:
    story.oneinbox("start-slow-answer", seconds=1)
    first = story.post("first", key=KEY)
    await story.until(story.running)
    story.lose_write("st-lost-after", of="first", after=lambda: story.calls["call_1"].answered, nth=nth)
    await story.wait(later)
    twin = story.post("twin", key=KEY)
    await first.status()
    await twin.status()
    await story.wait(200)
    story.assert_just(first, twin)


@pytest.mark.parametrize("number", range(1, 8))
@told()
async def test_a_call_that_was_given_is_not_stopped_by_a_replica_whose_store_comes_and_goes(
    story: Story, number: int
) -> None:
    """Its store answers again and again, but for this request; a repeat gets the call from the other replica."""
    story.oneinbox("start-slow-answer", seconds=1)
    first = story.post("first", key=KEY)
    await story.until(story.running)
    story.lose_operations(number, of="first", after=lambda: story.calls["call_1"].answered)
    await story.wait(2)
    twin = story.post("twin", key=KEY, at="r2")
    await first.status()
    await twin.status()
    await story.wait(200)
    story.assert_just(first, twin)


# N4: an answer that was doubtful lands later


@pytest.mark.parametrize("late", [0.4, 1, 3])
@pytest.mark.parametrize("nth", WRITES)
@told()
async def test_a_write_that_lands_late_gives_no_one_a_stopped_call(story: Story, nth: int, late: float) -> None:
    first = story.post("first", key=KEY)
    await story.until(story.running)
    story.lose_write("st-late", of="first", after=lambda: story.calls["call_1"].answered, nth=nth, seconds=late)
    await first.status()
    await story.wait(6)
    repeat = story.post("repeat", key=KEY, at="r2")
    await repeat.status()
    await story.wait(200)
    story.assert_just(first, repeat)


# N5: a late write overwrites that a call is unwanted


@pytest.mark.parametrize("late", [0.4, 0.8, 2])
@pytest.mark.parametrize("nth", WRITES)
@told()
async def test_an_unwanted_call_is_stopped_in_the_end(story: Story, nth: int, late: float) -> None:
    story.oneinbox("stop-hang")
    first = story.post("first", key=KEY)
    await story.until(story.running)
    story.lose_write("st-late", of="first", after=lambda: story.calls["call_1"].answered, nth=nth, seconds=late)
    await first.status()
    await story.wait(300)
    story.assert_just(first)


# N7: after an outage the slot was told, the record not yet


@told()
async def test_a_call_given_during_an_outage_is_not_hunted_down(story: Story) -> None:
    await story.clock(2.5)
    story.scene.server.begin("refused")
    await story.clock(8)
    first = story.post("first")
    assert await first.status() == 201
    await story.clock(12.85)
    story.scene.server.recover()
    await story.clock(13.5)
    story.scene.server.begin("frozen")
    story.read("look", first)
    await story.clock(18.9)
    await story.scene.kill("r1")
    story.scene.server.recover()
    await story.wait(1)
    await story.scene.boot("r1")
    await story.wait(240)
    story.assert_just(first)


# N8: killed between the record and the 201


@pytest.mark.parametrize("after", [0.01, 0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.3])
@pytest.mark.parametrize("key", [KEY, None])
@told()
async def test_a_call_that_a_killed_replica_gave_no_one_is_stopped(story: Story, after: float, key: str | None) -> None:
    story.scene.server.lag = 0.02
    story.oneinbox("start-slow-answer", seconds=1)
    first = story.post("first", key=key)
    await story.until(story.running)
    first.hang_up()
    await story.until(lambda: story.calls["call_1"].answered)
    await story.wait(after)
    await story.scene.kill("r1")
    await story.wait(3)
    await story.scene.boot("r1")
    await story.wait(300)
    assert story.running() == []


# N9: a stale read after the end


@pytest.mark.parametrize("lag", [0.02, 0.06, 0.1, 0.12])
@pytest.mark.parametrize("at", ["r1", "r2"])
@told()
async def test_a_stale_read_brings_no_call_back_to_life(story: Story, at: str, lag: float) -> None:
    first = story.post("first")
    assert await first.status() == 201
    followed = story.follow("follower", first)
    await story.until(lambda: followed.events)
    story.scene.server.lag = lag
    await story.wait(3)
    story.scene.oneinbox.end(story.calls["call_1"], "left")
    looks = story.looks("call_1")
    await story.until(lambda: story.looks("call_1") > looks)
    story.oneinbox("oi-stale", seconds=3, of="hook")
    story.webhook("call_1", at=at)
    await story.wait(40)
    after = followed.events[followed.events.index("completed") :]
    assert set(after) <= {"completed", "end"}


# Found by attacking the record


@told(call_seconds=700)
async def test_a_key_that_is_used_again_keeps_its_second_answer_when_the_first_call_must_end(story: Story) -> None:
    first = story.post("first", key=KEY)
    assert await first.status() == 201
    await story.clock(660)
    second = story.post("second", key=KEY)
    assert await second.status() == 201
    await story.clock(750)
    assert story.stops(first.call)
    third = story.post("third", key=KEY)
    assert await third.status() == 201
    assert third.call == second.call


@told(call_seconds=700)
async def test_the_end_of_a_keys_first_call_leaves_the_mark_of_its_second_request(story: Story) -> None:
    first = story.post("first", key=KEY)
    assert await first.status() == 201
    await story.clock(718)
    story.oneinbox("start-slow-answer", seconds=12, times=2)
    second = story.post("second", key=KEY)
    await story.until(lambda: story.stops(first.call))
    await story.wait(1)
    twin = story.post("twin", key=KEY, at="r2")
    assert (await second.status(), await twin.status()) == (201, 201)
    assert twin.call == second.call


@pytest.mark.parametrize("late", [0.3, 1, 2, 2.9])
@pytest.mark.parametrize("nth", WRITES)
@told(token_life=3600)
async def test_a_collection_that_is_made_late_gives_the_call_to_no_one(story: Story, nth: int, late: float) -> None:
    story.oneinbox("start-slow-answer", seconds=1)
    first = story.post("first", key=KEY)
    await story.until(story.running)
    first.hang_up()
    await story.wait(4)
    story.lose_write("st-late", of="repeat", after=lambda: True, nth=nth, seconds=late)
    repeat = story.post("repeat", key=KEY, at="r2")
    await repeat.status()
    await story.wait(200)
    story.assert_just(first, repeat)


@told()
async def test_a_404_of_before_a_good_look_counts_no_more(story: Story) -> None:
    story.oneinbox("start-slow-answer", seconds=1)
    story.oneinbox("stop-404")
    first = story.post("first")
    await story.until(story.running)
    first.hang_up()
    await story.wait(3)
    story.oneinbox("get-5xx", times=2)
    story.oneinbox("stop-404")
    await story.wait(360)
    assert story.running() == []


@told()
async def test_a_call_whose_stop_is_404_while_it_runs_could_not_be_stopped(story: Story) -> None:
    story.oneinbox("start-slow-answer", seconds=1)
    story.oneinbox("stop-404", times=1000)
    first = story.post("first")
    await story.until(story.running)
    first.hang_up()
    await story.wait(120)
    assert story.running() == ["call_1"]
    assert story.unstopped() == ["call_1"]


@pytest.mark.parametrize("moment", range(0, 40, 2))
@told()
async def test_a_repeat_that_is_cancelled_while_it_collects_has_not_collected(story: Story, moment: int) -> None:
    """As uvicorn cancels requests, 20 s after SIGTERM."""
    story.scene.server.lag = 0.03
    story.oneinbox("start-slow-answer", seconds=13)
    first = story.post("first", key=KEY)
    await story.until(story.running)
    await story.wait(1)
    first.hang_up()
    repeat = story.post("repeat", key=KEY, at="r2")
    await story.until(lambda: story.calls["call_1"].answered)
    await story.wait(0.01 * moment)
    if repeat.connection.task is not None:
        repeat.connection.task.cancel()
    await story.wait(300)
    story.assert_just(first, repeat)


@pytest.mark.parametrize("outage", ["refused", "frozen"])
@told(token_life=3600)
async def test_a_call_whose_answer_a_lost_store_may_have_kept_is_stopped_and_never_replayed(
    story: Story, outage: Literal["refused", "frozen"]
) -> None:
    story.oneinbox("start-slow-answer", seconds=1)
    first = story.post("first", key=KEY)
    await story.until(story.running)
    story.scene.server.begin(outage)
    assert await first.status() == 503
    assert story.running() == []
    await story.wait(4)
    story.scene.server.recover()
    for number in range(8):  # whenever it asks again
        again = story.post(f"again{number}", key=KEY, at="r2")
        if await again.status() == 201:
            break
        await story.wait(0.4)
    await story.wait(60)
    story.assert_just(again)
