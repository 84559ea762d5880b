"""The operator's kill switch: pause all sessions, block one user. In force on every replica within two seconds."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from app.identity import User
from app.problems import Problem, retry_later
from app.store import Store

PAUSE = "pause"
BLOCKS = "blocks"
READ_SECONDS = 1
IN_FORCE_SECONDS = 2
"""Seconds within which every replica that reaches the store has read it."""

log = structlog.get_logger(__name__)


@dataclass(repr=False, eq=False)
class KillSwitch:
    """Pauses and blocks, read every second; the last known ones stay in force while the store is gone.

    `clock`: monotonic seconds.
    """

    store: Store
    clock: Callable[[], float] = time.monotonic
    _paused_until: float = field(default=0.0, init=False)
    _blocked_until: dict[str, float] = field(default_factory=dict, init=False)

    def check(self, user: User) -> None:
        """Raise `at-capacity` while sessions are paused, `blocked` for a blocked user."""
        left = self._paused_until - self.clock()
        if left > 0:
            # A pause of hours may be ended early, so clients ask again after a minute at most.
            raise retry_later("at-capacity", min(left, 60))
        if self._blocked_until.get(user.store_name, 0) > self.clock():
            raise Problem("blocked")

    async def pause(self, seconds: float) -> None:
        """Refuse all sessions for `seconds`."""
        await self.store.add_member(PAUSE, PAUSE, seconds)

    async def resume(self) -> bool:
        """End a pause; return whether there was one."""
        return await self.store.remove_member([PAUSE], PAUSE)

    async def block(self, user: User, seconds: float) -> None:
        """Refuse a user's sessions for `seconds`."""
        await self.store.add_member(BLOCKS, user.store_name, seconds)

    async def unblock(self, user: User) -> bool:
        """End a block; return whether there was one."""
        return await self.store.remove_member([BLOCKS], user.store_name)

    async def refresh(self) -> None:
        """Read pauses and blocks. Nothing changes while the shared store is gone."""
        if not self._reachable():
            return
        paused, blocked = await self.store.members(PAUSE), await self.store.members(BLOCKS)
        if not self._reachable():
            return  # the store was lost meanwhile; local memory has none
        now = self.clock()
        self._paused_until = max((now + left for left in paused.values()), default=0.0)
        self._blocked_until = {name: now + left for name, left in blocked.items()}

    def _reachable(self) -> bool:
        return self.store.state == "ok"

    async def run(self) -> None:
        """Refresh every READ_SECONDS, until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(READ_SECONDS)
