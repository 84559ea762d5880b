"""The store of several replicas: Valkey or Redis (6 or newer, one primary; no cluster), over redis-py's connections.

Every operation has 250 ms in all: waiting for its turn, connecting, logging in, sending, receiving. (deadline.py gives
the server more while this process itself is too busy to read.) One timer covers all of it; redis-py's own timers would
cost CPU for each part and add up. Every failure is a `StoreUnavailable` that names neither address nor password. A
stalled server may still run a timed-out operation: it counts too much, never too little.

Of redis-py it uses the connection alone (pipeline.py): the client and the pool above it cost several times as much, and
the pool's waiters can lose their turn when others are cancelled.
"""

import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from app.store import scripts
from app.store.deadline import Deadline
from app.store.local_pubsub import LocalPubSub
from app.store.pipeline import PipelinedConnection
from app.store.protocol import Change, Decision, LimitRequest, RateState, Store, StoreUnavailable
from app.store.subscriber import Subscriber

PREFIX = "oib:"
TIMEOUT = 0.25
"""Seconds an operation may take in all."""

_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}


class ValkeyStore(Store):
    """Keep everything on a Valkey or Redis server: `redis://`, `valkey://`, or with TLS `rediss://`, `valkeys://`.

    It has one connection for commands and one for subscriptions, and connects with the first operation. Raises
    ValueError, without the URL in it, when the URL cannot be read.
    """

    shared = True

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        try:
            options: dict[str, Any] = {**parse_url(f"{_SCHEMES[scheme.lower()]}://{rest}")}
        except (KeyError, ValueError):
            raise ValueError("not a URL of the form redis://, rediss://, valkey:// or valkeys://") from None
        self._kind: type[Connection] = options.pop("connection_class", Connection)
        self._options = options | {
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": None,
            "socket_connect_timeout": None,  # one timer for the whole operation, below
            "health_check_interval": 0,
            "decode_responses": False,
            "encoding": "utf-8",
            "encoding_errors": "surrogatepass",  # a name may be any str
            "protocol": 2,
            "driver_info": None,
        }
        try:
            self._new_connection()
        except TypeError:
            raise ValueError("the URL has an unknown parameter") from None
        self._pipelined: PipelinedConnection | None = None
        self.pubsub = LocalPubSub()
        self._subscriber = Subscriber(self._new_connection, self.pubsub, PREFIX + "c:")

    async def decide(self, request: LimitRequest) -> Decision:
        rates, slots, member, lease, cost, enforce, record = request
        if slots and cost and not member:
            raise ValueError("slots need a member")
        arguments: list[str | bytes | int] = [len(rates), len(rates) + len(slots), cost, int(enforce), member]
        arguments.append(round(lease * 1e6))
        for rate in rates:
            arguments += (rate.amount, rate.seconds * 1_000_000)
        arguments += [-1 if slot.capacity is None else slot.capacity for slot in slots]
        if record is not None:
            arguments += (record.value, _milliseconds(record.ttl))
        answer: bytes = await self._run(scripts.DECIDE, _keys(request), *arguments)
        numbers = list(map(int, answer.split()))
        split = 1 + 4 * len(rates)
        refusals = [*numbers[1:split:4], *numbers[split::2]]
        return Decision(
            refused=tuple(index for index, refusal in enumerate(refusals) if refusal),
            rates=tuple(
                RateState(numbers[at + 1], numbers[at + 2] / 1e6, numbers[at + 3]) for at in range(1, split, 4)
            ),
            used=tuple(numbers[split + 1 :: 2]),
            counted=numbers[0] == 1,
        )

    async def give_back(self, request: LimitRequest, decision: Decision) -> bool:
        if not decision.counted:
            return True
        rates, slots = len(request.rates), len(request.slots)
        arguments: list[str | int] = [rates, rates + slots, request.cost, request.member]
        for rate, state in zip(request.rates, decision.rates, strict=True):
            arguments += (rate.amount, rate.seconds * 1_000_000, int(state.mark))
        await self._run(scripts.GIVE_BACK, _keys(request), *arguments)
        return True

    async def get(self, name: str) -> bytes | None:
        value: bytes | None = await self._ask("GET", _value(name))
        return value

    async def set(self, name: str, value: bytes, ttl: float) -> None:
        await self._ask("SET", _value(name), value, "PX", _milliseconds(ttl))

    async def add(self, name: str, value: bytes, ttl: float) -> bool:
        return await self._ask("SET", _value(name), value, "NX", "PX", _milliseconds(ttl)) is not None

    async def replace(self, name: str, expected: bytes, value: bytes, ttl: float) -> bool:
        return bool(await self._run(scripts.REPLACE, [_value(name)], expected, value, _milliseconds(ttl)))

    async def delete(self, name: str, expected: bytes | None = None) -> bool:
        if expected is None:
            return bool(await self._ask("DEL", _value(name)))
        return bool(await self._run(scripts.DELETE, [_value(name)], expected))

    async def add_member(self, name: str, member: str, ttl: float) -> None:
        await self._run(scripts.ADD_MEMBER, [_slot(name)], member, round(ttl * 1e6))

    async def remove_member(self, names: Sequence[str], member: str) -> bool:
        return bool(await self._run(scripts.REMOVE_MEMBER, [_slot(name) for name in names], member))

    async def members(self, name: str) -> dict[str, float]:
        found: list[bytes] = await self._run(scripts.MEMBERS, [_slot(name)])
        return {
            member.decode(errors="surrogatepass"): int(left) / 1e6
            for member, left in zip(found[::2], found[1::2], strict=True)
        }

    async def change(self, change: Change) -> bool:
        keys: list[str] = []
        arguments: list[str | bytes | int] = []

        def step(key: str, *words: str | bytes | int) -> None:
            keys.append(key)
            arguments.extend(words)

        for name, expected in change.expected.items():
            step(_value(name), *(("none",) if expected is None else ("is", expected)))
        for name, value, ttl in change.values:
            step(_value(name), "set", value, _milliseconds(ttl))
        for name in change.deletes:
            step(_value(name), "delete")
        for name, member, ttl in change.joins:
            step(_slot(name), "join", member, round(ttl * 1e6))
        for name, member in change.leaves:
            step(_slot(name), "leave", member)
        if change.entry is not None:
            name, value, keep, ttl = change.entry
            step(f"{PREFIX}l:{name}", "push", value, keep, _milliseconds(ttl))
        return bool(await self._run(scripts.CHANGE, keys, *arguments))

    async def items(self, name: str) -> list[bytes]:
        values: list[bytes] = await self._ask("LRANGE", f"{PREFIX}l:{name}", 0, -1)
        return values

    async def publish(self, channel: str, message: bytes) -> None:
        await self._ask("PUBLISH", f"{PREFIX}c:{channel}", message)

    @asynccontextmanager
    async def subscribe(self, channel: str) -> AsyncGenerator[AsyncIterator[bytes]]:
        async with self.pubsub.subscribe(channel) as messages:
            try:
                await self._subscriber.follow(channel)
                yield messages
            finally:
                self._subscriber.unfollow(channel)

    async def info(self) -> Mapping[str, str]:
        """Return what the server says about itself (INFO). Raises StoreUnavailable."""
        answer: bytes = await self._ask("INFO")
        pairs = (line.partition(":") for line in answer.decode("utf-8", "replace").splitlines())
        return {name: value for name, separator, value in pairs if separator}

    async def aclose(self) -> None:
        await self._subscriber.aclose()
        if self._pipelined is not None:
            await self._pipelined.aclose()

    async def _ask(self, *command: str | bytes | int) -> Any:
        return await self._bounded(lambda connection: connection.send(*command))

    async def _run(self, script: scripts.Script, keys: Sequence[str], *arguments: str | bytes | int) -> Any:
        parts = (len(keys), *keys, *arguments)

        async def evaluate(connection: PipelinedConnection) -> Any:
            try:
                return await connection.send("EVALSHA", script.sha, *parts)
            except NoScriptError:  # a new or restarted server
                return await connection.send("EVAL", script.text, *parts)

        return await self._bounded(evaluate)

    async def _bounded(self, operation: Callable[[PipelinedConnection], Awaitable[Any]]) -> Any:
        connection = self._open_connection()
        try:
            with Deadline(TIMEOUT, lambda: connection.heard):
                return await operation(connection)
        except TimeoutError:
            connection.abort()  # a late answer must not reach a later command
            raise StoreUnavailable(f"no answer within {TIMEOUT * 1000:.0f} ms") from None
        except (RedisError, OSError) as error:
            raise StoreUnavailable(type(error).__name__) from None

    def _open_connection(self) -> PipelinedConnection:
        if self._pipelined is None or self._pipelined.is_broken:
            self._pipelined = PipelinedConnection(self._new_connection())
        return self._pipelined

    def _new_connection(self) -> Connection:
        return self._kind(**self._options)


def _value(name: str) -> str:
    return f"{PREFIX}v:{name}"


def _slot(name: str) -> str:
    return f"{PREFIX}s:{name}"


def _keys(request: LimitRequest) -> list[str]:
    keys = [*(f"{PREFIX}r:{rate.name}" for rate in request.rates), *(_slot(slot.name) for slot in request.slots)]
    return keys if request.record is None else [*keys, _value(request.record.name)]


def _milliseconds(ttl: float) -> int:
    return max(1, math.ceil(ttl * 1000))
