"""A call's record: which moves its steps make, and that any of them may be made again."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.limits import CallAttempt
from app.limits import record as records
from app.limits.ledger import Ledger
from app.limits.record import ENDED, MOST_RECEIVERS, MOVES, UNWANTED, StartRecord, Step
from app.store import Change, ListEntry
from app.store.memory import MemoryStore
from tests.conftest import Logs

ATTEMPT = CallAttempt("request-1", 1_800_000_000, "main", "jwt:ann", "owner")
NOW = 1_800_000_100.0
DUE = NOW + 30

STEPS: dict[str, Callable[[], Step]] = {
    "reserve": lambda: records.reserve(ATTEMPT),
    "give": lambda: records.give(ATTEMPT, "call_1", kept=False),
    "give and keep": lambda: records.give(ATTEMPT, "call_1", kept=True),
    "restore": lambda: records.restore(ATTEMPT, "call_1"),
    "leave": lambda: records.leave(ATTEMPT, "call_1", DUE),
    "collect": lambda: records.collect("repeat-1"),
    "collect, another": lambda: records.collect("repeat-2"),
    "withdraw": lambda: records.withdraw("request-1", DUE, "why", records.reject(ATTEMPT, "call_1", "why")),
    "withdraw a repeat": lambda: records.withdraw("repeat-1", DUE, "why", records.nothing),
    "reject": lambda: records.reject(ATTEMPT, "call_1", "why"),
    "condemn": lambda: records.condemn("why"),
    "stopped": lambda: records.stopped("why"),
    "expire": lambda: records.expire(NOW, "why"),
    "expire, later": lambda: records.expire(DUE, "why"),
    "end": lambda: records.end(60),
    "no call": lambda: records.no_call(ATTEMPT),
    "give up": lambda: records.give_up,
    "fail": lambda: records.fail,
    "miss": lambda: records.miss(NOW),
    "found again": lambda: records.miss(0),
}
ALLOWED = {(move.before, move.after) for move in MOVES}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=25))
def test_steps_make_the_tables_moves_and_no_others(names: list[str]) -> None:
    record: StartRecord | None = None
    for name in names:
        after = STEPS[name]()(record)
        if after is None:
            continue
        if record is not None and record.state == after.state:
            assert record != after, "what moves nothing says so"
        else:
            assert (record.state if record else "", after.state) in ALLOWED, name
        assert STEPS[name]()(after) in (None, after) or name.startswith(("withdraw", "expire")), "made twice"
        assert StartRecord.from_bytes(after.to_bytes()) == after._replace(raw=after.to_bytes())
        record = after


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=15), st.sampled_from(sorted(STEPS)))
def test_an_end_is_final_and_an_unwanted_call_is_given_to_no_one(names: list[str], last: str) -> None:
    for state in (ENDED, UNWANTED):
        record = StartRecord(ATTEMPT, state, "call_1", unwanted="why")
        for name in [*names, last]:
            record = STEPS[name]()(record) or record
            assert record.state in (state, ENDED)
            assert record.given_to == ()


def test_every_move_of_the_table_can_happen() -> None:
    seen = set()
    for path in (
        ["reserve", "give", "withdraw", "fail", "end"],
        ["reserve", "leave", "collect", "withdraw a repeat", "expire, later", "end"],
        ["reserve", "leave", "end"],
        ["reserve", "give and keep", "withdraw"],
        ["reserve", "give", "end"],
        ["reserve", "reject"],
        ["reserve", "no call"],
        ["reserve", "give up", "reject"],
        ["reserve", "give up", "no call"],
        ["give"],
        ["leave"],
        ["reject"],
        ["no call"],
    ):
        record: StartRecord | None = None
        for name in path:
            after = STEPS[name]()(record)
            assert after is not None, name
            if record is None or record.state != after.state:
                seen.add((record.state if record else "", after.state))
            record = after
    assert seen == ALLOWED


@pytest.mark.parametrize("receivers", [1, 2, MOST_RECEIVERS - 1, MOST_RECEIVERS, 3 * MOST_RECEIVERS])
def test_a_call_waits_again_only_when_no_receiver_is_left(receivers: int) -> None:
    record = records.leave(ATTEMPT, "call_1", DUE)(records.reserve(ATTEMPT)(None))
    for number in range(receivers):
        record = records.collect(f"r{number}")(record) or record
    for number in range(receivers):
        assert record is not None
        assert record.state == "given"
        record = records.withdraw(f"r{number}", DUE, "why", records.nothing)(record) or record
    assert record is not None
    assert record.state == ("started" if receivers < MOST_RECEIVERS else "given"), "beyond that, not all are named"


# --- as stored ---


def stored(**fields: object) -> bytes:
    return json.dumps({"member": ATTEMPT.key, "call_id": "call_1", **fields}).encode()


@pytest.mark.parametrize(
    ("value", "state"),
    [
        (stored(), "given"),
        (stored(unwanted=""), "given"),
        (stored(unwanted="its answer was lost"), "unwanted"),
        (stored(v=3, state="given", of_tomorrow={"a": [1]}), "given"),
    ],
    ids=["yesterday", "yesterday-wanted", "yesterday-unwanted", "tomorrow"],
)
def test_other_versions_are_read(value: bytes, state: str) -> None:
    record = StartRecord.from_bytes(value)
    assert record is not None
    assert (record.attempt, record.call_id, record.state) == (ATTEMPT, "call_1", state)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b"{}",
        b"\xff",
        b'{"member": "too short"}',
        b'{"member": 1}',
        stored(given_to=1),
        stored(state=["given"]),
        stored(state="of tomorrow"),
        stored(due="soon"),
        stored(call_id=7),
    ],
)
def test_what_cannot_be_read_is_skipped_and_logged(value: bytes, logs: Logs) -> None:
    assert StartRecord.from_bytes(value) is None
    assert [entry["event"] for entry in logs] == ["call_record_unreadable"]


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists).map(
        lambda value: json.dumps({"member": ATTEMPT.key, "state": value, "given_to": value, "due": value}).encode()
    )
)
def test_reading_never_fails(value: bytes) -> None:
    record = StartRecord.from_bytes(value)
    assert record is None or record.to_bytes()


async def test_a_users_list_is_read_in_the_form_of_any_version(logs: Logs) -> None:
    store = MemoryStore()
    ledger = Ledger(store, lease=60)
    name = f"calls:{ATTEMPT.user}"
    for entry in (StartRecord(ATTEMPT, call_id="call_old").to_bytes(), b"of tomorrow"):
        await store.change(Change({}, entry=ListEntry(name, entry, 50, 60)))
    await ledger.move(ATTEMPT.request_id, records.give(ATTEMPT, "call_new", kept=False))
    assert await ledger.of_user(ATTEMPT.user) == [(ATTEMPT.since, "call_new"), (ATTEMPT.since, "call_old")]
    assert [entry["event"] for entry in logs] == ["call_record_unreadable"]


async def test_there_is_no_list_where_nobody_can_ask_for_it() -> None:
    store = MemoryStore()
    await Ledger(store, lease=60, listed=False).move(ATTEMPT.request_id, records.give(ATTEMPT, "call_1", kept=False))
    assert await store.items(f"calls:{ATTEMPT.user}") == []
