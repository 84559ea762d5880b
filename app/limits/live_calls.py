"""Track running calls: free their slots when they end, and hang up unwanted ones."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Self

import structlog
from pydantic_core import from_json, to_json

from app.identity import User
from app.limits.call_attempt import ALL_CALLS, CallAttempt, calls_of_user
from app.limits.talk_time import TalkTime
from app.oneinbox import CallRecord, OneInbox
from app.oneinbox.errors import NoSuchCall, OneInboxError
from app.store import LimitRequest, Rate, Store, StoreUnavailable, Value
from app.telemetry.metrics import Metrics

SWEEP_SECONDS = 30
RECHECK_SECONDS = 10
"""A refused user's calls are rechecked this often at most."""
UNSTOPPED = "unstopped"
"""The set of calls that could not be hung up, or not be found."""
UNFOUND = "of the request "
"""Stored in UNSTOPPED before the request id of a call that was not found."""
UNSTOPPED_SECONDS = 7 * 86400
DAY = 86400
LISTED_CALLS = 50
AT_ONCE = 8
"""Concurrent look-ups of one sweep."""

# Why a call is hung up: in logs, in the store (all but the last two, so keep those), and as a label in metrics.
HUNG_UP = "its caller hung up"
NOT_COLLECTED = "its caller hung up and did not come back"
NOT_KEPT = "its answer could not be kept"
UNUSABLE = "its answer was not usable"
LOST = "its answer was lost"
TOO_LONG = "it ran too long"
UNJOINED = "no one joined it"
REASONS = {
    HUNG_UP: "caller-gone",
    NOT_COLLECTED: "not-collected",
    NOT_KEPT: "not-kept",
    UNUSABLE: "unusable-answer",
    LOST: "lost-answer",
    TOO_LONG: "too-long",
    UNJOINED: "not-joined",
}

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LiveCall:
    """The store's record of a running call. `member`: its attempt's key. `unwanted`: why it must end, if it must."""

    member: str
    call_id: str
    unwanted: str = ""

    def to_bytes(self) -> bytes:
        """Return the value to store."""
        return to_json(self)

    @classmethod
    def from_bytes(cls, value: bytes) -> Self:
        """Parse a stored value."""
        return cls(**from_json(value))

    @property
    def attempt(self) -> CallAttempt:
        """The attempt that started the call."""
        return CallAttempt.from_key(self.member)


@dataclass(repr=False, eq=False)
class LiveCalls:
    """Free the slots of calls that ended, and hang up those that must end.

    `max_seconds`: longest life of a call; 0: no limit. `join_timeout`: seconds a call may stay unjoined; 0: no limit.
    `lease`: seconds after which a slot is free in any case. `now`: Unix time. `metrics`: counts hang-ups.
    """

    store: Store
    oneinbox: OneInbox
    talk: TalkTime
    _: KW_ONLY
    max_seconds: float
    join_timeout: float
    lease: float
    now: Callable[[], float] = time.time
    metrics: Metrics = field(default_factory=Metrics)
    _unsaved: dict[str, LiveCall] = field(default_factory=dict, init=False)
    """Calls that the shared store missed, by request id; the next sweep writes them."""

    async def begin(self, attempt: CallAttempt, call_id: str, *, unwanted: str = "") -> None:
        """Record the call that an attempt started. `unwanted`: why it must be hung up."""
        call = LiveCall(attempt.key, call_id, unwanted)
        try:
            await self._write(call)
        except StoreUnavailable:
            self._unsaved[attempt.request_id] = call

    async def restore(self, attempt: CallAttempt, call_id: str) -> bool:
        """Put a running call back into a store that lost it; return whether it was missing. Raises StoreUnavailable."""
        left = max(self.lease - (self.now() - attempt.since), SWEEP_SECONDS * 2)
        for name in attempt.sets:
            await self.store.add_member(name, attempt.key, left)
        if await self._find(attempt.request_id) is not None:
            return False
        await self.begin(attempt, call_id)
        return True

    async def note_end(self, request_id: str, record: CallRecord) -> None:
        """Free the slots of a call if its record has ended."""
        with contextlib.suppress(StoreUnavailable):  # the sweep will see it
            if record.ended and (call := await self._find(request_id)) is not None:
                await self._end(call, record)

    async def note_gone(self, call_id: str) -> None:
        """Free the slots of a call that OneInbox does not know."""
        with contextlib.suppress(StoreUnavailable):
            if (call := await self._find_by_id(call_id)) is not None:
                await self._end(call, None)

    async def stop(self, attempt: CallAttempt, call_id: str, why: str) -> None:
        """Hang up an unwanted call. If that fails, each sweep tries again."""
        await self.store.remove_member([UNSTOPPED], _unfound(attempt))
        await self.begin(attempt, call_id, unwanted=why)
        with contextlib.suppress(OneInboxError):  # logged and recorded by now
            await self._hang_up(LiveCall(attempt.key, call_id, why), why)

    async def release_slots(self, attempt: CallAttempt) -> None:
        """Free the slots of an attempt that started no call."""
        await self.store.remove_member([UNSTOPPED], _unfound(attempt))
        await self.store.remove_member(attempt.sets, attempt.key)

    async def mark_unresolved(self, attempt: CallAttempt) -> None:
        """List a call that may be running but was not found, for an operator."""
        await self.store.add_member(UNSTOPPED, _unfound(attempt), UNSTOPPED_SECONDS)

    async def is_pending(self, attempt: CallAttempt) -> bool:
        """Return whether the outcome of an attempt is unknown. Raises StoreUnavailable."""
        return await self._find(attempt.request_id) is None

    async def started_here(self, call_id: str) -> bool:
        """Return whether this deployment started the call, as far as its store remembers: at least a day."""
        return await self._request_id(call_id) is not None

    async def is_live(self, call_id: str) -> bool:
        """Return whether the call counts as running; False while the store cannot tell."""
        try:
            return await self._find_by_id(call_id) is not None
        except StoreUnavailable:
            return False

    async def of_user(self, user: User) -> list[str]:
        """Return the ids of the calls that a user started in the last day, newest first. Raises StoreUnavailable."""
        calls = [LiveCall.from_bytes(value) for value in await self.store.items(_list_of(user.store_name))]
        return [call.call_id for call in calls if call.attempt.since > self.now() - DAY]

    async def recheck(self, user: User) -> bool:
        """Check whether a refused user's calls have ended; return whether any slot became free."""
        if not (await self.store.decide(LimitRequest([Rate(f"look:{user.store_name}", 1, RECHECK_SECONDS)]))).allowed:
            return False
        members = await self.store.members(calls_of_user(user.store_name))
        freed = await asyncio.gather(
            *(self._check_call(CallAttempt.from_key(member)) for member in list(members)[:AT_ONCE])
        )
        return any(freed)

    async def flush(self) -> None:
        """Write the calls that began while the shared store was gone."""
        for request_id, call in list(self._unsaved.items()):
            try:
                await self._write(call)
            except StoreUnavailable:
                return
            self._unsaved.pop(request_id, None)

    async def sweep(self) -> list[CallAttempt]:
        """Check every live call, unless another replica has just done so; return attempts of unknown outcome."""
        await self.flush()
        if not (await self.store.decide(LimitRequest([Rate("sweep", 1, SWEEP_SECONDS - 1)]))).allowed:
            return []
        places = asyncio.Semaphore(AT_ONCE)
        pending: list[CallAttempt] = []

        async def check(attempt: CallAttempt) -> None:
            try:
                async with places:
                    if await self._check_call(attempt) is None:
                        pending.append(attempt)
            except Exception:  # one call must not keep the others from being checked
                log.exception("call_check_failed", request_id=attempt.request_id)

        members = await self.store.members(ALL_CALLS)
        await asyncio.gather(*(check(CallAttempt.from_key(member)) for member in members))
        return pending

    async def _check_call(self, attempt: CallAttempt) -> bool | None:
        """Check one call; return whether its slots became free, or None if its attempt's outcome is unknown."""
        try:
            call = await self._find(attempt.request_id)
        except StoreUnavailable:
            return False  # without the store nothing is known about the call
        if call is None:
            return None
        try:
            record = await self.oneinbox.get_call(call.call_id)
            if not record.ended and (why := self._overdue(call, record)):
                record = await self._hang_up(call, why)
        except NoSuchCall:
            await self._end(call, None)
            return True
        except OneInboxError as error:
            log.warning("call_lookup_failed", call=call.call_id, reason=error.reason)
            return False
        if record.ended:
            await self._end(call, record)
        return record.ended

    def _overdue(self, call: LiveCall, record: CallRecord) -> str:
        age = self.now() - call.attempt.since
        if call.unwanted:
            return call.unwanted
        if self.max_seconds and age > self.max_seconds:
            return TOO_LONG
        if self.join_timeout and age > self.join_timeout and record.status in ("queued", "initiated"):
            return UNJOINED
        return ""

    async def _hang_up(self, call: LiveCall, why: str) -> CallRecord:
        """Stop a call; return its record. Raises OneInboxError, after recording that the call runs on."""
        log.warning("call_stop_requested", call=call.call_id, why=why)
        try:
            record = await self.oneinbox.stop_call(call.call_id)
        except NoSuchCall:
            await self._end(call, None)
            raise
        except OneInboxError as error:
            log.error("call_not_stopped", call=call.call_id, why=why, reason=error.reason)
            self.metrics.count_hang_up(REASONS.get(why, "other"), done=False)
            await self.store.add_member(UNSTOPPED, call.call_id, UNSTOPPED_SECONDS)
            raise
        self.metrics.count_hang_up(REASONS.get(why, "other"), done=True)
        if why == LOST:
            self.metrics.count_orphan("stopped")
        await self.store.remove_member([UNSTOPPED], call.call_id)
        if record.ended:
            await self._end(call, record)
        return record

    async def _find(self, request_id: str) -> LiveCall | None:
        """Return the record of a call, or None. Raises StoreUnavailable."""
        if request_id in self._unsaved:
            return self._unsaved[request_id]
        value = await self.store.get(f"call:{request_id}")
        return LiveCall.from_bytes(value) if value is not None else None

    async def _find_by_id(self, call_id: str) -> LiveCall | None:
        request_id = await self._request_id(call_id)
        return await self._find(request_id) if request_id is not None else None

    async def _request_id(self, call_id: str) -> str | None:
        for request_id, call in self._unsaved.items():
            if call.call_id == call_id:
                return request_id
        try:
            value = await self.store.get(f"started:{call_id}")
        except StoreUnavailable:
            return None
        return value.decode() if value is not None else None

    async def _end(self, call: LiveCall, record: CallRecord | None) -> None:
        """Free a call's slots and count its minutes, once."""
        attempt = call.attempt
        self._unsaved.pop(attempt.request_id, None)
        if await self.store.remove_member(attempt.sets, attempt.key):
            await self.talk.count(attempt, record)
        await self.store.remove_member([UNSTOPPED], call.call_id)
        with contextlib.suppress(StoreUnavailable):  # it expires
            await self.store.delete(f"call:{attempt.request_id}")

    async def _write(self, call: LiveCall) -> None:
        attempt = call.attempt
        left = self.lease - (self.now() - attempt.since)
        if left <= 0:
            return
        value = call.to_bytes()
        values = [
            Value(f"call:{attempt.request_id}", value, left),
            Value(f"started:{call.call_id}", attempt.request_id.encode(), max(left, DAY)),
        ]
        if call.unwanted:
            for each in values:
                await self.store.set(*each)
        else:
            await self.store.push(_list_of(attempt.user), value, keep=LISTED_CALLS, ttl=DAY, setting=values)


def _unfound(attempt: CallAttempt) -> str:
    """Return the name in UNSTOPPED of a call that was not found."""
    return UNFOUND + attempt.request_id


def _list_of(user: str) -> str:
    return f"calls:{user}"
