"""A call at one moment, as browsers see it: what is cached, shared between replicas, and streamed."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Self

from app.calls.schemas import project
from app.oneinbox import CallRecord

LATE_FIELDS = frozenset({"transcript", "messages", "summary", "recording_url"})
"""Exposed fields that OneInbox fills some seconds after a call ended."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One state of a call.

    `etag`: names the state, quotes included. `seen`: Unix time of the look at OneInbox. `created`, `ended_at`: of the
    call's start and end, as OneInbox says. `ended`: over for good. `complete`: no exposed field is still to come.
    `owner`: the pseudonym on OneInbox's record. `fields`: the visible JSON without `id`, whose key is its holder's own.
    """

    etag: str
    seen: float
    created: float | None
    ended_at: float | None
    ended: bool
    complete: bool
    owner: str
    fields: bytes

    @classmethod
    def of(cls, record: CallRecord, *, seen: float, agent_names: Mapping[str, str], expose: Collection[str]) -> Self:
        """The visible part of a record."""
        call = project(record, agent=agent_names.get(record.agent_id or ""), expose=expose)
        fields = call.model_dump_json(exclude_unset=True).encode()
        return cls(
            etag=f'"{hashlib.sha256(fields).hexdigest()[:32]}"',
            seen=seen,
            created=record.created_at.timestamp() if record.created_at else None,
            ended_at=record.ended_at.timestamp() if record.ended_at else None,
            ended=record.ended,
            complete=record.ended and all(getattr(call, name) for name in LATE_FIELDS.intersection(expose)),
            owner=record.owner,
            fields=fields,
        )

    def body(self, public_id: str) -> bytes:
        """The call as JSON, under the name by which it was asked for (letters, digits, `_`, `-`, `.`)."""
        return b'{"id":"' + public_id.encode() + b'",' + self.fields[1:]

    def to_bytes(self) -> bytes:
        """For other replicas."""
        head = asdict(self)
        del head["fields"]
        return json.dumps(head).encode() + b"\n" + self.fields

    @classmethod
    def from_bytes(cls, value: bytes) -> Self:
        """What `to_bytes` made."""
        head, _, fields = value.partition(b"\n")
        return cls(**json.loads(head), fields=fields)
