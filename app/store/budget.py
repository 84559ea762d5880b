"""The time that the members of a set have used in a moving window, in memory. scripts.py holds the same in Lua.

A member counts from its start (the second word of its name) for as long as it is in the set, and the seconds that it
used, when it leaves, for a window after that. Nothing here reads the members: `running` grows with their number and
time. Used seconds lie in a grid of window/64 cells; an entry leaves with its newest part: late, never early.
"""

import math
from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from app.store.sliding_window import GRID

WINDOW = 86_400
"""Seconds of every budget's window."""


def start_of(member: str, now: float) -> float:
    """Return the Unix time at which a member started, as its name says; now, if it does not say so."""
    words = member.split(" ", 2)
    start = float(words[1]) if len(words) > 1 and words[1].isascii() and words[1].isdecimal() else now
    return min(start, now)


@dataclass(slots=True)
class UsedTime:
    """One set's time. `at`: Unix time of the last change. `running`: seconds that its `members` had run by then.

    `limit`: None: only counted. `until`: Unix time at which the last member's lease ends. `used`: time of the last
    entry and seconds, of each cell: an array, since a list of tuples would take ten times as much.
    """

    at: float
    members: int = 0
    running: float = 0
    limit: float | None = None
    until: float = 0
    used: "array[float]" = field(default_factory=lambda: array("d"))

    @property
    def total(self) -> float:
        """Seconds used in the window, running members included."""
        return self.running + sum(self.used[1::2])

    @property
    def over_at(self) -> float:
        """Unix time at which nothing is left of it: members have ended, and used seconds have left the window."""
        return max(self.until, self.used[-2] + WINDOW if self.used else 0)

    def advance(self, now: float, members: Collection[str], expired: Iterable[str] = ()) -> None:
        """Bring it up to date; `members`: of the set. It is counted again if some came or went unseen.

        `expired`: those whose leases have ended: no one saw their ends.
        """
        self.running += self.members * max(0.0, now - self.at)
        self.at = max(self.at, now)
        while self.used and self.used[0] + WINDOW <= self.at:
            del self.used[:2]
        for each in expired:
            self.leave(each, self.at - start_of(each, self.at))
        if len(members) != self.members:
            self.members, self.running = len(members), sum(self.at - start_of(each, self.at) for each in members)

    def join(self, member: str) -> None:
        """Count a member from its start on."""
        self.members += 1
        self.running += self.at - start_of(member, self.at)

    def leave(self, member: str, seconds: float) -> None:
        """Count the seconds that a member has used, in place of those that it ran."""
        self.members -= 1
        self.running = max(0.0, self.running - self.at + start_of(member, self.at)) if self.members else 0.0
        seconds = min(seconds, WINDOW)
        if seconds <= 0:
            return
        cell = WINDOW / GRID
        if self.used and self.used[-2] // cell == self.at // cell:
            self.used[-2:] = array("d", (self.at, self.used[-1] + seconds))
        else:
            self.used.extend((self.at, seconds))

    def runs_out(self) -> float | None:
        """Return the Unix time at which nothing is left, if only time passes; None: never."""
        if self.limit is None or not self.members:
            return None
        left, at = self.limit - self.total, self.at
        if left <= 0:
            return at
        for time, seconds in zip(self.used[::2], self.used[1::2], strict=True):
            leaves = time + WINDOW
            if left < self.members * (leaves - at):
                break
            left, at = left - self.members * (leaves - at) + seconds, leaves
        return at + math.ceil(left / self.members * 1000) / 1000

    def free_in(self, limit: float) -> float:
        """Return the seconds until members that have left take less than `limit`; 0: they do now."""
        left = self.total - self.running - limit
        if left < 0:
            return 0.0
        for time, seconds in zip(self.used[::2], self.used[1::2], strict=True):
            left -= seconds
            if left < 0:
                return time + WINDOW - self.at
        return 0.0
