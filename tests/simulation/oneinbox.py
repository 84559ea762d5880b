"""A simulated OneInbox: the truth about calls, and the faults of its answers."""

import asyncio
import base64
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import httpx

from tests.simulation.loop import EPOCH, HOST, REQUEST
from tests.simulation.world import World

if TYPE_CHECKING:
    from tests.simulation.connections import Connection
    from tests.simulation.invariants import Invariants
    from tests.simulation.replicas import Replica

START = "/v1/calls/web"
LIST = "/v1/calls"
USAGE = "/v1/usage"
FAULTS = {
    "oi-connect": 0.05,  # cannot connect: surely not sent
    "oi-429": 0.04,
    "oi-stale": 0.3,  # an answer as of a moment before
    "start-5xx": 0.08,
    "start-408": 0.04,
    "start-hang": 0.06,
    "start-late": 0.08,  # the call comes to exist long after everyone gave up
    "start-slow": 0.3,
    "start-5xx-after": 0.08,
    "start-drop-after": 0.08,
    "start-hang-after": 0.08,
    "start-invalid": 0.06,
    "start-no-id": 0.06,
    "start-slow-answer": 0.25,
    "fails": 0.15,  # the call ends by itself within seconds
    "list-5xx": 0.15,
    "list-hang": 0.05,
    "list-lag": 0.3,  # a new call is not listed at first
    "list-no-metadata": 0.5,
    "get-404": 0.08,  # although the call runs
    "get-5xx": 0.12,
    "get-hang": 0.06,
    "stop-404": 0.1,
    "stop-5xx": 0.15,
    "stop-hang": 0.08,
    "stop-hang-after": 0.1,
    "stop-5xx-after": 0.1,
    "stop-stale": 0.2,  # stopped, and answered with the state before
}
"""Kinds of faults, and how often each happens in a world that has it."""


@dataclass(frozen=True, slots=True)
class Given:
    """A 201 for a call. `at`: when its last byte was sent to an open connection, or received by the browser."""

    at: float
    connection: "Connection"


@dataclass(frozen=True, slots=True)
class Stop:
    """A request to stop a call. `by`: "user" if the browser asked for it, "broker" otherwise."""

    at: float
    replica: str
    by: str


@dataclass(eq=False)
class Call:
    """A call, as OneInbox knows it; times are the loop's. `starter`: the request that it was started for."""

    id: str
    agent: str
    metadata: dict[str, Any]
    created: float
    listed_from: float
    token: str
    token_end: float | None
    starter: "Connection"
    reserved: float = 0
    epoch: int = 0
    """Which memory counted it: a number per process on memory://, 0 on a shared store."""
    ended: float | None = None
    end_reason: str = ""
    joined: float | None = None
    answered: float | None = None
    """When OneInbox's answer to the POST reached the broker."""
    given: list[Given] = field(default_factory=list)
    received: list[Given] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    left: float | None = None
    """When the broker may stop it, because its browser's page has gone and did not come back."""

    @property
    def home(self) -> "Replica":
        """The replica that asked for it."""
        return self.starter.replica

    @property
    def user(self) -> str:
        """Whose call it is."""
        return self.starter.user

    @property
    def request_id(self) -> str:
        """The id that the broker wrote on it."""
        return str(self.metadata.get("broker_request_id", ""))

    def lasted(self, until: float) -> float:
        """Return the seconds that it ran, until a moment."""
        return max(0.0, min(until, self.ended if self.ended is not None else until) - self.created)

    def status(self, at: float) -> str:
        """Return its status at a moment."""
        if self.ended is not None and self.ended <= at:
            return "completed"
        if self.joined is not None and self.joined <= at:
            return "in_progress"
        return "queued" if at < self.created + 0.3 else "initiated"

    def record(self, at: float) -> dict[str, Any]:
        """Return its record as of a moment."""
        ended = self.ended if self.ended is not None and self.ended <= at else None
        return {
            "id": self.id,
            "agent_id": self.agent,
            "status": self.status(at),
            "created_at": _iso(self.created),
            "started_at": _iso(self.joined),
            "ended_at": _iso(ended),
            "duration_seconds": None if ended is None else math.ceil(ended - self.created),
            "end_reason": self.end_reason if ended is not None else None,
            "metadata": self.metadata,
        }


def _iso(at: float | None) -> str | None:
    if at is None:
        return None
    return datetime.fromtimestamp(EPOCH + at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(eq=False)
class OneInbox:
    """All calls. `timeout`: the broker's ONEINBOX_TIMEOUT; `token_lives`: seconds that tokens may last, None: no exp.

    `keys`: the API keys that are accepted.
    """

    world: World
    invariants: "Invariants"
    timeout: float
    token_lives: list[int | None]
    keys: set[str]
    calls: dict[str, Call] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    """How often each request was sent."""
    announce: Callable[[Call], object] = field(default=lambda _: None)
    """Sends the webhook of a call that ended."""
    lists_down_until: float = 0.0
    """Until then every list is refused."""

    def running(self) -> list[Call]:
        """Return the running calls."""
        return [call for call in self.calls.values() if call.ended is None]

    def end(self, call: Call, reason: str) -> None:
        """End a call."""
        if call.ended is None:
            call.ended = self.world.now
            call.end_reason = reason
            self.world.note("oneinbox", f"{call.id} ends: {reason}")
            self.invariants.call_ended(call)
            self.announce(call)

    def create(self, body: Mapping[str, Any], connection: "Connection", place: str) -> Call:
        """Start a call."""
        world = self.world
        life = world.pick(f"token:{place}", self.token_lives)
        token_end = None if life is None else math.floor(world.date + life) - EPOCH
        claims = {} if token_end is None else {"exp": int(token_end + EPOCH)}
        payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
        lag = world.length("list-lag", place, 0.2, 3) if world.fault("list-lag", place) else 0.0
        call = Call(
            f"call_{len(self.calls) + 1}",
            body["agent_id"],
            body["metadata"],
            world.now,
            world.now + lag,
            f"eyJh.{payload}.c2ln",
            token_end,
            connection,
        )
        self.calls[call.id] = call
        world.note("oneinbox", f"{call.id} exists (for {connection}{f', token {life} s' if life else ''})")
        self.invariants.call_created(call)
        if world.fault("fails", place):
            world.later(world.length("fails", place, 0.1, 40), self.end, call, "agent_failed")
        return call


@dataclass(eq=False)
class _Exchange:
    """One request of the broker to OneInbox, and ways to answer it. `place`: where chance finds it."""

    world: World
    method: str
    path: str
    query: str
    content: bytes
    place: str
    replica: "Replica"
    connection: "Connection | None"
    answer: "asyncio.Future[httpx.Response]"
    on_answer: Callable[[], object] | None = None

    def say(self, status: int, body: Any, after: float = 0.0, headers: Mapping[str, str] | None = None) -> None:
        """Answer, after a time and the way back."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        back = self.world.between(f"oi2:{self.place}", 0.01, 0.15)

        def arrive() -> None:
            if not self.answer.done():
                if self.on_answer is not None:
                    self.on_answer()
                response = httpx.Response(status, headers=dict(headers or {}), stream=httpx.ByteStream(raw))
                self.answer.set_result(response)

        self.world.later(back + after, arrive)

    def drop(self) -> None:
        """Cut the connection."""

        def arrive() -> None:
            if not self.answer.done():
                self.answer.set_exception(httpx.ReadError("reset"))

        self.world.later(0.05, arrive)

    def busy(self) -> None:
        """Answer 429."""
        seconds = self.world.pick(f"retry:{self.place}", ["1", "2", "5"])
        self.say(429, {"detail": "slow down"}, headers={"retry-after": seconds})


class Transport(httpx.AsyncBaseTransport):
    """A replica's connection to OneInbox."""

    def __init__(self, world: World, oneinbox: OneInbox, invariants: "Invariants") -> None:
        self._world, self._oneinbox, self._invariants = world, oneinbox, invariants

    async def aclose(self) -> None:
        """Nothing is open."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        world = self._world
        request.extensions["sent"] = False
        if world.over:
            raise httpx.ConnectError("over")
        replica: Replica = HOST.get()
        connection: Connection | None = REQUEST.get()
        path, method = request.url.path, request.method
        short = f"{method} {path[3:]}"
        place = world.numbered(f"{connection.name if connection is not None else replica.name}:{short}")
        self._oneinbox.asked[short] += 1
        if world.fault("oi-connect", place):
            await asyncio.sleep(0.05)
            world.note(replica.name, f"→ OneInbox {short}: cannot connect")
            raise httpx.ConnectError("refused")
        if (before_sending := request.extensions.get("before_sending")) is not None:
            before_sending()
        request.extensions["sent"] = True
        exchange = _Exchange(
            world,
            method,
            path,
            request.url.query.decode(),
            await request.aread(),
            place,
            replica,
            connection,
            world.loop.create_future(),
        )
        authorized = request.headers.get("authorization", "").removeprefix("Bearer ") in self._oneinbox.keys
        arrive = self._arrive if authorized else lambda each: each.say(401, {"detail": "unknown key"})
        starts = path == START and connection is not None
        if starts and connection is not None:
            self._invariants.start_sent(connection)
        if method == "POST" and path.endswith("/stop"):
            self._stop_sent(path.split("/")[3], connection, replica)
        world.later(world.between(f"oi1:{place}", 0.01, 0.15), arrive, exchange)
        try:
            return await exchange.answer
        finally:
            if starts and connection is not None:
                self._invariants.start_over(connection)

    def _stop_sent(self, call_id: str, connection: "Connection | None", replica: "Replica") -> None:
        by = "user" if connection is not None and "/stop" in connection.path else "broker"
        self._world.note(replica.name, f"→ OneInbox: stop {call_id} ({by})")
        if (call := self._oneinbox.calls.get(call_id)) is not None:
            call.stops.append(Stop(self._world.now, replica.name, by))
            self._invariants.stop_sent(call)

    def _arrive(self, exchange: _Exchange) -> None:
        if self._world.over:
            return
        if exchange.path == START:
            self._start(exchange)
        elif exchange.method == "GET" and exchange.path == LIST:
            self._list(exchange)
        elif exchange.path == USAGE:
            exchange.say(200, {"max_calls_per_day": 100_000, "calls_remaining_today": 100_000})
        else:
            self._call(exchange)

    def _start(self, exchange: _Exchange) -> None:
        world, oneinbox, place = self._world, self._oneinbox, exchange.place
        assert exchange.connection is not None
        body, connection = json.loads(exchange.content), exchange.connection
        if world.fault("oi-429", place):
            exchange.busy()
        elif world.fault("start-5xx", place):
            exchange.say(503, {"detail": "no"})
        elif world.fault("start-hang", place):
            world.note("oneinbox", f"never answers the POST of {connection}")
        elif world.fault("start-late", place):
            late = world.length("start-late", place, 3, oneinbox.timeout + 25)
            world.note("oneinbox", f"takes {late:.1f} s to make a call for {connection}, and answers no one")
            world.later(late, oneinbox.create, body, connection, place)
        elif world.fault("start-slow", place):
            world.later(world.length("start-slow", place, 0.5, oneinbox.timeout - 0.6), self._act, exchange, body)
        else:
            self._act(exchange, body)

    def _act(self, exchange: _Exchange, body: Mapping[str, Any]) -> None:
        world, place = self._world, exchange.place
        assert exchange.connection is not None
        call = self._oneinbox.create(body, exchange.connection, place)
        if world.fault("start-5xx-after", place):
            return exchange.say(500, {"detail": "broken"})
        if world.fault("start-408", place):
            return exchange.say(408, {"detail": "too slow"})
        if world.fault("start-drop-after", place):
            return exchange.drop()
        if world.fault("start-hang-after", place):
            return None
        answer: dict[str, Any] = {
            "id": call.id,
            "server_url": "wss://voice.oneinbox.ai",
            "participant_token": call.token,
            "metadata": call.metadata,
        }
        if world.fault("start-invalid", place):
            answer["participant_token"] = None
        elif world.fault("start-no-id", place):
            del answer["id"]
        lag = 0.0
        if world.fault("start-slow-answer", place):
            lag = world.length("start-slow-answer", place, 0.5, self._oneinbox.timeout)

        def answered() -> None:
            call.answered = world.now

        exchange.on_answer = answered
        return exchange.say(201, answer, lag)

    def _list(self, exchange: _Exchange) -> None:
        world, place = self._world, exchange.place
        if world.now < self._oneinbox.lists_down_until or world.fault("list-5xx", place):
            return exchange.say(502, b"oops")
        if world.fault("list-hang", place):
            return None
        seen = self._seen(place)
        asked = {name: values[0] for name, values in parse_qs(exchange.query).items()}
        limit, offset = int(asked["limit"]), int(asked["offset"])
        found = [
            call
            for call in reversed(self._oneinbox.calls.values())
            if call.listed_from <= seen
            and call.status(seen) == asked.get("status", call.status(seen))
            and call.agent == asked.get("agent_id", call.agent)
        ]
        items = [call.record(seen) for call in found[offset : offset + limit]]
        if world.fault("list-no-metadata", place):
            items = [{name: value for name, value in item.items() if name != "metadata"} for item in items]
        answer = {"items": items, "total": len(found), "limit": limit, "offset": offset}
        return exchange.say(200, answer, headers={"date": formatdate(int(EPOCH + world.now), usegmt=True)})

    def _seen(self, place: str) -> float:
        stale = self._world.fault("oi-stale", place)
        return self._world.now - (self._world.length("oi-stale", place, 0.2, 3) if stale else 0)

    def _call(self, exchange: _Exchange) -> None:
        world, place = self._world, exchange.place
        call = self._oneinbox.calls.get(exchange.path.split("/")[3])
        kind = "stop" if exchange.path.endswith("/stop") else "get"
        if call is None:
            return exchange.say(404, {"detail": "Call not found"})
        if world.fault(f"{kind}-404", place):
            world.note("oneinbox", f"says 404 of {call.id}, which {'runs' if call.ended is None else 'has ended'}")
            return exchange.say(404, {"detail": "Call not found"})
        if world.fault(f"{kind}-5xx", place):
            return exchange.say(500, {"detail": "broken"})
        if world.fault(f"{kind}-hang", place):
            return None
        if world.fault("oi-429", place):
            return exchange.busy()
        if kind == "get":
            return exchange.say(200, call.record(max(self._seen(place), call.created)))
        return self._stop(exchange, call)

    def _stop(self, exchange: _Exchange, call: Call) -> None:
        world, place = self._world, exchange.place
        before = call.record(world.now)
        self._oneinbox.end(call, "api_stop")
        if world.fault("stop-hang-after", place):
            return None
        if world.fault("stop-5xx-after", place):
            return exchange.say(500, {"detail": "broken"})
        return exchange.say(200, before if world.fault("stop-stale", place) else call.record(world.now))
