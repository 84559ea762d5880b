"""Calls whose answer was lost: found again by what the broker wrote on their record, and hung up.

A POST to OneInbox that timed out, broke off or failed may have started a call all the same, which nobody will ever join
and which is billed. Each is looked for some times over a minute. What a killed process left behind is found by any
replica's sweep: its name in the set of live calls says all that is needed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog

from app.limits.live import LiveCalls
from app.limits.starts import Start
from app.oneinbox import CallRecord, OneInbox
from app.oneinbox.errors import OneInboxError

SCAN_AFTER = (2.0, 5.0, 15.0, 60.0)
"""Seconds after the loss at which is looked; after the last, there was no call."""
CLOCKS_APART = 300.0
"""OneInbox's clock and ours may differ by so many seconds."""
PAGE = 100
MOST_PAGES = 20
MOST_FETCHES = 200
"""Calls that one scan fetches one by one, where a list does not say enough."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Loss:
    """A start of unknown outcome. `lost`: when its answer was given up; `scans`: how often was looked. Unix times."""

    start: Start
    lost: float
    scans: int = 0

    @property
    def due(self) -> float:
        """When to look next."""
        return self.lost + SCAN_AFTER[self.scans]


class Reconciler:
    """Looks for lost calls, all in one scan.

    `agent_ids`: by configured name. `timeout`: seconds that OneInbox may take to answer. `now`: Unix time. `sleep`:
    waits so many seconds.
    """

    def __init__(
        self,
        oneinbox: OneInbox,
        live: LiveCalls,
        *,
        agent_ids: Mapping[str, str],
        timeout: float,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._oneinbox = oneinbox
        self._live = live
        self._agent_ids = agent_ids
        self._timeout = timeout
        self._now = now
        self._sleep = sleep
        self._losses: dict[str, Loss] = {}
        self._news = asyncio.Event()

    def lose(self, start: Start) -> None:
        """Look for the call of a start whose answer was lost."""
        if start.request_id not in self._losses:
            self._losses[start.request_id] = Loss(start, self._now())
            self._news.set()

    def lose_old(self, starts: list[Start]) -> None:
        """Look for those starts whose answer must have come long ago: whoever waited for it is gone."""
        for start in starts:
            if self._now() - start.since > self._timeout + SCAN_AFTER[-1]:
                self.lose(start)

    async def run(self) -> None:
        """Look, for ever, whenever it is time for one."""
        while True:
            if not self._losses:
                self._news.clear()
                await self._news.wait()
            wait = min(loss.due for loss in self._losses.values()) - self._now()
            if wait > 0:
                self._news.clear()
                try:
                    async with asyncio.timeout(wait):
                        await self._news.wait()
                except TimeoutError:
                    pass
                continue
            try:
                await self.scan()
            except Exception:
                log.exception("scan_failed")
                await self._sleep(1)

    async def scan(self) -> None:
        """Look once for all that are lost, and settle each that is found, or was looked for the last time."""
        losses = {loss.start.request_id: loss for loss in self._losses.values() if loss.due <= self._now()}
        found: dict[str, CallRecord] = {}
        failed: set[str] = set()
        for agent in {loss.start.agent for loss in losses.values()}:
            of_agent = {key: loss for key, loss in losses.items() if loss.start.agent == agent}
            try:
                found.update(await self._find(self._agent_ids.get(agent, ""), of_agent))
            except OneInboxError as error:
                log.warning("scan_of_agent_failed", agent=agent, reason=error.reason)
                failed.update(of_agent)
        for request_id, loss in losses.items():
            loss.scans += 1
            last = loss.scans >= len(SCAN_AFTER)
            if (record := found.get(request_id)) is not None:
                log.warning("lost_call_found", call=record.id, request_id=request_id, scans=loss.scans)
                await self._live.stop(loss.start, record.id, "its answer was lost")
                del self._losses[request_id]
            elif last and request_id in failed:
                # Not known to be nothing: the slot stays until its lease ends, and the next sweep begins anew.
                log.error("lost_call_given_up", request_id=request_id)
                del self._losses[request_id]
            elif last:
                log.warning("lost_call_not_found", request_id=request_id)
                await self._live.abandon(loss.start)
                del self._losses[request_id]

    async def _find(self, agent_id: str, losses: Mapping[str, Loss]) -> dict[str, CallRecord]:
        """The records of lost calls of one agent, by request id."""
        oldest = min(loss.start.since for loss in losses.values()) - CLOCKS_APART
        found: dict[str, CallRecord] = {}
        fetches = 0
        for page in range(MOST_PAGES):
            calls = (await self._oneinbox.list_calls(agent_id=agent_id, limit=PAGE, offset=page * PAGE)).items
            for listed in calls:
                record = listed
                if record.metadata is None and self._may_be(record, losses) and fetches < MOST_FETCHES:
                    fetches += 1
                    record = await self._oneinbox.get_call(record.id)
                request_id = record.request_id
                if request_id in losses and self._is(record, agent_id, losses[request_id].start):
                    found[request_id] = record
            ages = [record.created_at.timestamp() for record in calls if record.created_at is not None]
            if len(calls) < PAGE or len(found) == len(losses) or (ages and min(ages) < oldest):
                break
        return found

    def _may_be(self, record: CallRecord, losses: Mapping[str, Loss]) -> bool:
        return any(self._fits(record, loss.start) for loss in losses.values())

    def _fits(self, record: CallRecord, start: Start) -> bool:
        if record.created_at is None:
            return True
        after = record.created_at.timestamp() - start.since
        return -CLOCKS_APART <= after <= self._timeout + CLOCKS_APART

    def _is(self, record: CallRecord, agent_id: str, start: Start) -> bool:
        return record.agent_id == agent_id and record.owner == start.owner and self._fits(record, start)
