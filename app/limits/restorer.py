"""Read the running calls back from OneInbox into a store that has lost them, so that slots and deadlines hold again."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import KW_ONLY, dataclass, field

import structlog

from app.identity.keyring import Keyring
from app.limits.call_attempt import CallAttempt
from app.limits.live_calls import LiveCalls
from app.limits.running_calls import running_pages
from app.oneinbox import CallRecord, OneInbox
from app.oneinbox.errors import OneInboxError
from app.store import Store, StoreUnavailable
from app.telemetry.metrics import Metrics

LOCK = "restoring"
LOCK_SECONDS = 60
RETRY_SECONDS = 5
AT_ONCE = 8
LONGEST_WAIT = 20.0

log = structlog.get_logger(__name__)


@dataclass(repr=False, eq=False)
class Restorer:
    """Restore the calls, one replica at a time.

    `agent_ids`: whose calls to list. `timeout`: seconds that OneInbox may take to answer. `now`: Unix time. `metrics`:
    counts the store's losses.
    """

    store: Store
    oneinbox: OneInbox
    live: LiveCalls
    keyring: Keyring
    _: KW_ONLY
    agent_ids: Collection[str]
    timeout: float
    now: Callable[[], float] = time.time
    metrics: Metrics = field(default_factory=Metrics)
    _counted: int = field(default=0, init=False)

    async def run(self) -> None:
        """Restore whenever the store is incomplete, until cancelled."""
        while True:
            await asyncio.sleep(1)
            while self._counted < self.store.losses:
                self._counted += 1
                self.metrics.count_store_loss()
            if self.store.incomplete:
                try:
                    await self.restore()
                except OneInboxError as error:
                    log.warning("calls_not_restored", reason=error.reason, retry_seconds=RETRY_SECONDS)
                    await asyncio.sleep(RETRY_SECONDS)
                except StoreUnavailable:
                    continue
                except Exception:
                    log.exception("restore_failed")
                    await asyncio.sleep(RETRY_SECONDS)

    async def restore(self) -> None:
        """Restore once, unless another replica does. Raises OneInboxError, StoreUnavailable."""
        lock = secrets.token_bytes(8)
        if not await self.store.add(LOCK, lock, LOCK_SECONDS):
            return
        try:
            began = self.now()
            restored = await self._restore_all()
            if self.store.losses:
                # A POST that was under way when the store lost its data may have started a call since.
                await asyncio.sleep(max(0.0, began + min(self.timeout, LONGEST_WAIT) - self.now()))
                restored += await self._restore_all()
            if await self.store.complete():
                log.warning("calls_restored", calls=restored)
        finally:
            # It ends by itself; an error of the clean-up must not take the place of a cancellation.
            with contextlib.suppress(StoreUnavailable):
                await self.store.delete(LOCK, lock)

    async def _restore_all(self) -> int:
        places = asyncio.Semaphore(AT_ONCE)

        async def restore(listed: CallRecord) -> bool:
            async with places:
                record = listed
                if record.metadata is None:
                    try:
                        record = await self.oneinbox.get_call(listed.id)
                    except OneInboxError as error:
                        if error.status == 404:
                            return False
                        raise
                attempt = self._attempt(record)
                return attempt is not None and not record.ended and await self.live.restore(attempt, record.id)

        restored = 0
        for agent_id in self.agent_ids:
            async with contextlib.aclosing(running_pages(self.oneinbox, agent_id)) as read:
                async for calls in read:
                    restored += sum(await asyncio.gather(*(restore(record) for record in calls)))
        return restored

    def _attempt(self, record: CallRecord) -> CallAttempt | None:
        """Return the attempt that started a call; None if it is not this deployment's, as far as its seal tells."""
        if not record.request_id or not record.owner:
            return None
        unwritten = self.keyring.unseal(record.sealed_attempt, self.live.ledger.seal_context(record.request_id))
        if unwritten is None:
            return None
        try:
            return CallAttempt.restored(unwritten, record.request_id, record.owner)
        except ValueError:
            log.warning("call_record_skipped", call=record.id)
            return None
