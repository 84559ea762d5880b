"""The interface of every store. Names are bare here; a shared store prefixes them with `oib:`.

Everything in a store expires, so it cannot fill up.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, Self

PAGE = 500
"""Members of a set that are read at once."""


class StoreUnavailable(Exception):
    """No answer of the shared store in time, or a refusal (out of memory, read-only, wrong password)."""

    lacks_right = False
    """True when only the store's user lacks a right."""


class Rate(NamedTuple):
    """At most `amount` in any window of `seconds`, counted under `name`.

    Rates of different windows need different names; one request uses each name once. `owner`, `kind`: its parts, for a
    store that keeps an owner's windows together; the name alone where they are not given.
    """

    name: str
    amount: int
    seconds: int
    owner: str = ""
    kind: str = ""


class RateState(NamedTuple):
    """One rate after a decision.

    `remaining`: how many more the window takes (never below 0). `reset`: seconds until the window takes more than it
    does now (the whole window when it is empty); after a refusal, seconds until the same request would pass this rate,
    if nothing else is counted (a cost above `amount` never passes). `mark`: the entry that this decision counted in,
    for giving it back; opaque.
    """

    remaining: int
    reset: float
    mark: float = 0


class Slot(NamedTuple):
    """Room for `capacity` members at once under `name`; None: no limit."""

    name: str
    capacity: int | None


class Budget(NamedTuple):
    """At most `seconds` of use in any 24 hours by the members of a slot: of those that are in it, and that have left.

    `slot`: its index in the request. `seconds`: None: they are only counted. A member's second word is the Unix time at
    which it started. When a budget with running members runs out, `budget:` and the slot's name are due (`take_due`),
    unless it is not `enforced`.
    """

    slot: int
    seconds: int | None
    enforced: bool = True


class BudgetState(NamedTuple):
    """One budget after a decision.

    `remaining`: seconds; infinite without a limit. `reset`: seconds until some can be free again; 0: now, or when
    members leave that run.
    """

    remaining: float
    reset: float


BUDGET = "budget:"
"""Before a slot's name, in the index of due times: its budget runs out."""
BUDGET_CLAIM = 2.0
"""Seconds for which a due budget is claimed at most: members that come meanwhile are not to wait."""
KEPT = -1
"""A budget's limit: the one that it has."""


class Value(NamedTuple):
    """A value under a name, for `ttl` seconds."""

    name: str
    value: bytes
    ttl: float


class LimitRequest(NamedTuple):
    """A request for room under several rates and slots at once.

    `member`: enters every slot for `lease` seconds; a present member takes no more room. `cost`: counted in each rate;
    0: only look; a full rate or slot does not refuse. `enforce` False: count it whatever the answer. `record`: a value
    that is set in the same step, if the request is counted and there is none. `budgets`: refuse when nothing is left.
    """

    rates: Sequence[Rate] = ()
    slots: Sequence[Slot] = ()
    member: str = ""
    lease: float = 0
    cost: int = 1
    enforce: bool = True
    record: Value | None = None
    budgets: Sequence[Budget] = ()


class Decision(NamedTuple):
    """The answer to a `LimitRequest`.

    `refused`: indices into rates, slots, budgets (the first slot's is len(rates)) that had no room; empty means yes.
    `rates`, `budgets`: the states, in the order asked. `used`: members per slot after the decision, in the order asked.
    `counted`: the request was counted (allowed, or not enforced; never when it only looked). `local`: answered by this
    process alone, because the shared store is gone; it has no `record`. `doubtful`: the shared store may have counted
    it, too. `mirrored`: what this process counted for itself beside the shared store.
    """

    refused: tuple[int, ...]
    rates: tuple[RateState, ...]
    used: tuple[int, ...]
    counted: bool
    local: bool = False
    doubtful: bool = False
    mirrored: "Decision | None" = None
    budgets: tuple[BudgetState, ...] = ()

    @property
    def allowed(self) -> bool:
        """True when nothing refused."""
        return not self.refused


class Member(NamedTuple):
    """A member of a set, for `ttl` seconds. `timed`: the set has a budget."""

    name: str
    member: str
    ttl: float
    timed: bool = False


class Leave(NamedTuple):
    """A member that leaves a set. `seconds`: what it used of the set's budget; None: the set has none."""

    name: str
    member: str
    seconds: float | None = None


class ListEntry(NamedTuple):
    """A value in front of a list that keeps the newest `keep`, and expires `ttl` seconds after its last entry."""

    name: str
    value: bytes
    keep: int
    ttl: float


class Due(NamedTuple):
    """A member of the index of due times: it is due `delay` seconds from now; None: it is taken out of the index."""

    member: str
    delay: float | None


class Change(NamedTuple):
    """Several writes that are made together, if the values are as expected; otherwise none is.

    `expected`: values by name; None: there is none. `values`: to set. `joins`: members to put into sets. `leaves`: sets
    and members to take out. `entry`: goes into a list. `due`: for the index of due times.
    """

    expected: Mapping[str, bytes | None]
    values: Sequence[Value] = ()
    joins: Sequence[Member] = ()
    leaves: Sequence[Leave] = ()
    entry: ListEntry | None = None
    due: Due | None = None


class Store(Protocol):
    """Base of all stores. All durations are seconds. Shared stores raise StoreUnavailable.

    Opened with `async with`, also when the server cannot be reached.
    """

    shared: bool
    """True when other processes see the same data."""
    losses: int = 0
    """The number of times that this process has seen the shared store lose data."""

    @property
    def state(self) -> Literal["ok", "down"]:
        """`down`: the shared store is gone, and this process answers alone where it can."""
        return "ok"

    @property
    def settling(self) -> bool:
        """True when the shared store has just come back: other processes may still be writing what it missed."""
        return False

    @property
    def incomplete(self) -> bool:
        """True when the shared store is new or has lost data, until `complete`: running calls may be missing in it."""
        return False

    async def complete(self) -> bool:
        """Note that the running calls are in the store again; False if it has lost data meanwhile."""
        return True

    def use(self, url: str) -> None:
        """Use another URL from now on, such as one with a new password. Raises ValueError."""
        raise ValueError("is of another kind, which needs a restart")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def now(self) -> float:
        """Return Unix time by the store's clock, which all its processes share."""

    async def decide(self, request: LimitRequest) -> Decision:
        """Ask all rates and slots at once: all are counted, or none.

        Raises ValueError for slots without a member, unless `cost` is 0.
        """

    async def give_back(self, request: LimitRequest, decision: Decision) -> bool:
        """Undo what `decide` counted: each rate only in the entry it was counted in; the member leaves the slots, and
        the record is deleted. Return False if the shared store has not confirmed it.

        Call it at most once per decision: an entry's hits are indistinguishable.
        """

    async def get(self, name: str) -> bytes | None:
        """Return the value, or None when there is none."""

    async def set(self, name: str, value: bytes, ttl: float) -> None:
        """Set the value for `ttl` seconds."""

    async def add(self, name: str, value: bytes, ttl: float) -> bool:
        """Set the value if there is none; return whether it was set."""

    async def replace(self, name: str, expected: bytes, value: bytes, ttl: float) -> bool:
        """Set the value if the current one is `expected`; return whether it was set."""

    async def delete(self, name: str, expected: bytes | None = None) -> bool:
        """Delete the value (only if it is `expected`, when given); return whether it was there."""

    async def add_member(self, name: str, member: str, ttl: float) -> None:
        """Put a member into a set for `ttl` seconds; resets its end if it is present."""

    async def remove_member(self, names: Sequence[str], member: str) -> bool:
        """Take a member out of sets; return whether it was in any."""

    async def members(self, name: str) -> dict[str, float]:
        """Return the unexpired members and the seconds each has left; a large set is read in parts, as by `pages`."""

    def pages(self, name: str) -> AsyncIterator[list[str]]:
        """Return a set's members in parts, so that a large one stops nothing else.

        Each that is there all the time is returned at least once.
        """

    async def change(self, change: Change) -> bool:
        """Make all writes of a change; return False, and make none, if a value is not as expected."""

    async def take_due(self, most: int, claim: float, held: Sequence[str] = ()) -> list[str]:
        """Return at most `most` members whose time has come, earliest first. None is returned again within `claim`
        seconds (a budget: BUDGET_CLAIM at most), to any process.

        `held`: members that this process is still at: their claims start again.
        """

    async def has_run_out(self, name: str, seconds: int | None) -> bool:
        """Return whether a set's budget has run out while members run; plan when it does.

        `seconds`: its limit from now on; None: it has none; KEPT.
        """

    async def due_in(self, members: Sequence[str]) -> list[float | None]:
        """Return the seconds until each member is due (0 or less: now); None: it is not in the index."""

    async def items(self, name: str) -> list[bytes]:
        """Return a list's values, newest first."""

    async def publish(self, channel: str, message: bytes) -> None:
        """Send a message to every subscriber of the channel, on every replica. A hint: it may get lost."""

    def subscribe(self, channel: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Receive the channel's messages from now on. Never raises; silent while the store is gone.

        A reader that falls more than 64 messages behind loses the oldest.
        """

    async def aclose(self) -> None:
        """Close connections. The store cannot be used afterwards."""
