"""Commands for running calls: list them, end them, forget those that are known to be settled."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import typer
from pydantic_core import to_json

from app.cli.operator import Operator, Said, reach_store, run_operator
from app.cli.status import rfc3339
from app.identity.keyring import LOGGED
from app.limits import record as records
from app.limits.call_attempt import ALL_CALLS, CallAttempt, attempts_of
from app.limits.kill_switch import printable
from app.limits.ledger import UNFOUND, UNSTOPPED
from app.limits.live_calls import OPERATOR
from app.limits.record import ENDED, GIVEN, RESERVED, STARTED, UNRESOLVED, UNWANTED, StartRecord
from app.oneinbox.models import CALL_ID
from app.store import StoreUnavailable

AT_ONCE = 64
"""Records read or moved at once."""
STOP_SECONDS = 30
"""How long a command waits for the calls that it ends."""
POLL_SECONDS = 0.25

NOT_FOUND = "not found"
STATES = {
    RESERVED: "starting",
    STARTED: "running",
    GIVEN: "running",
    UNWANTED: "stopping",
    UNRESOLVED: NOT_FOUND,
    ENDED: "ended",
}
FATES = {
    RESERVED: "still starting; not stopped",
    STARTED: "changed meanwhile; not stopped",
    GIVEN: "changed meanwhile; not stopped",
    UNWANTED: "asked for; not yet ended",
    UNRESOLVED: "not found at OneInbox, so not stopped",
    ENDED: "ended",
}
NO_RECORD = "the store has no record of it, so not stopped"
NOT_ASKED = "not stopped: the store does not answer"
UNDECIDED = (FATES[RESERVED], FATES[GIVEN], FATES[UNWANTED], NOT_ASKED)
"""What is looked at again."""
NONE = "No running calls."
COLUMNS = ("CALL", "AGENT", "USER", "AGE", "ENDS AT", "STATE")

T = TypeVar("T")
R = TypeVar("R")


class Running(NamedTuple):
    """A running call, as far as the store knows it.

    `call`: OneInbox's id; empty if it is not known. `attempt`: None if only an id is left. `unstopped`: it could not be
    stopped, or not be found. `ends_at`: Unix time; None: nothing bounds it.
    """

    request_id: str
    call: str
    attempt: CallAttempt | None
    state: str
    unstopped: bool
    ends_at: float | None

    @property
    def name(self) -> str:
        """The call as commands take it."""
        return self.call or self.request_id

    def as_object(self, now: float) -> dict[str, Any]:
        """Return it for JSON; times are RFC 3339."""
        attempt = self.attempt
        return {
            "call": self.call or None,
            "request": self.request_id or None,
            "agent": attempt.agent if attempt else None,
            "user": attempt.owner[:LOGGED] if attempt else None,
            "started_at": rfc3339(attempt.since) if attempt else None,
            "age_seconds": max(0, round(now - attempt.since)) if attempt else None,
            "ends_at": rfc3339(self.ends_at) if self.ends_at is not None else None,
            "state": self.state,
            "could_not_be_stopped": self.unstopped,
        }

    def row(self, now: float) -> tuple[str, ...]:
        """Return it for a reader: a text for each of COLUMNS."""
        attempt = self.attempt
        unstopped = ", could not be stopped" if self.unstopped and self.state != NOT_FOUND else ""
        return (
            self.call or f"request {self.request_id}",
            attempt.agent if attempt else "unknown",
            attempt.owner[:LOGGED] if attempt else "unknown",
            str(timedelta(seconds=max(0, round(now - attempt.since)))) if attempt else "unknown",
            rfc3339(self.ends_at) if self.ends_at is not None else "unknown" if attempt is None else "never",
            self.state + unstopped,
        )


async def running_calls(operator: Operator, user: str = "", agent: str = "") -> list[Running]:
    """Return all running calls, those of USER or those of an agent, oldest first.

    Raises StoreUnavailable, SettingsError.
    """
    ledger, store = operator.limits.ledger, operator.store
    users = operator.users(user) if user else {}
    listed = await store.members(UNSTOPPED)
    attempts = {attempt.request_id: attempt for attempt in attempts_of(await store.members(ALL_CALLS))}
    unstopped = [entry for entry in listed if not entry.startswith(UNFOUND)]
    request_of = dict(zip(unstopped, await _each(unstopped, ledger.request_id), strict=True))
    call_of = {request_id: call for call, request_id in request_of.items() if request_id is not None}
    unfound = [entry.removeprefix(UNFOUND) for entry in listed if entry.startswith(UNFOUND)]
    request_ids = [*dict.fromkeys([*attempts, *call_of, *unfound])]
    found = [Running("", call, None, "unknown", True, None) for call, each in request_of.items() if each is None]
    for request_id, record in zip(request_ids, await _each(request_ids, ledger.find), strict=True):
        if record is not None and not record.running:
            continue  # its slots are about to become free
        attempt = record.attempt if record is not None else attempts.get(request_id)
        found.append(
            Running(
                request_id,
                record.call_id if record is not None else call_of.get(request_id, ""),
                attempt,
                STATES[record.state] if record is not None else "unknown",
                request_id in call_of or UNFOUND + request_id in listed or (record is not None and record.failed),
                None,
            )
        )
    known = [each.attempt for each in found if each.attempt is not None]
    ends = await ledger.ends(known, operator.settings.max_call_seconds)
    ends_at = {attempt.request_id: at for attempt, (at, _) in zip(known, ends, strict=True)}
    found = [each._replace(ends_at=ends_at.get(each.request_id)) for each in found]
    of_agent = [each for each in found if not agent or (each.attempt is not None and each.attempt.agent == agent)]
    chosen = [each for each in of_agent if not user or _is_of(each, users)]
    return sorted(chosen, key=lambda each: each.attempt.since if each.attempt is not None else 0)


async def stop_calls(operator: Operator, calls: Sequence[Running]) -> dict[str, str]:
    """Have these calls hung up, and wait until they have ended; return what became of each, by its name.

    The replicas hang up. A call that is still starting is stopped as soon as it has an id.
    """
    fates = {call.name: NOT_ASKED if call.request_id else NO_RECORD for call in calls}
    pending = [call for call in calls if call.request_id]
    until = time.monotonic() + STOP_SECONDS

    async def stop(call: Running) -> StartRecord | None:
        before, after = await operator.limits.ledger.move(call.request_id, records.condemn(OPERATOR))
        return after or before

    while True:
        with contextlib.suppress(StoreUnavailable):  # asked again
            for call, record in zip(pending, await _each(pending, stop), strict=True):
                fates[call.name] = FATES[record.state] if record is not None else NO_RECORD
        pending = [call for call in pending if fates[call.name] in UNDECIDED]
        if not pending or time.monotonic() > until:
            return fates
        await asyncio.sleep(POLL_SECONDS)


async def hang_up_all(operator: Operator) -> Said:
    """End every running call, and say how many ended, and which did not."""
    fates = await stop_calls(operator, await running_calls(operator))
    rest = {name: fate for name, fate in fates.items() if fate != FATES[ENDED]}
    return Said("\n".join([*_lines(rest), _summary(fates)]), not rest)


async def forget(operator: Operator, name: str) -> Said:
    """Drop a call that could not be stopped, by OneInbox's id, or not be found, by its request's; free its slots."""
    if not CALL_ID.fullmatch(name):
        return Said(f"{printable(name)}: unknown", fine=False)
    ledger, store = operator.limits.ledger, operator.store
    listed = await store.members(UNSTOPPED)
    unfound = UNFOUND + name in listed
    entry = UNFOUND + name if unfound else name
    request_id = name if unfound else await ledger.request_id(name)
    record = await ledger.find(request_id) if request_id is not None else None
    if entry not in listed and not (record is not None and record.running and record.failed):
        running = record is not None and record.running
        return Said(f"{name}: {'is running; `calls stop` ends it' if running else 'unknown'}", fine=False)
    if request_id is not None:
        attempts = attempts_of(await store.members(ALL_CALLS)) if record is None else []
        attempt = next((each for each in attempts if each.request_id == request_id), None)
        await ledger.move(request_id, records.no_call(attempt) if attempt is not None else records.end(0))
    await store.remove_member([UNSTOPPED], entry)
    return Said(f"{name}: forgotten")


def run_list(user: str, agent: str, *, as_json: bool) -> None:
    """Print the running calls."""

    async def run(operator: Operator) -> Said:
        calls, now = await running_calls(operator, user, agent), time.time()
        if as_json:
            return Said(to_json([call.as_object(now) for call in calls], indent=2).decode())
        return Said(_table([COLUMNS, *(call.row(now) for call in calls)]) if calls else NONE)

    run_operator(run)


def run_stop(names: Sequence[str], user: str, agent: str, *, yes: bool) -> None:
    """End calls by id; without ids those of USER or of an agent, or all. Ask first, on a terminal, if they are many."""
    names = [*dict.fromkeys(names)]
    calls = reach_store(partial(_find, names=names) if names else partial(running_calls, user=user, agent=agent))
    if len(calls) > 1 and not yes and is_terminal():
        typer.confirm(f"End {len(calls)} calls?", abort=True)

    async def run(operator: Operator) -> Said:
        fates = {**dict.fromkeys(names, "unknown"), **await stop_calls(operator, calls)}
        lines = [*_lines(fates), *([_summary(fates)] if len(fates) > 1 else [])]
        return Said("\n".join(lines) or NONE, all(fate == FATES[ENDED] for fate in fates.values()))

    run_operator(run)


def is_terminal() -> bool:
    """Return whether someone can answer a question."""
    return sys.stdin is not None and sys.stdin.isatty()


async def _find(operator: Operator, names: Sequence[str]) -> list[Running]:
    """Return the calls with these ids of OneInbox, without those that are unknown. They may have ended."""
    ledger = operator.limits.ledger
    ids = [name for name in names if CALL_ID.fullmatch(name)]
    request_ids = [each for each in await _each(ids, ledger.request_id) if each is not None]
    found = [record for record in await _each(request_ids, ledger.find) if record is not None]
    return [
        Running(record.attempt.request_id, record.call_id, record.attempt, STATES[record.state], record.failed, None)
        for record in found
    ]


def _is_of(call: Running, users: Mapping[str, str]) -> bool:
    attempt = call.attempt
    return attempt is not None and (attempt.user in users or attempt.owner[:LOGGED] in users.values())


def _lines(fates: Mapping[str, str]) -> list[str]:
    # An unknown name is whatever was typed.
    return [f"{printable(name)}: {fate}" for name, fate in fates.items()]


def _summary(fates: Mapping[str, str]) -> str:
    return f"ended {sum(fate == FATES[ENDED] for fate in fates.values())} of {len(fates)} running calls"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


async def _each(items: Sequence[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
    """Do work for each item, so many at once."""
    done: list[R] = []
    for start in range(0, len(items), AT_ONCE):
        done += await asyncio.gather(*(work(item) for item in items[start : start + AT_ONCE]))
    return done
