"""A call's record: everything known about one start, from before its POST until it is settled.

One value in the store with one state, moved by compare-and-set only (ledger.py). A step is a move as a function: it
gets the record as the store has it, and returns the new one, or None if there is nothing to move. Steps may be applied
again, so a write that was not confirmed is settled by applying its step to what is found.

An absent record proves nothing: it may have expired, or the store may have lost it.
"""

from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, Self

import structlog
from pydantic import ConfigDict, create_model
from pydantic_core import to_json

from app.limits.call_attempt import CallAttempt

State = Literal["reserved", "started", "given", "unwanted", "ended", "unresolved"]
RESERVED: Final = "reserved"
STARTED: Final = "started"
GIVEN: Final = "given"
UNWANTED: Final = "unwanted"
ENDED: Final = "ended"
UNRESOLVED: Final = "unresolved"

VERSION = 2
"""Version 1 had no state, and was written after the POST."""
MOST_RECEIVERS = 8
"""Receivers that a record names; with more, the call stays given."""

log = structlog.get_logger(__name__)


class Move(NamedTuple):
    """One kind of move: from a state (empty: no record) to a state, who makes it, on what evidence, what follows."""

    before: State | Literal[""]
    after: State
    who: str
    evidence: str
    follows: str


MOVES = (
    Move("", RESERVED, "the session, before its POST", "the limits have room", "takes the slots"),
    *(
        Move("", state, "the session", "the store has lost the record, and this process knows the start", "as below")
        for state in (GIVEN, STARTED, UNWANTED, ENDED)
    ),
    Move(RESERVED, GIVEN, "the session", "OneInbox's 201, and a client that is still there", "the client gets its 201"),
    Move(RESERVED, STARTED, "the session", "OneInbox's 201; the client left its key", "waits for a repeat until `due`"),
    Move(RESERVED, UNWANTED, "the session, the reconciler", "no client is left; the lost call was found", "is stopped"),
    Move(RESERVED, UNRESOLVED, "the reconciler", "lists of OneInbox that could not be read", "an operator is told"),
    Move(RESERVED, ENDED, "any process", "no call exists, or it has ended", "frees the slots"),
    Move(STARTED, GIVEN, "a repeat", "the client is there", "the client gets the kept 201"),
    Move(
        STARTED, UNWANTED, "any replica, when it is due", "`due` has passed", "is stopped; its 201 is given to no one"
    ),
    Move(STARTED, ENDED, "any process", "a terminal status, or a 404 that was believed", "frees the slots"),
    Move(GIVEN, STARTED, "the last receiver's request", "the client has gone; the 201 is kept", "waits again"),
    Move(
        GIVEN,
        UNWANTED,
        "the request; any replica",
        "the client or its page has gone; its end has come; not joined",
        "is stopped",
    ),
    Move(GIVEN, ENDED, "any process", "a terminal status, or a 404 that was believed", "frees the slots"),
    Move(UNRESOLVED, UNWANTED, "the reconciler", "the lost call was found", "is stopped"),
    Move(UNRESOLVED, ENDED, "any process", "no call exists, or it has ended", "frees the slots"),
    Move(UNWANTED, ENDED, "any process", "a terminal status, or a 404 that was believed", "frees the slots"),
)
"""Every move between states; the table in app/README.md is made from it."""


class StartRecord(NamedTuple):
    """The record of one start.

    `attempt`: stored as its key, `member`, and its `ends`. `call_id`: OneInbox's, once known. `given_to`: requests
    whose clients got the 201. `kept`: the 201 is kept for repeats. `due`: Unix time at which a started call is stopped.
    `unwanted`: why it must end, or had to. `failed`: it could not be stopped. `missing_since`: Unix time of the first
    404. `seconds`: how long an ended call lasted. `turn`: counts what was settled without a move, so that a late write
    finds another value. `stop_at`: Unix time at which the call is stopped, unless its owner comes back; 0: it is not.
    `raw`: as read from the store.
    """

    attempt: CallAttempt
    state: State = RESERVED
    call_id: str = ""
    given_to: tuple[str, ...] = ()
    kept: bool = False
    due: float = 0
    unwanted: str = ""
    failed: bool = False
    missing_since: float = 0
    seconds: float = 0
    turn: int = 0
    stop_at: float = 0
    raw: bytes = b""

    @property
    def running(self) -> bool:
        """True from the POST until an end was seen."""
        return self.state != ENDED

    def moved(self, **changes: Any) -> Self:
        """Return a copy with these changes."""
        return self._replace(raw=b"", **changes)

    def to_bytes(self) -> bytes:
        """Return the value to store: JSON without what is empty."""
        attempt = self.attempt
        stored: dict[str, Any] = {"v": VERSION, "member": attempt.key, "state": self.state}
        if attempt.ends:
            stored["ends"] = attempt.ends
        if self[2:-1] != _EMPTY:
            stored |= {name: value for name, value in zip(_OPTIONAL, self[2:], strict=False) if value}
        return to_json(stored)

    @classmethod
    def from_bytes(cls, value: bytes) -> Self | None:
        """Read a stored value of any version; None, and a log entry, if it cannot be read."""
        try:
            stored = _STORED.model_validate_json(value).model_dump()
            attempt = CallAttempt.from_key(stored.pop("member"))._replace(ends=stored.pop("ends"))
        except ValueError:
            log.error("call_record_unreadable")
            return None
        state: State = stored.pop("state") or (UNWANTED if stored["unwanted"] else GIVEN)  # version 1 had none
        return cls(attempt, state, **stored)._replace(raw=value)


_OPTIONAL = StartRecord._fields[2:-1]
_EMPTY = tuple(StartRecord._field_defaults[name] for name in _OPTIONAL)
_FIELDS: dict[str, Any] = {
    "member": (str, ...),
    "state": (State | None, None),
    "ends": (float, 0),
    **{name: (StartRecord.__annotations__[name], empty) for name, empty in zip(_OPTIONAL, _EMPTY, strict=True)},
}
_STORED = create_model("Stored", __config__=ConfigDict(strict=True, cache_strings="keys"), **_FIELDS)
"""A record as stored; fields that another version added are ignored."""

Step = Callable[[StartRecord | None], StartRecord | None]


def reserve(attempt: CallAttempt) -> Step:
    """Before the POST."""
    return lambda found: StartRecord(attempt) if found is None else None


def give(attempt: CallAttempt, call_id: str, *, kept: bool) -> Step:
    """The session's client gets the 201. `kept`: repeats may, too."""
    return lambda found: StartRecord(attempt, GIVEN, call_id, (attempt.request_id,), kept) if _is_open(found) else None


def restore(attempt: CallAttempt, call_id: str) -> Step:
    """The store has lost the record of a running call: it was given, as far as anything tells.

    No receiver is named, so a session that is still under way knows better.
    """
    return lambda found: StartRecord(attempt, GIVEN, call_id) if found is None else None


def leave(attempt: CallAttempt, call_id: str, due: float) -> Step:
    """The session's client has gone, and may come back with its key until `due`."""
    return lambda found: StartRecord(attempt, STARTED, call_id, kept=True, due=due) if _is_open(found) else None


def collect(receiver: str) -> Step:
    """A repeat's client gets the kept 201. `receiver`: names the request."""

    def step(found: StartRecord | None) -> StartRecord | None:
        if found is None or found.state not in (STARTED, GIVEN):
            return None
        if receiver in found.given_to or len(found.given_to) == MOST_RECEIVERS:
            return None
        # The last place is never given back, for those who are not named.
        name = receiver if len(found.given_to) < MOST_RECEIVERS - 1 else ""
        return found.moved(state=GIVEN, given_to=(*found.given_to, name), due=0, stop_at=0)

    return step


def withdraw(receiver: str, due: float, why: str, otherwise: Step) -> Step:
    """A receiver did not get its 201 after all.

    If it was the only one, a repeat may collect a kept 201 until `due`; one that is not kept is unwanted. `otherwise`:
    for a record that was not yet given.
    """

    def step(found: StartRecord | None) -> StartRecord | None:
        if _is_open(found) or found is None or found.state != GIVEN:
            return otherwise(found)
        if receiver not in found.given_to:
            return None
        others = tuple(each for each in found.given_to if each != receiver)
        if others:
            return found.moved(given_to=others)
        if found.kept:
            return found.moved(state=STARTED, given_to=(), due=due)
        return found.moved(state=UNWANTED, given_to=(), unwanted=why)

    return step


def nothing(_: StartRecord | None) -> StartRecord | None:
    """Move nothing."""
    return None


def reject(attempt: CallAttempt, call_id: str, why: str) -> Step:
    """No client gets the call: it must end. Moves only what was given to no one."""

    def step(found: StartRecord | None) -> StartRecord | None:
        if found is None:
            return StartRecord(attempt, UNWANTED, call_id, unwanted=why)
        if _is_open(found) or found.state == UNRESOLVED:
            return found.moved(state=UNWANTED, call_id=call_id, unwanted=why)
        return None

    return step


def expire(now: float, why: str) -> Step:
    """No repeat collected the call in time."""
    return lambda found: (
        found.moved(state=UNWANTED, unwanted=why)
        if found is not None and found.state == STARTED and found.due <= now
        else None
    )


def stop_later(at: float) -> Step:
    """The owner's page has gone, and may be reloading: stop the call at `at`."""
    return lambda found: found.moved(stop_at=at) if found is not None and found.state in (STARTED, GIVEN) else None


def stop_not(found: StartRecord | None) -> StartRecord | None:
    """The owner is back: take a `stop_later` back."""
    return found.moved(stop_at=0) if found is not None and found.state in (STARTED, GIVEN) and found.stop_at else None


def desert(now: float, why: str) -> Step:
    """The owner did not come back in time."""
    return lambda found: (
        found.moved(state=UNWANTED, unwanted=why)
        if found is not None and found.state in (STARTED, GIVEN) and 0 < found.stop_at <= now
        else None
    )


def condemn(why: str) -> Step:
    """A call must end: no client may get it now."""
    return lambda found: (
        found.moved(state=UNWANTED, unwanted=why) if found is not None and found.state in (STARTED, GIVEN) else None
    )


def stopped(why: str) -> Step:
    """A call is stopped without the store: no client may get it now, even if another process sees its end first."""

    def step(found: StartRecord | None) -> StartRecord | None:
        if found is not None and found.state == ENDED and not found.unwanted:
            return found.moved(unwanted=why)
        return condemn(why)(found)

    return step


def end(seconds: float) -> Step:
    """The call has ended, after `seconds`."""
    return lambda found: found.moved(state=ENDED, seconds=seconds) if found is not None and found.running else None


def no_call(attempt: CallAttempt) -> Step:
    """The attempt started no call."""
    return lambda found: (
        (found or StartRecord(attempt)).moved(state=ENDED)
        if found is None or found.state in (RESERVED, UNRESOLVED)
        else None
    )


def give_up(found: StartRecord | None) -> StartRecord | None:
    """The call may be running, and was not found."""
    return found.moved(state=UNRESOLVED) if found is not None and found.state == RESERVED else None


def fail(found: StartRecord | None) -> StartRecord | None:
    """An unwanted call could not be stopped."""
    return found.moved(failed=True) if found is not None and found.state == UNWANTED and not found.failed else None


def miss(now: float) -> Step:
    """OneInbox said 404; 0: it knows the call again."""

    def step(found: StartRecord | None) -> StartRecord | None:
        if found is None or not found.running or found.state == RESERVED or bool(found.missing_since) == bool(now):
            return None
        return found.moved(missing_since=now)

    return step


def _is_open(found: StartRecord | None) -> bool:
    """Return whether it is still for the session to say who gets the call."""
    return found is None or found.state == RESERVED or (found.state == GIVEN and not found.given_to)
