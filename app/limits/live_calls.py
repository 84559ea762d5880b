"""Follow running calls: move their records as evidence comes in, and hang up those that must end."""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

import structlog

from app.identity import User
from app.limits import record as records
from app.limits.call_attempt import ALL_CALLS, CallAttempt, calls_of_user
from app.limits.ledger import DAY, UNCOLLECTED, Kept, Ledger, Moved
from app.limits.record import ENDED, GIVEN, RESERVED, STARTED, UNRESOLVED, UNWANTED, StartRecord, Step
from app.limits.talk_time import TalkTime
from app.oneinbox import CallRecord, OneInbox
from app.oneinbox.errors import NoSuchCall, OneInboxError
from app.store import LimitRequest, Rate, Store, StoreUnavailable
from app.telemetry.metrics import Metrics

SWEEP_SECONDS = 30
RECHECK_SECONDS = 10
"""A refused user's calls are rechecked this often at most."""
COLLECT_SECONDS = 30
"""How long the call of a client that disconnected waits for the client to return with its key."""
RUMOUR_SECONDS = 60
"""A 404 is believed when it comes again this much later, so never in a call's first minute."""
MOST_MISSING = 1000
AT_ONCE = 8
"""Concurrent look-ups of one sweep, and stops in the background."""

# Why a call is hung up: in logs, in the store (so keep them), and as a label in metrics.
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


@dataclass(repr=False, eq=False)
class LiveCalls:
    """Move the records of calls, and hang up those that must end.

    `max_seconds`: longest life of a call; 0: no limit. `join_timeout`: seconds a call may stay unjoined; 0: no limit.
    `now`: Unix time. `metrics`: counts hang-ups.
    """

    store: Store
    oneinbox: OneInbox
    talk: TalkTime
    ledger: Ledger
    _: KW_ONLY
    max_seconds: float
    join_timeout: float
    now: Callable[[], float] = time.time
    metrics: Metrics = field(default_factory=Metrics)
    _missing: OrderedDict[str, float] = field(default_factory=OrderedDict, init=False)
    """Unix time of the first 404 of calls without a record, such as those from before a restart on `memory://`."""
    _stop_places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE), init=False)
    _stops: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    async def give(self, attempt: CallAttempt, call_id: str, kept: Kept | None = None) -> bool:
        """Record that the session's client gets the call, right before it does. False: it must not get it.

        `kept`: the answer to keep for repeats. Without one, a store that is gone does not matter; with one it raises
        StoreUnavailable.
        """
        step = records.give(attempt, call_id, kept.name if kept is not None else "")
        try:
            before, after = await self._move(attempt.request_id, step, StartRecord(attempt), kept)
        except StoreUnavailable:
            if kept is not None:
                raise
            await self.ledger.hold(attempt.request_id, step)
            return True
        return after is not None or (before is not None and attempt.request_id in before.given_to)

    async def restore(self, attempt: CallAttempt, call_id: str) -> bool:
        """Put a running call back into a store that lost it; return whether it was missing. Raises StoreUnavailable."""
        found = await self.ledger.find(attempt.request_id)
        if found is None:
            return (await self._move(attempt.request_id, records.restore(attempt, call_id))).after is not None
        if found.running:  # its slots may be lost all the same
            left = max(1.0, self.ledger.lease - (self.now() - attempt.since))
            for name in attempt.sets:
                await self.store.add_member(name, attempt.key, left)
        return False

    async def leave(self, attempt: CallAttempt, call_id: str, kept: Kept) -> bool:
        """Record that the session's client has gone, and let the call wait for a repeat. False: it cannot wait.

        Raises StoreUnavailable.
        """
        step = records.leave(attempt, call_id, kept.name, self.now() + COLLECT_SECONDS)
        moved = await self._move(attempt.request_id, step, StartRecord(attempt), kept)
        return moved.after is not None

    async def collect(self, request_id: str, receiver: str) -> bool:
        """Record that a repeat's client gets the call, right before it does. False: it was stopped, or will be.

        `receiver`: names the repeat. A call that ended by itself is given all the same. Raises StoreUnavailable.
        """
        try:
            before, after = await self._move(request_id, records.collect(receiver))
        except StoreUnavailable:
            await self.withdraw_repeat(request_id, receiver)
            raise
        # An absent record proves nothing: the kept answer stands for itself.
        return after is not None or before is None or (before.state in (GIVEN, ENDED) and not before.unwanted)

    async def withdraw(self, attempt: CallAttempt, call_id: str, why: str) -> None:
        """Record that the session's client did not get the call: it waits for a repeat if its answer is kept.

        Otherwise it is stopped.
        """
        await self._move_or_hold(attempt.request_id, self._withdrawal(attempt, call_id, why))

    async def abandon(self, attempt: CallAttempt, call_id: str) -> None:
        """Like `withdraw`, without a wait: for a session that is cancelled because the process ends."""
        await self.ledger.hold(attempt.request_id, self._withdrawal(attempt, call_id, HUNG_UP))

    async def withdraw_repeat(self, request_id: str, receiver: str) -> None:
        """Record that a repeat's client did not get the call."""
        due = self.now() + COLLECT_SECONDS
        await self._move_or_hold(request_id, records.withdraw(receiver, due, HUNG_UP, records.nothing))

    async def stop(self, attempt: CallAttempt, call_id: str, why: str) -> None:
        """Hang up a call whose answer no client has or gets. If that fails, each sweep tries again."""
        step = records.reject(attempt, call_id, why)
        try:
            unwanted = (await self._move(attempt.request_id, step)).after
        except StoreUnavailable:
            await self.ledger.hold(attempt.request_id, step)
            unwanted = step(None)
        if unwanted is not None and unwanted.state == UNWANTED:
            await self._hang_up(unwanted)

    def stop_soon(self, attempt: CallAttempt, call_id: str, why: str) -> None:
        """Like `stop`, in the background."""
        self._in_background(partial(self.stop, attempt, call_id, why))

    async def release(self, attempt: CallAttempt) -> None:
        """Free the slots of an attempt that started no call."""
        await self._move_or_hold(attempt.request_id, records.no_call(attempt))

    async def give_up(self, attempt: CallAttempt) -> None:
        """List a call that may be running but was not found, for an operator."""
        with contextlib.suppress(StoreUnavailable):  # the next sweep reports it again
            await self._move(attempt.request_id, records.give_up)

    async def is_pending(self, attempt: CallAttempt) -> bool:
        """Return whether the outcome of an attempt is unknown. Raises StoreUnavailable."""
        found = await self.ledger.find(attempt.request_id)
        return found is not None and found.state in (RESERVED, UNRESOLVED)

    async def note_end(self, request_id: str, record: CallRecord) -> None:
        """Free the slots of a call if OneInbox's record says that it has ended, and count its minutes."""
        if record.ended:
            with contextlib.suppress(StoreUnavailable):  # the sweep will see it
                await self._end(request_id, record)

    async def note_missing(self, call_id: str) -> bool:
        """Return whether to believe that OneInbox does not know a call, after a 404. Frees the slots if so.

        A 404 is a rumour until it comes again, RUMOUR_SECONDS later, without a sign of life meanwhile.
        """
        try:
            found = await self._find_by_id(call_id)
            if found is not None:
                return await self._believe_missing(found)
        except StoreUnavailable:
            return False
        since = self._missing.setdefault(call_id, self.now())
        if len(self._missing) > MOST_MISSING:
            self._missing.popitem(last=False)
        return self.now() - since >= RUMOUR_SECONDS

    def note_seen(self, call_id: str) -> None:
        """Forget a 404 of a call that has no record: OneInbox knows it."""
        self._missing.pop(call_id, None)

    async def started(self, call_id: str) -> StartRecord | None:
        """Return the record of a call that this deployment started, as far as its store remembers: at least a day."""
        try:
            return await self._find_by_id(call_id)
        except StoreUnavailable:
            return None

    async def started_here(self, call_id: str) -> bool:
        """Return whether this deployment started the call, as far as its store remembers: at least a day."""
        try:
            return await self.ledger.request_id(call_id) is not None
        except StoreUnavailable:
            return False

    async def is_live(self, call_id: str) -> bool:
        """Return whether the call counts as running; False while the store cannot tell."""
        found = await self.started(call_id)
        return found is not None and found.running

    async def of_user(self, user: User) -> list[str]:
        """Return the ids of the calls that a user started in the last day, newest first. Raises StoreUnavailable."""
        calls = await self.ledger.of_user(user.store_name)
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

    async def flush(self, *, last: bool = False) -> None:
        """Settle what the store has not confirmed.

        A call that no client has is stopped without the store, if it waited as long as for a repeat, or if this is the
        `last` time.
        """
        for request_id, held in list(self.ledger.unconfirmed.items()):
            try:
                before, after = await self._move(request_id, records.nothing)
            except StoreUnavailable:
                guess = held.guess()
                if guess is None or guess.state != UNWANTED or not (last or self.now() - held.since >= COLLECT_SECONDS):
                    continue
                held.since = self.now()
                self._in_background(partial(self._hang_up, guess))
            else:
                if after is not None and after.state == UNWANTED and (before is None or before.state != UNWANTED):
                    self._in_background(partial(self._hang_up, after))

    async def stop_uncollected(self) -> None:
        """Stop the calls that no repeat collected in time. Raises StoreUnavailable."""
        expire = records.expire(self.now(), NOT_COLLECTED)
        for request_id in await self.store.members(UNCOLLECTED):
            found = await self.ledger.find(request_id)
            if expire(found) is None:
                continue
            _, after = await self._move(request_id, expire, found)
            if after is not None:  # this replica moved it, so no other stops it
                self._in_background(partial(self._hang_up, after))

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

    async def finish(self) -> None:
        """Wait for the stops in the background. Without a shared store, also stop what no process would stop later."""
        await asyncio.gather(*self._stops, return_exceptions=True)
        if self.store.shared:
            return
        for member in await self.store.members(ALL_CALLS):
            request_id = CallAttempt.from_key(member).request_id
            await self._move(request_id, records.expire(float("inf"), NOT_COLLECTED))
            found = await self.ledger.find(request_id)
            if found is not None and found.state == UNWANTED:
                self._in_background(partial(self._hang_up, found))
        await asyncio.gather(*self._stops, return_exceptions=True)

    async def _check_call(self, attempt: CallAttempt) -> bool | None:
        """Check one call; return whether its slots became free, or None if its attempt's outcome is unknown."""
        try:
            found = await self.ledger.find(attempt.request_id)
            if found is None:
                return False  # an absent record proves nothing: the slots are free when the lease ends
            if found.state in (RESERVED, UNRESOLVED):
                return None
            if not found.running:
                await self.ledger.release_slots(found)
                return True
            if found.state == STARTED:
                found = (await self._move(attempt.request_id, records.expire(self.now(), NOT_COLLECTED))).after or found
            return await self._look(found)
        except StoreUnavailable:
            return False  # without the store nothing is known about the call

    async def _look(self, found: StartRecord) -> bool:
        """Ask OneInbox for a call, and act on the answer; return whether it has ended."""
        try:
            record = await self.oneinbox.get_call(found.call_id)
        except NoSuchCall:
            return await self._believe_missing(found)
        except OneInboxError as error:
            log.warning("call_lookup_failed", call=found.call_id, reason=error.reason)
            return False
        request_id = found.attempt.request_id
        if record.ended:
            await self._end(request_id, record)
            return True
        if found.missing_since:
            await self._move(request_id, records.miss(0))
        if found.state == GIVEN and (why := self._overdue(found, record)):
            step = records.end_given(why)
            try:
                found = (await self._move(request_id, step)).after or found
            except StoreUnavailable:  # its time is up, whatever the store says
                await self.ledger.hold(request_id, step)
                found = step(found) or found
        if found.state != UNWANTED:
            return False
        stopped = await self._hang_up(found)
        return stopped is not None and stopped.ended

    def _withdrawal(self, attempt: CallAttempt, call_id: str, why: str) -> Step:
        otherwise = records.reject(attempt, call_id, why)
        return records.withdraw(attempt.request_id, self.now() + COLLECT_SECONDS, why, otherwise)

    def _overdue(self, found: StartRecord, record: CallRecord) -> str:
        """Return why a call that was given must end; empty if it need not."""
        age = self.now() - found.attempt.since
        if self.max_seconds and age > self.max_seconds:
            return TOO_LONG
        if self.join_timeout and age > self.join_timeout and record.status in ("queued", "initiated"):
            return UNJOINED
        return ""

    async def _hang_up(self, unwanted: StartRecord) -> CallRecord | None:
        """Stop an unwanted call; return OneInbox's record, or None if it runs on: then the sweep tries again."""
        request_id, call_id, why = unwanted.attempt.request_id, unwanted.call_id, unwanted.unwanted
        log.warning("call_stop_requested", call=call_id, why=why)
        try:
            record = await self.oneinbox.stop_call(call_id)
        except NoSuchCall:
            with contextlib.suppress(StoreUnavailable):
                await self._believe_missing(unwanted)
            return None
        except OneInboxError as error:
            log.error("call_not_stopped", call=call_id, why=why, reason=error.reason)
            self.metrics.count_hang_up(REASONS.get(why, "other"), done=False)
            await self._move_or_hold(request_id, records.fail)
            return None
        self.metrics.count_hang_up(REASONS.get(why, "other"), done=True)
        if why == LOST:
            self.metrics.count_orphan("stopped")
        if record.ended:
            await self._end_or_hold(request_id, record)
        return record

    def _in_background(self, work: Callable[[], Awaitable[object]]) -> None:
        """Stop in the background: a slow stop must not delay what else is due."""

        async def stop() -> None:
            async with self._stop_places:
                await work()

        task = asyncio.create_task(stop(), name="stop")
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)

    async def _believe_missing(self, found: StartRecord) -> bool:
        """Take note of a 404; return whether it is the second, RUMOUR_SECONDS after the first."""
        request_id, since = found.attempt.request_id, found.missing_since
        if since and self.now() - since >= RUMOUR_SECONDS:
            await self._end(request_id, None)
            return True
        if not since:
            log.warning("call_missing", call=found.call_id, believed_after=RUMOUR_SECONDS)
            await self._move(request_id, records.miss(self.now()))
        return False

    async def _end(self, request_id: str, record: CallRecord | None) -> None:
        """Record a call's end, and count its minutes. Raises StoreUnavailable."""
        found = await self.ledger.find(request_id)
        if found is not None and found.running:
            await self._move(request_id, self._ended(found.attempt, record), found)

    async def _end_or_hold(self, request_id: str, record: CallRecord) -> None:
        try:
            await self._end(request_id, record)
        except StoreUnavailable:
            held = self.ledger.unconfirmed.get(request_id)
            guess = held.guess() if held is not None else None
            if guess is not None:
                await self.ledger.hold(request_id, self._ended(guess.attempt, record))

    def _ended(self, attempt: CallAttempt, record: CallRecord | None) -> Step:
        seconds = record.duration_seconds if record is not None else None
        return records.end(self.now() - attempt.since if seconds is None else seconds)

    async def _move(
        self, request_id: str, step: Step, guess: StartRecord | None = None, kept: Kept | None = None
    ) -> Moved:
        """Move a record, and count the minutes of a call that ended, once. Raises StoreUnavailable."""
        moved = await self.ledger.move(request_id, step, guess, kept)
        if moved.after is not None and not moved.after.running:
            await self.talk.count(moved.after.attempt.user, moved.after.seconds)
        return moved

    async def _move_or_hold(self, request_id: str, step: Step) -> None:
        """Move a record, now or once the store answers; stop a call that is unwanted by then."""
        try:
            before, after = await self._move(request_id, step)
        except StoreUnavailable:
            await self.ledger.hold(request_id, step)
            return
        if after is not None and after.state == UNWANTED and (before is None or before.state != UNWANTED):
            await self._hang_up(after)

    async def _find_by_id(self, call_id: str) -> StartRecord | None:
        request_id = await self.ledger.request_id(call_id)
        return await self.ledger.find(request_id) if request_id is not None else None
