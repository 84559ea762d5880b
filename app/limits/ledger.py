"""The records of all calls, in the store. The decision about the limits writes the first state; all moves are here.

Slots, lists and kept answers hang on a record: `_change` derives them from its move, in the same write.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

import structlog

from app.limits.call_attempt import AGENTS, CallAttempt
from app.limits.record import ENDED, GIVEN, STARTED, UNRESOLVED, UNWANTED, StartRecord, Step
from app.store import BUDGET, PAGE, Change, Due, Leave, ListEntry, Member, Store, StoreUnavailable, Value

DAY = 86400
LISTED_CALLS = 50
KEEP_SECONDS = 600
"""A 201 is kept for repeats this long."""
ENDED_SECONDS = KEEP_SECONDS + 300
"""An ended call's record is kept for this long at least: longer than a kept 201 that names it."""
UNSTOPPED = "unstopped"
"""The set of calls that could not be hung up, or not be found."""
UNSTOPPED_SECONDS = 7 * DAY
RETURN_SECONDS = 600
"""How long beyond its `stop_at` a call can still be kept by its owner, while no process has stopped it."""
UNFOUND = "of the request "
"""Stored in UNSTOPPED before the request id of a call that was not found."""
LEASE_GRACE = 300
"""Seconds that a slot outlives its call's `ends`, so that there is time to hang up."""
STOP_SECONDS = 5
"""An unwanted call that the process which stops it has given no sign of for this long is stopped by another."""
MOVE_TRIES = 5
"""How often a move is tried, if others move the record meanwhile."""
MOST_UNCONFIRMED = 10_000
"""Records with unconfirmed moves; beyond that, the oldest are dropped, with a log entry."""

log = structlog.get_logger(__name__)


class Kept(NamedTuple):
    """A 201 to keep for repeats, in the same write: its name, the mark that it replaces, and how long."""

    name: str
    mark: bytes
    value: bytes
    ttl: float


class Moved(NamedTuple):
    """The result of a step: the record as found, and as moved; `after` is None if nothing was moved."""

    before: StartRecord | None
    after: StartRecord | None


@dataclass(slots=True)
class Unconfirmed:
    """Steps that the store has not confirmed: each may have been made, or may be made late.

    `since`: Unix time. `call_id`: if known. `tried`: they have been sent since.
    """

    steps: list[Step]
    since: float
    call_id: str = ""
    tried: bool = False

    def guess(self) -> StartRecord | None:
        """Return the record as it should be, going by this process alone."""
        return _applied(self.steps, None)


@dataclass(repr=False, eq=False)
class Ledger:
    """Find records, and move them. Every method that needs the store raises StoreUnavailable.

    `lease`: seconds from the POST after which the slot of a call without an `ends` is free in any case. `prefix`: the
    store's; a call is read back from OneInbox only under the same one. `hangs_up`: this process ends the calls whose
    records it moves, so others wait before they do. `listed`: users may ask for their calls of the last day. `timed`:
    minutes are limited, so the sets of users, organizations and all calls have budgets. `now`: Unix time.
    """

    store: Store
    _: KW_ONLY
    lease: float
    prefix: str = ""
    hangs_up: bool = True
    listed: bool = True
    timed: bool = False
    now: Callable[[], float] = time.time
    unconfirmed: dict[str, Unconfirmed] = field(default_factory=dict, init=False)
    """By request id. They are made as soon as the store answers, before anything is concluded from the record."""
    _by_call: dict[str, str] = field(default_factory=dict, init=False)
    """Request ids of unconfirmed calls, by call id."""

    def reserved(self, attempt: CallAttempt) -> Value:
        """Return a new record, for the store to write with the decision about the limits."""
        return Value(_name(attempt.request_id), StartRecord(attempt).to_bytes(), self.left(attempt))

    def is_timed(self, name: str) -> bool:
        """Return whether a set of live calls has a budget; also one without a limit, since a plan may change."""
        return self.timed and not name.startswith(AGENTS)

    def left(self, attempt: CallAttempt) -> float:
        """Return the seconds until an attempt's slots are free in any case; at least 1."""
        end = attempt.ends + LEASE_GRACE if attempt.ends > 0 else attempt.since + self.lease
        return max(1.0, end - self.now())

    async def ends(self, attempts: Sequence[CallAttempt], longest: float) -> list[tuple[float | None, bool]]:
        """Return when each running call is hung up at the latest, as known now, and whether that is for its minutes.

        Unix times; None: nothing bounds it. `longest`: as for `CallAttempt.end`.
        """
        names = list({BUDGET + name: None for attempt in attempts for name in attempt.sets})
        left: dict[str, float | None] = {}
        for at in range(0, len(names), PAGE):
            page = names[at : at + PAGE]
            left |= zip(page, await self.store.due_in(page), strict=True)
        ends: list[tuple[float | None, bool]] = []
        for attempt in attempts:
            end = attempt.end(longest)
            own = end if end > 0 else math.inf
            outs = (out for name in attempt.sets if (out := left[BUDGET + name]) is not None)
            runs_out = self.now() + max(0.0, min(outs, default=math.inf))
            first = min(own, runs_out)
            ends.append((None if first == math.inf else first, runs_out < own))
        return ends

    async def plan(self, request_id: str, delay: float | None) -> None:
        """Look at a call `delay` seconds from now; None: never again."""
        await self.store.change(Change({}, due=Due(request_id, delay)))

    async def plan_again(self, record: StartRecord | None) -> None:
        """Look at a call when its record says that it is due; never again if it does not say so."""
        if record is not None:
            due = self._due(record, record.state) or Due(record.attempt.request_id, None)
            await self.store.change(Change({}, due=due))

    async def is_absent(self, request_id: str) -> bool:
        """Return whether there is no record, not even one that cannot be read."""
        return await self.store.get(_name(request_id)) is None

    async def ensure_planned(self, request_id: str) -> None:
        """Look at a call now, unless it is known when to look at it."""
        if await self.store.due_in([request_id]) == [None]:
            await self.plan(request_id, 0)

    def seal_context(self, request_id: str) -> str:
        """Return what an attempt is sealed with on OneInbox's record, so that no other deployment can open it."""
        return f"{self.prefix} {request_id}"

    async def find(self, request_id: str) -> StartRecord | None:
        """Return a record, or None."""
        held = self.unconfirmed.get(request_id)
        try:
            value = await self.store.get(_name(request_id))
        except StoreUnavailable:
            if held is None:
                raise
            return held.guess()
        found = StartRecord.from_bytes(value) if value is not None else None
        return found if held is None else _applied(held.steps, found) or found

    async def request_id(self, call_id: str) -> str | None:
        """Return the id of the request that started a call; None if the store does not remember one."""
        if call_id in self._by_call:
            return self._by_call[call_id]
        value = await self.store.get(f"started:{call_id}")
        return value.decode() if value is not None else None

    async def stops_later(self, call_id: str) -> str | None:
        """Return the id of the request that started a call which may be stopped soon, as its page has gone; or None."""
        value = await self.store.get(_stops_later(call_id))
        return value.decode() if value is not None else None

    async def of_user(self, user: str) -> list[tuple[int, str]]:
        """Return the start (Unix time) and id of each of a user's calls, newest first. `user`: name in the store."""
        return [call for value in await self.store.items(f"calls:{user}") if (call := _listed(value)) is not None]

    async def rejoin(self, record: StartRecord) -> None:
        """Put a running call back into its sets, unless its record has changed."""
        await self.store.change(Change({_name(record.attempt.request_id): record.raw}, joins=self._joins(record)))

    async def move(
        self,
        request_id: str,
        step: Step,
        guess: StartRecord | None = None,
        kept: Kept | None = None,
        *,
        for_others: bool = False,
    ) -> Moved:
        """Apply a step to a record. `guess`: the record, if it is most likely known; `kept`: an answer to keep with it.

        `for_others`: if the call must end, any process may do so at once. A kept answer whose mark is gone is not kept,
        and nothing is moved.
        """
        steps = [step]
        held = self.unconfirmed.get(request_id)
        if held is not None:
            steps, guess, held.tried = [*held.steps, step], None, True
        before = guess
        for _ in range(MOVE_TRIES):
            if guess is None:
                value = await self.store.get(_name(request_id))
                before = StartRecord.from_bytes(value) if value is not None else None
                if before is None and value is not None:  # unreadable
                    self._confirm(request_id, steps)
                    break
            guess = None
            after = written = _applied(steps, before)
            if written is None and held is not None and before is not None:
                # What was not confirmed may still be made: let it find another value than it expects.
                written = before.moved(turn=before.turn + 1)
            if written is None or await self.store.change(self._change(before, written, kept, for_others)):
                self._confirm(request_id, steps)
                return Moved(before, after)
        return Moved(before, None)

    async def hold(self, request_id: str, step: Step) -> None:
        """Make a step once the store answers. The slots of a call that ended are free at once, as counted locally."""
        held = self.unconfirmed.setdefault(request_id, Unconfirmed([], self.now()))
        held.steps.append(step)
        guess = held.guess()
        if guess is not None and guess.call_id and not held.call_id:
            held.call_id = guess.call_id
            self._by_call[guess.call_id] = request_id
        if guess is not None and not guess.running:
            with contextlib.suppress(StoreUnavailable):
                await self.release_slots(guess)
        if len(self.unconfirmed) > MOST_UNCONFIRMED:
            dropped = next(iter(self.unconfirmed))
            log.error("call_record_dropped", request_id=dropped)
            self._drop(dropped)

    def drop_unsent(self, request_id: str) -> bool:
        """Forget steps that were never sent; False if they may have been."""
        held = self.unconfirmed.get(request_id)
        if held is None or held.tried:
            return False
        self._drop(request_id)
        return True

    async def release_slots(self, record: StartRecord) -> None:
        """Free the slots of a call that has ended."""
        await self.store.change(Change({}, leaves=self._leaves(record)))

    def _confirm(self, request_id: str, steps: list[Step]) -> None:
        held = self.unconfirmed.get(request_id)
        if held is not None:
            held.steps = [step for step in held.steps if step not in steps]
            if not held.steps:
                self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        call_id = self.unconfirmed.pop(request_id).call_id
        if call_id:
            del self._by_call[call_id]

    def _change(self, before: StartRecord | None, after: StartRecord, kept: Kept | None, for_others: bool) -> Change:
        """Return the write of a move, with everything that hangs on the record."""
        attempt, request_id = after.attempt, after.attempt.request_id
        left = self.left(attempt)
        name, value = _name(request_id), after.to_bytes()
        expected: dict[str, bytes | None] = {name: None if before is None else before.raw or before.to_bytes()}
        # The record of a call that must be ended outlives its slots: until it is seen ended, or an operator is told.
        ttl = left + UNSTOPPED_SECONDS if after.state in (STARTED, GIVEN, UNWANTED) else max(left, ENDED_SECONDS)
        values, entry = [Value(name, value, ttl)], None
        joins: list[Member] = []
        leaves: list[Leave] = []
        state, was = after.state, before.state if before is not None else ""
        if after.call_id and (before is None or not before.call_id):
            values.append(Value(f"started:{after.call_id}", request_id.encode(), max(left, DAY)))
            if self.listed and state != UNWANTED:
                listed = f"{attempt.since} {after.call_id}".encode()
                entry = ListEntry(f"calls:{attempt.user}", listed, LISTED_CALLS, DAY)
        if after.stop_at and (before is None or after.stop_at != before.stop_at):
            # One question then tells each read whether there is a stop to take back.
            lasts = after.stop_at - self.now() + RETURN_SECONDS
            values.append(Value(_stops_later(after.call_id), request_id.encode(), lasts))
        if state == ENDED:
            leaves += self._leaves(after)
        elif before is None:
            joins += self._joins(after)
        if after.failed:
            if state == ENDED:
                leaves.append(Leave(UNSTOPPED, after.call_id))
            else:
                joins.append(Member(UNSTOPPED, after.call_id, UNSTOPPED_SECONDS))
        if state == UNRESOLVED:
            joins.append(Member(UNSTOPPED, UNFOUND + request_id, UNSTOPPED_SECONDS))
        elif was == UNRESOLVED:
            leaves.append(Leave(UNSTOPPED, UNFOUND + request_id))
        if kept is not None:
            expected[kept.name] = kept.mark
            values.append(Value(kept.name, kept.value, kept.ttl))
        due = Due(request_id, 0) if for_others and state == UNWANTED else self._due(after, was)
        return Change(expected, values, joins, leaves, entry, due)

    def _joins(self, record: StartRecord) -> list[Member]:
        member, left = record.attempt.key, self.left(record.attempt)
        return [Member(name, member, left, self.is_timed(name)) for name in record.attempt.sets]

    def _leaves(self, record: StartRecord) -> list[Leave]:
        """Return how an ended call leaves its sets: its seconds go over from those of running calls to those used."""
        member, seconds = record.attempt.key, math.ceil(record.seconds)
        return [Leave(name, member, seconds if self.is_timed(name) else None) for name in record.attempt.sets]

    def _due(self, after: StartRecord, was: str) -> Due | None:
        """Return when the call must be looked at: it or its owner waits no longer, its end has come, or it runs on."""
        times = [after.attempt.ends, after.stop_at, after.due if after.state == STARTED else 0]
        if after.state in (STARTED, GIVEN) and (ahead := [time for time in times if time > 0]):
            return Due(after.attempt.request_id, min(ahead) - self.now())
        if after.state == UNWANTED:
            return Due(after.attempt.request_id, STOP_SECONDS if self.hangs_up else 0)
        return Due(after.attempt.request_id, None) if was in (STARTED, GIVEN, UNWANTED) else None


def _applied(steps: list[Step], found: StartRecord | None) -> StartRecord | None:
    """Return the record after all steps; None if none of them moves it."""
    moved = None
    for step in steps:
        moved = step(moved or found) or moved
    return moved


def _listed(value: bytes) -> tuple[int, str] | None:
    """Return an entry of a user's list of calls: its start and id; earlier versions listed whole records."""
    since, _, call_id = value.partition(b" ")
    if since.isdigit():
        return int(since), call_id.decode()
    record = StartRecord.from_bytes(value)
    return None if record is None else (record.attempt.since, record.call_id)


def _name(request_id: str) -> str:
    return f"call:{request_id}"


def _stops_later(call_id: str) -> str:
    return f"stops:{call_id}"
