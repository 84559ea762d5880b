"""Current values for `GET /metrics`, read from the parts on each request."""

import asyncio
from dataclasses import dataclass

import structlog

from app.calls.poller import CallPoller
from app.limits import Allowance, KillSwitch, Limits
from app.limits.call_attempt import ALL_CALLS
from app.limits.ledger import UNSTOPPED
from app.oneinbox import OneInbox
from app.sessions.service import Sessions
from app.store import LimitRequest, Slot, Store, StoreUnavailable
from app.telemetry.metrics import Metrics

EVERY_SECONDS = 5

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Gauges:
    """Write current values into the metrics. `max_live_calls_total`: the limit on running calls, if any."""

    metrics: Metrics
    store: Store
    kill_switch: KillSwitch
    limits: Limits
    oneinbox: OneInbox
    allowance: Allowance
    sessions: Sessions
    poller: CallPoller
    max_live_calls_total: int | None

    async def read(self) -> None:
        """Read all values; without the shared store only those of this process, after 250 ms at most."""
        self._read_own()
        try:
            counts, limits = await asyncio.gather(
                self.store.decide(LimitRequest(slots=(Slot(ALL_CALLS, None), Slot(UNSTOPPED, None)), cost=0)),
                self.limits.usage(),
            )
        except StoreUnavailable:
            return
        live, unstopped = counts.used
        self.metrics.live_calls.set(live)
        self.metrics.unstopped.set(unstopped)
        for name, used, amount in limits:
            self.metrics.set_used(name, used / amount)
        if self.max_live_calls_total is not None:
            self.metrics.set_used("global-live-calls", live / self.max_live_calls_total)
        self._read_own()  # the store's state may have changed

    async def run(self) -> None:
        """Write this process's values every 5 seconds if there are several workers: any of them answers for all."""
        while self.metrics.shared:
            self._read_own()
            await asyncio.sleep(EVERY_SECONDS)

    def _read_own(self) -> None:
        self.metrics.waiting.set(self.sessions.waiting)
        self.metrics.streams.set(self.poller.streams)
        self.metrics.followed.set(self.poller.followed)
        self.metrics.cooldown.set(self.oneinbox.breaker.seconds_left)
        self.metrics.set_allowance(self.allowance.left, self.allowance.cap)
        self.metrics.store_up.set(self.store.state == "ok")
        self.metrics.paused.set(self.kill_switch.paused)
        self.metrics.blocks.set(self.kill_switch.blocked)
