"""The part of a call that browsers may see: an allow-list, whatever OneInbox adds to its records."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from io import StringIO
from itertools import islice
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.limits import Bounds
from app.oneinbox.models import CallRecord

Role = Literal["agent", "user"]
ROLES: dict[str, Role] = {"agent": "agent", "assistant": "agent", "bot": "agent", "user": "user", "customer": "user"}
UNSPOKEN = frozenset({"tool", "tool_call", "tool_result", "function", "system"})
"""Roles whose lines or messages were not spoken."""
MAX_LINES = 10_000
"""Lines of a transcript or messages that are shown, the first ones: hours of talk."""
LINE = re.compile(r"^\s*([A-Za-z_]{2,12})\s*:\s?(.*)$")


class Utterance(BaseModel):
    """Something that one side said."""

    role: Role
    content: str


class BasicCall(BaseModel):
    """The fields of a call that its owner always sees."""

    agent: str | None = Field(description="Configured name of the agent; null if it is no longer configured.")
    status: str = Field(
        description="`queued`, `initiated`, `in_progress`, `completed` or `failed`; treat any other as running.",
        examples=["in_progress"],
    )
    created_at: datetime | None = Field(description="RFC 3339, UTC.")
    started_at: datetime | None = Field(description="RFC 3339, UTC; null until someone joins.")
    ended_at: datetime | None = Field(description="RFC 3339, UTC; null while running.")
    duration_seconds: float | None = Field(description="Length of the conversation; null until it ends.")
    end_reason: str | None = Field(description="OneInbox's reason for the end.")
    ends_at: datetime | None = Field(
        description="RFC 3339, UTC: the latest moment that the running call may last to, as known now; it may move. "
        "Null if nothing bounds it, and once it has ended."
    )
    stopped_because: str | None = Field(
        description="Why the broker ended the call: `max-call-seconds`, `talk-minutes`, `not-joined`, `operator` or "
        "`caller-gone`; null if it did not."
    )


class ExposedCall(BasicCall):
    """A call with the fields that BROKER_EXPOSE may add."""

    transcript: list[Utterance] | None = Field(
        default=None, description="Who said what, at most 10,000 lines; 2 to 3 seconds after the end."
    )
    messages: list[Utterance] | None = Field(default=None, description="As `transcript`, from OneInbox's message list.")
    recording_url: str | None = Field(default=None, description="URL of the recording.")
    summary: str | None = Field(default=None, description="OneInbox's summary of the call.")
    outcome: str | None = Field(default=None, description="OneInbox's verdict on the call.")


class Call(ExposedCall):
    """A call, as its owner sees it."""

    id: str = Field(description="The id in the call's Location.")


class Ending(BaseModel):
    """The data of the event `ending`: the call is about to be ended by the broker."""

    ends_at: datetime = Field(description="As in the call.")
    seconds_left: int = Field(ge=0)
    reason: str = Field(description="`max-call-seconds` or `talk-minutes`.")


class CallList(BaseModel):
    """Your calls of the last day, newest first."""

    items: list[Call] = Field(description="At most 50.")


RUNNING, ENDED = "Running", "Ended"
CALLS: dict[str, dict[str, Any]] = {
    RUNNING: {
        "id": "call_abc123",
        "agent": "default",
        "status": "in_progress",
        "created_at": "2026-01-05T10:00:00Z",
        "started_at": "2026-01-05T10:00:02Z",
        "ended_at": None,
        "duration_seconds": None,
        "end_reason": None,
        "ends_at": "2026-01-05T10:02:00Z",
        "stopped_because": None,
    }
}
CALLS[ENDED] = {
    **CALLS[RUNNING],
    "status": "completed",
    "ended_at": "2026-01-05T10:01:14Z",
    "duration_seconds": 72,
    "end_reason": "user_hangup",
    "ends_at": None,
    # Added by BROKER_EXPOSE:
    "transcript": [
        {"role": "agent", "content": "Hello! How can I help?"},
        {"role": "user", "content": "Where is my order?"},
    ],
    "summary": "The customer asked about an order.",
}
EVENTS = "".join(
    f"event: {name}\n{event_id}data: {json.dumps(data)}\n\n"
    for name, event_id, data in (
        ("call", 'id: "5d41402abc4b2a76"\n', CALLS[RUNNING]),
        ("ending", "", {"ends_at": "2026-01-05T10:02:00Z", "seconds_left": 60, "reason": "max-call-seconds"}),
        ("call", 'id: "b9719d911017c592"\n', CALLS[ENDED]),
        ("end", 'id: "b9719d911017c592"\n', {}),
    )
)


WEB_URL = re.compile(r"https?://", re.IGNORECASE)


def project(record: CallRecord, bounds: Bounds, *, agent: str | None, expose: Collection[str]) -> BasicCall:
    """Return the visible part of a record, without its id. `expose`: names from BROKER_EXPOSE."""
    basic: dict[str, Any] = {
        "agent": agent,
        "status": record.status or "unknown",
        "created_at": record.created_at,
        "started_at": record.started_at,
        "ended_at": record.ended_at,
        "duration_seconds": record.duration_seconds,
        "end_reason": record.end_reason,
        "ends_at": None if bounds.ends_at is None else datetime.fromtimestamp(int(bounds.ends_at), UTC),
        "stopped_because": bounds.stopped_because,
    }
    if not expose:
        return BasicCall(**basic)
    # Only what is exposed is worked on: a transcript may be large.
    more: Mapping[str, Callable[[], Any]] = {
        "transcript": lambda: _transcript(record),
        "messages": lambda: _utterances(record.messages),
        # Pages show it as a link: no scheme that a browser would run.
        "recording_url": lambda: record.recording_url if WEB_URL.match(record.recording_url or "") else None,
        "summary": lambda: record.ai_summary or record.analysis.summary,
        "outcome": lambda: record.outcome or record.analysis.outcome,
    }
    return ExposedCall(**basic, **{name: value() for name, value in more.items() if name in expose})


def _utterances(items: Any) -> list[Utterance] | None:
    """Return what was said in a list of messages, without tool calls and their results."""
    if not isinstance(items, list):
        return None
    first = items[:MAX_LINES]
    said = [item for item in first if isinstance(item, dict) and isinstance(item.get("content"), str)]
    return [
        Utterance(role=ROLES[item["role"]], content=item["content"])
        for item in said
        if isinstance(item.get("role"), str) and item["role"] in ROLES
    ]


def _transcript(record: CallRecord) -> list[Utterance] | None:
    """Return the transcript, whether OneInbox sends a list or a text of `role: words` lines.

    A text without speakers cannot be split; the message list is used instead. Tool calls and their results are left
    out, in a text with the lines that follow them up to the next speaker.
    """
    if isinstance(record.transcript, list):
        return _utterances(record.transcript)
    if not isinstance(record.transcript, str) or not record.transcript.strip():
        return None
    said: list[tuple[Role, list[str]]] = []
    unspoken = False
    for line in islice(StringIO(record.transcript, newline=None), MAX_LINES):
        match = LINE.match(line)
        name = match[1].lower() if match else ""
        if match and (role := ROLES.get(name)):
            said.append((role, [match[2]]))
            unspoken = False
        elif unspoken or name in UNSPOKEN:
            unspoken = True
        elif said:
            said[-1][1].append(line.removesuffix("\n"))
        else:
            return _utterances(record.messages)
    return [Utterance(role=role, content="\n".join(lines)) for role, lines in said]
