"""A simulated shared store: its server, and a replica's connection to it."""

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

from app.store import Store, StoreUnavailable
from app.store.failover import PROBE_REQUEST
from app.store.local_pubsub import LocalPubSub
from app.store.memory import MemoryStore
from tests.simulation.loop import EPOCH, REQUEST, WORLD
from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.simulation.invariants import Invariants
    from tests.simulation.replicas import Replica

TIMEOUT = 0.25
"""Seconds that an operation may take in all, as in app.store.valkey."""
OPERATIONS = frozenset(
    name
    for name, each in vars(Store).items()
    if inspect.iscoroutinefunction(each) and not name.startswith("_") and name not in ("publish", "aclose", "complete")
)
"""The operations on what the store holds, of the interface itself: a new one is simulated like the others."""
LEFT = ("live:all", "unstopped")
"""Sets that are empty once all calls are settled: slots, and what `status` lists."""
UNSTOPPED = LEFT[1]
READS = frozenset({"get", "members", "items"})
KEEPS = OPERATIONS - READS - {"add_member", "remove_member"}
"""Those that may change a value."""
FAULTS = {
    "st-lost": 0.02,  # before it did anything
    "st-lost-after": 0.02,  # done, and its answer lost
    "st-late": 0.015,  # given up, and done later
    "st-slow": 0.2,
    "publish-lost": 0.2,
}
"""Kinds of faults, and how often each happens in a world that has it."""
Outage = Literal["refused", "frozen", "denied", "lagging"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a replica: for stories that choose which one fails."""

    name: str
    replica: str
    connection: str
    """The request that it was for; empty: the replica's own work."""
    at: float
    arguments: tuple[Any, ...]

    @property
    def writes(self) -> bool:
        """Return whether it may change anything."""
        return self.name not in READS


class Contents(MemoryStore):
    """What a store holds; it reports reservations, and the states of calls' records.

    `epoch`: 0 for the shared server, another number for each process's own memory. `watched`: report the states.
    """

    def __init__(self, world: World, invariants: "Invariants", epoch: int, *, watched: bool) -> None:
        self.replayed: float | None = None
        """The time that counts while a journal is replayed."""
        super().__init__(self._time, epoch=EPOCH)
        self.world, self.invariants, self.epoch = world, invariants, epoch
        self.watched = watched
        self._states: dict[str, str] = {}

    @property
    def due(self) -> list[str]:
        """What stands in the index of due times."""
        return self._due.members

    def _time(self) -> float:
        return self.world.now if self.replayed is None else self.replayed

    def look(self, report: bool = True) -> None:
        """Compare the record of each known start with what it was."""
        clock = self._now()
        for request_id, before in self._states.items():
            after = _state(self._value(f"call:{request_id}", clock))
            if after != before:
                self._states[request_id] = after
                if report:
                    self.invariants.record_changed(request_id, before, after)

    def reserved(self, request_id: str) -> None:
        """Note a start."""
        self._states.setdefault(request_id, "none")
        self.invariants.reserved(request_id, self.epoch)


@lru_cache(10_000)
def _state(value: bytes | None) -> str:
    """Return the state that a record says. Before records had one: unwanted, or given."""
    if value is None:
        return "none"
    record = json.loads(value)
    return str(record.get("state") or ("unwanted*" if record.get("unwanted") else "given*"))


def _watched(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    operation = getattr(MemoryStore, name)

    async def watched(self: Contents, *args: Any, **kwargs: Any) -> Any:
        result = await operation(self, *args, **kwargs)
        if name == "decide" and result.counted and args[0].member not in ("", "probe"):
            self.reserved(args[0].member.partition(" ")[0])
        if self.watched and name in KEEPS and (name != "decide" or args[0].member):
            self.look()
        return result

    return watched


for _name in OPERATIONS - READS:
    setattr(Contents, _name, _watched(_name))


def now(operation: Coroutine[Any, Any, Any]) -> Any:
    """Run an operation that awaits nothing."""
    try:
        operation.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


class Server:
    """The server: what it holds, and whether it answers. `keep_journal`: it may fail over, so writes are kept."""

    def __init__(self, world: World, invariants: "Invariants", *, keep_journal: bool = False) -> None:
        self.world, self.invariants = world, invariants
        self.contents = self._new()
        self.outage: Outage | None = None
        self.lag = 0.0
        self.connections: list[StoreConnection] = []
        self.generation = 0
        self._keep_journal = keep_journal
        self._journal: list[tuple[float, Callable[[Contents], Any]]] = []
        self._frozen: list[Callable[[], object]] = []
        self._trouble: list[float] | None = None

    def do(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out an operation."""

        def operation(contents: Contents) -> Any:
            return now(getattr(contents, name)(*args, **kwargs))

        if self._keep_journal and name not in READS:
            self._journal.append((self.world.now, operation))
        return operation(self.contents)

    def begin(self, outage: Outage, lag: float = 0.0) -> None:
        """Fail from now on. `lag`: seconds that each way takes more, if it lags."""
        self.world.note("store", f"is {outage}")
        self.outage, self.lag = outage, lag
        self._trouble = self.world.begin_trouble()

    def recover(self) -> None:
        """Answer again; what was sent to a frozen server is done now."""
        if self.outage is None:
            return
        self.world.note("store", "is back")
        self.outage, self.lag = None, 0.0
        if self._trouble is not None:
            self._trouble[1] = self.world.now
        waiting, self._frozen = self._frozen, []
        for each in waiting:
            each()

    def wait_for_thaw(self, work: Callable[[], object]) -> None:
        """Do it once the server is no longer frozen."""
        self._frozen.append(work)

    def empty(self) -> None:
        """FLUSHALL."""
        self.world.note("store", "is emptied")
        self.invariants.store_emptied()
        self._journal.clear()
        self.contents = self._new()

    def fail_over(self, lost_seconds: float) -> None:
        """A replica of the server takes over: it lacks the last writes, and connections break."""
        self.world.note("store", f"fails over, {lost_seconds * 1000:.0f} ms of writes are lost")
        self.world.begin_trouble()[1] = self.world.now + 1
        self.invariants.writes_lost(self.world.now - lost_seconds)
        self.generation += 1
        self._journal = [each for each in self._journal if each[0] <= self.world.now - lost_seconds]
        self.contents = self._new(watched=False)
        for at, operation in self._journal:
            self.contents.replayed = at
            operation(self.contents)
        self.contents.replayed = None
        self.contents.look(report=False)
        self.contents.watched = True
        for connection in self.connections:
            connection.break_off()

    def _new(self, *, watched: bool = True) -> Contents:
        return Contents(self.world, self.invariants, 0, watched=watched)


class StoreConnection:
    """A replica's connection to the server: to FailoverStore, a ValkeyStore."""

    shared = True
    state = "ok"
    channels = "ok"

    def __init__(self, world: World, server: Server, replica: "Replica") -> None:
        self.world, self.server, self.replica = world, server, replica
        self.pubsub = LocalPubSub()
        self.lag = 0.0
        """Seconds that each way takes more, from this replica."""
        self._last = 0.0
        self._waiting: dict[asyncio.Future[Any], None] = {}
        self.watch: Callable[[Operation], tuple[str, float] | None] = lambda _: None
        """A story's choice: the fault of an operation, if any, and the seconds that it is late."""
        server.connections.append(self)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        if name not in OPERATIONS:
            raise AttributeError(name)
        return partial(self._do, name)

    @property
    def moves(self) -> int:
        """How often the server was another one."""
        return self.server.generation

    async def check_place(self) -> None:
        """There is one address."""

    async def info(self) -> dict[str, str]:
        """Nothing to warn about."""
        return {"aof_enabled": "1"}

    async def mark(self, name: str, beat_name: str, value: str, beat: int, ttl: float) -> tuple[str, bool, int]:
        """As ValkeyStore's: part of the probe, so it costs no steps."""
        if self.server.outage is not None or self.world.over:
            raise StoreUnavailable("ConnectionError")
        kept, before = (now(self.server.contents.get(each)) for each in (name, beat_name))
        self.server.do("set", (name, kept or value.encode(), ttl), {})
        self.server.do("set", (beat_name, str(beat).encode(), ttl), {})
        return (kept or value.encode()).decode(), kept is None, int(before or 0)

    def now(self) -> float:
        """Unix time, by the server's clock."""
        return self.world.date

    async def pages(self, name: str) -> "AsyncIterator[list[str]]":
        """All members at once."""
        yield list(await self._do("members", name))

    async def publish(self, channel: str, message: bytes) -> None:
        """Send a message to every replica."""
        world, server = self.world, self.server
        if server.outage or world.over:
            raise StoreUnavailable("ConnectionError")
        for each in server.connections:
            if not each.replica.dead and not world.fault("publish-lost", world.numbered(f"{each.replica.name}:news")):
                world.later(0.002, each.pubsub.deliver, channel, message)

    def subscribe(self, channel: str) -> "AbstractAsyncContextManager[AsyncIterator[bytes]]":
        """Receive the channel's messages."""
        return self.pubsub.subscribe(channel)

    async def aclose(self) -> None:
        """Nothing is open."""

    def break_off(self) -> None:
        """The server closed the connection: what was sent has no answer."""
        waiting, self._waiting = self._waiting, {}
        for answer in waiting:
            if not answer.done():
                answer.set_exception(StoreUnavailable("ConnectionError"))
                answer.exception()

    async def _do(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Carry out an operation on the server, or lose it."""
        world, server = self.world, self.server
        if world.over:
            raise StoreUnavailable("over")
        connection = REQUEST.get()
        own = connection is None
        if own and server.outage is None:  # an idle replica's routine costs no steps
            if name in READS and not (empty := now(getattr(server.contents, name)(*args))):
                return empty
            if args[0] is PROBE_REQUEST:
                return None  # not looked at
        what = _subject(args)
        act = partial(server.do, name, args, kwargs)
        if server.outage == "refused":
            raise StoreUnavailable("ConnectionError")
        if server.outage == "denied" and name not in READS:
            raise StoreUnavailable("ReadOnlyError")
        if server.outage == "frozen":
            if name not in READS:
                server.wait_for_thaw(act)
            await asyncio.sleep(TIMEOUT)
            raise StoreUnavailable("no answer within 250 ms")
        who = connection.name if connection is not None else self.replica.name
        place = world.numbered(f"{who}:{name}:{what}")
        asked = Operation(name, self.replica.name, connection.name if connection else "", world.now, args)
        fault = self.watch(asked) or self._fault(place, own)
        if fault is not None:
            await self._lose(*fault, act, place)
        return await self._ask(act, place)

    def _fault(self, place: str, own: bool) -> tuple[str, float] | None:
        if own and not self.world.rates.get("st-background"):
            return None
        for kind in ("st-lost", "st-lost-after", "st-late"):
            if self.world.fault(kind, place):
                return kind, self.world.length(kind, place, 0.3, 3)
        return None

    async def _lose(self, fault: str, late: float, act: Callable[[], Any], place: str) -> None:
        world = self.world
        done = {"st-lost": "is lost before it did anything", "st-lost-after": "is done, and its answer lost"}
        world.note(self.replica.name, f"store: {place} {done.get(fault, 'is done late')}")
        if fault == "st-lost-after":
            world.later(0.001, act)
        elif fault == "st-late":
            world.later(late, act)
        world.begin_trouble()[1] = world.now + 3
        self._last = 0.0
        await asyncio.sleep(TIMEOUT)
        raise StoreUnavailable("no answer within 250 ms")

    async def _ask(self, act: Callable[[], Any], place: str) -> Any:
        world = self.world
        way = world.between(f"st:{place}", 0.0002, 0.004) + self.server.lag + self.lag
        if world.fault("st-slow", place):
            way += world.length("st-slow", place, 0.005, 0.1)
        self._last = max(world.now + way, self._last)  # one connection: no operation overtakes another
        answer: asyncio.Future[Any] = world.loop.create_future()
        generation = self.server.generation

        def reply(result: Any) -> None:
            self._waiting.pop(answer, None)
            if not answer.done():
                answer.set_result(result)

        def arrive() -> None:
            if self.server.generation == generation:
                world.later(way, reply, act())

        self._waiting[answer] = None
        world.loop.call_at(self._last, arrive, context=WORLD)
        if self._last + way < world.now + TIMEOUT:
            return await answer
        try:
            async with asyncio.timeout(TIMEOUT):
                return await answer
        except TimeoutError:
            self._waiting.pop(answer, None)
            raise StoreUnavailable("no answer within 250 ms") from None


def _subject(args: tuple[Any, ...]) -> str:
    """Return what an operation is about: the kind of its first name."""
    first = args[0] if args else ""
    if rates := getattr(first, "rates", ()):
        return str(rates[0].name.partition(":")[0])
    if expected := getattr(first, "expected", None):
        first = next(iter(expected))
    elif isinstance(first, (list, tuple)) and first and isinstance(first[0], str):
        first = first[0]
    return first.partition(":")[0] if isinstance(first, str) else type(first).__name__
