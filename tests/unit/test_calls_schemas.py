"""What a browser sees of a call, whatever OneInbox makes of its records."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from app.calls.schemas import MAX_LINES, Call, project
from app.calls.snapshots import Snapshot
from app.limits import Bounds
from app.oneinbox.models import CallRecord

BASIC = (
    "agent",
    "status",
    "created_at",
    "started_at",
    "ended_at",
    "duration_seconds",
    "end_reason",
    "ends_at",
    "stopped_because",
)
EXPOSABLE = ("transcript", "messages", "recording_url", "summary", "outcome")
READ = ("agent_id", *BASIC, *EXPOSABLE, "ai_summary", "metadata")
SECRET = "SECRET"
strict = TypeAdapter(Call)

# Anything, with the secret in every text and every name.
text = st.text(max_size=12).map(lambda word: f"{SECRET}{word}")
leaf = st.none() | st.booleans() | st.integers() | st.floats() | text
anything = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)
# A date that no zone can shift, or that none can hold, is OneInbox's problem; app.oneinbox reads it.
roles = st.sampled_from(["agent", "user", "assistant", "tool_call", "tool_result", "system", "Agent", "", None, 7])
message = st.fixed_dictionaries(
    {},
    optional={
        "role": roles | anything,
        "content": st.just("said") | anything,
        "name": text,
        "arguments": anything,
        "tool_call_id": text,
        "result": anything,
    },
)
said_text = st.lists(st.sampled_from(["agent: said", "User: said", "tool: x", "said", "", ":"]), max_size=6).map(
    "\n".join
)
record = st.fixed_dictionaries(
    {"id": st.just("call_1")},
    optional={
        "agent_id": st.just("agt_1") | anything,
        "status": st.sampled_from(["queued", "in_progress", "completed", "failed", "new"]) | st.integers() | st.none(),
        "created_at": st.just("2026-03-01T10:00:00Z") | st.integers(0, 10**10) | st.none(),
        "duration_seconds": st.floats() | st.integers() | anything,
        "end_reason": st.just("hangup") | st.integers() | st.lists(text),
        "transcript": st.lists(message | anything, max_size=4)
        | said_text
        | st.dictionaries(text, text)
        | st.integers(),
        "messages": st.lists(message | anything, max_size=4) | st.dictionaries(text, text) | text | st.integers(),
        "recording_url": st.just("https://r.example/1") | st.integers() | st.lists(text),
        "ai_summary": st.just("a summary") | st.dictionaries(text, text),
        "outcome": st.just("sold") | st.lists(text),
        "metadata": st.dictionaries(st.sampled_from(["broker_user", "broker_request_id", "order"]), anything)
        | anything,
        "analysis": anything,
        "latency": anything,
        "variables": anything,
        "from_number": anything,
        "cost_cents": anything,
        "summary": anything,
        "agent": anything,
        "owner": anything,
        "some_new_field": anything,
    },
)
exposed = st.sets(st.sampled_from(EXPOSABLE))


def spoken(value: Any) -> list[str]:
    """What may be shown of a transcript or a list of messages: the words of the two sides."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return []
    sides = ("agent", "user", "assistant")
    return [
        item["content"]
        for item in value
        if isinstance(item, dict) and item.get("role") in sides and isinstance(item.get("content"), str)
    ]


@settings(deadline=None)  # other people's machines are busy
@given(record, exposed)
def test_the_shape_holds_and_nothing_else_is_shown(given_record: dict[str, Any], expose: set[str]) -> None:
    wire = json.loads(json.dumps(given_record))
    snapshot = Snapshot.of(CallRecord.model_validate(wire), seen=0, agent_names={"agt_1": "default"}, expose=expose)

    body = snapshot.body("call_1.key")
    call = json.loads(body)
    strict.validate_json(body)
    assert call.keys() == {"id", *BASIC, *expose}
    assert call["id"] == "call_1.key"
    assert call["agent"] in (None, "default")
    for name in ("transcript", "messages"):
        shown = call.get(name)
        assert shown is None or all(item.keys() == {"role", "content"} for item in shown)
        assert shown is None or all(item["role"] in ("agent", "user") for item in shown)
    allowed = "".join([*spoken(wire.get("transcript")), *spoken(wire.get("messages"))])
    told = json.dumps([*(call.get("transcript") or []), *(call.get("messages") or [])])
    assert told.count(SECRET) <= 2 * allowed.count(SECRET), "each is shown twice at most: as transcript, as message"
    rest = {name: value for name, value in call.items() if name not in ("transcript", "messages")}
    assert SECRET not in json.dumps(rest)


@settings(deadline=None)  # other people's machines are busy
@given(record, exposed)
def test_a_state_is_named_by_what_is_seen_of_it(given_record: dict[str, Any], expose: set[str]) -> None:
    wire = json.loads(json.dumps(given_record))
    unseen = {**wire, "cost_cents": 1, "some_new_field": {"x": 1}, "analysis": None}
    first, second = (
        Snapshot.of(CallRecord.model_validate(each), seen=at, agent_names={}, expose=expose)
        for at, each in ((1.0, wire), (2.0, unseen))
    )

    assert first.etag == second.etag
    assert first.fields == second.fields
    assert Snapshot.from_bytes(first.to_bytes()) == first
    # One event of a stream is three lines.
    assert b"\n" not in first.body("x")
    assert b"\r" not in first.body("x")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("https://r.example/1.wav", "https://r.example/1.wav"),
        ("HTTP://r.example/1", "HTTP://r.example/1"),
        ("javascript:alert(1)", None),
        (" https://r.example", None),
        ("data:text/html,x", None),
        ("", None),
        (None, None),
    ],
)
def test_a_recording_is_a_link_that_runs_nothing(said: str | None, shown: str | None) -> None:
    call = project(
        CallRecord(id="call_1", recording_url=said), Bounds(None, None), agent=None, expose={"recording_url"}
    )

    assert call.model_dump()["recording_url"] == shown


@pytest.mark.parametrize("separator", ["\n", "\r", "\r\n", "\u2028", "\x00", "\x85", "\x1e", "\n\nevent: end\ndata: "])
def test_no_text_breaks_out_of_its_event(separator: str) -> None:
    record = CallRecord(
        id="call_1",
        status=f"x{separator}y",
        end_reason=separator,
        ai_summary=f"data: {separator}",
        transcript=separator,
    )

    snapshot = Snapshot.of(record, seen=0, agent_names={}, expose={"summary", "transcript"})

    body = snapshot.body("call_1")
    assert b"\n" not in body
    assert b"\r" not in body
    assert json.loads(body)["status"] == f"x{separator}y"


MANY = 900_000
SAID = {"role": "user", "content": "x"}
LARGE: dict[str, dict[str, Any]] = {
    "breaks": {"transcript": "agent: x" + "\n" * MANY},
    "returns": {"transcript": "agent: x" + "\r" * MANY},
    "both": {"transcript": "agent: x" + "\r\n" * MANY},
    "unspoken-lines": {"transcript": "agent: x\ntool: y" + "\n" * MANY},
    "continued-lines": {"transcript": "agent: x" + "\ny" * MANY},
    "many-turns": {"transcript": "agent: x\nuser: y\n" * (MANY // 8)},
    "spaces": {"transcript": "agent: x\n" + " " * MANY},
    "spaces-behind-a-name": {"transcript": "agent: x\nuser" + " " * MANY},
    "colons": {"transcript": "agent" + ":" * MANY},
    "a-list": {"transcript": [SAID] * MANY},
    "a-list-of-nothing": {"transcript": [{}] * MANY},
    "messages": {"messages": [SAID] * MANY},
    "messages-instead-of-a-text": {"transcript": "no speaker" + "\n" * MANY, "messages": [SAID] * MANY},
}


@pytest.mark.parametrize("expose", [{"transcript", "messages"}, {"summary"}], ids=["exposed", "not-exposed"])
@pytest.mark.parametrize("name", LARGE)
def test_a_large_record_takes_little_time_and_shows_a_bounded_part(name: str, expose: set[str]) -> None:
    record = CallRecord(id="call_1", ai_summary="short", **LARGE[name])

    begun = time.process_time()
    snapshot = Snapshot.of(record, seen=0, agent_names={}, expose=expose)
    took = time.process_time() - begun

    assert took < (0.5 if "messages" in expose else 0.03)
    call = json.loads(snapshot.fields)
    for shown in (call.get("transcript"), call.get("messages")):
        lines = [line for item in shown or [] for line in item["content"].split("\n")]
        assert len(lines) <= MAX_LINES


def test_the_first_lines_of_a_long_transcript_are_shown() -> None:
    turns = [f"{'agent' if at % 2 else 'user'}: {at}\nmore" for at in range(MAX_LINES)]

    for transcript in ("\n".join(turns), [{"role": "user", "content": str(at)} for at in range(2 * MAX_LINES)]):
        record = CallRecord(id="call_1", transcript=transcript)
        shown = project(record, Bounds(None, None), agent=None, expose={"transcript"}).model_dump()["transcript"]
        texts = [item["content"] for item in shown]
        assert texts[:2] == (["0\nmore", "1\nmore"] if isinstance(transcript, str) else ["0", "1"])
        assert len("\n".join(texts).split("\n")) == MAX_LINES
