"""The operator's kill switch: pause all sessions, block one user. In force on every replica within two seconds."""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import structlog
from pydantic_core import from_json, to_json

from app.identity import User
from app.problems import Problem, retry_later
from app.store import Store, StoreUnavailable

PAUSE = "pause"
BLOCKS = "blocks"
BY_PSEUDONYM = "p:"
"""In the set of blocks, before a pseudonym as logs show it; all other members are users' names in the store."""
CONTROLS = "controls"
"""Changes with each command, so that a replica can say which one it has read."""
CONTROLS_SECONDS = 86400
READ_SECONDS = 1
ENDED_SECONDS = 60
"""How long the note of a control that an operator ended is kept, for replicas to read who did."""
LONGEST_REASON = 200
LONGEST_NAME = 64
LATEST = 1e11
"""A Unix time beyond all that are shown."""
AT_ONCE = 64
"""Notes read at once."""

log = structlog.get_logger(__name__)


class Note(NamedTuple):
    """The note beside a pause or block; other versions may have written none, so everything may be missing.

    `user`: the blocked user's pseudonym, as logs show it. `by`: the operator's name on their machine. `since`: Unix
    time. `ended_by`: who ended it before its time.
    """

    user: str = ""
    by: str = ""
    reason: str = ""
    since: float = 0
    ended_by: str = ""

    def to_bytes(self) -> bytes:
        """Return the value to store."""
        return to_json({"v": 1, **{name: value for name, value in self._asdict().items() if value}})

    @classmethod
    def from_bytes(cls, value: bytes) -> Self:
        """Read a stored value; an empty note, and a log entry, if it cannot be read."""
        try:
            stored = from_json(value)
            texts = {name: printable(stored.get(name, "")) for name in ("user", "by", "reason", "ended_by")}
            since = float(stored.get("since", 0))
            return cls(**texts, since=since if 0 <= since < LATEST else 0)
        except (ValueError, TypeError, AttributeError):
            log.warning("store_record_skipped", name="control")
            return cls()


NO_NOTE = Note()


class Control(NamedTuple):
    """A pause or block in the store. `name`: the blocked user's in the set of blocks, or PAUSE. `left`: seconds."""

    name: str
    left: float
    note: Note


def printable(text: str, most: int = LONGEST_REASON) -> str:
    """Return a text for logs and terminals: so many characters, with a question mark for each that does not print."""
    return "".join(each if each.isprintable() else "?" for each in text[:most])


async def read_controls(store: Store) -> list[Control]:
    """Return the pause, if there is one, and the blocks. Raises StoreUnavailable."""
    members = {**await store.members(PAUSE), **await store.members(BLOCKS)}
    notes = await _read_notes(store, members)
    return [Control(name, left, _note_of(name, notes)) for name, left in members.items()]


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
    _notes: dict[str, Note] = field(default_factory=dict, init=False)
    """By the name of a control."""
    _logged: dict[str, Note] = field(default_factory=dict, init=False)
    """The controls in force, as the log has them."""

    def check(self, user: User, pseudonym: str) -> None:
        """Raise `at-capacity` while sessions are paused, `blocked` for a blocked user.

        `pseudonym`: the user's, as logs show it.
        """
        left = self._paused_until - self.clock()
        if left > 0:
            # A pause of hours may be ended early, so clients ask again after a minute at most.
            raise retry_later("at-capacity", min(left, 60), reason="paused")
        for name in (user.store_name, BY_PSEUDONYM + pseudonym) if self._blocked_until else ():
            if self._blocked_until.get(name, 0) > self.clock():
                raise Problem("blocked")

    @property
    def paused(self) -> bool:
        """True while sessions are paused."""
        return self._paused_until > self.clock()

    @property
    def blocked(self) -> int:
        """The number of blocks."""
        now = self.clock()
        return sum(until > now for until in self._blocked_until.values())

    async def announce(self) -> str:
        """Note a change that was written; return what `controls` becomes on each replica that has read it."""
        controls = secrets.token_hex(8)
        await self.store.set(CONTROLS, controls.encode(), CONTROLS_SECONDS)
        return controls

    async def pause(self, seconds: float, note: Note = NO_NOTE) -> None:
        """Refuse all sessions for `seconds`."""
        await self._begin(PAUSE, PAUSE, seconds, note)

    async def resume(self, by: str = "") -> bool:
        """End a pause; return whether there was one."""
        return await self._end(PAUSE, PAUSE, by)

    async def block(self, name: str, seconds: float, note: Note = NO_NOTE) -> None:
        """Refuse a user's sessions for `seconds`. `name`: the user's in the store, or BY_PSEUDONYM and a pseudonym."""
        await self._begin(BLOCKS, name, seconds, note)

    async def unblock(self, name: str, by: str = "") -> bool:
        """End a block; return whether there was one."""
        return await self._end(BLOCKS, name, by)

    async def refresh(self) -> None:
        """Read pauses and blocks, and log what changed. Nothing changes while the shared store is gone."""
        await self._read()
        self._audit()

    async def run(self) -> None:
        """Refresh every READ_SECONDS, until cancelled."""
        while True:
            try:
                await self.refresh()
            except Exception:  # a value that cannot be read must not end the reading
                log.exception("controls_check_failed")
            await asyncio.sleep(READ_SECONDS)

    async def _begin(self, kind: str, name: str, seconds: float, note: Note) -> None:
        await self.store.set(_key(name), note.to_bytes(), seconds)
        await self.store.add_member(kind, name, seconds)

    async def _end(self, kind: str, name: str, by: str) -> bool:
        note = (await _read_notes(self.store, [name])).get(name, NO_NOTE)
        await self.store.set(_key(name), note._replace(ended_by=by).to_bytes(), ENDED_SECONDS)
        return await self.store.remove_member([kind], name)

    async def _read(self) -> None:
        if not self._reachable():
            return
        try:
            # Read first: what is read after it includes what the command wrote before.
            controls = ((await self.store.get(CONTROLS)) or b"").decode()
            paused, blocked = await self.store.members(PAUSE), await self.store.members(BLOCKS)
            names = {*paused, *blocked}
            unread = names if controls != self.controls else names - self._notes.keys()
            notes = await _read_notes(self.store, unread | (self._logged.keys() - names))
        except StoreUnavailable:
            return
        if not self._reachable():
            return  # the store was lost meanwhile; local memory has none
        now, notes = self.clock(), {**self._notes, **notes}
        self._paused_until = max((now + left for left in paused.values()), default=0.0)
        self._blocked_until = {name: now + left for name, left in blocked.items()}
        self._notes = {name: _note_of(name, notes) for name in names | self._logged.keys()}
        self.controls = controls

    def _audit(self) -> None:
        """Log each control that has come into force, or ended, since the last time."""
        now = self.clock()
        ends = {PAUSE: self._paused_until, **self._blocked_until}
        in_force = {
            name: self._notes.get(name, NO_NOTE)._replace(ended_by="") for name, until in ends.items() if until > now
        }
        for name, note in in_force.items():
            if self._logged.get(name) != note:
                log.warning("control_in_force", **_described(name, note), seconds=round(ends[name] - now))
        for name in self._logged.keys() - in_force.keys():
            log.warning("control_ended", **_described(name, self._notes.get(name, NO_NOTE)))
        self._logged = in_force

    def _reachable(self) -> bool:
        return self.store.state == "ok"


def _described(name: str, note: Note) -> dict[str, Any]:
    """Return a log entry's fields for a control."""
    said = {"user": note.user, "by": note.by, "reason": note.reason, "ended_by": note.ended_by}
    return {"kind": "pause" if name == PAUSE else "block", **{name: text for name, text in said.items() if text}}


def _note_of(name: str, notes: dict[str, Note]) -> Note:
    note = notes.get(name, NO_NOTE)
    if name.startswith(BY_PSEUDONYM):
        note = note._replace(user=name.removeprefix(BY_PSEUDONYM))
    return note


async def _read_notes(store: Store, names: Iterable[str]) -> dict[str, Note]:
    notes: dict[str, Note] = {}
    wanted = list(names)
    for start in range(0, len(wanted), AT_ONCE):
        some = wanted[start : start + AT_ONCE]
        values = await asyncio.gather(*(store.get(_key(name)) for name in some))
        notes |= {name: Note.from_bytes(value) for name, value in zip(some, values, strict=True) if value is not None}
    return notes


def _key(name: str) -> str:
    return f"control:{name}"
