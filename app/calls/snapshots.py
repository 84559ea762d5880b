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

    `etag`: names the state, quotes included. `seen`: Unix time of the look at OneInbox. `created`: of the call's start,
    as OneInbox says. `ended_at`: of its end, within what was seen of it; None while it runs. `ended`: over for good.
    `complete`: no exposed field is still to come.
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
    def of(
        cls,
        record: CallRecord,
        *,
        seen: float,
        agent_names: Mapping[str, str],
        expose: Collection[str],
        before: Self | None = None,
    ) -> Self:
        """The visible part of a record. `before`: the state seen before."""
        call = project(record, agent=agent_names.get(record.agent_id or ""), expose=expose)
        fields = call.model_dump_json(exclude_unset=True).encode()
        return cls(
            etag=f'"{hashlib.sha256(fields).hexdigest()[:32]}"',
            seen=seen,
            created=record.created_at.timestamp() if record.created_at else None,
            ended_at=_end_of(record, seen, before) if record.ended else None,
            ended=record.ended,
            complete=record.ended and all(getattr(call, name) for name in LATE_FIELDS.intersection(expose)),
            # Whose a call is does not change; an answer without metadata, as to a stop, may not say it.
            owner=record.owner or (before.owner if before is not None else ""),
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
    def from_bytes(cls, value: bytes) -> Self | None:
        """What `to_bytes` made; None for what another version of the broker made of it."""
        head, _, fields = value.partition(b"\n")
        try:
            return cls(**json.loads(head), fields=fields)
        except (TypeError, ValueError):
            return None


def _end_of(record: CallRecord, seen: float, before: Snapshot | None) -> float:
    """Unix time of a call's end. OneInbox's word counts where it can be true: its clock may be another."""
    if before is not None and before.ended_at is not None:
        return before.ended_at
    said = record.ended_at.timestamp() if record.ended_at else seen
    return min(seen, said if before is None else max(before.seen, said))
