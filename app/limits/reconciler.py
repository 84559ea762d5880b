"""Find calls whose answer was lost, by the metadata that the broker wrote on their record, and hang them up.

A POST to OneInbox that timed out, broke off or failed may still have started a call, which is billed although no one
will join it. Each is looked for several times within a minute. Calls that a killed process left behind are found by any
replica's sweep: their keys in the set of live calls hold all that is needed.
"""

import asyncio
import contextlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import structlog

from app.limits.call_attempt import CallAttempt
from app.limits.live_calls import LOST, SWEEP_SECONDS, LiveCalls
from app.limits.running_calls import pages
from app.oneinbox import CallRecord, OneInbox
from app.oneinbox.errors import OneInboxError
from app.store import StoreUnavailable
from app.telemetry.metrics import Metrics

SCAN_AFTER = (2.0, 5.0, 15.0, 60.0)
"""Seconds after the loss at which to scan; if the last scan finds no call, there is none."""
SCAN_PAGES = (5, 1, 2, 17)
"""Most pages of each scan, 25 in all. The first covers the wait for the answer, the last all: 20 new calls a second."""
MOST_PAGES = 200
"""Most pages of any scan: for an attempt of another process, whose clock is not known, and for many losses together."""
SHARED_SECONDS = 2.0
"""A scan includes what is due this soon."""
CLOCKS_APART = 300.0
"""Seconds that OneInbox's clock and ours may differ by."""
DATE_APART = 2.0
"""Seconds that the Date of OneInbox's answers may be ahead of the clock by which it dates calls."""
MOST_FETCHES = 200
"""Most calls that one scan fetches one by one, because a list has no metadata."""
MOST_CACHED = 10_000
"""Most calls whose metadata is cached, so that the next scan fetches others. It never changes."""
AT_ONCE = 8
"""Agents whose calls are read at once."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Loss:
    """An attempt of unknown outcome. `since`: Unix time from which SCAN_AFTER counts. `scans`: number of scans so far.

    `witnessed`: this process lost the answer itself; for one that a sweep found, the outcome may still become known.
    `ahead`: seconds that OneInbox's clock is at least ahead of the one by which the POST is dated.
    """

    attempt: CallAttempt
    since: float
    witnessed: bool
    scans: int = 0
    ahead: float | None = None

    @property
    def due(self) -> float:
        """Unix time of the next scan."""
        return self.since + SCAN_AFTER[self.scans]

    @property
    def last(self) -> bool:
        """True if the next scan is the last."""
        return self.scans + 1 == len(SCAN_AFTER)

    @property
    def most_pages(self) -> int:
        """Most pages of the next scan."""
        return SCAN_PAGES[self.scans] if self.witnessed or not self.last else MOST_PAGES

    @property
    def oldest(self) -> float:
        """Unix time, by OneInbox's clock, before which the call was surely not created."""
        return self.attempt.since - (CLOCKS_APART if self.ahead is None else DATE_APART - self.ahead)

    def compare_clocks(self, ahead: float | None) -> None:
        """Take note of how far OneInbox's clock is ahead of this process's now; it may have been set meanwhile."""
        if self.witnessed and ahead is not None and abs(ahead) < CLOCKS_APART:
            self.ahead = ahead if self.ahead is None else min(self.ahead, ahead)


@dataclass(slots=True)
class ScanResult:
    """The result of scanning one agent's calls.

    `complete`: no candidate was skipped. `reached`: Unix time of creation down to which the calls were read.
    """

    found: dict[str, CallRecord] = field(default_factory=dict)
    complete: bool = True
    reached: float = math.inf
    fetches: int = 0

    def excludes(self, loss: Loss) -> bool:
        """Return whether there is no call of a loss that was not found."""
        return self.complete and self.reached < loss.oldest


@dataclass(repr=False, eq=False)
class Reconciler:
    """Look for lost calls, those of an agent in one scan.

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
    _scanned: set[str] = field(default_factory=set, init=False)
    """Agents whose calls are being scanned."""
    _places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE), init=False)
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
        """Scan whenever a loss is due, each agent's calls for themselves, until cancelled."""
        async with asyncio.TaskGroup() as scans:
            while True:
                for agent in await self._until_due():
                    self._scanned.add(agent)
                    scans.create_task(self._scan_in_turn(agent), name="scan")

    async def finish(self) -> None:
        """Look once for all, when the process ends. What is not found may come later, so others will look for it."""

        async def look(losses: Sequence[Loss]) -> None:
            result = await self._look_for(losses, SCAN_PAGES[-1])
            await asyncio.gather(
                *(self._settle(loss, result) for loss in losses if loss.attempt.request_id in result.found)
            )

        agents = dict.fromkeys(loss.attempt.agent for loss in self._losses.values())
        await asyncio.gather(*(look(self._losses_of(agent)) for agent in agents))

    async def scan(self) -> None:
        """Look once for all that are due; settle each that is found, or is out of scans."""
        await asyncio.gather(*(self._scan(agent) for agent in self._due_agents()))

    async def _scan_in_turn(self, agent: str) -> None:
        try:
            async with self._places:
                await self._scan(agent)
        except Exception:
            log.exception("reconcile_failed")
            await asyncio.sleep(1)
        finally:
            self._scanned.discard(agent)
            self._added.set()

    async def _scan(self, agent: str) -> None:
        due = self._losses_of(agent, before=self.now() + SHARED_SECONDS)
        unsettled = await asyncio.gather(*(self._is_unsettled(loss) for loss in due))
        losses = [loss for loss, still in zip(due, unsettled, strict=True) if still]
        if losses:
            first = max((loss.most_pages for loss in losses if not loss.last), default=0)
            last = sum(loss.most_pages for loss in losses if loss.last)
            result = await self._look_for(losses, min(max(first, last), MOST_PAGES))
            # The failure of one leaves the others alone.
            await asyncio.gather(*(self._settle(loss, result) for loss in losses))

    async def _look_for(self, losses: Sequence[Loss], most_pages: int) -> ScanResult:
        """Look through the newest calls of an agent, whatever their status: lists by status get shorter meanwhile.

        `losses`: of that agent.
        """
        agent, result = losses[0].attempt.agent, ScanResult()
        if agent not in self.agent_ids:  # no longer configured
            result.complete = False
            return result
        by_request = {loss.attempt.request_id: loss for loss in losses}
        try:
            await self._find(self.agent_ids[agent], by_request, most_pages, result)
        except OneInboxError as error:
            log.warning("reconcile_scan_failed", agent=agent, reason=error.reason)
            result.complete = False
        return result

    def _losses_of(self, agent: str, before: float = math.inf) -> list[Loss]:
        """Return the losses of an agent whose next scan is due before a moment."""
        return [loss for loss in self._losses.values() if loss.attempt.agent == agent and loss.due <= before]

    def _due_agents(self) -> list[str]:
        """Return the agents with a loss that is due."""
        now = self.now()
        return list(dict.fromkeys(loss.attempt.agent for loss in self._losses.values() if loss.due <= now))

    def _add(self, loss: Loss) -> None:
        if loss.attempt.request_id not in self._losses:
            self._losses[loss.attempt.request_id] = loss
            self.metrics.count_orphan("lost")
            self._added.set()

    async def _until_due(self) -> list[str]:
        """Wait until a loss is due whose agent's calls are not being scanned; return all such agents."""
        while True:
            self._added.clear()
            if agents := [agent for agent in self._due_agents() if agent not in self._scanned]:
                return agents
            dues = [loss.due for loss in self._losses.values() if loss.attempt.agent not in self._scanned]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(dues) - self.now()) if dues else None):
                    await self._added.wait()

    async def _is_unsettled(self, loss: Loss) -> bool:
        """Return whether to look for a loss, or to conclude anything about it: its outcome is not known otherwise."""
        if loss.witnessed:
            return True
        try:
            unsettled = await self.live.is_pending(loss.attempt)
        except StoreUnavailable:
            loss.since = self.now()  # the store cannot tell; wait for it as long as for this scan
            return False
        if not unsettled:
            self._losses.pop(loss.attempt.request_id, None)
        return unsettled

    async def _settle(self, loss: Loss, result: ScanResult) -> None:
        if not await self._is_unsettled(loss):
            return
        attempt, last = loss.attempt, loss.last
        loss.scans += 1
        record = result.found.get(attempt.request_id)
        if record is None and not last:
            return
        del self._losses[attempt.request_id]
        if record is not None:
            log.warning("lost_call_found", call=record.id, request_id=attempt.request_id, scans=loss.scans)
            self.metrics.count_orphan("found")
            self.live.stop_soon(attempt, record.id, LOST)
        elif result.excludes(loss):
            log.warning("lost_call_not_found", request_id=attempt.request_id)
            self.metrics.count_orphan("not-found")
            await self.live.release(attempt)
        else:
            # It may run: its slot stays until the lease ends, and the next sweep reports it again.
            log.error("lost_call_unresolved", request_id=attempt.request_id)
            self.metrics.count_orphan("given-up")
            await self.live.give_up(attempt)

    async def _find(self, agent_id: str, losses: Mapping[str, Loss], most_pages: int, result: ScanResult) -> None:
        """Look through an agent's calls, newest first, until all are found or too old. Raises OneInboxError."""
        async with contextlib.aclosing(pages(self.oneinbox, agent_id, most=most_pages)) as read:
            async for calls, last in read:
                for loss in losses.values():
                    loss.compare_clocks(self.oneinbox.ahead)
                oldest = min(loss.oldest for loss in losses.values())
                for listed in calls:
                    record = await self._with_metadata(listed, losses, oldest, result)
                    lost = losses.get(record.request_id) if record is not None else None
                    if record is not None and lost is not None and self._is_call_of(record, agent_id, lost.attempt):
                        result.found[record.request_id] = record
                ages = [call.created_at.timestamp() for call in calls if call.created_at is not None]
                result.reached = -math.inf if last else min([result.reached, *ages])
                if len(result.found) == len(losses) or result.reached < oldest:
                    return

    async def _with_metadata(
        self, listed: CallRecord, losses: Mapping[str, Loss], oldest: float, result: ScanResult
    ) -> CallRecord | None:
        """Return a listed call with its metadata; None if it is surely not lost, or cannot be fetched."""
        if listed.metadata is not None:
            return listed
        if listed.id in self._cached:
            return self._cached[listed.id]
        if listed.created_at is not None and listed.created_at.timestamp() < oldest:
            return None
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
