"""The time that the members of a set have used in a moving window, in memory. scripts.py holds the same in Lua.

A member counts from its start (the second word of its name) for as long as it is in the set, and the seconds that it
used, when it leaves, for a window after that. Nothing here reads the members: `running` grows with their number and
time. Used seconds lie in a grid of window/64 cells; an entry leaves with its newest part: late, never early.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from app.store.sliding_window import GRID

WINDOW = 86_400
"""Seconds of every budget's window."""
LONGEST_CLAIM = 10
"""Seconds that a claim of a due budget lasts at most."""


def start_of(member: str, now: float) -> float:
    """Return the Unix time at which a member started, as its name says; now, if it does not say so."""
    words = member.split(" ", 2)
    start = float(words[1]) if len(words) > 1 and words[1].isascii() and words[1].isdecimal() else now
    return min(start, now)


@dataclass(slots=True)
class UsedTime:
    """One set's time. `at`: Unix time of the last change. `running`: seconds that its `members` had run by then.

    `limit`: None: only counted. `used`: time of the last entry, and seconds, by cell.
    """

    at: float
    members: int = 0
    running: float = 0
    limit: float | None = None
    used: list[tuple[float, float]] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Seconds used in the window, running members included."""
        return self.running + sum(seconds for _, seconds in self.used)

    @property
    def over_at(self) -> float:
        """Unix time at which its last used seconds leave the window."""
        return self.used[-1][0] + WINDOW if self.used else self.at

    def advance(self, now: float, members: Iterable[str], count: int) -> None:
        """Bring it up to date; `members`, `count`: of the set. It is counted anew if members came or went unseen."""
        self.running += self.members * max(0.0, now - self.at)
        self.at = max(self.at, now)
        if count != self.members:
            self.members, self.running = count, sum(self.at - start_of(each, self.at) for each in members)
        self.used = [(time, seconds) for time, seconds in self.used if time + WINDOW > self.at]

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
        if self.used and self.used[-1][0] // cell == self.at // cell:
            seconds += self.used.pop()[1]
        self.used.append((self.at, seconds))

    def runs_out(self) -> float | None:
        """Return the Unix time at which nothing is left, if only time passes; None: never."""
        if self.limit is None or not self.members:
            return None
        left, at = self.limit - self.total, self.at
        if left <= 0:
            return at
        for time, seconds in self.used:
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
        for time, seconds in self.used:
            left -= seconds
            if left < 0:
                return time + WINDOW - self.at
        return 0.0
