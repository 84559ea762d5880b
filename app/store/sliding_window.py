"""The sliding window in memory: at most `amount` in any window of `seconds`, wherever it begins.

A window is a flat tuple of numbers, `(seconds, total, time, count, time, count, …)`, oldest entry first, that is
replaced and never changed. A tuple of numbers, because the garbage collector does not track it; a million lists would
stop the process for a second.

A hit at time t leaves at t + seconds. Up to an amount of 64 each hit is one entry. Above that, hits in one cell of a
grid of seconds/64 share an entry that leaves with its newest hit: up to a cell late, never early. That keeps the list
of entries short, and the code is the same for both. scripts.py holds the same in Lua.
"""

from math import floor
from typing import TypeAlias

from app.store.protocol import Rate, RateState

Window: TypeAlias = tuple[float, ...]

GRID = 64
"""Cells per window, and the largest amount counted hit by hit."""
MOST = GRID + 1
"""Most entries of a window: a window of 64 cells touches 65."""

_TOTAL, _FIRST = 1, 2


def fresh(seconds: float) -> Window:
    """Return an empty window."""
    return (seconds, 0)


def ended(window: Window, now: float) -> bool:
    """Return whether nothing is left in the window."""
    return len(window) == _FIRST or window[-2] + window[0] <= now


def current(window: Window, now: float) -> Window:
    """Return the window without the entries that have left."""
    seconds, total = window[:_FIRST]
    size, keep = len(window), _FIRST
    while keep < size and window[keep] + seconds <= now:
        total -= window[keep + 1]
        keep += 2
    return window if keep == _FIRST else (seconds, total, *window[keep:])


def total(window: Window) -> int:
    """Return the sum of a current window's counts."""
    return int(window[_TOTAL])


def count(window: Window, rate: Rate, now: float, cost: int) -> Window:
    """Return the window with `cost` more at `now`, the mark of that entry."""
    seconds, held = window[:_FIRST]
    if len(window) > _FIRST and _same_entry(now, window[-2], rate):
        return (seconds, held + cost, *window[_FIRST:-2], now, window[-1] + cost)
    if len(window) < _FIRST + 2 * MOST:
        return (seconds, held + cost, *window[_FIRST:], now, cost)
    # Counted past the amount (enforce=False). The two oldest become one that leaves with the younger: no answer
    # changes, since the 64 entries behind it fill the amount while it is there.
    _, oldest, younger, count_ = window[_FIRST : _FIRST + 4]
    return (seconds, held + cost, younger, oldest + count_, *window[_FIRST + 4 :], now, cost)


def uncount(window: Window, rate: Rate, mark: float, cost: int) -> Window:
    """Return the window with `cost` less in the marked entry, or unchanged when that entry has left."""
    for at in range(len(window) - 2, _FIRST - 1, -2):
        if _same_entry(window[at], mark, rate):
            taken = min(cost, window[at + 1])
            left = (window[at], window[at + 1] - taken) if window[at + 1] > taken else ()
            return (window[0], window[_TOTAL] - taken, *window[_FIRST:at], *left, *window[at + 2 :])
    return window


def wait(window: Window, now: float, target: float) -> float:
    """Return the seconds until a current window holds at most `target` or is empty; `seconds` if it is empty now."""
    if len(window) == _FIRST:
        return window[0]
    at, left = _FIRST, window[_TOTAL] - window[_FIRST + 1]
    while left > target and at + 2 < len(window):
        at += 2
        left -= window[at + 1]
    return min(window[0], window[at] + window[0] - now)  # a rounding error above it would be told as a second more


def describe(window: Window, rate: Rate, now: float, refused_cost: int | None, mark: float) -> RateState:
    """Return a current window's state after a decision; `refused_cost` is None when the rate had room."""
    held = total(window)
    target = min(held, rate.amount) - 1 if refused_cost is None else rate.amount - refused_cost
    return RateState(max(rate.amount - held, 0), wait(window, now, target), mark)


def _same_entry(one: float, other: float, rate: Rate) -> bool:
    if one == other:
        return True
    cell = rate.seconds / GRID
    return rate.amount > GRID and floor(one / cell) == floor(other / cell)
