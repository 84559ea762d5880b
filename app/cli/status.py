"""The output of `status`: limits, calls, controls and replicas."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from app.broker.replicas import Report, read_reports
from app.limits import Limits
from app.limits.allowance import Reading, read_allowance
from app.limits.call_attempt import ALL_CALLS
from app.limits.kill_switch import CONTROLS, PAUSE, Control, read_controls
from app.limits.ledger import UNFOUND, UNSTOPPED
from app.limits.rate_limiter import GLOBAL_MINUTES
from app.store import Store


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a deployment. `limits`: name, used, allowed, unit. `latest`: the last command's mark.

    `allowance`: OneInbox's calls of the day, left and allowed; None if they are not watched.
    """

    limits: Sequence[tuple[str, int, int, str]]
    allowance: tuple[int, int] | None
    running: int
    controls: Sequence[Control]
    reports: Sequence[Report]
    latest: str
    unstopped: Sequence[str]

    def lines(self) -> Iterator[str]:
        """Yield it for a reader."""
        for name, used, amount, unit in self.limits:
            yield f"{name}: {used} of {amount} {unit}"
        left = "not watched" if self.allowance is None else "{} of {} left".format(*self.allowance)
        yield f"OneInbox's calls today: {left}"
        yield f"live calls: {self.running}"
        pauses = [control for control in self.controls if control.name == PAUSE]
        yield from (f"paused for {round(pause.left)} s more, {_about(pause)}" for pause in pauses)
        if not pauses:
            yield "not paused"
        blocks = [control for control in self.controls if control.name != PAUSE]
        yield f"blocked users: {len(blocks)}"
        yield from (f"  {block.note.user or 'unknown'} {_about(block)}" for block in blocks)
        yield f"replicas: {len(self.reports)}"
        for report in self.reports:
            late = "" if report.controls == self.latest else ", has not confirmed the last command"
            yield f"  {described(report)}{late}"
        yield f"calls that could not be stopped: {len(self.unstopped)}"
        yield from (f"  {call.replace(UNFOUND, 'not found: request ')}" for call in self.unstopped)

    def as_object(self) -> dict[str, Any]:
        """Return it for JSON; times are RFC 3339."""
        return {
            "limits": [dict(zip(("name", "used", "allowed", "unit"), limit, strict=True)) for limit in self.limits],
            "oneinbox_calls_today": self.allowance and dict(zip(("left", "allowed"), self.allowance, strict=True)),
            "running_calls": self.running,
            "pause": next((_object(control) for control in self.controls if control.name == PAUSE), None),
            "blocks": [
                {"user": control.note.user, **_object(control)} for control in self.controls if control.name != PAUSE
            ],
            "replicas": [
                {
                    "id": report.id,
                    "version": report.version,
                    "reaches_store": not report.stale,
                    "reported_seconds_ago": round(report.age),
                    "controls_confirmed": report.controls == self.latest,
                    "paused": report.paused,
                    "blocked": report.blocked,
                }
                for report in self.reports
            ],
            "unstopped": [
                {"request": call.removeprefix(UNFOUND)} if call.startswith(UNFOUND) else {"call": call}
                for call in self.unstopped
            ],
        }


async def read_status(store: Store, limits: Limits) -> Status:
    """Read it from the store. Raises StoreUnavailable."""
    return Status(
        [(*row, "seconds" if row[0] == GLOBAL_MINUTES else "sessions") for row in await limits.usage()],
        _calls_today(await read_allowance(store)),
        len(await store.members(ALL_CALLS)),
        await read_controls(store),
        await read_reports(store),
        ((await store.get(CONTROLS)) or b"").decode(),
        sorted(await store.members(UNSTOPPED)),
    )


def _calls_today(reading: Reading | None) -> tuple[int, int] | None:
    if reading is None or reading.left is None or reading.cap is None or not reading.of_today(time.time()):
        return None
    return reading.left, reading.cap


def described(report: Report) -> str:
    """Return a replica's report as a line."""
    state = f"silent for {report.age:.0f} s" if report.stale else "reaches the store"
    paused = ", paused" if report.paused else ""
    blocked = f", {report.blocked} blocked" if report.blocked else ""
    return f"{report.id}: version {report.version or 'unknown'}, {state}{paused}{blocked}"


LATEST = 253_402_300_799
"""The last second of the year 9999, the last one that RFC 3339 can write."""


def rfc3339(seconds: float) -> str:
    """Return a Unix time as RFC 3339, in UTC and whole seconds."""
    return datetime.fromtimestamp(min(round(seconds), LATEST), UTC).isoformat().replace("+00:00", "Z")


def _about(control: Control) -> str:
    """Return until when, since when, by whom and why, as far as it is known."""
    note = control.note
    parts = [
        f"until {_until(control)}",
        f"since {rfc3339(note.since)}" if note.since else "",
        f"by {note.by}" if note.by else "",
        f"because: {note.reason}" if note.reason else "",
    ]
    return ", ".join(part for part in parts if part)


def _object(control: Control) -> dict[str, Any]:
    note = control.note
    since = rfc3339(note.since) if note.since else None
    return {"until": _until(control), "since": since, "by": note.by, "reason": note.reason}


def _until(control: Control) -> str:
    return rfc3339(time.time() + control.left)
