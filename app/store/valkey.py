"""The store of several replicas: Valkey or Redis (6 or newer, one primary; no cluster), through redis-py's connections.

Every operation has 250 ms in all: waiting for its turn, connecting, logging in, asking, answering. (A process that
is itself too busy to listen gives a server that answers more: patience.py.) One timer around the whole does that;
redis-py's timers (one for each of these) would add CPU and sum up. Whatever goes wrong is a `StoreUnavailable` that
tells neither address nor password. A question cut short may still be carried out by a server that thaws later: then too
much is counted, never too little.

Of redis-py it uses the connection alone (line.py): the client and the pool above it cost several times a question, and
the pool's waiters can lose their turn when others are cancelled.
"""

import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Literal, Self

from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from app.store import scripts
from app.store.deadline import Deadline
from app.store.local_pubsub import LocalPubSub
from app.store.pipeline import PipelinedConnection
from app.store.protocol import Decision, LimitRequest, RateState, StoreUnavailable, Value
from app.store.subscriber import Subscriber

PREFIX = "oib:"
TIMEOUT = 0.25
"""Seconds an operation may take in all."""

_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}


class ValkeyStore:
    """`Store` on a Valkey or Redis server: `redis://`, `valkey://`, or with TLS `rediss://`, `valkeys://`.

    Two connections: one for questions, one for subscriptions. Nothing connects before the first question.
    Raises ValueError, without the URL in it, when the URL cannot be read.
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
            "socket_connect_timeout": None,  # one bound for all of an operation, below
            "health_check_interval": 0,
            "decode_responses": False,
            "encoding": "utf-8",
            "encoding_errors": "surrogatepass",  # any str is a name
            "protocol": 2,
            "driver_info": None,
        }
        try:
            self._new_connection()
        except TypeError:
            raise ValueError("the URL has a parameter that is unknown") from None
        self._pipelined: PipelinedConnection | None = None
        self.pubsub = LocalPubSub()
        self._subscriber = Subscriber(self._new_connection, self.pubsub, PREFIX + "c:")

    @property
    def state(self) -> Literal["ok", "down"]:
        """Always ok: this class does not remember how the last question went."""
        return "ok"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def decide(self, request: LimitRequest) -> Decision:
        """See `Store.decide`."""
        rates, slots, member, lease, cost, enforce = request
        if slots and cost and not member:
            raise ValueError("slots need a member")
        asked: list[str | int] = [len(rates), cost, int(enforce), member, round(lease * 1e6)]
        for rate in rates:
            asked += (rate.amount, rate.seconds * 1_000_000)
        asked += [-1 if slot.capacity is None else slot.capacity for slot in slots]
        answer: bytes = await self._run(scripts.DECIDE, _keys(request), *asked)
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

    async def give_back(self, request: LimitRequest, decision: Decision) -> None:
        """See `Store.give_back`."""
        if not decision.counted:
            return
        asked: list[str | int] = [len(request.rates), request.cost, request.member]
        for rate, state in zip(request.rates, decision.rates, strict=True):
            asked += (rate.amount, rate.seconds * 1_000_000, int(state.mark))
        await self._run(scripts.GIVE_BACK, _keys(request), *asked)

    async def get(self, name: str) -> bytes | None:
        """See `Store.get`."""
        value: bytes | None = await self._ask("GET", _value(name))
        return value

    async def set(self, name: str, value: bytes, ttl: float) -> None:
        """See `Store.set`."""
        await self._ask("SET", _value(name), value, "PX", _milliseconds(ttl))

    async def add(self, name: str, value: bytes, ttl: float) -> bool:
        """See `Store.add`."""
        return await self._ask("SET", _value(name), value, "NX", "PX", _milliseconds(ttl)) is not None

    async def replace(self, name: str, expected: bytes, value: bytes, ttl: float) -> bool:
        """See `Store.replace`."""
        return bool(await self._run(scripts.REPLACE, [_value(name)], expected, value, _milliseconds(ttl)))

    async def delete(self, name: str, expected: bytes | None = None) -> bool:
        """See `Store.delete`."""
        if expected is None:
            return bool(await self._ask("DEL", _value(name)))
        return bool(await self._run(scripts.DELETE, [_value(name)], expected))

    async def add_member(self, name: str, member: str, ttl: float) -> None:
        """See `Store.add_member`."""
        await self._run(scripts.ENTER, [_slot(name)], member, round(ttl * 1e6))

    async def remove_member(self, names: Sequence[str], member: str) -> bool:
        """See `Store.remove_member`."""
        return bool(await self._run(scripts.LEAVE, [_slot(name) for name in names], member))

    async def members(self, name: str) -> dict[str, float]:
        """See `Store.members`."""
        found: list[bytes] = await self._run(scripts.MEMBERS, [_slot(name)])
        return {
            member.decode(errors="surrogatepass"): int(left) / 1e6
            for member, left in zip(found[::2], found[1::2], strict=True)
        }

    async def push(self, name: str, value: bytes, *, keep: int, ttl: float, setting: Sequence[Value] = ()) -> None:
        """See `Store.push`."""
        keys = [f"{PREFIX}l:{name}", *(_value(each.name) for each in setting)]
        asked: list[str | bytes | int] = [value, keep, _milliseconds(ttl)]
        for each in setting:
            asked += (each.value, _milliseconds(each.ttl))
        await self._run(scripts.PUSH, keys, *asked)

    async def items(self, name: str) -> list[bytes]:
        """See `Store.items`."""
        values: list[bytes] = await self._ask("LRANGE", f"{PREFIX}l:{name}", 0, -1)
        return values

    async def publish(self, channel: str, message: bytes) -> None:
        """See `Store.publish`."""
        await self._ask("PUBLISH", f"{PREFIX}c:{channel}", message)

    @asynccontextmanager
    async def subscribe(self, channel: str) -> AsyncGenerator[AsyncIterator[bytes]]:
        """See `Store.subscribe`."""
        async with self.pubsub.listen(channel) as messages:
            try:
                await self._subscriber.follow(channel)
                yield messages
            finally:
                self._subscriber.forget(channel)

    async def aclose(self) -> None:
        """See `Store.aclose`."""
        await self._subscriber.aclose()
        if self._pipelined is not None:
            await self._pipelined.aclose()

    async def _ask(self, *command: str | bytes | int) -> Any:
        return await self._bounded(lambda connection: connection.ask(*command))

    async def _run(self, script: scripts.Script, keys: Sequence[str], *arguments: str | bytes | int) -> Any:
        asked = (len(keys), *keys, *arguments)

        async def evaluate(connection: PipelinedConnection) -> Any:
            try:
                return await connection.ask("EVALSHA", script.sha, *asked)
            except NoScriptError:  # a new server, or one that was restarted
                return await connection.ask("EVAL", script.text, *asked)

        return await self._bounded(evaluate)

    async def _bounded(self, ask: Callable[[PipelinedConnection], Awaitable[Any]]) -> Any:
        connection = self._open_connection()
        try:
            with Deadline(TIMEOUT, lambda: connection.heard):
                return await ask(connection)
        except TimeoutError:
            connection.hang_up()  # what it still has to say must meet nobody
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
    return [*(f"{PREFIX}r:{rate.name}" for rate in request.rates), *(_slot(slot.name) for slot in request.slots)]


def _milliseconds(ttl: float) -> int:
    return max(1, math.ceil(ttl * 1000))
