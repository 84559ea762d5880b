"""OneInbox's answers, in both editions of its documentation. Fields that the broker does not need are ignored."""

import contextlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

BROKER_USER = "broker_user"
BROKER_REQUEST_ID = "broker_request_id"
BROKER_USER_ID = "broker_user_id"
BROKER_CALL = "broker_call"
"""Metadata keys that the broker writes on a call."""

CALL_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
TERMINAL_STATUSES = frozenset({"completed", "failed", "no_answer", "no-answer", "busy", "canceled", "cancelled"})
"""Statuses of calls that have ended. Any other status, also an unknown one, counts as running."""
STATUSES = TERMINAL_STATUSES | {"queued", "initiated", "in_progress"}
"""As OneInbox's documentation spells them, some in two ways."""


class WebCall(NamedTuple):
    """A started web call: its id and what the browser needs to join it."""

    id: str
    server_url: str
    participant_token: str

    def __repr__(self) -> str:
        return f"WebCall(id={self.id!r})"  # without its token: tracebacks are logged


def _or_none(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Treat a field of an unexpected type as missing: one odd field must not hide the whole call."""
    try:
        return handler(value)
    except ValueError:
        return None


def _status(value: Any, handler: ValidatorFunctionWrapHandler) -> str | None:
    """Return a documented status in its documented spelling, and any other text as it is: `in-progress` is known."""
    text = _or_none(value, handler)
    if not isinstance(text, str):
        return None
    lower = text.lower()
    return next((known for known in (lower, lower.replace("-", "_")) if known in STATUSES), text)


def _utc(value: Any, handler: ValidatorFunctionWrapHandler) -> datetime | None:
    moment = _or_none(value, handler)
    if not isinstance(moment, datetime):
        return None
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:  # within hours of year 1 or 9999
        return None


Text = Annotated[str | None, WrapValidator(_or_none)]
Status = Annotated[str | None, WrapValidator(_status)]
Number = Annotated[Annotated[float, Field(allow_inf_nan=False)] | None, WrapValidator(_or_none)]
Moment = Annotated[datetime | None, WrapValidator(_utc)]
Count = Annotated[int, Field(strict=True, ge=0, le=10**9)]


class Analysis(BaseModel):
    """Holds `ai_summary` and `outcome` in some editions."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    summary: Text = None
    outcome: Text = None


def _analysis(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    return _or_none(value, handler) or Analysis()


class CallRecord(BaseModel):
    """OneInbox's record of a call. Everything but the id may be missing."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")
    agent_id: Text = None
    status: Status = None
    created_at: Moment = None
    started_at: Moment = None
    ended_at: Moment = None
    duration_seconds: Number = None
    end_reason: Text = None
    transcript: Any = None
    messages: Any = None
    recording_url: Text = None
    ai_summary: Text = None
    outcome: Text = None
    analysis: Annotated[Analysis, WrapValidator(_analysis)] = Analysis()
    metadata: Annotated[Mapping[str, Any] | None, WrapValidator(_or_none)] = None

    @property
    def request_id(self) -> str:
        """The broker's id of the POST that started the call; empty if the broker did not start it."""
        return self._text(BROKER_REQUEST_ID)

    @property
    def owner(self) -> str:
        """The pseudonym of the user who started the call; empty if the broker did not start it."""
        return self._text(BROKER_USER)

    @property
    def sealed_attempt(self) -> str:
        """The rest of the broker's record of the call, encrypted; empty if there is none."""
        return self._text(BROKER_CALL)

    def _text(self, name: str) -> str:
        value = (self.metadata or {}).get(name)
        return value if isinstance(value, str) else ""

    @property
    def ended(self) -> bool:
        """True when the call has ended."""
        return self.status in TERMINAL_STATUSES


class AgentRecord(BaseModel):
    """OneInbox's record of an agent. `max_duration_seconds`: OneInbox itself ends its calls after this time."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Text = None
    max_duration_seconds: Number = None


class Usage(BaseModel):
    """The account's calls of the day, which begins at 00:00 UTC. A cap of an unexpected type or size is an error."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    max_calls_per_day: Count | None
    """None and 0: there is no cap."""
    calls_made_today: Annotated[Count | None, WrapValidator(_or_none)] = None
    calls_remaining_today: Annotated[Count | None, WrapValidator(_or_none)] = None

    @property
    def left(self) -> int | None:
        """The calls that may still be started today; None if there is no cap, or too little is known."""
        cap, made, left = self.max_calls_per_day, self.calls_made_today, self.calls_remaining_today
        if not cap:
            return None
        if left is None and made is not None:  # such as a negative number after more calls than the cap
            return max(0, cap - made)
        return left


class Webhook(BaseModel):
    """A registered webhook. The signing secret in the answer to a registration is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    name: Text = None
    url: str
    status: Text = None


class WebhookList(BaseModel):
    """The account's webhooks."""

    items: list[Webhook]


def _readable(value: Any, handler: ValidatorFunctionWrapHandler) -> list[CallRecord]:
    """Keep the items that are calls: one odd item must not hide the others."""
    if not isinstance(value, list):
        raise ValueError("not a list")
    records = []
    for item in value:
        with contextlib.suppress(ValueError):
            records.append(CallRecord.model_validate(item))
    return records


class CallPage(BaseModel):
    """One page of a list of calls.

    `listed`: its length, including items that cannot be read. `total`: the length of the list, as OneInbox says.
    """

    items: Annotated[list[CallRecord], WrapValidator(_readable)]
    listed: int = 0
    total: Number = None

    @model_validator(mode="before")
    @classmethod
    def _count(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("items"), list):
            return data
        return {"items": data["items"], "listed": len(data["items"]), "total": data.get("total")}
