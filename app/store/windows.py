"""The moving window in memory: never more than `amount` in any window of `seconds`, whatever the edge.

A window is a flat array of doubles, `[seconds, total, time, count, time, count, …]`, oldest entry first. An array and
not objects: a million users are a million windows, and the garbage collector does not look into arrays.

A hit at time t leaves at t + seconds. Up to an amount of 64 each hit is an entry of its own. Beyond, hits in one cell
of a grid of seconds/64 share an entry that leaves with its newest hit: up to a cell late, never early. So an entry list
stays short, and both kinds are the same code. scripts.py holds the same in Lua.
"""

from array import array
from math import floor
from typing import TypeAlias

from app.store.protocol import Rate, RateState

Window: TypeAlias = "array[float]"

GRID = 64
"""Cells per window, and the largest amount that is counted hit by hit."""
MOST = GRID + 1
"""Entries of a window at most: a window of 64 cells touches 65."""

_TOTAL, _FIRST = 1, 2


def fresh(seconds: float) -> Window:
    """A window that holds nothing."""
    return array("d", (seconds, 0))


def ended(window: Window, now: float) -> bool:
    """Whether nothing is left in the window."""
    return len(window) == _FIRST or window[-2] + window[0] <= now


def spent(window: Window, now: float) -> int:
    """What the window holds at `now`. Drops what has left."""
    seconds = window[0]
    size, keep = len(window), _FIRST
    while keep < size and window[keep] + seconds <= now:
        window[_TOTAL] -= window[keep + 1]
        keep += 2
    if keep > _FIRST:
        del window[_FIRST:keep]
    return int(window[_TOTAL])


def count(window: Window, rate: Rate, now: float, cost: int) -> float:
    """Count `cost` in; the mark says in which entry."""
    if len(window) > _FIRST:
        newest = window[-2]
        now = max(now, newest)
        cell = rate.seconds / GRID
        if now == newest or (rate.amount > GRID and floor(now / cell) == floor(newest / cell)):
            window[-2] = now
            window[-1] += cost
            window[_TOTAL] += cost
            return now
    window.append(now)
    window.append(cost)
    window[_TOTAL] += cost
    if len(window) > _FIRST + 2 * MOST:
        # Counted past the amount (enforce=False). Two oldest become one that leaves with the younger: no answer
        # changes, since the 64 entries behind it fill the amount as long as it is there.
        window[_FIRST + 3] += window[_FIRST + 1]
        del window[_FIRST : _FIRST + 2]
    return now


def uncount(window: Window, rate: Rate, mark: float, cost: int) -> None:
    """Take `cost` back out of the marked entry; nothing when that entry has left."""
    cell = rate.seconds / GRID
    for at in range(len(window) - 2, _FIRST - 1, -2):
        time = window[at]
        if time == mark or (rate.amount > GRID and floor(time / cell) == floor(mark / cell)):
            taken = min(cost, window[at + 1])
            window[at + 1] -= taken
            window[_TOTAL] -= taken
            if not window[at + 1]:
                del window[at : at + 2]
            return


def describe(window: Window, rate: Rate, now: float, refused_cost: int | None, mark: float) -> RateState:
    """What a decision says of a window already cleared by `spent`; `refused_cost` is None when the rate had room."""
    total = int(window[_TOTAL])
    amount = rate.amount
    if not total:
        return RateState(amount, float(rate.seconds), mark)
    target = min(total, amount) - 1 if refused_cost is None else amount - refused_cost
    at, left = _FIRST, total - window[_FIRST + 1]
    while left > target and at + 2 < len(window):
        at += 2
        left -= window[at + 1]
    return RateState(max(amount - total, 0), window[at] + window[0] - now, mark)
