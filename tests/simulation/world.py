"""A simulated world: chance, history, and what was seen to go wrong."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.simulation.loop import BEGIN, EPOCH, WORLD, SimLoop

T = TypeVar("T")
Choice = Callable[[str, Sequence[Any]], Any]


class Chance:
    """Random numbers that belong to a place: leaving one thing out changes no other."""

    def __init__(self, seed: int) -> None:
        self._key = (seed % 2**64).to_bytes(8, "big")

    def unit(self, place: str) -> float:
        """Return the number of a place, in [0, 1)."""
        raw = hashlib.blake2b(place.encode(), digest_size=8, key=self._key).digest()
        return int.from_bytes(raw, "big") / 2**64

    def between(self, place: str, low: float, high: float) -> float:
        """Return a number between two others."""
        return low + (high - low) * self.unit(place)

    def pick(self, place: str, choices: Sequence[T]) -> T:
        """Return one of several things."""
        return choices[int(self.unit(place) * len(choices))]


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken. `kind`: a letter and a word, see invariants.py. `at`: virtual seconds."""

    kind: str
    what: str
    at: float


@dataclass(eq=False, slots=True)
class Planned:
    """A fault that a story plans. `fits`: which places it hits; `times`: how often; `seconds`: its length, if any."""

    kind: str
    fits: Callable[[str], bool]
    times: int = 1
    seconds: float | None = None


@dataclass(eq=False)
class World:
    """One world, from its seed.

    `without`: names of faults, events and browsers that must not happen: that is how a failing run is shrunk.
    `keep_history`: keep lines to show; the digest covers them in any case.
    """

    loop: SimLoop
    seed: int
    without: frozenset[str] = frozenset()
    keep_history: bool = False
    rates: dict[str, float] = field(default_factory=dict)
    """How often each kind of fault happens, where it could."""
    planned: list[Planned] = field(default_factory=list)
    history: list[tuple[float, str, str]] = field(default_factory=list)
    fired: list[str] = field(default_factory=list)
    """Names of the faults and events that happened."""
    violations: list[Violation] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Faults, events, transitions and answers, each by its name."""
    troubles: list[list[float]] = field(default_factory=list)
    """Times in which the store failed, from and to."""
    quiet: bool = False
    """No more faults."""
    over: bool = False
    """Nothing counts now."""

    def __post_init__(self) -> None:
        self.chance = Chance(self.seed)
        self.unit, self.between, self.pick = self.chance.unit, self.chance.between, self.chance.pick
        self._digest = hashlib.blake2b(digest_size=8)
        self._places: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._fired_at: list[tuple[str, float]] = []

    @property
    def now(self) -> float:
        """The loop's time."""
        return self.loop.now

    @property
    def date(self) -> float:
        """Unix time, by a clock that is right."""
        return EPOCH + self.loop.now

    @property
    def digest(self) -> str:
        """A digest of the whole history: equal for equal runs."""
        return self._digest.hexdigest()

    @property
    def troubled(self) -> bool:
        """Return whether any fault or event happened."""
        return bool(self.fired)

    def fault(self, kind: str, place: str) -> bool:
        """Return whether a fault happens at a place."""
        name = f"{kind}@{place}"
        for each in self.planned:
            if each.kind == kind and each.times and each.fits(place):
                each.times -= 1
                if each.seconds is not None:
                    self._seconds[name] = each.seconds
                break
        else:
            rate = self.rates.get(kind)
            if not rate or self.quiet or self.unit(name) >= rate or name in self.without:
                return False
        self.fire(name)
        return True

    def failed(self, kinds: str, since: float, until: float) -> bool:
        """Return whether a fault happened in a time. `kinds`: beginnings of its kind, with spaces between."""
        begun = tuple(kinds.split())
        return any(since <= at <= until and name.startswith(begun) for name, at in self._fired_at)

    def is_calm(self, since: float) -> bool:
        """Return whether no fault or event has happened since a moment."""
        return not any(at >= since for _, at in self._fired_at) and not self.store_failed(since)

    def fire(self, name: str) -> None:
        """Note that a fault or an event happens; `name`: its kind, `@` and its place."""
        self.fired.append(name)
        self._fired_at.append((name, self.now))
        self.counts["fault " + name.partition("@")[0]] += 1

    def length(self, kind: str, place: str, low: float, high: float) -> float:
        """Return how many seconds a fault lasts: what a story says, or chance."""
        return self._seconds.get(f"{kind}@{place}") or self.between(f"{kind}:{place}", low, high)

    def numbered(self, place: str) -> str:
        """Return the place with the number of times that it was asked for."""
        self._places[place] += 1
        return f"{place}#{self._places[place] - 1}"

    def note(self, who: str, what: str) -> None:
        """Write a line of history."""
        if self.over:
            return
        self._digest.update(f"{self.now:.6f} {who} {what}\n".encode())
        if self.keep_history:
            self.history.append((self.now - BEGIN, who, what))

    def violate(self, kind: str, what: str) -> None:
        """Note that a promise is broken."""
        if not self.over:
            self.violations.append(Violation(kind, what, self.now - BEGIN))
            self.note("!!", f"VIOLATION {kind}: {what}")

    def later(self, seconds: float, work: Callable[..., object], *args: Any) -> Any:
        """Call `work` after a time, whichever processes die meanwhile."""
        return self.loop.call_later(seconds, work, *args, context=WORLD)

    def begin_trouble(self) -> list[float]:
        """Note that the store fails from now on; the caller sets the end."""
        self.troubles.append([self.now, math.inf])
        return self.troubles[-1]

    def store_failed(self, since: float, until: float | None = None) -> bool:
        """Return whether the store failed in a time."""
        end = self.now if until is None else until
        return any(begun <= end and ended >= since for begun, ended in self.troubles)
