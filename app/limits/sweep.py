"""The one sweep, on any replica: looks at live calls, hangs up what must end, and finds what a dead process left."""

import asyncio

import structlog

from app.limits.live import SWEEP_SECONDS, LiveCalls
from app.limits.reconciler import Reconciler

log = structlog.get_logger(__name__)


async def sweep_forever(live: LiveCalls, reconciler: Reconciler) -> None:
    """Sweep every SWEEP_SECONDS."""
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            reconciler.lose_old(await live.sweep())
        except Exception:
            log.exception("sweep_failed")
