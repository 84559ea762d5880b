"""Work on running calls in the background, and once more at the end of the process."""

import asyncio

import structlog

from app.limits.live_calls import SWEEP_SECONDS, LiveCalls
from app.limits.reconciler import Reconciler
from app.store import StoreUnavailable

TICK_SECONDS = 1
BUSY_SECONDS = 0.05
RETRIES = 3
SETTLE_SECONDS = 10
"""Seconds that a process may take at its end to settle what only it knows."""

log = structlog.get_logger(__name__)


async def sweep_forever(live: LiveCalls, reconciler: Reconciler) -> None:
    """Check live calls every SWEEP_SECONDS."""
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            reconciler.report_stale(await live.sweep())
        except Exception:
            log.exception("sweep_failed")


async def settle_forever(live: LiveCalls) -> None:
    """Every second, settle what the store has not confirmed."""
    while True:
        await asyncio.sleep(TICK_SECONDS)
        try:
            await live.flush()
        except Exception:
            log.exception("settling_failed")


async def end_forever(live: LiveCalls) -> None:
    """Every second, end the calls whose time has come; sooner while there are more than can be ended at once."""
    while True:
        more = False
        try:
            more = await live.take_due()
        except StoreUnavailable:
            pass  # they stay due
        except Exception:
            log.exception("ending_failed")
        await asyncio.sleep(BUSY_SECONDS if more else TICK_SECONDS)


async def settle(live: LiveCalls, reconciler: Reconciler) -> None:
    """Settle what only this process knows, when it ends, within SETTLE_SECONDS.

    Lost calls are looked for once.
    """
    try:
        async with asyncio.timeout(SETTLE_SECONDS):
            for _ in range(RETRIES):  # a store that is back is noticed within a second
                await live.flush()
                if not live.ledger.unconfirmed:
                    break
                await asyncio.sleep(TICK_SECONDS)
            await live.flush(last=True)
            await reconciler.finish()
            await live.finish()
    except TimeoutError:
        log.error("calls_unsettled", seconds=SETTLE_SECONDS)
    except Exception:
        log.exception("calls_unsettled")
