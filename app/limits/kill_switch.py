"""The operator's kill switch: pause all sessions, block one user. In force on every replica within two seconds."""

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from app.identity import User
from app.problems import Problem, retry_later
from app.store import Store, StoreUnavailable

PAUSE = "pause"
BLOCKS = "blocks"
CONTROLS = "controls"
"""Changes with each command, so that a replica can say which one it has read."""
CONTROLS_SECONDS = 86400
READ_SECONDS = 1

log = structlog.get_logger(__name__)


@dataclass(repr=False, eq=False)
class KillSwitch:
    """Pauses and blocks, read every second; the last known ones stay in force while the store is gone.

    `clock`: monotonic seconds.
    """

    store: Store
    clock: Callable[[], float] = time.monotonic
    controls: str = field(default="", init=False)
    """The last command that is in force here."""
    _paused_until: float = field(default=0.0, init=False)
    _blocked_until: dict[str, float] = field(default_factory=dict, init=False)

    def check(self, user: User) -> None:
        """Raise `at-capacity` while sessions are paused, `blocked` for a blocked user."""
        left = self._paused_until - self.clock()
        if left > 0:
            # A pause of hours may be ended early, so clients ask again after a minute at most.
            raise retry_later("at-capacity", min(left, 60), reason="paused")
        if self._blocked_until.get(user.store_name, 0) > self.clock():
            raise Problem("blocked")

    @property
    def paused(self) -> bool:
        """True while sessions are paused."""
        return self._paused_until > self.clock()

    @property
    def blocked(self) -> int:
        """The number of blocked users."""
        now = self.clock()
        return sum(until > now for until in self._blocked_until.values())

    async def announce(self) -> str:
        """Note a change that was written; return what `controls` becomes on each replica that has read it."""
        controls = secrets.token_hex(8)
        await self.store.set(CONTROLS, controls.encode(), CONTROLS_SECONDS)
        return controls

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
        try:
            # Read first: what is read after it includes what the command wrote before.
            controls = await self.store.get(CONTROLS)
        except StoreUnavailable:
            return
        paused, blocked = await self.store.members(PAUSE), await self.store.members(BLOCKS)
        if not self._reachable():
            return  # the store was lost meanwhile; local memory has none
        now = self.clock()
        self._paused_until = max((now + left for left in paused.values()), default=0.0)
        self._blocked_until = {name: now + left for name, left in blocked.items()}
        self.controls = controls.decode() if controls else ""

    def _reachable(self) -> bool:
        return self.store.state == "ok"

    async def run(self) -> None:
        """Refresh every READ_SECONDS, until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(READ_SECONDS)
