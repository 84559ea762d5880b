"""Replicas of the broker that read and follow calls of one simulated OneInbox.

@in_simulated_time
async def test_something() -> None:
    world = CallWorld()
    replica = world.replica()
    world.oneinbox.has("call_1", status="in_progress")
    await replica.cache.get("call_1")
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import SecretStr

from app.calls.cache import CallCache
from app.calls.ownership import Ownership
from app.calls.poller import CallPoller
from app.calls.refresh_queue import RefreshQueue
from app.calls.service import Calls
from app.identity import User
from app.identity.keyring import Keyring
from app.limits import CallAttempt, LiveCalls
from app.limits.ledger import Ledger
from app.oneinbox import OneInbox
from app.store.memory import MemoryStore
from tests.support.harness import AGENT_ID, ONEINBOX

DATE = 1_800_000_000.0
ANN, BEN = User(mode="jwt", id="ann"), User(mode="jwt", id="ben")
ANONYMOUS = User(mode="anonymous", id="203.0.113.7")
SECRET = "a secret of the tests, of more than 32 characters"
KEYRING = Keyring([SECRET])


class FakeOneInbox(httpx.AsyncBaseTransport):
    """OneInbox: `records` by id. Responds with the state at the request, `delay` seconds later.

    `failures`: responses to the next requests instead, in order; with `fails_on` the first one stays. `requests`: times
    and paths.
    """

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.delay = 0.0
        self.failures: list[httpx.Response | Exception] = []
        self.fails_on = False
        self.requests: list[tuple[float, str]] = []
        self.running = 0
        self.most_at_once = 0

    def has(self, call_id: str = "call_1", *, owner: str = "", **record: Any) -> dict[str, Any]:
        """Add a call."""
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
    def fetches(self) -> list[float]:
        """When calls were fetched."""
        return [at for at, path in self.requests if not path.endswith("/stop")]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.requests.append((asyncio.get_running_loop().time(), path))
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            answer = self._answer(path)
            await asyncio.sleep(self.delay)
        finally:
            self.running -= 1
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
    """A store that replicas share."""

    shared = True


@dataclass
class Replica:
    """One process of the broker: `clock` monotonic, `skew` of its date in seconds."""

    world: "CallWorld"
    skew: float = 0.0
    expose: tuple[str, ...] = ()
    max_streams: int = 10_000
    max_streams_total: int = 10_000
    max_seconds: float = 3600
    warn_seconds: float = 60
    cache: CallCache = field(init=False)
    poller: CallPoller = field(init=False)
    calls: Calls = field(init=False)
    refresh_queue: RefreshQueue = field(init=False)
    live: LiveCalls = field(init=False)
    ownership: Ownership = field(init=False)

    def __post_init__(self) -> None:
        clock, store = asyncio.get_running_loop().time, self.world.store
        oneinbox = OneInbox(ONEINBOX, SecretStr("oi_sk_x"), self.world.oneinbox, timeout=15, connect_timeout=3)
        ledger = Ledger(store, lease=3900, now=self.now)
        self.live = LiveCalls(store, oneinbox, ledger, max_seconds=self.max_seconds, join_timeout=0, now=self.now)
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
        self.calls = Calls(
            oneinbox, self.ownership, self.cache, self.poller, self.live, warn_seconds=self.warn_seconds, now=self.now
        )
        self.refresh_queue = RefreshQueue(self.calls.refresh)

    def now(self) -> float:
        """This replica's date."""
        return DATE + asyncio.get_running_loop().time() + self.skew

    async def start_call(self, user: User, call_id: str = "call_1") -> str:
        """Record a call as started for a user, in its live slots; return its public id."""
        owner = KEYRING.pseudonym(user)
        attempt = CallAttempt(f"request-{call_id}", int(self.now()), "default", user.store_name, owner)
        await self.live.give(attempt, call_id)
        return self.ownership.public_id(call_id, user)

    @asynccontextmanager
    async def subscribed(self) -> AsyncIterator[None]:
        """Receive what other replicas saw."""
        task = asyncio.create_task(self.poller.run())
        await asyncio.sleep(0)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class CallWorld:
    """One OneInbox, one store, and any number of replicas."""

    def __init__(self, *, shared: bool = False) -> None:
        self.oneinbox = FakeOneInbox()
        self.store = (SharedStore if shared else MemoryStore)(asyncio.get_running_loop().time)

    def replica(self, **settings: Any) -> Replica:
        """Add a process."""
        return Replica(self, **settings)


def pseudonym(user: User) -> str:
    """Return a user's name on OneInbox's record."""
    return KEYRING.pseudonym(user)


@dataclass
class Reader:
    """A client that follows a call: what it received, and when."""

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
        """Whether the last event was `end`."""
        return bool(self.events) and self.events[-1][1] == "end"

    def take(self, chunk: bytes) -> None:
        """Parse one chunk, which must be one whole event or comment."""
        now = asyncio.get_running_loop().time()
        if chunk == b": keep-alive\n\n":
            self.keep_alives.append(now)
            return
        *head, data, blank, end = chunk.decode().split("\n")
        name, *event_id = head
        assert (blank, end) == ("", "")
        assert len(event_id) == (name != "event: ending")
        assert all(each.startswith('id: "') for each in event_id)
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
    """Wait until streams end."""
    await asyncio.gather(*(reader.task for reader in readers if reader.task is not None))


async def disconnect(reader: Reader) -> None:
    """Close a stream."""
    assert reader.task is not None
    reader.task.cancel()
    await asyncio.gather(reader.task, return_exceptions=True)


async def outcome(work: Awaitable[Any]) -> Any:
    """Return the result or the exception."""
    try:
        return await work
    except Exception as error:
        return error
