"""The store of several replicas: Valkey or Redis (6 or newer), over redis-py's connections.

Every operation has BROKER_STORE_TIMEOUT in all: waiting for its turn, connecting, logging in, sending, receiving.
(deadline.py gives the server more while this process itself is too busy to read.) One timer covers all of it;
redis-py's own timers would cost CPU for each part and add up. Every failure is a `StoreUnavailable` that names neither
address nor password. A stalled server may still run a timed-out operation: it counts too much, never too little.

A server that says it is the wrong one (READONLY, MOVED, LOADING, …) is left: place.py finds the right one, which is
asked within the same timeout.

Of redis-py it uses the connection alone (pipeline.py): the client and the pool above it cost several times as much, and
the pool's waiters can lose their turn when others are cancelled.
"""

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, cast

from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from app.clock import SYSTEM_CLOCK, Clock
from app.store import scripts
from app.store.deadline import Deadline
from app.store.local_pubsub import LocalPubSub
from app.store.pipeline import PipelinedConnection
from app.store.place import FixedPlace, FoundPlace, Nowhere, Place, ask_node, ask_sentinel
from app.store.protocol import (
    BUDGET,
    KEPT,
    PAGE,
    BudgetState,
    Change,
    Decision,
    LimitRequest,
    RateState,
    Store,
    StoreUnavailable,
)
from app.store.replies import Elsewhere, is_refused_right, is_unknown_command, reason_of
from app.store.subscriber import Subscriber
from app.store.url import Address, parse_store_url

PREFIX = "oib"
TIMEOUT = 0.25
PROOF_MILLISECONDS = 10_000


class Refused(StoreUnavailable):
    """The store's user lacks a right. The store itself works."""

    lacks_right = True


class UnknownCommand(StoreUnavailable):
    """The server is too old for a command."""


class ValkeyStore(Store):
    """Keep everything on Valkey or Redis: one server, the primary that Sentinels name, or one shard of a cluster.

    It has one connection for commands and one for subscriptions, and connects with the first operation. `timeout`:
    seconds an operation may take in all. `prefix`: of all names in the store. `clock`: this process's. Raises
    ValueError, without the URL in it, when the URL cannot be used.
    """

    shared = True

    def __init__(
        self, url: str, *, timeout: float = TIMEOUT, prefix: str = PREFIX, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self.timeout = timeout
        self._clock = clock
        self._epoch = clock.now() - clock.monotonic()
        self._prefix = prefix
        self._url = parse_store_url(url)
        # One hash tag: a decision is one script, so all its keys must be in one shard.
        self._names = f"{{{prefix}}}:" if self._url.kind == "cluster" else f"{prefix}:"
        self._rates, self._slots, self._values, self._lists = (f"{self._names}{kind}:" for kind in "rsvl")
        self._due, self._budgets = f"{self._slots}due", f"{self._names}b:"
        self._sign = f"{self._values}place:{secrets.token_hex(8)}"
        self._pipelined: PipelinedConnection | None = None
        self._place = self._find_place()
        self.moves = 0
        self.pubsub = LocalPubSub()
        sharded = self._url.kind == "cluster"
        self._subscriber = Subscriber(self._place, self.pubsub, f"{self._names}c:", timeout, sharded)

    @property
    def channels(self) -> Literal["ok", "refused"]:
        """`refused`: the user may not subscribe, so this process hears only what it publishes itself."""
        return "refused" if self._subscriber.refused else "ok"

    def use(self, url: str) -> None:
        """Use another URL of the same kind from now on, such as one with a new password. Raises ValueError."""
        parsed = parse_store_url(url)
        if parsed.kind != self._url.kind:
            raise ValueError("is of another kind, which needs a restart")
        self._url = parsed
        self._place = self._subscriber.place = self._find_place()
        self._leave(self._pipelined)

    async def decide(self, request: LimitRequest) -> Decision:
        rates, slots, member, lease, cost, enforce, record, budgets = request
        if slots and cost and not member:
            raise ValueError("slots need a member")
        arguments: list[str | bytes | int] = [len(rates), len(rates) + len(slots), cost, int(enforce), member]
        arguments += (round(lease * 1e6), len(budgets))
        for rate in rates:
            arguments += (rate.amount, rate.seconds * 1_000_000)
        arguments += [-1 if slot.capacity is None else slot.capacity for slot in slots]
        for slot, seconds, enforced in budgets:
            arguments += (slot, -1 if seconds is None else seconds, int(enforced), BUDGET + slots[slot].name)
        if record is not None:
            arguments += (record.value, _milliseconds(record.ttl))
        answer: bytes = await self._run(scripts.DECIDE, self._keys(request), *arguments)
        numbers = list(map(int, answer.split()))
        split = 1 + 4 * len(rates)
        last = split + 2 * len(slots)
        refusals = [*numbers[1:split:4], *numbers[split:last:2], *numbers[last::3]]
        return Decision(
            refused=tuple(index for index, refusal in enumerate(refusals) if refusal),
            rates=tuple(
                RateState(numbers[at + 1], numbers[at + 2] / 1e6, numbers[at + 3]) for at in range(1, split, 4)
            ),
            used=tuple(numbers[split + 1 : last : 2]),
            counted=numbers[0] == 1,
            budgets=tuple(
                BudgetState(math.inf if budget.seconds is None else numbers[at + 1] / 1e3, numbers[at + 2] / 1e3)
                for at, budget in zip(range(last, len(numbers), 3), budgets, strict=True)
            ),
        )

    async def give_back(self, request: LimitRequest, decision: Decision) -> bool:
        if not decision.counted:
            return True
        rates, slots = len(request.rates), len(request.slots)
        arguments: list[str | int] = [rates, rates + slots, request.cost, request.member, len(request.budgets)]
        for rate, state in zip(request.rates, decision.rates, strict=True):
            arguments += (rate.amount, rate.seconds * 1_000_000, int(state.mark))
        for budget in request.budgets:
            arguments += (budget.slot, BUDGET + request.slots[budget.slot].name)
        await self._run(scripts.GIVE_BACK, self._keys(request), *arguments)
        return True

    async def get(self, name: str) -> bytes | None:
        value: bytes | None = await self._ask("GET", self._values + name)
        return value

    async def set(self, name: str, value: bytes, ttl: float) -> None:
        await self._ask("SET", self._values + name, value, "PX", _milliseconds(ttl))

    async def add(self, name: str, value: bytes, ttl: float) -> bool:
        return await self._ask("SET", self._values + name, value, "NX", "PX", _milliseconds(ttl)) is not None

    async def replace(self, name: str, expected: bytes, value: bytes, ttl: float) -> bool:
        return bool(await self._run(scripts.REPLACE, [self._values + name], expected, value, _milliseconds(ttl)))

    async def delete(self, name: str, expected: bytes | None = None) -> bool:
        if expected is None:
            return bool(await self._ask("DEL", self._values + name))
        return bool(await self._run(scripts.DELETE, [self._values + name], expected))

    async def add_member(self, name: str, member: str, ttl: float) -> None:
        await self._run(scripts.ADD_MEMBER, [self._slots + name], member, round(ttl * 1e6))

    async def remove_member(self, names: Sequence[str], member: str) -> bool:
        return bool(await self._run(scripts.REMOVE_MEMBER, [self._slots + name for name in names], member))

    async def members(self, name: str) -> dict[str, float]:
        members: dict[str, float] = {}
        cursor = b"0"
        while True:
            cursor, found = await self._run(scripts.MEMBERS, [self._slots + name], cursor)
            members |= {
                member.decode(errors="surrogatepass"): int(left) / 1e6
                for member, left in zip(found[::2], found[1::2], strict=True)
            }
            if cursor == b"0":
                return members

    async def change(self, change: Change) -> bool:
        keys: list[str] = []
        arguments: list[str | bytes | int] = []
        for name, expected in change.expected.items():
            keys.append(self._values + name)
            arguments += ("none",) if expected is None else ("is", expected)
        for name, value, ttl in change.values:
            keys.append(self._values + name)
            arguments += ("set", value, _milliseconds(ttl))
        for name, member, ttl, timed in change.joins:
            if timed:
                keys += (self._slots + name, self._budgets + name, self._due)
                arguments += ("enter", member, round(ttl * 1e6), BUDGET + name)
            else:
                keys.append(self._slots + name)
                arguments += ("join", member, round(ttl * 1e6))
        for name, member, seconds in change.leaves:
            if seconds is None:
                keys.append(self._slots + name)
                arguments += ("leave", member)
            else:
                keys += (self._slots + name, self._budgets + name, self._due)
                arguments += ("end", member, round(seconds * 1000), BUDGET + name)
        if change.entry is not None:
            name, value, keep, ttl = change.entry
            keys.append(self._lists + name)
            arguments += ("push", value, keep, _milliseconds(ttl))
        if change.due is not None:
            member, delay = change.due
            keys.append(self._due)
            arguments += ("done", member) if delay is None else ("due", member, round(delay * 1e6))
        return bool(await self._run(scripts.CHANGE, keys, *arguments))

    async def pages(self, name: str) -> AsyncIterator[list[str]]:
        cursor = b"0"
        while True:
            cursor, found = await self._ask("ZSCAN", self._slots + name, cursor, "COUNT", PAGE)
            yield [member.decode(errors="surrogatepass") for member in found[::2]]
            if cursor == b"0":
                return

    async def take_due(self, most: int, claim: float, held: Sequence[str] = ()) -> list[str]:
        taken: list[bytes] = await self._run(scripts.TAKE_DUE, [self._due], most, round(claim * 1e6), *held)
        return [member.decode(errors="surrogatepass") for member in taken]

    async def has_run_out(self, name: str, seconds: int | None) -> bool:
        keys = [self._slots + name, self._budgets + name, self._due]
        limit = "" if seconds == KEPT else -1 if seconds is None else seconds
        return bool(await self._run(scripts.HAS_RUN_OUT, keys, limit, BUDGET + name))

    async def due_in(self, members: Sequence[str]) -> list[float | None]:
        found: list[bytes | None] = await self._run(scripts.DUE_IN, [self._due], *members)
        return [None if left is None else int(left) / 1e6 for left in found]

    async def items(self, name: str) -> list[bytes]:
        values: list[bytes] = await self._ask("LRANGE", self._lists + name, 0, -1)
        return values

    async def publish(self, channel: str, message: bytes) -> None:
        name = f"{self._names}c:{channel}"
        if self._subscriber.sharded:
            try:
                await self._bounded(lambda connection: connection.send("SPUBLISH", name, message))
            except UnknownCommand:
                self._subscriber.sharded = False
            else:
                return
        await self._ask("PUBLISH", name, message)

    @asynccontextmanager
    async def subscribe(self, channel: str) -> AsyncGenerator[AsyncIterator[bytes]]:
        async with self.pubsub.subscribe(channel) as messages:
            try:
                await self._subscriber.follow(channel)
                yield messages
            finally:
                self._subscriber.unfollow(channel)

    def now(self) -> float:
        return self._clock.monotonic() + self._epoch

    async def mark(self, name: str, beat_name: str, value: str, beat: int, ttl: float) -> tuple[str, bool, int]:
        """Set `name` if there is none, and the beat; return the value, whether it is new, and the beat before.

        It also tells how far the server's clock is ahead.
        """
        keys, sent = [self._values + name, self._values + beat_name], self._clock.monotonic()
        kept, is_new, before, now = await self._run(scripts.MARK, keys, value, beat, _milliseconds(ttl))
        self._epoch = int(now) / 1e6 - (sent + self._clock.monotonic()) / 2
        return bytes(kept).decode(), bool(is_new), int(before)

    async def info(self) -> Mapping[str, str]:
        """Return what the server says about itself (INFO; `save` if CONFIG may be read). Raises StoreUnavailable."""
        answer: bytes = await self._ask("INFO")
        pairs = (line.partition(":") for line in answer.decode("utf-8", "replace").splitlines())
        about = {name: value for name, separator, value in pairs if separator}
        with contextlib.suppress(StoreUnavailable):  # most managed stores refuse it
            config: list[bytes] = await self._ask("CONFIG", "GET", "save")
            about |= {"save": config[1].decode()} if len(config) == 2 else {}
        return about

    async def may_publish(self) -> bool:
        """Return whether the user may use the broker's channels. Raises StoreUnavailable."""
        async with self.subscribe("doctor"):
            try:
                await self.publish("doctor", b"")
            except Refused:
                return False
            return self.channels == "ok"

    @property
    def rights(self) -> str:
        """The ACL rules that the store's user needs."""
        return f"~{self._names}* &{self._names}* +@all -@admin -@dangerous +info"

    async def check_place(self) -> None:
        """Check that a new connection leads to the server in use; if it does not, go where it leads. Never raises.

        A name may point elsewhere by now, or Sentinels name another server, while the old one still takes writes.
        """
        connection, nonce = self._pipelined, secrets.token_hex(8)
        if connection is None or connection.is_broken:
            return
        try:
            async with asyncio.timeout(self.timeout * 2):
                fresh = await self._place.fresh()
                try:
                    await fresh.send_command("SET", self._sign, nonce, "PX", PROOF_MILLISECONDS)
                    await fresh.read_response()
                finally:
                    await fresh.disconnect(nowait=True)
                if await connection.send("GET", self._sign) != nonce.encode():
                    self._leave(connection)
        except (RedisError, OSError, TimeoutError):
            return  # the connection in use may work all the same; operations will tell

    async def aclose(self) -> None:
        await self._subscriber.aclose()
        if self._pipelined is not None:
            await self._pipelined.aclose()
        await self._place.aclose()

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
            with Deadline(self.timeout, lambda: connection.heard):
                try:
                    return await operation(connection)
                except Elsewhere:
                    self._leave(connection)
                    connection = self._open_connection()
                    return await operation(connection)
        except TimeoutError:
            connection.abort()  # a late answer must not reach a later command
            raise StoreUnavailable(f"no answer within {self.timeout * 1000:.0f} ms") from None
        except (RedisError, OSError) as error:
            if isinstance(error, Elsewhere):
                self._leave(connection)
            raise _unavailable(error) from None

    def _leave(self, connection: PipelinedConnection | None) -> None:
        """Leave the connection to the wrong server; only the first of its users does anything."""
        if connection is self._pipelined:
            if connection is not None:
                connection.retire()
            self._pipelined = None
            self._move()

    def _move(self) -> None:
        self.moves += 1
        self._place.leave()
        self._subscriber.move()

    def _open_connection(self) -> PipelinedConnection:
        if self._pipelined is None or self._pipelined.is_broken:
            if self._pipelined is not None:
                self._move()
            self._pipelined = PipelinedConnection(self._place.connection)
        return self._pipelined

    def _find_place(self) -> Place:
        """Return the place that the URL describes."""
        url = self._url
        options = {
            **url.options,
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": None,
            "socket_connect_timeout": None,  # one timer for the whole operation
            "health_check_interval": 0,
            "encoding_errors": "surrogatepass",  # a name may be any str
            "protocol": 2,
            "driver_info": None,
        }
        if url.tls:
            # Made once, when the first connection needs it: to read all authorities takes 50 ms.
            tls_context = SSLConnection(**options).ssl_context

        def connect(address: Address) -> Connection:
            if not url.tls:
                return Connection(host=address[0], port=address[1], **options)
            connection = SSLConnection(host=address[0], port=address[1], **options)
            connection.ssl_context = tls_context
            return connection

        proof = ("SET", self._sign, "1", "PX", PROOF_MILLISECONDS)
        if url.kind == "unix":
            return FixedPlace(lambda: cast("Connection", UnixDomainSocketConnection(**options)))
        if url.kind == "server":
            return FixedPlace(lambda: connect(url.addresses[0]))
        if url.kind == "cluster":
            nodes = list(url.addresses)
            return FoundPlace(nodes, ask_node(f"{{{self._prefix}}}", connect, nodes), connect, proof, self.timeout)
        common = {name: value for name, value in options.items() if name.startswith("ssl_")} | {
            "ssl": url.tls,
            "protocol": 2,
            # redis-py tries for 4 s otherwise.
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": self.timeout,
            "socket_connect_timeout": self.timeout,
        }
        own = {name: url.options[name] for name in ("username", "password") if name in url.options}
        logins: list[Mapping[str, Any]] = [url.sentinel_login] if url.sentinel_login else [{}, own] if own else [{}]
        ask = ask_sentinel(url.service, [common | dict(login) for login in logins])
        return FoundPlace(url.addresses, ask, connect, proof, self.timeout)

    def _keys(self, request: LimitRequest) -> list[str]:
        rates, slots = self._rates, self._slots
        keys = [*[rates + rate.name for rate in request.rates], *[slots + slot.name for slot in request.slots]]
        if request.budgets:
            keys += [*[self._budgets + request.slots[budget.slot].name for budget in request.budgets], self._due]
        return keys if request.record is None else [*keys, self._values + request.record.name]


def _unavailable(error: Exception) -> StoreUnavailable:
    if is_refused_right(error):
        return Refused(reason_of(error))
    if isinstance(error, ResponseError) and is_unknown_command(error):
        return UnknownCommand(reason_of(error))
    return StoreUnavailable(str(error) if isinstance(error, Elsewhere | Nowhere) else reason_of(error))


def _milliseconds(ttl: float) -> int:
    return max(1, math.ceil(ttl * 1000))
