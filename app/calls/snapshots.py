"""A call at one moment, as browsers see it: cached, shared between replicas, and streamed."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Self

from app.calls.schemas import project
from app.limits import Bounds
from app.oneinbox import CallRecord

LATE_FIELDS = frozenset({"transcript", "messages", "summary", "recording_url"})
"""Exposed fields that OneInbox fills some seconds after a call ended."""
STEADY_SECONDS = 10.0
"""A move of `ends_at` by less than this is no change."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One state of a call.

    `etag`: quotes included. `seen`: when OneInbox was asked, as Unix time. `created`: its start, as OneInbox says.
    `ended_at`: its end, limited to what was observed; None while it runs. `complete`: no exposed field is missing.
    `bounds`: as shown. `owner`: the pseudonym on OneInbox's record. `fields`: the visible JSON without `id`, which
    holds the owner's key.
    """

    etag: str
    seen: float
    created: float | None
    ended_at: float | None
    ended: bool
    complete: bool
    bounds: Bounds
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
        bounds: Bounds | None = None,
        before: Self | None = None,
    ) -> Self:
        """Return the visible part of a record. `bounds`: None if unknown. `before`: the previous state."""
        shown = _shown(bounds, before, ended=record.ended)
        call = project(record, shown, agent=agent_names.get(record.agent_id or ""), expose=expose)
        fields = call.model_dump_json(exclude_unset=True).encode()
        return cls(
            etag=f'"{hashlib.sha256(fields).hexdigest()[:32]}"',
            seen=seen,
            created=record.created_at.timestamp() if record.created_at else None,
            ended_at=_end_of(record, seen, before) if record.ended else None,
            ended=record.ended,
            complete=record.ended and all(getattr(call, name) for name in LATE_FIELDS.intersection(expose)),
            bounds=shown,
            # The owner never changes; a response without metadata, as to a stop, may not name it.
            owner=record.owner or (before.owner if before is not None else ""),
            fields=fields,
        )

    def body(self, public_id: str) -> bytes:
        """Return the call as JSON, with the id it was requested by (letters, digits, `_`, `-`, `.`)."""
        return b'{"id":"' + public_id.encode() + b'",' + self.fields[1:]

    def to_bytes(self) -> bytes:
        """Serialise for other replicas."""
        head = asdict(self)
        del head["fields"]
        return json.dumps(head).encode() + b"\n" + self.fields

    @classmethod
    def from_bytes(cls, value: bytes) -> Self | None:
        """Read what `to_bytes` wrote; None if another version of the broker wrote it differently."""
        line, _, fields = value.partition(b"\n")
        try:
            head = json.loads(line)
            return cls(bounds=Bounds(*head.pop("bounds")), **head, fields=fields)
        except (AttributeError, KeyError, TypeError, ValueError):
            return None


def _shown(bounds: Bounds | None, before: Snapshot | None, *, ended: bool) -> Bounds:
    """Return the bounds to show: those shown before, unless they have changed. `bounds`: None if unknown."""
    last = before.bounds if before is not None else Bounds(None, None)
    ends_at, stopped_because, reason = bounds or last
    if ended:
        ends_at = None
    elif ends_at is not None and last.ends_at is not None and abs(ends_at - last.ends_at) < STEADY_SECONDS:
        ends_at = last.ends_at
    return Bounds(ends_at, stopped_because, reason)


def _end_of(record: CallRecord, seen: float, before: Snapshot | None) -> float:
    """Return the Unix time of a call's end: OneInbox's, limited to what is possible, as its clock may differ.

    Without `ended_at` it follows from the start and the length.
    """
    if before is not None and before.ended_at is not None:
        return before.ended_at
    started = record.started_at or record.created_at
    if record.ended_at is not None:
        said = record.ended_at.timestamp()
    elif started is not None and record.duration_seconds is not None:
        said = started.timestamp() + record.duration_seconds
    else:
        said = seen
    return min(seen, said if before is None else max(before.seen, said))
