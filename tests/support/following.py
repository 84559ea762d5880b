"""A house of replicas that follow calls, in a time of its own.

@in_own_time
async def test_something() -> None:
    house = House()
    replica = house.replica()
    house.oneinbox.records["call_1"] = {"status": "in_progress"}
    await asyncio.sleep(3600)  # takes no time
"""

import asyncio
import functools
import json
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import httpx
from pydantic import SecretStr

from app.calls.cache import CallCache
from app.calls.ownership import Ownership
from app.calls.poller import CallPoller
from app.calls.refresh_queue import RefreshQueue
from app.calls.service import Calls
from app.identity import User
from app.identity.keyring import Keyring
from app.limits import CallAttempt, LiveCalls, TalkTime
from app.oneinbox import OneInbox
from app.store.memory import MemoryStore
from tests.support.harness import AGENT_ID, ONEINBOX

P = ParamSpec("P")

DATE = 1_800_000_000.0
ANN, BEN = User(mode="jwt", id="ann"), User(mode="jwt", id="ben")
NOBODY = User(mode="anonymous", id="203.0.113.7")
SECRET = "a secret of the tests, of more than 32 characters"
KEYRING = Keyring([SECRET])


class _Leaping(selectors.DefaultSelector):
    """Leaps over the time in which nothing would happen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:  # pragma: no cover
            raise AssertionError("nothing will ever happen")
        # Work takes time too, or a pause that is shorter than a float can tell would never end.
        self.now += 1e-6 if ready else max(timeout or 0, 1e-6)
        return ready


class OwnTime(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while everybody waits, and then at once."""

    def __init__(self) -> None:
        self._leaping = _Leaping()
        super().__init__(self._leaping)

    def time(self) -> float:
        return self._leaping.now

    def pass_time(self, seconds: float) -> None:
        """As if a callback took so long."""
        self._leaping.now += seconds


def in_own_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test in time of its own; what nobody caught, and what is left running, fails it."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        uncaught: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=OwnTime) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: uncaught.append(context))
            runner.run(_tidy(test(*args, **kwargs)))
        assert not uncaught

    return run


async def _tidy(test: Coroutine[Any, Any, None]) -> None:
    await test
    await asyncio.sleep(120)  # looks that nobody waits for any more end by themselves
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left


class Account(httpx.AsyncBaseTransport):
    """OneInbox: `records` by id. Answers what is there when it is asked, `delay` seconds later.

    `failures`: answers to the next requests instead, in order; the last one stays when `fails_on`. `asked`: times and
    paths of all requests.
    """

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.delay = 0.0
        self.failures: list[httpx.Response | Exception] = []
        self.fails_on = False
        self.asked: list[tuple[float, str]] = []
        self.under_way = 0
        self.most_under_way = 0

    def has(self, call_id: str = "call_1", *, owner: str = "", **record: Any) -> dict[str, Any]:
        """Know a call."""
        metadata = {"broker_user": owner, "broker_request_id": f"request-{call_id}"}
        self.records[call_id] = {
            "id": call_id,
            "agent_id": AGENT_ID,
            "status": "queued",
            "metadata": metadata,
            **record,
        }
        return self.records[call_id]

    @property
    def looks(self) -> list[float]:
        """When calls were looked up."""
        return [at for at, path in self.asked if not path.endswith("/stop")]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.asked.append((asyncio.get_running_loop().time(), path))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            answer = self._answer(path)
            await asyncio.sleep(self.delay)
        finally:
            self.under_way -= 1
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, stream=httpx.ByteStream(answer.content))

    def _answer(self, path: str) -> httpx.Response | Exception:
        if self.failures:
            return self.failures[0] if self.fails_on else self.failures.pop(0)
        record = self.records.get(path.split("/")[3])
        if record is None:
            return httpx.Response(404, json={"detail": "Call not found"})
        if path.endswith("/stop"):
            record["status"] = "completed"
        return httpx.Response(200, content=json.dumps(record))


class SharedStore(MemoryStore):
    """What replicas share. Its clock is the loop's."""

    shared = True


@dataclass
class Replica:
    """One process of the broker: `clock` monotonic, `skew` of its date in seconds."""

    house: "House"
    skew: float = 0.0
    expose: tuple[str, ...] = ()
    max_streams: int = 10_000
    max_streams_total: int = 10_000
    cache: CallCache = field(init=False)
    poller: CallPoller = field(init=False)
    calls: Calls = field(init=False)
    refresh_queue: RefreshQueue = field(init=False)
    live: LiveCalls = field(init=False)
    ownership: Ownership = field(init=False)

    def __post_init__(self) -> None:
        clock, store = asyncio.get_running_loop().time, self.house.store
        oneinbox = OneInbox(ONEINBOX, SecretStr("oi_sk_x"), self.house.oneinbox, timeout=15, connect_timeout=3)
        talk = TalkTime(store, minutes=None, minutes_total=None, now=self.now)
        self.live = LiveCalls(store, oneinbox, talk, max_seconds=3600, join_timeout=0, lease=3900, now=self.now)
        self.ownership = Ownership(KEYRING)
        self.cache = CallCache(
            oneinbox=oneinbox,
            store=store,
            keyring=KEYRING,
            live=self.live,
            agent_names={AGENT_ID: "default"},
            expose=frozenset(self.expose),
            clock=clock,
            now=self.now,
        )
        self.poller = CallPoller(
            self.cache,
            store,
            max_streams=self.max_streams,
            max_streams_total=self.max_streams_total,
            clock=clock,
            now=self.now,
        )
        self.calls = Calls(oneinbox, self.ownership, self.cache, self.poller, self.live, now=self.now)
        self.refresh_queue = RefreshQueue(self.calls.hint)

    def now(self) -> float:
        """Its idea of the date."""
        return DATE + asyncio.get_running_loop().time() + self.skew

    async def hand_out(self, user: User, call_id: str = "call_1") -> str:
        """Remember a call as started for a user, in its live slots; its public id."""
        owner = KEYRING.pseudonym(user)
        attempt = CallAttempt(f"request-{call_id}", int(self.now()), "default", user.store_name, owner)
        for name in attempt.sets:
            await self.house.store.add_member(name, attempt.key, 3900)
        await self.live.begin(attempt, call_id)
        return self.ownership.public_id(call_id, user)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Hear of what other replicas saw."""
        task = asyncio.create_task(self.poller.run())
        await asyncio.sleep(0)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class House:
    """One OneInbox, one store, and as many replicas as wanted."""

    def __init__(self, *, shared: bool = False) -> None:
        self.oneinbox = Account()
        self.store = (SharedStore if shared else MemoryStore)(asyncio.get_running_loop().time)

    def replica(self, **settings: Any) -> Replica:
        """One more process."""
        return Replica(self, **settings)


def pseudonym(user: User) -> str:
    """A user's name on OneInbox's record."""
    return KEYRING.pseudonym(user)


@dataclass
class Reader:
    """Somebody who follows a call: what came, and when."""

    events: list[tuple[float, str, Mapping[str, Any]]] = field(default_factory=list)
    keep_alives: list[float] = field(default_factory=list)
    over_at: float | None = None
    task: "asyncio.Task[None] | None" = None

    @property
    def statuses(self) -> list[str]:
        """The states, in order."""
        return [data["status"] for _, name, data in self.events if name == "call"]

    @property
    def ended(self) -> bool:
        """Whether it was told that the call is over."""
        return bool(self.events) and self.events[-1][1] == "end"

    def take(self, chunk: bytes) -> None:
        """Read one chunk, which must be one whole event or comment."""
        now = asyncio.get_running_loop().time()
        if chunk == b": keep-alive\n\n":
            self.keep_alives.append(now)
            return
        name, event_id, data, *rest = chunk.decode().split("\n")
        assert rest == ["", ""]
        assert event_id.startswith('id: "')
        self.events.append((now, name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))


def follow(replica: Replica, user: User = ANN, call: str = "call_1", last_event_id: str | None = None) -> Reader:
    """Follow a call in the background, as the route does."""
    reader = Reader()

    async def read() -> None:
        stream = await replica.calls.follow(user, call, last_event_id)
        assert stream is not None

        async def send(message: Any) -> None:
            if message.get("body"):
                reader.take(message["body"])

        async def receive() -> Any:
            await asyncio.get_running_loop().create_future()

        await stream({"type": "http"}, receive, send)
        reader.over_at = asyncio.get_running_loop().time()

    reader.task = asyncio.create_task(read())
    return reader


async def finish(readers: Iterable[Reader]) -> None:
    """Wait for the end of streams."""
    await asyncio.gather(*(reader.task for reader in readers if reader.task is not None))


async def leave(reader: Reader) -> None:
    """Hang up."""
    assert reader.task is not None
    reader.task.cancel()
    await asyncio.gather(reader.task, return_exceptions=True)


async def outcome(work: Awaitable[Any]) -> Any:
    """The result or the exception."""
    try:
        return await work
    except Exception as error:
        return error
