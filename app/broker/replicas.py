"""Replicas report to the store: their version, what they see of it, which of the operator's controls they obey."""

import asyncio
import secrets
import socket
from dataclasses import dataclass, field

import structlog
from pydantic_core import from_json, to_json

from app import __version__
from app.clock import SYSTEM_CLOCK, Clock
from app.limits import KillSwitch
from app.store import Store, StoreUnavailable

REPLICAS = "replicas"
"""The set of the replicas that run, or did so a minute ago."""
EVERY_SECONDS = 2.0
LOOK_SECONDS = 0.5
KEPT_SECONDS = 60
STALE_SECONDS = 10
"""A replica that has not reported for so long does not reach the store, or has died."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """One replica's report. `controls`: as a KillSwitch's."""

    id: str
    version: str = ""
    controls: str = ""
    paused: bool = False
    blocked: int = 0
    left: float = 0
    """Seconds until it is forgotten; how long ago it reported follows from it, whatever its clock says."""

    @property
    def age(self) -> float:
        """Seconds since the replica reported."""
        return max(0.0, KEPT_SECONDS - self.left)

    @property
    def stale(self) -> bool:
        """True when a report is missing."""
        return self.age > STALE_SECONDS


@dataclass(repr=False, eq=False)
class Reporter:
    """Report for this replica, every two seconds and when its controls change."""

    store: Store
    kill_switch: KillSwitch
    clock: Clock = SYSTEM_CLOCK
    id: str = field(default_factory=lambda: f"{socket.gethostname()}-{secrets.token_hex(3)}", init=False)

    async def run(self) -> None:
        """Report until cancelled."""
        reported_at, reported = float("-inf"), ""
        while True:
            if self.clock.monotonic() - reported_at >= EVERY_SECONDS or reported != self.kill_switch.controls:
                reported = self.kill_switch.controls
                try:
                    await self.report()
                    reported_at = self.clock.monotonic()
                except StoreUnavailable:
                    reported = ""
            await asyncio.sleep(LOOK_SECONDS)

    async def report(self) -> None:
        """Report now. Raises StoreUnavailable."""
        switch = self.kill_switch
        value = {
            "v": 1,
            "version": __version__,
            "controls": switch.controls,
            "paused": switch.paused,
            "blocked": switch.blocked,
        }
        await self.store.set(_name(self.id), to_json(value), KEPT_SECONDS)
        await self.store.add_member(REPLICAS, self.id, KEPT_SECONDS)

    async def aclose(self) -> None:
        """Withdraw the report: the replica stops."""
        try:
            await self.store.remove_member([REPLICAS], self.id)
            await self.store.delete(_name(self.id))
        except StoreUnavailable:
            pass  # it expires


async def read_reports(store: Store) -> list[Report]:
    """Return the replicas' last reports, by id. Raises StoreUnavailable."""
    members = await store.members(REPLICAS)
    values = await asyncio.gather(*(store.get(_name(member)) for member in members))
    reports = []
    for (member, left), value in sorted(zip(members.items(), values, strict=True)):
        try:
            kept = from_json(value or b"{}")
            known = {name: kept[name] for name in _FIELDS if name in kept}
            reports.append(Report(**known, id=member, left=left))
        except (ValueError, TypeError):
            log.warning("store_record_skipped", name=REPLICAS)
            reports.append(Report(id=member, left=left))
    return reports


_FIELDS = ("version", "controls", "paused", "blocked")


def _name(replica: str) -> str:
    return f"replica:{replica}"
