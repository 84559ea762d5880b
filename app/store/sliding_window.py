"""The sliding window in memory: at most `amount` in any window of `seconds`, wherever it begins.

A window is a bytearray of pairs of doubles: `seconds` and the sum of all counts, then a time and a count for each
entry, oldest first. A bytearray, because a hit then costs the same however many entries there are, and because the
garbage collector does not track it; a million lists would stop the process for a second.

A hit at time t leaves at t + seconds. Up to an amount of 64 each hit is one entry. Above that, hits in one cell of a
grid of seconds/64 share an entry that leaves with its newest hit: up to a cell late, never early. That keeps the list
of entries short, and the code is the same for both. scripts.py holds the same in Lua.
"""

from math import floor
from struct import Struct
from typing import TypeAlias

from app.store.protocol import Rate, RateState

Window: TypeAlias = bytearray

GRID = 64
"""Cells per window, and the largest amount counted hit by hit."""
MOST = GRID + 1
"""Most entries of a window: a window of 64 cells touches 65."""

_PAIR = Struct("dd")
_SIZE = _PAIR.size
"""Bytes of a pair; the first entry begins here."""


def fresh(seconds: float) -> Window:
    """Return an empty window."""
    return bytearray(_PAIR.pack(seconds, 0))


def entries(window: Window) -> list[tuple[float, float]]:
    """Return each entry's time and count, oldest first."""
    return list(_PAIR.iter_unpack(window[_SIZE:]))


def ended(window: Window, now: float) -> bool:
    """Return whether nothing is left in the window."""
    if len(window) == _SIZE:
        return True
    until: float = _PAIR.unpack_from(window, len(window) - _SIZE)[0] + _PAIR.unpack_from(window)[0]
    return until <= now


def drop(window: Window, now: float) -> int:
    """Drop the entries that have left; return the sum of the others' counts."""
    seconds, total = _PAIR.unpack_from(window)
    at = _SIZE
    while at < len(window):
        time, counted = _PAIR.unpack_from(window, at)
        if time + seconds > now:
            break
        total -= counted
        at += _SIZE
    if at > _SIZE:
        del window[_SIZE:at]
        _PAIR.pack_into(window, 0, seconds, total)
    return int(total)


def count(window: Window, rate: Rate, now: float, cost: int) -> None:
    """Count `cost` more at `now`, the mark of that entry."""
    seconds, total = _PAIR.unpack_from(window)
    _PAIR.pack_into(window, 0, seconds, total + cost)
    last = len(window) - _SIZE
    newest, counted = _PAIR.unpack_from(window, last)
    if last and _same_entry(now, newest, rate):
        _PAIR.pack_into(window, last, now, counted + cost)
        return
    if last == MOST * _SIZE:
        # Counted past the amount (enforce=False). The two oldest become one that leaves with the younger: no answer
        # changes, since the 64 entries behind it fill the amount while it is there.
        (_, oldest), (younger, more) = entries(window)[:2]
        _PAIR.pack_into(window, 2 * _SIZE, younger, oldest + more)
        del window[_SIZE : 2 * _SIZE]
    window += _PAIR.pack(now, cost)


def uncount(window: Window, rate: Rate, mark: float, cost: int) -> None:
    """Count `cost` less in the marked entry, unless that entry has left."""
    seconds, total = _PAIR.unpack_from(window)
    for at in range(len(window) - _SIZE, 0, -_SIZE):
        time, counted = _PAIR.unpack_from(window, at)
        if _same_entry(time, mark, rate):
            taken = min(cost, counted)
            _PAIR.pack_into(window, 0, seconds, total - taken)
            _PAIR.pack_into(window, at, time, counted - taken)
            if taken == counted:
                del window[at : at + _SIZE]
            return


def wait(window: Window, now: float, target: float) -> float:
    """Return the seconds until a current window holds at most `target` or is empty; `seconds` if it is empty now."""
    seconds: float
    seconds, left = _PAIR.unpack_from(window)
    until = seconds
    for at in range(_SIZE, len(window), _SIZE):
        time, counted = _PAIR.unpack_from(window, at)
        until = time + seconds - now
        left -= counted
        if left <= target:
            break
    return min(seconds, until)  # a rounding error above it would be told as a second more


def describe(window: Window, rate: Rate, now: float, refused_cost: int | None, mark: float) -> RateState:
    """Return a current window's state after a decision; `refused_cost` is None when the rate had room."""
    held = int(_PAIR.unpack_from(window)[1])
    target = min(held, rate.amount) - 1 if refused_cost is None else rate.amount - refused_cost
    return RateState(max(rate.amount - held, 0), wait(window, now, target), mark)


def _same_entry(one: float, other: float, rate: Rate) -> bool:
    if one == other:
        return True
    cell = rate.seconds / GRID
    return rate.amount > GRID and floor(one / cell) == floor(other / cell)
