"""Webhooks are hints: whatever they say, the broker fetches the call itself."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

MAX_QUEUED = 1000
"""Further calls are dropped: polling finds out a little later."""
AT_ONCE = 8

log = structlog.get_logger(__name__)


@dataclass(repr=False, eq=False)
class RefreshQueue:
    """Refresh calls in the background, each once at a time. `refresh`: refreshes one."""

    refresh: Callable[[str], Awaitable[None]]
    _places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE), init=False)
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)
    _again: set[str] = field(default_factory=set, init=False)

    def add(self, call_id: str) -> None:
        """Refresh a call soon; one being refreshed is refreshed once more afterwards."""
        if call_id in self._tasks:
            self._again.add(call_id)
        elif len(self._tasks) < MAX_QUEUED:
            self._tasks[call_id] = asyncio.create_task(self._run(call_id), name="refresh")

    async def aclose(self) -> None:
        """Cancel everything."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, call_id: str) -> None:
        try:
            while True:
                self._again.discard(call_id)
                async with self._places:
                    await self.refresh(call_id)
                if call_id not in self._again:
                    return
        except Exception:
            log.exception("refresh_failed", call=call_id)
        finally:
            self._again.discard(call_id)
            del self._tasks[call_id]
