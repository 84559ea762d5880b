"""What is done in the background about running calls, and once more at the end of the process."""

import asyncio

import structlog

from app.limits.live_calls import SWEEP_SECONDS, LiveCalls
from app.limits.reconciler import Reconciler
from app.store import StoreUnavailable

TICK_SECONDS = 1
RETRIES = 3
SETTLE_SECONDS = 10
"""Seconds that a process may take at its end to settle what only it knows."""

log = structlog.get_logger(__name__)


async def sweep_forever(live: LiveCalls, reconciler: Reconciler) -> None:
    """Check live calls every SWEEP_SECONDS; settle what the store has not confirmed as soon as it answers."""
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


async def stop_uncollected_forever(live: LiveCalls) -> None:
    """Stop the calls that no client collected in time, every second."""
    while True:
        await asyncio.sleep(TICK_SECONDS)
        try:
            await live.stop_uncollected()
        except StoreUnavailable:
            continue  # retried once the store is back
        except Exception:
            log.exception("uncollected_sweep_failed")


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
        log.exception("settling_failed")
