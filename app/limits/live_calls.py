"""Follow running calls: move their records as evidence comes in, and hang up those that must end."""

import asyncio
import contextlib
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import NamedTuple

import structlog

from app.identity import User
from app.limits import record as records
from app.limits.call_attempt import ALL_CALLS, CallAttempt, attempts_of, calls_of_user
from app.limits.ledger import DAY, STOP_SECONDS, Kept, Ledger, Moved
from app.limits.record import ENDED, GIVEN, RESERVED, STARTED, UNRESOLVED, UNWANTED, StartRecord, Step
from app.limits.running_calls import running_calls
from app.oneinbox import CallRecord, OneInbox
from app.oneinbox.errors import NoSuchCall, OneInboxError
from app.store import BUDGET, KEPT, LimitRequest, Rate, Store, StoreUnavailable
from app.telemetry.metrics import Metrics

SWEEP_SECONDS = 30
RECHECK_SECONDS = 10
"""A refused user's calls are rechecked this often at most."""
COLLECT_SECONDS = 30
"""How long the call of a client that disconnected waits for the client to return with its key."""
RUMOUR_SECONDS = 60
"""A 404 is believed when it comes again this much later, so never in a call's first minute."""
PATIENCE_SECONDS = 2
"""How long a call that its client did not get waits for a store that is gone: it may have kept its answer."""
RETRY_SECONDS = 0.1
MOST_MISSING = 1000
AT_ONCE = 8
"""Concurrent look-ups of one sweep."""
STOPS_AT_ONCE = 256
"""Calls in the background that are hung up, or looked at because they are due."""
STOP_AGAIN_SECONDS = 10
"""A call that could not be stopped is stopped again this much later."""
READ_AT_ONCE = 64
"""Records that a sweep reads at once."""
LISTED_SECONDS = 15
"""A call may be missing in OneInbox's lists for this long after its POST."""
MOST_UNLISTED = 3
"""Sweeps in a row without an agent's lists; from this one on, calls are looked at singly."""
UNLISTED = CallRecord(id="unlisted")
"""Stands for a call of which nothing but its age is known."""
MOST_SINGLE = 100
"""Calls that a sweep looks at singly, because no list tells of them; the next sweep takes others."""

# Why a call is hung up: in logs, in the store (so keep them), and as a label in metrics.
HUNG_UP = "its caller hung up"
NOT_COLLECTED = "its caller hung up and did not come back"
NOT_KEPT = "its answer could not be kept"
LEFT = "its page was closed"
UNUSABLE = "its answer was not usable"
LOST = "its answer was lost"
TOO_LONG = "it ran too long"
NO_MINUTES = "the minutes are used up"
UNJOINED = "no one joined it"
OPERATOR = "an operator stopped it"
REASONS = {
    HUNG_UP: "caller-gone",
    NOT_COLLECTED: "not-collected",
    NOT_KEPT: "not-kept",
    LEFT: "page-closed",
    UNUSABLE: "unusable-answer",
    LOST: "lost-answer",
    TOO_LONG: "too-long",
    NO_MINUTES: "talk-minutes",
    UNJOINED: "not-joined",
    OPERATOR: "operator",
}
STOPPED_BECAUSE = {
    TOO_LONG: "max-call-seconds",
    NO_MINUTES: "talk-minutes",
    UNJOINED: "not-joined",
    OPERATOR: "operator",
    **dict.fromkeys((HUNG_UP, NOT_COLLECTED, NOT_KEPT, LEFT, UNUSABLE, LOST), "caller-gone"),
}
"""The same reasons, in the owner's words."""

log = structlog.get_logger(__name__)


class Bounds(NamedTuple):
    """The bounds of a call, and why it ended.

    `ends_at`: the latest moment that it may run to, as Unix time; None if nothing bounds it, or it must end already.
    `stopped_because`: why the broker ended it, if it did. `reason`: why it will end at `ends_at`.
    """

    ends_at: float | None
    stopped_because: str | None
    reason: str = "max-call-seconds"


@dataclass(repr=False, eq=False)
class LiveCalls:
    """Move the records of calls, and hang up those that must end.

    `max_seconds`: longest life of a call; 0: no limit. `join_timeout`: seconds a call may stay unjoined; 0: no limit.
    `agent_ids`: by configured name, to list their calls; the calls of others are looked at singly. `now`: Unix time.
    `metrics`: counts hang-ups.
    `minutes_of`: seconds of talk that the calls of a set may take; None: no limit; KEPT.
    """

    store: Store
    oneinbox: OneInbox
    ledger: Ledger
    _: KW_ONLY
    max_seconds: float
    join_timeout: float
    agent_ids: Mapping[str, str] = field(default_factory=dict)
    minutes_of: Callable[[str], int | None] = lambda _: KEPT
    now: Callable[[], float] = time.time
    metrics: Metrics = field(default_factory=Metrics)
    _missing: OrderedDict[str, float] = field(default_factory=OrderedDict, init=False)
    """Unix time of the first 404 that a read met, by call id."""
    _background_places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(STOPS_AT_ONCE), init=False)
    _background: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)
    """Work in the background, by what it is about."""
    _stopping: dict[str, None] = field(default_factory=dict, init=False)
    """Request ids of the calls that this process is hanging up."""

    async def give(self, attempt: CallAttempt, call_id: str, kept: Kept | None = None) -> bool:
        """Record that the session's client gets the call, right before it does. False: it must not get it.

        `kept`: the answer to keep for repeats. Without one, a store that is gone does not matter; with one it raises
        StoreUnavailable.
        """
        step = records.give(attempt, call_id, kept=kept is not None)
        try:
            before, after = await self.ledger.move(attempt.request_id, step, StartRecord(attempt), kept)
        except StoreUnavailable:
            if kept is not None:
                raise
            await self.ledger.hold(attempt.request_id, step)
            return True
        return _is_given(after or before, attempt.request_id)

    async def restore(self, attempt: CallAttempt, call_id: str) -> bool:
        """Put a running call back into a store that lost it; return whether it was missing. Raises StoreUnavailable."""
        attempt = attempt._replace(ends=self._end_of(attempt))
        found = await self.ledger.find(attempt.request_id)
        if found is None:
            moved = await self.ledger.move(attempt.request_id, records.restore(attempt, call_id))
            for name in filter(self.ledger.is_timed, attempt.sets):
                await self.store.has_run_out(name, self.minutes_of(name))
            return moved.after is not None
        if found.running:  # its slots and its due time may be lost all the same
            await self.ledger.rejoin(found)
            if found.state != RESERVED:
                await self.ledger.ensure_planned(attempt.request_id)
        return False

    async def leave(self, attempt: CallAttempt, call_id: str, kept: Kept) -> bool:
        """Record that the session's client has gone, and let the call wait for a repeat. False: it cannot wait.

        Raises StoreUnavailable.
        """
        step = records.leave(attempt, call_id, self.now() + COLLECT_SECONDS)
        before, after = await self.ledger.move(attempt.request_id, step, StartRecord(attempt), kept)
        left = after or before
        return left is not None and left.state == STARTED

    async def collect(self, request_id: str, receiver: str) -> bool:
        """Record that a repeat's client gets the call, right before it does. False: it was stopped, or will be.

        `receiver`: names the repeat. A call that ended by itself is given all the same. Raises StoreUnavailable.
        """
        try:
            before, after = await self.ledger.move(request_id, records.collect(receiver))
        except StoreUnavailable:
            await self.withdraw_repeat(request_id, receiver)
            raise
        except asyncio.CancelledError:  # the process ends
            await self.ledger.hold(request_id, self._withdrawal_of_repeat(receiver))
            raise
        found = after or before
        # An absent record proves nothing: the kept answer stands for itself.
        return found is None or (found.state in (GIVEN, ENDED) and not found.unwanted)

    async def withdraw(self, attempt: CallAttempt, call_id: str, why: str) -> None:
        """Record that the session's client did not get the call: it waits for a repeat if its answer is kept.

        Otherwise it is stopped; also if the store is gone for PATIENCE_SECONDS, since no repeat gets an answer without
        it.
        """
        request_id, step = attempt.request_id, self._withdrawal(attempt, call_id, why)
        try:
            unwanted = _newly_unwanted(await self._move_patiently(request_id, step))
        except StoreUnavailable:
            await self.ledger.hold(request_id, step)
            await self.ledger.hold(request_id, records.stopped(why))
            unwanted = StartRecord(attempt, UNWANTED, call_id, unwanted=why)
        if unwanted is not None:
            await self._hang_up(unwanted)

    async def abandon(self, attempt: CallAttempt, call_id: str) -> None:
        """Like `withdraw`, without a wait: for a session that is cancelled because the process ends."""
        await self.ledger.hold(attempt.request_id, self._withdrawal(attempt, call_id, HUNG_UP))

    async def withdraw_repeat(self, request_id: str, receiver: str) -> None:
        """Record that a repeat's client did not get the call."""
        await self._move_or_hold(request_id, self._withdrawal_of_repeat(receiver))

    async def stop(self, attempt: CallAttempt, call_id: str, why: str) -> None:
        """Hang up a call whose answer no client has or gets. If that fails, again STOP_AGAIN_SECONDS later."""
        step = records.reject(attempt, call_id, why)
        try:
            unwanted = (await self.ledger.move(attempt.request_id, step)).after
        except StoreUnavailable:
            await self.ledger.hold(attempt.request_id, step)
            unwanted = step(None)
        if unwanted is not None and unwanted.state == UNWANTED:
            await self._hang_up(unwanted)

    async def stop_later(self, call_id: str, seconds: float) -> bool:
        """Stop a call in some seconds, unless `keep` is called before. False: the store does not know the call."""
        try:
            request_id = await self.ledger.request_id(call_id)
            if request_id is None:
                return False
            return (await self.ledger.move(request_id, records.stop_later(self.now() + seconds))).before is not None
        except StoreUnavailable:
            return False

    async def keep(self, call_id: str) -> None:
        """Take a `stop_later` back: the owner of the call is there."""
        with contextlib.suppress(StoreUnavailable):
            if (request_id := await self.ledger.stops_later(call_id)) is not None:
                await self.ledger.move(request_id, records.stop_not)

    def stop_soon(self, attempt: CallAttempt, call_id: str, why: str) -> None:
        """Like `stop`, in the background."""
        self._in_background(attempt.request_id, partial(self.stop, attempt, call_id, why))

    async def release(self, attempt: CallAttempt) -> None:
        """Free the slots of an attempt that started no call."""
        await self._move_or_hold(attempt.request_id, records.no_call(attempt))

    async def give_up(self, attempt: CallAttempt) -> None:
        """List a call that may be running but was not found, for an operator."""
        with contextlib.suppress(StoreUnavailable):  # the next sweep reports it again
            await self.ledger.move(attempt.request_id, records.give_up)

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
        since = self._missing.setdefault(call_id, self.now())
        if len(self._missing) > MOST_MISSING:
            self._missing.popitem(last=False)
        try:
            found = await self._find_by_id(call_id)
            if found is not None and found.running:
                return await self._believe_missing(found)
        except StoreUnavailable:
            return False
        return self.now() - since >= RUMOUR_SECONDS

    def note_seen(self, call_id: str) -> None:
        """Forget a 404 of a call: OneInbox knows it."""

        async def forget() -> None:
            with contextlib.suppress(StoreUnavailable):  # the sweep will see it
                if (request_id := await self.ledger.request_id(call_id)) is not None:
                    await self.ledger.move(request_id, records.miss(0))

        if self._missing.pop(call_id, None) is not None:
            self._in_background(call_id, forget)

    async def started(self, call_id: str) -> StartRecord | None:
        """Return the record of a call that this deployment started, as far as its store remembers: at least a day."""
        try:
            return await self._find_by_id(call_id)
        except StoreUnavailable:
            return None

    async def bounds(self, call_id: str) -> Bounds | None:
        """Return a call's bounds; None if the store does not know the call, or does not answer."""
        with contextlib.suppress(StoreUnavailable):
            found = await self._find_by_id(call_id)
            if found is None:
                return None
            if found.unwanted or not found.running:
                return Bounds(None, STOPPED_BECAUSE.get(found.unwanted))
            [(end, for_minutes)] = await self.ledger.ends([found.attempt], self.max_seconds)
            return Bounds(end, None, "talk-minutes") if for_minutes else Bounds(end, None)
        return None

    async def started_here(self, call_id: str) -> bool:
        """Return whether this deployment started the call, as far as its store remembers: at least a day."""
        try:
            return await self.ledger.request_id(call_id) is not None
        except StoreUnavailable:
            return False

    async def started_by(self, user: User, call_id: str) -> bool:
        """Return whether the user started the call, as far as the store remembers: for at least a day, 50 calls."""
        try:
            request_id = await self.ledger.request_id(call_id)
            if request_id is None:
                return False
            if (found := await self.ledger.find(request_id)) is not None:
                return found.attempt.user == user.store_name
            return any(own == call_id for _, own in await self.ledger.of_user(user.store_name))
        except StoreUnavailable:
            return False

    async def is_live(self, call_id: str) -> bool:
        """Return whether the call counts as running; False while the store cannot tell."""
        found = await self.started(call_id)
        return found is not None and found.running

    async def of_user(self, user: User) -> list[str]:
        """Return the ids of the calls that a user started in the last day, newest first. Raises StoreUnavailable."""
        calls = await self.ledger.of_user(user.store_name)
        return [call_id for since, call_id in calls if since > self.now() - DAY]

    async def recheck(self, user: User) -> bool:
        """Check whether a refused user's calls have ended; return whether any slot became free."""
        if not (await self.store.decide(LimitRequest([Rate(f"look:{user.store_name}", 1, RECHECK_SECONDS)]))).allowed:
            return False
        attempts = attempts_of(await self.store.members(calls_of_user(user.store_name)))
        # The user waits, so the stops do not count.
        return any(await asyncio.gather(*(self._check_call(each, wait=False) for each in attempts[:AT_ONCE])))

    async def flush(self, *, last: bool = False) -> None:
        """Settle what the store has not confirmed.

        A call that no client has is stopped without the store, if it waited as long as for a repeat, or if this is the
        `last` time.
        """
        for request_id, held in list(self.ledger.unconfirmed.items()):
            try:
                unwanted = _newly_unwanted(await self.ledger.move(request_id, records.nothing))
            except StoreUnavailable:
                guess = held.guess()
                if guess is None or guess.state != UNWANTED or not (last or self.now() - held.since >= COLLECT_SECONDS):
                    continue
                held.since = self.now()
                unwanted = guess
            if unwanted is not None:
                self._hang_up_soon(unwanted)

    async def take_due(self) -> bool:
        """Take calls whose time has come, and end them in the background; return whether there may be more.

        One process takes each. What it is still at stays its own; what it leaves is taken by another, STOP_SECONDS
        later. Raises StoreUnavailable.
        """
        held = list({**self._stopping, **self._background})
        places = max(0, STOPS_AT_ONCE - len(self._background))
        taken = await self.store.take_due(places, STOP_SECONDS, held)
        for member in taken:
            work = self._end_budget if member.startswith(BUDGET) else self._end_due
            self._in_background(member, partial(work, member))
        return len(taken) == places

    async def _end_budget(self, budget: str) -> None:
        """End the running calls of a budget that has run out."""
        name = budget.removeprefix(BUDGET)
        with contextlib.suppress(StoreUnavailable):  # it stays due
            if not await self.store.has_run_out(name, self.minutes_of(name)):
                return
            async for page in self.store.pages(name):
                attempts = attempts_of(page)
                for start in range(0, len(attempts), READ_AT_ONCE):
                    some = attempts[start : start + READ_AT_ONCE]
                    await asyncio.gather(*(self._end_for_minutes(each.request_id) for each in some))
                if not await self.store.has_run_out(name, self.minutes_of(name)):
                    return  # calls that ended gave minutes back

    async def _end_for_minutes(self, request_id: str) -> None:
        """End a call; any replica may do so, if this one is busy."""
        found = await self.ledger.find(request_id)
        if found is None or found.state not in (STARTED, GIVEN) or 0 < self._end_of(found.attempt) <= self.now():
            return  # whose own end has come is ended for that
        busy = len(self._background) >= STOPS_AT_ONCE
        moved = await self.ledger.move(request_id, records.condemn(NO_MINUTES), found, for_others=busy)
        if not busy and (unwanted := _newly_unwanted(moved)) is not None:
            self._hang_up_soon(unwanted)

    async def sweep(self) -> list[CallAttempt]:
        """Check the live calls, unless another replica has just done so; return attempts of unknown outcome.

        OneInbox is asked which calls run. A running call that is not among them, or must end, is checked by itself.
        """
        if not (await self.store.decide(LimitRequest([Rate("sweep", 1, SWEEP_SECONDS - 1)]))).allowed:
            return []
        pending: list[CallAttempt] = []
        to_check: list[CallAttempt] = []
        running: dict[str, list[StartRecord]] = {}
        for found in await self._find_all(attempts_of(await self.store.members(ALL_CALLS))):
            if found.state in (RESERVED, UNRESOLVED):
                pending.append(found.attempt)
            elif found.state == GIVEN or (found.state == STARTED and found.due > self.now()):
                running.setdefault(found.attempt.agent, []).append(found)
            else:
                to_check.append(found.attempt)
        places = asyncio.Semaphore(AT_ONCE)
        compared = await asyncio.gather(*(self._compare(agent, calls, places) for agent, calls in running.items()))
        single: list[CallAttempt] = []
        for left, unknown in compared:
            to_check += left
            single += unknown
        first = int(self.now() // SWEEP_SECONDS) * MOST_SINGLE % (len(single) or 1)
        to_check += (single[first:] + single[:first])[:MOST_SINGLE]

        async def check(attempt: CallAttempt) -> None:
            try:
                async with places:
                    await self._check_call(attempt)
            except Exception:  # one call must not keep the others from being checked
                log.exception("call_check_failed", request_id=attempt.request_id)

        await asyncio.gather(*(check(attempt) for attempt in dict.fromkeys(to_check)))
        return pending

    async def _find_all(self, attempts: list[CallAttempt]) -> list[StartRecord]:
        """Return the records of attempts. An absent one proves nothing: the slots are free when the lease ends."""

        async def find(attempt: CallAttempt) -> StartRecord | None:
            try:
                return await self.ledger.find(attempt.request_id)
            except StoreUnavailable:
                return None  # without the store nothing is known about the call
            except Exception:  # one call must not keep the others from being checked
                log.exception("call_check_failed", request_id=attempt.request_id)
                return None

        found: list[StartRecord | None] = []
        for start in range(0, len(attempts), READ_AT_ONCE):
            found += await asyncio.gather(*(find(attempt) for attempt in attempts[start : start + READ_AT_ONCE]))
        return [each for each in found if each is not None]

    async def _compare(
        self, agent: str, calls: list[StartRecord], places: asyncio.Semaphore
    ) -> tuple[list[CallAttempt], list[CallAttempt]]:
        """Compare an agent's running calls with OneInbox's lists, which are read after the records.

        Return the attempts whose calls are in no list or must end, and those that no list can tell of.
        """
        to_check = [found.attempt for found in calls if self._overdue(found, UNLISTED)]
        everyone = [found.attempt for found in calls]
        if agent not in self.agent_ids:
            return to_check, everyone
        now = self.now()
        listable = [found for found in calls if abs(now - found.attempt.since) >= LISTED_SECONDS]
        if not listable:
            return to_check, []
        name = f"unlisted:{agent}"
        try:
            async with places:
                listed = await running_calls(self.oneinbox, self.agent_ids[agent])
        except OneInboxError as error:
            failures = 1
            with contextlib.suppress(StoreUnavailable):
                failures += int(await self.store.get(name) or b"0")
                await self.store.set(name, b"%d" % failures, 10 * SWEEP_SECONDS)
            log.warning("calls_not_listed", agent=agent, reason=error.reason, sweeps=failures)
            return to_check, everyone if failures >= MOST_UNLISTED else []
        with contextlib.suppress(StoreUnavailable):
            await self.store.delete(name)
            for found in listable:
                if found.missing_since and found.call_id in listed:
                    await self.ledger.move(found.attempt.request_id, records.miss(0))
        for found in listable:
            record = listed.get(found.call_id)
            if record is None or self._overdue(found, record):
                to_check.append(found.attempt)
        return to_check, []

    async def finish(self) -> None:
        """Wait for the stops in the background. Without a shared store, also stop what no process would stop later."""
        await asyncio.gather(*self._background.values(), return_exceptions=True)
        if self.store.shared:
            return
        for attempt in attempts_of(await self.store.members(ALL_CALLS)):
            await self.ledger.move(attempt.request_id, records.expire(math.inf, NOT_COLLECTED))
            await self.ledger.move(attempt.request_id, records.desert(math.inf, LEFT))
            found = await self.ledger.find(attempt.request_id)
            if found is not None and found.state == UNWANTED:
                self._hang_up_soon(found)
        await asyncio.gather(*self._background.values(), return_exceptions=True)

    async def _end_due(self, request_id: str) -> None:
        """End a call if its time has come; otherwise plan when to look again."""
        with contextlib.suppress(StoreUnavailable):  # it stays due
            found = await self.ledger.find(request_id)
            if found is None:
                if await self.ledger.is_absent(request_id):  # another version's may be read by others
                    await self.ledger.plan(request_id, None)
                return
            if found.state == UNWANTED:
                await self._hang_up(found)
                return
            step: Step = records.nothing
            if found.state in (STARTED, GIVEN) and 0 < self._end_of(found.attempt) <= self.now():
                step = records.condemn(TOO_LONG)
            elif found.state == STARTED and found.due <= self.now():
                step = records.expire(self.now(), NOT_COLLECTED)
            elif 0 < found.stop_at <= self.now():
                step = records.desert(self.now(), LEFT)
            before, after = await self.ledger.move(request_id, step, found)
            if (unwanted := _newly_unwanted(Moved(before, after))) is not None:
                await self._hang_up(unwanted)
            elif before is None or before.state != UNWANTED:  # else who moved it meanwhile ends it
                await self.ledger.plan_again(before)

    async def _check_call(self, attempt: CallAttempt, *, wait: bool = True) -> bool | None:
        """Check one call, and hang it up if it must end.

        Return whether its slots became free, or None if its attempt's outcome is unknown. `wait`: for the stop.
        """
        try:
            found = await self.ledger.find(attempt.request_id)
            if found is None:
                return False  # an absent record proves nothing: the slots are free when the lease ends
            if found.state in (RESERVED, UNRESOLVED):
                return None
            if not found.running:
                await self.ledger.release_slots(found)
                return True
            was = found.state
            found, ended = await self._look(found)
            if ended or found.state != UNWANTED:
                return ended
            if was == UNWANTED:  # who moved it has stopped it, and it is stopped again when it is due
                await self.ledger.ensure_planned(attempt.request_id)
                return False
            if not wait:
                self._hang_up_soon(found)
                return False
            record = await self._hang_up(found)
            return record is not None and record.ended
        except StoreUnavailable:
            return False  # without the store nothing is known about the call

    async def _look(self, found: StartRecord) -> tuple[StartRecord, bool]:
        """Ask OneInbox for a call, and move its record by the answer; return the record, and whether the call ended."""
        request_id = found.attempt.request_id
        try:
            record = await self.oneinbox.get_call(found.call_id)
        except NoSuchCall:
            return found, await self._believe_missing(found)
        except OneInboxError as error:
            log.warning("call_lookup_failed", call=found.call_id, reason=error.reason)
            return found, False
        if record.ended:
            await self._end(request_id, record)
            return found, True
        if found.missing_since:
            found = (await self.ledger.move(request_id, records.miss(0))).after or found
        if found.state == GIVEN and (why := self._overdue(found, record)):
            step = records.condemn(why)
            try:
                found = (await self.ledger.move(request_id, step)).after or found
            except StoreUnavailable:  # its time is up, whatever the store says
                await self.ledger.hold(request_id, records.stopped(why))
                found = step(found) or found
        return found, False

    def _withdrawal(self, attempt: CallAttempt, call_id: str, why: str) -> Step:
        otherwise = records.reject(attempt, call_id, why)
        return records.withdraw(attempt.request_id, self.now() + COLLECT_SECONDS, why, otherwise)

    def _withdrawal_of_repeat(self, receiver: str) -> Step:
        return records.withdraw(receiver, self.now() + COLLECT_SECONDS, HUNG_UP, records.nothing)

    def _overdue(self, found: StartRecord, record: CallRecord) -> str:
        """Return why a call that was given must end; empty if it need not."""
        age = self.now() - found.attempt.since
        if 0 < self._end_of(found.attempt) <= self.now():
            return TOO_LONG
        if self.join_timeout and age > self.join_timeout and record.status in ("queued", "initiated"):
            return UNJOINED
        return ""

    def _end_of(self, attempt: CallAttempt) -> float:
        """Return the Unix time at which a call must end by its own bound, or NEVER."""
        return attempt.end(self.max_seconds)

    async def _hang_up(self, unwanted: StartRecord) -> CallRecord | None:
        """Stop an unwanted call; return OneInbox's record, or None if it runs on: then it is stopped again."""
        request_id = unwanted.attempt.request_id
        self._stopping[request_id] = None
        try:
            record = await self._stop(unwanted)
            if record is None or not record.ended:
                with contextlib.suppress(StoreUnavailable):
                    await self.ledger.plan(request_id, STOP_AGAIN_SECONDS)
            return record
        finally:
            self._stopping.pop(request_id, None)

    async def _stop(self, unwanted: StartRecord) -> CallRecord | None:
        request_id, call_id, why = unwanted.attempt.request_id, unwanted.call_id, unwanted.unwanted
        log.warning("call_stop_requested", call=call_id, why=why)
        try:
            record = await self.oneinbox.stop_call(call_id)
        except OneInboxError as error:
            if isinstance(error, NoSuchCall) and not await self._is_running(unwanted):
                return None
            log.error("call_not_stopped", call=call_id, why=why, reason=error.reason)
            self.metrics.count_hang_up(REASONS.get(why, "other"), done=False)
            await self._move_or_hold(request_id, records.fail, stop=False)
            return None
        self.metrics.count_hang_up(REASONS.get(why, "other"), done=True)
        if why == LOST:
            self.metrics.count_orphan("stopped")
        if record.ended:
            await self._end_or_hold(request_id, record)
        return record

    async def _is_running(self, unwanted: StartRecord) -> bool:
        """Return whether a call whose stop got a 404 is surely running; take note of its end."""
        try:
            record = await self.oneinbox.get_call(unwanted.call_id)
            if record.ended:
                await self._end(unwanted.attempt.request_id, record)
        except NoSuchCall:
            with contextlib.suppress(StoreUnavailable):
                await self._believe_missing(unwanted)
            return False
        except (OneInboxError, StoreUnavailable):
            return False
        return not record.ended

    def _hang_up_soon(self, unwanted: StartRecord) -> None:
        """Like `_hang_up`, in the background."""
        self._in_background(unwanted.attempt.request_id, partial(self._hang_up, unwanted))

    def _in_background(self, about: str, work: Callable[[], Awaitable[object]]) -> None:
        """Work in the background, once at a time: a slow stop must not delay what else is due."""
        if about in self._background:
            return

        async def run() -> None:
            try:
                async with self._background_places:
                    await work()
            except Exception:
                log.exception("stop_failed", about=about)
            finally:
                del self._background[about]

        self._background[about] = asyncio.create_task(run(), name="stop")

    async def _believe_missing(self, found: StartRecord) -> bool:
        """Take note of a 404; return whether it is the second, RUMOUR_SECONDS after the first."""
        request_id, since = found.attempt.request_id, found.missing_since
        if since and self.now() - since >= RUMOUR_SECONDS:
            await self._end(request_id, None)
            return True
        if not since:
            log.warning("call_missing", call=found.call_id, believed_after=RUMOUR_SECONDS)
            await self.ledger.move(request_id, records.miss(self.now()))
        return False

    async def _end(self, request_id: str, record: CallRecord | None) -> None:
        """Record a call's end, and count its minutes. Raises StoreUnavailable."""
        found = await self.ledger.find(request_id)
        if found is not None and found.running:
            await self.ledger.move(request_id, self._ended(found.attempt, record), found)

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
        seconds = self.now() - attempt.since if seconds is None else seconds
        return records.end(min(max(seconds, 0), DAY))

    async def _move_patiently(self, request_id: str, step: Step) -> Moved:
        """Move a record as soon as the store answers. Raises StoreUnavailable once it is gone for PATIENCE_SECONDS.

        A store that comes and goes, which other replicas may reach, has as long as a repeat has to collect the call.
        """
        now = asyncio.get_running_loop().time
        begun = last_seen = now()
        while True:
            if self.store.state == "ok":
                last_seen = now()
            try:
                return await self.ledger.move(request_id, step)
            except StoreUnavailable:
                if now() >= min(last_seen + PATIENCE_SECONDS, begun + COLLECT_SECONDS):
                    raise
                await asyncio.sleep(RETRY_SECONDS)

    async def _move_or_hold(self, request_id: str, step: Step, *, stop: bool = True) -> None:
        """Move a record, now or once the store answers. `stop`: hang up a call that becomes unwanted."""
        try:
            unwanted = _newly_unwanted(await self.ledger.move(request_id, step))
        except StoreUnavailable:
            await self.ledger.hold(request_id, step)
            return
        if stop and unwanted is not None:
            await self._hang_up(unwanted)

    async def _find_by_id(self, call_id: str) -> StartRecord | None:
        request_id = await self.ledger.request_id(call_id)
        return await self.ledger.find(request_id) if request_id is not None else None


def _is_given(record: StartRecord | None, receiver: str) -> bool:
    return record is not None and record.state == GIVEN and receiver in record.given_to


def _newly_unwanted(moved: Moved) -> StartRecord | None:
    """Return the record of a call that a move made unwanted, which the one who moved it stops."""
    before, after = moved
    if after is None or after.state != UNWANTED or (before is not None and before.state == UNWANTED):
        return None
    return after
