"""The calls that are running: their slots, their ends, and the hanging up of those that run too long."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Self

import structlog

from app.identity import User
from app.limits.service import ALL_CALLS, user_calls
from app.oneinbox import CallRecord, OneInbox
from app.oneinbox.errors import NoSuchCall, OneInboxError
from app.store import Rate, Store, StoreUnavailable

SWEEP_SECONDS = 30
LOOK_SECONDS = 10
"""A refused user's calls are looked at this often at most."""
UNSTOPPED = "unstopped"
"""The set of calls that could not be hung up."""
UNSTOPPED_SECONDS = 7 * 86400
DAY = 86400
LISTED_CALLS = 50
AT_ONCE = 8
"""Look-ups of one sweep under way at once."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LiveCall:
    """One running call, as the store keeps it. `user`: its owner's name there. `since`: Unix time of its POST."""

    member: str
    call_id: str
    agent: str
    user: str
    since: float

    def to_bytes(self) -> bytes:
        """For the store."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, value: bytes) -> Self:
        """Out of the store."""
        return cls(**json.loads(value))

    @property
    def slots(self) -> list[str]:
        """The sets it is a member of."""
        return [f"live:user:{self.user}", f"live:agent:{self.agent}", ALL_CALLS]


class LiveCalls:
    """Knows which calls run, frees the slots of those that ended, and hangs up those that run too long.

    `max_seconds`: longest life of a call; 0: any. `join_timeout`: seconds to stay unjoined; 0: any. `lease`: seconds
    after which a slot is free whatever became of its call. `now`: Unix time.
    """

    def __init__(
        self,
        store: Store,
        oneinbox: OneInbox,
        *,
        max_seconds: float,
        join_timeout: float,
        lease: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._oneinbox = oneinbox
        self._max_seconds = max_seconds
        self._join_timeout = join_timeout
        self._lease = lease
        self._now = now
        # Calls that a shared store could not be told of; the next sweep tells it.
        self._untold: dict[str, LiveCall] = {}

    async def begin(self, user: User, *, member: str, call_id: str, agent: str) -> None:
        """Remember which call took the slots of `member`."""
        call = LiveCall(member, call_id, agent, user.store_name, self._now())
        try:
            await self._write(call, self._lease)
        except StoreUnavailable:
            self._untold[member] = call

    async def handed_out(self, call_id: str) -> bool:
        """Whether this deployment started the call, as far as its store remembers: a day and longer."""
        return await self._member(call_id) is not None

    async def is_live(self, call_id: str) -> bool:
        """Whether the call counts as running."""
        member = await self._member(call_id)
        return member is not None and await self._find(member) is not None

    async def of_user(self, user: User) -> list[LiveCall]:
        """The calls that a user started in the last day, the newest first. Raises StoreUnavailable."""
        calls = [LiveCall.from_bytes(value) for value in await self._store.items(_calls_of(user.store_name))]
        return [call for call in calls if call.since > self._now() - DAY]

    async def see(self, member: str, record: CallRecord | None) -> None:
        """Free the slots of a call that was seen ended, or gone (None)."""
        if record is None or record.ended:
            call = await self._find(member)
            if call is not None:
                await self._end(call)

    async def stop(self, member: str, call_id: str, why: str) -> None:
        """Hang up a call that nobody is given, and free its slots; one that cannot be stopped is remembered."""
        try:
            await self.see(member, await self._hang_up(call_id, why))
        except NoSuchCall:
            await self.see(member, None)
        except OneInboxError:
            pass  # said and remembered by now; the sweep goes on trying

    async def look_again(self, user: User) -> bool:
        """Look whether a refused user's calls have ended meanwhile; whether any slot became free."""
        if not (await self._store.decide([Rate(f"look:{user.store_name}", 1, LOOK_SECONDS)])).allowed:
            return False
        members = await self._store.members(user_calls(user))
        freed = await asyncio.gather(*(self._look(member) for member in list(members)[:AT_ONCE]))
        return any(freed)

    async def sweep(self) -> None:
        """Look at every live call once, if no other replica has just done so."""
        await self._tell()
        if not (await self._store.decide([Rate("sweep", 1, SWEEP_SECONDS - 1)])).allowed:
            return
        places = asyncio.Semaphore(AT_ONCE)

        async def look(member: str) -> None:
            async with places:
                await self._look(member)

        await asyncio.gather(*(look(member) for member in await self._store.members(ALL_CALLS)))

    async def run(self) -> None:
        """Sweep for ever."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await self.sweep()
            except Exception:
                log.exception("sweep_failed")

    async def _look(self, member: str) -> bool:
        """Look at one call; whether its slots became free. A call without a record is still being started."""
        call = await self._find(member)
        if call is None:
            return False
        try:
            record = await self._oneinbox.get_call(call.call_id)
            if not record.ended and (why := self._overdue(call, record)):
                record = await self._hang_up(call.call_id, why)
        except NoSuchCall:
            await self._end(call)
            return True
        except OneInboxError as error:
            log.warning("look_failed", call=call.call_id, reason=error.reason)
            return False
        if record.ended:
            await self._end(call)
        return record.ended

    def _overdue(self, call: LiveCall, record: CallRecord) -> str:
        age = self._now() - call.since
        if self._max_seconds and age > self._max_seconds:
            return "ran too long"
        if self._join_timeout and age > self._join_timeout and record.status in ("queued", "initiated"):
            return "was not joined"
        return ""

    async def _hang_up(self, call_id: str, why: str) -> CallRecord:
        log.warning("hanging_up", call=call_id, why=why)
        try:
            record = await self._oneinbox.stop_call(call_id)
        except NoSuchCall:
            raise
        except OneInboxError as error:
            log.error("call_not_stopped", call=call_id, reason=error.reason)
            await self._store.enter(UNSTOPPED, call_id, UNSTOPPED_SECONDS)
            raise
        await self._store.leave([UNSTOPPED], call_id)
        return record

    async def _find(self, member: str) -> LiveCall | None:
        if member in self._untold:
            return self._untold[member]
        try:
            value = await self._store.get(f"call:{member}")
        except StoreUnavailable:
            return None
        return LiveCall.from_bytes(value) if value is not None else None

    async def _end(self, call: LiveCall) -> None:
        self._untold.pop(call.member, None)
        await self._store.leave(call.slots, call.member)
        with contextlib.suppress(StoreUnavailable):  # it expires
            await self._store.delete(f"call:{call.member}")

    async def _member(self, call_id: str) -> str | None:
        try:
            value = await self._store.get(f"started:{call_id}")
        except StoreUnavailable:
            return next((call.member for call in self._untold.values() if call.call_id == call_id), None)
        return value.decode() if value is not None else None

    async def _write(self, call: LiveCall, ttl: float) -> None:
        await self._store.set(f"call:{call.member}", call.to_bytes(), ttl)
        await self._store.set(f"started:{call.call_id}", call.member.encode(), max(ttl, DAY))
        await self._store.push(_calls_of(call.user), call.to_bytes(), keep=LISTED_CALLS, ttl=DAY)

    async def _tell(self) -> None:
        for member, call in list(self._untold.items()):
            left = self._lease - (self._now() - call.since)
            try:
                if left > 0:
                    await self._write(call, left)
            except StoreUnavailable:
                return
            self._untold.pop(member, None)


def _calls_of(user: str) -> str:
    return f"calls:{user}"
