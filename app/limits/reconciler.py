"""Find calls whose answer was lost, by the metadata that the broker wrote on their record, and hang them up.

A POST to OneInbox that timed out, broke off or failed may still have started a call, which is billed although no one
will join it. Each is looked for several times within a minute. Calls that a killed process left behind are found by any
replica's sweep: their keys in the set of live calls hold all that is needed.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import structlog

from app.limits.call_attempt import CallAttempt
from app.limits.live_calls import LOST, SWEEP_SECONDS, LiveCalls
from app.oneinbox import CallRecord, OneInbox
from app.oneinbox.errors import OneInboxError
from app.oneinbox.models import CallPage
from app.store import StoreUnavailable
from app.telemetry.metrics import Metrics

SCAN_AFTER = (2.0, 5.0, 15.0, 60.0)
"""Seconds after the loss at which to scan; if the last scan finds no call, there is none."""
CLOCKS_APART = 300.0
"""Seconds that OneInbox's clock and ours may differ by."""
PAGE = 100
OVERLAP = 10
"""Calls that a page repeats from the one before: when calls end meanwhile, the others move up in a list by status."""
MOST_PAGES = 20
MOST_FETCHES = 200
"""Most calls that one scan fetches one by one, because a list has no metadata."""
MOST_CACHED = 10_000
"""Most calls whose metadata is cached, so that the next scan fetches others. It never changes."""
TRIES = 3
"""Times that a page is requested before the scan breaks off."""
RUNNING = ("queued", "initiated", "in_progress")
"""Statuses of calls that must be stopped. Their lists are short, however many calls the account has."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Loss:
    """An attempt of unknown outcome. `since`: Unix time from which SCAN_AFTER counts. `scans`: number of scans so far.

    `witnessed`: this process lost the answer itself; for one that a sweep found, the outcome may still become known.
    """

    attempt: CallAttempt
    since: float
    witnessed: bool
    scans: int = 0

    @property
    def due(self) -> float:
        """Unix time of the next scan."""
        return self.since + SCAN_AFTER[self.scans]


@dataclass(slots=True)
class ScanResult:
    """The result of scanning one agent's calls. `complete`: no candidate was skipped."""

    found: dict[str, CallRecord] = field(default_factory=dict)
    complete: bool = True
    fetches: int = 0


@dataclass(repr=False, eq=False)
class Reconciler:
    """Look for lost calls, all in one scan.

    `agent_ids`: by configured name. `timeout`: seconds that OneInbox may take to answer. `now`: Unix time. `metrics`:
    counts lost calls and their outcomes.
    """

    oneinbox: OneInbox
    live: LiveCalls
    _: KW_ONLY
    agent_ids: Mapping[str, str]
    timeout: float
    now: Callable[[], float] = time.time
    metrics: Metrics = field(default_factory=Metrics)
    _losses: dict[str, Loss] = field(default_factory=dict, init=False)
    _added: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _cached: OrderedDict[str, CallRecord] = field(default_factory=OrderedDict, init=False)

    def report_lost(self, attempt: CallAttempt) -> None:
        """Look for the call of an attempt whose answer this process has lost."""
        self._add(Loss(attempt, self.now(), witnessed=True))

    def report_stale(self, attempts: list[CallAttempt]) -> None:
        """Look for the calls of those attempts whose answer is overdue.

        The first scan waits until every replica has had time to write what it knows to the store.
        """
        for attempt in attempts:
            if self.now() - attempt.since > self.timeout + SCAN_AFTER[-1]:
                self._add(Loss(attempt, self.now() + SWEEP_SECONDS, witnessed=False))

    async def run(self) -> None:
        """Scan whenever a loss is due, until cancelled."""
        while True:
            await self._until_due()
            try:
                await self.scan()
            except Exception:
                log.exception("reconcile_failed")
                await asyncio.sleep(1)

    async def finish(self) -> None:
        """Look once for all, when the process ends. What is not found may come later, so others will look for it."""
        for loss, record, _ in await self._look_for(list(self._losses.values())):
            if record is not None:
                await self._settle(loss, record, complete=False)

    async def scan(self) -> None:
        """Look once for all that are due; settle each that is found, or is out of scans."""
        for loss, record, complete in await self._look_for(
            [loss for loss in self._losses.values() if loss.due <= self.now()]
        ):
            await self._settle(loss, record, complete=complete)

    async def _look_for(self, losses: Sequence[Loss]) -> list[tuple[Loss, CallRecord | None, bool]]:
        """Return each loss with its call, if that was found, and whether no candidate was skipped."""
        looked: list[tuple[Loss, CallRecord | None, bool]] = []
        for agent in {loss.attempt.agent for loss in losses}:
            of_agent = {loss.attempt.request_id: loss for loss in losses if loss.attempt.agent == agent}
            result = ScanResult()
            await self._scan_agent(agent, of_agent, result)
            looked += [(loss, result.found.get(key), result.complete) for key, loss in of_agent.items()]
        return looked

    async def _scan_agent(self, agent: str, losses: Mapping[str, Loss], result: ScanResult) -> None:
        """Look through an agent's running calls, in the last scan all: a status may be unknown."""
        agent_id = self.agent_ids.get(agent, "")
        for status in RUNNING:
            try:
                await self._find(agent_id, status, losses, result)
            except OneInboxError as error:
                log.warning("reconcile_scan_failed", agent=agent, status=status, reason=error.reason)
                result.complete = False
        if any(loss.scans + 1 == len(SCAN_AFTER) for loss in losses.values()):
            beyond = ScanResult(found=result.found)
            with contextlib.suppress(OneInboxError):
                await self._find(agent_id, None, losses, beyond)

    def _add(self, loss: Loss) -> None:
        if loss.attempt.request_id not in self._losses:
            self._losses[loss.attempt.request_id] = loss
            self.metrics.count_orphan("lost")
            self._added.set()

    async def _until_due(self) -> None:
        while True:
            self._added.clear()
            dues = [loss.due for loss in self._losses.values()]
            wait = min(dues) - self.now() if dues else None
            if wait is not None and wait <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._added.wait()

    async def _settle(self, loss: Loss, record: CallRecord | None, *, complete: bool) -> None:
        attempt = loss.attempt
        try:
            if not loss.witnessed and not await self.live.is_pending(attempt):
                del self._losses[attempt.request_id]  # its outcome is known now
                return
        except StoreUnavailable:
            loss.since = self.now()  # the store cannot tell; start over
            return
        loss.scans += 1
        if record is not None:
            log.warning("lost_call_found", call=record.id, request_id=attempt.request_id, scans=loss.scans)
            self.metrics.count_orphan("found")
            del self._losses[attempt.request_id]
            self.live.stop_soon(attempt, record.id, LOST)
        elif loss.scans == len(SCAN_AFTER):
            del self._losses[attempt.request_id]
            if complete:
                log.warning("lost_call_not_found", request_id=attempt.request_id)
                self.metrics.count_orphan("not-found")
                await self.live.release(attempt)
            else:
                # It may run: its slot stays until the lease ends, and the next sweep reports it again.
                log.error("lost_call_unresolved", request_id=attempt.request_id)
                self.metrics.count_orphan("given-up")
                await self.live.give_up(attempt)

    async def _find(self, agent_id: str, status: str | None, losses: Mapping[str, Loss], result: ScanResult) -> None:
        """Look through a list of calls, newest first, until all are found or too old. Raises OneInboxError."""
        oldest = min(loss.attempt.since for loss in losses.values()) - CLOCKS_APART
        offset, seen = 0, set[str]()
        for _ in range(MOST_PAGES):
            calls = await self._page(agent_id, status, offset)
            if offset and seen.isdisjoint(each.id for each in calls.items):
                offset = max(0, offset - PAGE // 2)  # more calls ended than pages overlap: some were skipped
                continue
            for listed in calls.items:
                record = await self._with_metadata(listed, losses, result)
                loss = losses.get(record.request_id) if record is not None else None
                if record is not None and loss is not None and self._is_call_of(record, agent_id, loss.attempt):
                    result.found[record.request_id] = record
            ages = [record.created_at.timestamp() for record in calls.items if record.created_at is not None]
            if calls.listed < PAGE or len(result.found) == len(losses) or (ages and min(ages) < oldest):
                return
            seen.update(each.id for each in calls.items)
            offset += PAGE - OVERLAP
        result.complete = False

    async def _page(self, agent_id: str, status: str | None, offset: int) -> CallPage:
        for _ in range(TRIES - 1):
            with contextlib.suppress(OneInboxError):
                return await self.oneinbox.list_calls(agent_id=agent_id, status=status, limit=PAGE, offset=offset)
        return await self.oneinbox.list_calls(agent_id=agent_id, status=status, limit=PAGE, offset=offset)

    async def _with_metadata(
        self, listed: CallRecord, losses: Mapping[str, Loss], result: ScanResult
    ) -> CallRecord | None:
        """Return a listed call with its metadata; None if it is surely not lost, or cannot be fetched."""
        if listed.metadata is not None:
            return listed
        if listed.id in self._cached:
            return self._cached[listed.id]
        if not any(self._could_be(listed, loss.attempt) for loss in losses.values()):
            return None
        if result.fetches >= MOST_FETCHES:
            result.complete = False
            return None
        result.fetches += 1
        try:
            record = await self.oneinbox.get_call(listed.id)
        except OneInboxError as error:
            # A 404 is not a lost call; any other error may hide one.
            result.complete = result.complete and error.status == 404
            return None
        self._cached[record.id] = record.model_copy(update={"messages": None, "transcript": None})
        while len(self._cached) > MOST_CACHED:
            self._cached.popitem(last=False)
        return record

    def _could_be(self, record: CallRecord, attempt: CallAttempt) -> bool:
        if record.created_at is None:
            return True
        after = record.created_at.timestamp() - attempt.since
        return -CLOCKS_APART <= after <= self.timeout + CLOCKS_APART

    def _is_call_of(self, record: CallRecord, agent_id: str, attempt: CallAttempt) -> bool:
        return record.agent_id == agent_id and record.owner == attempt.owner and self._could_be(record, attempt)
