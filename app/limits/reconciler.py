"""Calls whose answer was lost: found again by what the broker wrote on their record, and hung up.

A POST to OneInbox that timed out, broke off or failed may have started a call all the same, which nobody will ever join
and which is billed. Each is looked for some times over a minute. What a killed process left behind is found by any
replica's sweep: its name in the set of live calls says all that is needed.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
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
"""Seconds after the loss at which is looked; after the last, there was no call."""
CLOCKS_APART = 300.0
"""OneInbox's clock and ours may differ by so many seconds."""
PAGE = 100
OVERLAP = 10
"""Calls that a page repeats from the one before: calls that end meanwhile move all others up in a list by status."""
MOST_PAGES = 20
MOST_FETCHES = 200
"""Calls that one scan fetches one by one, where a list does not say enough."""
MOST_REMEMBERED = 10_000
"""Calls whose metadata is remembered, so that the next scan fetches others: it never changes."""
STOPS_AT_ONCE = 8
TRIES = 3
"""Times that one page is asked for before the scan breaks off."""
RUNNING = ("queued", "initiated", "in_progress")
"""Statuses of calls that have to be stopped; their lists are short, whatever an account's day was like."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Loss:
    """A start of unknown outcome. `since`: Unix time from which SCAN_AFTER counts. `scans`: how often was looked.

    `witnessed`: this process itself saw the answer get lost; what a sweep found may turn out to be known after all.
    """

    attempt: CallAttempt
    since: float
    witnessed: bool
    scans: int = 0

    @property
    def due(self) -> float:
        """When to look next."""
        return self.since + SCAN_AFTER[self.scans]


@dataclass(slots=True)
class ScanResult:
    """What a scan of one agent brought. `complete`: nothing that may be a lost call was left out."""

    found: dict[str, CallRecord] = field(default_factory=dict)
    complete: bool = True
    fetches: int = 0


@dataclass
class Reconciler:
    """Looks for lost calls, all in one scan.

    `agent_ids`: by configured name. `timeout`: seconds that OneInbox may take to answer. `now`: Unix time. `metrics`:
    count lost calls, and what became of them.
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
    _remembered: OrderedDict[str, CallRecord] = field(default_factory=OrderedDict, init=False)
    _stop_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(STOPS_AT_ONCE), init=False)
    _stops: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    def report_lost(self, attempt: CallAttempt) -> None:
        """Look for the call of a start whose answer this process has lost."""
        self._add(Loss(attempt, self.now(), witnessed=True))

    def report_stale(self, attempts: list[CallAttempt]) -> None:
        """Look for those starts of unknown outcome whose answer must have come long ago.

        Not before every replica has had the time to tell the store what it knows.
        """
        for attempt in attempts:
            if self.now() - attempt.since > self.timeout + SCAN_AFTER[-1]:
                self._add(Loss(attempt, self.now() + SWEEP_SECONDS, witnessed=False))

    async def run(self) -> None:
        """Look, for ever, whenever it is time for one."""
        try:
            while True:
                await self._until_due()
                try:
                    await self.scan()
                except Exception:
                    log.exception("reconcile_failed")
                    await asyncio.sleep(1)
        finally:
            for task in self._stops:
                task.cancel()

    async def scan(self) -> None:
        """Look once for all that are due, and settle each that is found, or was looked for the last time."""
        losses = {loss.attempt.request_id: loss for loss in self._losses.values() if loss.due <= self.now()}
        for agent in {loss.attempt.agent for loss in losses.values()}:
            of_agent = {key: loss for key, loss in losses.items() if loss.attempt.agent == agent}
            result = ScanResult()
            await self._scan_agent(agent, of_agent, result)
            for request_id, loss in of_agent.items():
                await self._settle(loss, result.found.get(request_id), complete=result.complete)

    async def _scan_agent(self, agent: str, losses: Mapping[str, Loss], result: ScanResult) -> None:
        """Look through an agent's running calls; for the last time also through all, whose status may be a new one."""
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
            self.metrics.orphan("lost")
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
                del self._losses[attempt.request_id]  # it was known after all
                return
        except StoreUnavailable:
            loss.since = self.now()  # nobody can tell now
            return
        loss.scans += 1
        if record is not None:
            log.warning("lost_call_found", call=record.id, request_id=attempt.request_id, scans=loss.scans)
            self.metrics.orphan("found")
            del self._losses[attempt.request_id]
            self._stop(attempt, record.id)
        elif loss.scans == len(SCAN_AFTER):
            del self._losses[attempt.request_id]
            if complete:
                log.warning("lost_call_not_found", request_id=attempt.request_id)
                self.metrics.orphan("not-found")
                await self.live.release_slots(attempt)
            else:
                # It may run: its slot stays until the lease ends, and the next sweep begins anew.
                log.error("lost_call_unresolved", request_id=attempt.request_id)
                self.metrics.orphan("given-up")
                await self.live.mark_unresolved(attempt)

    def _stop(self, attempt: CallAttempt, call_id: str) -> None:
        """Hang up beside the scans: a stop that hangs must not hold up another loss."""

        async def stop() -> None:
            async with self._stop_slots:
                await self.live.stop(attempt, call_id, LOST)

        task = asyncio.create_task(stop(), name="stop")
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)

    async def _find(self, agent_id: str, status: str | None, losses: Mapping[str, Loss], result: ScanResult) -> None:
        """Look through one list of calls, newest first, until all are found or too old. Raises OneInboxError."""
        oldest = min(loss.attempt.since for loss in losses.values()) - CLOCKS_APART
        offset, seen = 0, set[str]()
        for _ in range(MOST_PAGES):
            calls = await self._page(agent_id, status, offset)
            if offset and seen.isdisjoint(each.id for each in calls.items):
                offset = max(0, offset - PAGE // 2)  # more ended than pages overlap; between lies what nobody has seen
                continue
            for listed in calls.items:
                record = await self._with_metadata(listed, losses, result)
                loss = losses.get(record.request_id) if record is not None else None
                if record is not None and loss is not None and self._is(record, agent_id, loss.attempt):
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
        """A listed call with its metadata; None where it cannot be one of the lost ones, or cannot be had."""
        if listed.metadata is not None:
            return listed
        if listed.id in self._remembered:
            return self._remembered[listed.id]
        if not any(self._fits(listed, loss.attempt) for loss in losses.values()):
            return None
        if result.fetches >= MOST_FETCHES:
            result.complete = False
            return None
        result.fetches += 1
        try:
            record = await self.oneinbox.get_call(listed.id)
        except OneInboxError as error:
            # A 404 is no lost call of ours; anything else may hide one.
            result.complete = result.complete and error.status == 404
            return None
        self._remembered[record.id] = record.model_copy(update={"messages": None, "transcript": None})
        while len(self._remembered) > MOST_REMEMBERED:
            self._remembered.popitem(last=False)
        return record

    def _fits(self, record: CallRecord, attempt: CallAttempt) -> bool:
        if record.created_at is None:
            return True
        after = record.created_at.timestamp() - attempt.since
        return -CLOCKS_APART <= after <= self.timeout + CLOCKS_APART

    def _is(self, record: CallRecord, agent_id: str, attempt: CallAttempt) -> bool:
        return record.agent_id == agent_id and record.owner == attempt.owner and self._fits(record, attempt)
