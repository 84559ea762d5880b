"""Storage, state over time, and records of calls."""

import math
import secrets
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from app.sandbox.options import EmulatorOptions
from app.sandbox.schemas import StartCall

MAX_CALLS = 100_000
TERMINAL = frozenset({"completed", "failed", "no_answer", "no-answer", "busy", "canceled", "cancelled"})

_TOLD = "The caller asked for the opening hours and was told."
_ECHOED = "The caller was greeted, and heard their own words again."
_NOT_STARTED = frozenset({"queued", "initiated"})
_EVICTION_SCAN = 1_000
_OLDER_FIELDS = frozenset(
    {
        "id",
        "agent_id",
        "type",
        "status",
        "variables",
        "started_at",
        "ended_at",
        "duration_seconds",
        "end_reason",
        "transcript",
        "recording_url",
        "metadata",
        "created_at",
    }
)


@dataclass(frozen=True, slots=True)
class Ending:
    """The way and time a call ended: by the clock, by a stop, or through the control surface."""

    status: str
    reason: str
    started_at: float | None
    ended_at: float


@dataclass(frozen=True, slots=True)
class Hold:
    """A status in which the control surface keeps a call."""

    status: str
    since: float


@dataclass(slots=True)
class Call:
    """A call. Its state follows from these fields and the time."""

    number: int
    """Counts up in the order of creation."""
    id: str
    agent_id: str
    room_name: str
    created_at: float
    variables: dict[str, Any]
    overrides: dict[str, Any]
    metadata: dict[str, Any]
    ending: Ending | None = None
    """Set unless the clock ended it."""
    hold: Hold | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of the record replaced by the control surface."""
    removed: set[str] = field(default_factory=set)
    """Fields of the record removed by the control surface."""
    announced: frozenset[str] = frozenset()
    """Webhook events already sent."""
    met_at: float | None = None
    """When its caller and the agent were first in the room together; with `voice="agent"` only."""
    said: list[dict[str, Any]] = field(default_factory=list)
    """Messages spoken in the room; with `voice="agent"` only."""


@dataclass(frozen=True, slots=True)
class CallState:
    """A call's state at one point in time."""

    status: str
    changed_at: float
    started_at: float | None = None
    ended_at: float | None = None
    end_reason: str | None = None
    ready: bool = False
    """True once the transcript and the rest are filled in."""
    next_change: float | None = None

    @property
    def running(self) -> bool:
        """True while the call costs money; an unknown status counts as running."""
        return self.status not in TERMINAL

    @property
    def duration(self) -> int | None:
        """Seconds talked; None until the call has ended."""
        if self.ended_at is None:
            return None
        return 0 if self.started_at is None else round(self.ended_at - self.started_at)

    @property
    def events(self) -> tuple[str, ...]:
        """Webhook events due so far, in order."""
        due: list[str] = []
        if self.started_at is not None:
            due.append("call.started")
        if self.ended_at is not None:
            due.append("call.failed" if self.status == "failed" else "call.ended")
        if self.ready:
            due += ["call.recording.available", "transcript.final", "call.analyzed"]
        return tuple(due)


def state_at(call: Call, options: EmulatorOptions, now: float) -> CallState:
    """Return the state of `call` at time `now`."""
    if call.ending is not None:
        return _ended(call.ending, options, now)
    initiated_at = call.created_at + options.queued
    started_at = initiated_at + options.initiated
    if call.hold is not None:
        talking_at = call.met_at if options.voice == "agent" else started_at
        since = call.hold.since if talking_at is None else min(talking_at, call.hold.since)
        return CallState(call.hold.status, call.hold.since, None if call.hold.status in _NOT_STARTED else since)
    if options.voice == "agent":
        return _state_in_room(call, options, now)
    if now < initiated_at:
        return CallState("queued", call.created_at, next_change=initiated_at)
    if now < started_at:
        return CallState("initiated", initiated_at, next_change=started_at)
    talked = min(options.in_progress, options.max_duration_seconds)
    reason = "user_hangup" if talked == options.in_progress else "max_duration"
    return _state_in_progress(started_at, started_at + talked, reason, options, now)


def _state_in_room(call: Call, options: EmulatorOptions, now: float) -> CallState:
    if call.met_at is not None:
        return _state_in_progress(call.met_at, call.met_at + options.max_duration_seconds, "max_duration", options, now)
    given_up_at = call.created_at + options.join_timeout
    if now < given_up_at:
        return CallState("initiated", call.created_at, next_change=given_up_at)
    return _ended(Ending("failed", "no_participant", None, given_up_at), options, now)


def _state_in_progress(
    started_at: float, ended_at: float, reason: str, options: EmulatorOptions, now: float
) -> CallState:
    if now < ended_at:
        return CallState("in_progress", started_at, started_at, next_change=ended_at)
    return _ended(Ending("completed", reason, started_at, ended_at), options, now)


def _ended(end: Ending, options: EmulatorOptions, now: float) -> CallState:
    ready_at = end.ended_at + options.transcript_delay
    if now < ready_at:
        return CallState(end.status, end.ended_at, end.started_at, end.ended_at, end.reason, next_change=ready_at)
    return CallState(end.status, ready_at, end.started_at, end.ended_at, end.reason, ready=True)


class Calls:
    """The account's calls, at most MAX_CALLS."""

    def __init__(self, options: EmulatorOptions) -> None:
        self._options = options
        # In order of creation. Not a plain dict: iterating one steps over every entry deleted at its front.
        self._calls: OrderedDict[str, Call] = OrderedDict()
        self._created = 0

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call]:
        """Iterate over the calls, newest first."""
        return reversed(self._calls.values())

    def get(self, call_id: str) -> Call | None:
        """Return the call with this id, or None."""
        return self._calls.get(call_id)

    def state(self, call: Call) -> CallState:
        """Return the current state of `call`."""
        return state_at(call, self._options, self._options.now())

    def running(self) -> list[Call]:
        """Return the calls that have not ended, newest first."""
        return [call for call in self if self.state(call).running]

    def start(self, body: StartCall) -> Call:
        """Create a call."""
        if len(self._calls) >= MAX_CALLS:
            self._evict()
        self._created += 1
        call = Call(
            number=self._created,
            id=str(uuid.uuid4()) if self._options.edition == "reference" else f"call_{secrets.token_hex(8)}",
            agent_id=body.agent_id,
            room_name=f"web-{secrets.token_hex(4)}",
            created_at=self._options.now(),
            variables=body.variables or {},
            overrides=body.overrides.model_dump(exclude_unset=True) if body.overrides else {},
            metadata=body.metadata or {},
        )
        self._calls[call.id] = call
        return call

    def meet(self, call: Call) -> None:
        """Note that the caller and the agent are in the room."""
        if call.met_at is None and self.state(call).running:
            call.met_at = self._options.now()

    def stop(self, call: Call, reason: str = "api_stop") -> None:
        """End a call if it is running."""
        if self.state(call).running:
            self._end(call, "completed", reason)

    def force(self, call: Call, status: str | None) -> None:
        """Keep a call in `status` until the next change or stop; None returns it to the clock."""
        if status is None:
            call.ending = call.hold = None
        elif status in TERMINAL:
            self._end(call, status, status)
        else:
            call.ending, call.hold = None, Hold(status, self._options.now())

    def delete(self, call: Call) -> None:
        """Remove a call."""
        del self._calls[call.id]

    def _end(self, call: Call, status: str, reason: str) -> None:
        state = self.state(call)
        ended_at = self._options.now() if state.ended_at is None else state.ended_at
        call.ending, call.hold = Ending(status, reason, state.started_at, ended_at), None

    def _evict(self) -> None:
        """Remove the oldest ended call; the oldest of all if the first _EVICTION_SCAN are running."""
        oldest = list(islice(self._calls.values(), _EVICTION_SCAN))
        self.delete(next((call for call in oldest if not self.state(call).running), oldest[0]))


def record(call: Call, state: CallState, options: EmulatorOptions) -> dict[str, Any]:
    """Return the call's record, as GET /v1/calls/{id} answers it."""
    talked = state.ready and state.started_at is not None
    messages = _messages(call, options) if talked else []
    duration = state.duration or 0
    fields: dict[str, Any] = {
        "id": call.id,
        "agent_id": call.agent_id,
        "type": "web",
        "status": state.status,
        "from_number": None,
        "to_number": None,
        "room_name": call.room_name,
        "direction": "inbound",
        "scheduled_at": None,
        "variables": call.variables,
        "started_at": timestamp(state.started_at),
        "ended_at": timestamp(state.ended_at),
        "duration_seconds": state.duration,
        "end_reason": state.end_reason,
        "transcript": _transcript(messages, options) if talked else None,
        "messages": messages,
        "recording_url": f"https://recordings.oneinbox.example/{call.id}.wav" if talked else None,
        "analysis": {"sentiment": "positive", "success": True} if talked else {},
        "latency": {"stt_ms": 120, "llm_ms": 340, "tts_ms": 180} if talked else {},
        "cost_cents": math.ceil(duration / 60 * 10) if state.ready else None,
        "metadata": call.metadata,
        "created_at": timestamp(call.created_at),
        "updated_at": timestamp(state.changed_at),
        "twilio_call_sid": None,
        "outcome": "resolved" if talked else None,
        "ai_summary": (_ECHOED if options.voice == "agent" else _TOLD) if talked else None,
        "credits_used": round(duration / 60, 2) if state.ready else None,
    }
    if options.edition == "guide":
        fields = {name: value for name, value in fields.items() if name in _OLDER_FIELDS}
    fields |= call.extra
    return {name: value for name, value in fields.items() if name not in call.removed}


def usage(calls: Calls, options: EmulatorOptions) -> dict[str, Any]:
    """Return the account's use, as GET /v1/usage answers it. Days and months begin at 00:00 UTC."""
    day = datetime.fromtimestamp(options.now(), UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    month = day.replace(day=1)
    today = sum(call.created_at >= day.timestamp() for call in calls)
    of_month = [calls.state(call) for call in calls if call.created_at >= month.timestamp()]
    minutes = sum(state.duration or 0 for state in of_month) / 60
    cap = options.max_calls_per_day
    return {
        "calls_made_today": today,
        "max_calls_per_day": cap,
        "calls_remaining_today": None if cap is None else max(0, cap - today),
        "calls_this_month": len(of_month),
        "minutes_used_this_month": round(minutes, 2),
        "cost_cents_this_month": math.ceil(minutes * 10),
        "kb_token_budget": None,
        "period_start": timestamp(month.timestamp()),
    }


def timestamp(at: float | None) -> str | None:
    """Format a time as RFC 3339 in UTC."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


def _messages(call: Call, options: EmulatorOptions) -> list[dict[str, Any]]:
    if options.voice == "agent":
        return call.said
    greeting = call.overrides.get("first_message") or "Hello, this is the sandbox. How can I help you?"
    tool = {"name": "opening_hours", "tool_call_id": "tool_1"}
    return [
        {"role": "agent", "content": greeting},
        {"role": "user", "content": "When do you open tomorrow?"},
        {"role": "tool_call", "content": "", **tool, "arguments": {"day": "tomorrow"}},
        {"role": "tool_result", "content": '{"opens": "09:00"}', **tool, "is_error": False},
        {"role": "agent", "content": "We open at nine."},
        {"role": "user", "content": "Thank you, goodbye."},
    ]


def _transcript(messages: list[dict[str, Any]], options: EmulatorOptions) -> str | list[dict[str, Any]]:
    spoken = [message for message in messages if message["role"] in ("agent", "user")]
    if options.edition == "guide":
        return spoken
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in spoken)
