"""The sweep, by one replica at a time: check live calls, hang up those that must end, find lost ones."""

import asyncio

import structlog

from app.limits.live_calls import SWEEP_SECONDS, LiveCalls
from app.limits.reconciler import Reconciler

log = structlog.get_logger(__name__)


async def sweep_forever(live: LiveCalls, reconciler: Reconciler) -> None:
    """Sweep every SWEEP_SECONDS; write what a shared store missed as soon as it is back."""
    seconds = 0
    while True:
        await asyncio.sleep(1)
        seconds += 1
        try:
            await live.flush()
            if seconds % SWEEP_SECONDS == 0:
                reconciler.report_stale(await live.sweep())
        except Exception:
            log.exception("sweep_failed")
