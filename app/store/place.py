"""Where the writable server is: the URL's own address, or what Sentinels or cluster nodes say and a write proves."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from redis.asyncio.connection import Connection
from redis.asyncio.sentinel import Sentinel
from redis.crc import key_slot
from redis.exceptions import MovedError, RedisError

from app.store.replies import reason_of
from app.store.url import Address

MOST_CANDIDATES = 8
MOST_NODES = 16
LOGIN_REFUSED = ("NOAUTH", "uthenti", "WRONGPASS")
"""Parts of the answers of a Sentinel that wants another login."""


class Nowhere(RedisError):
    """No known address leads to a writable server. The text says why, without addresses."""


class Place(Protocol):
    """Gives connections, not connected yet, to the writable server."""

    async def connection(self) -> Connection:
        """Return one to the known address, which is looked up if there is none. Raises RedisError, OSError."""

    async def fresh(self) -> Connection:
        """Return one to the address as it is found now. Raises RedisError, OSError."""

    def leave(self) -> None:
        """Forget the known address: it leads to the wrong server, or to none."""

    async def aclose(self) -> None:
        """Stop looking."""


@dataclass(repr=False, eq=False)
class FixedPlace(Place):
    """One address. Each connection resolves its name again."""

    connect: Callable[[], Connection]

    async def connection(self) -> Connection:
        return self.connect()

    async def fresh(self) -> Connection:
        return self.connect()

    def leave(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


@dataclass(repr=False, eq=False)
class FoundPlace(Place):
    """The address that guides (Sentinels, cluster nodes) name.

    `ask` returns what one guide names, best first. `proof`: a write, which only the right server takes. `timeout`:
    seconds for each answer. One look-up at a time runs in its own task, which outlives the operation that started it:
    with a guide that does not answer it takes longer than an operation may, and would never end otherwise.
    """

    guides: Sequence[Address]
    ask: Callable[[Address], Awaitable[Sequence[Address]]]
    connect: Callable[[Address], Connection]
    proof: Sequence[str | int]
    timeout: float
    _last: Address | None = field(default=None, init=False)
    _looking: asyncio.Task[Address] | None = field(default=None, init=False)
    _asking: set[asyncio.Task[Sequence[Address]]] = field(default_factory=set, init=False)
    """Questions under way, also those whose answers are no longer needed."""

    async def connection(self) -> Connection:
        task = self._looking
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._looking = asyncio.create_task(self._look(), name="store-place")
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # its caller may be gone
        return self.connect(await asyncio.shield(task))

    async def fresh(self) -> Connection:
        return self.connect(await self._look())

    def leave(self) -> None:
        if self._looking is not None and self._looking.done():
            self._looking = None

    async def aclose(self) -> None:
        tasks: list[asyncio.Task[Any]] = [*([self._looking] if self._looking else []), *self._asking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> Address:
        named, reasons = await self._candidates()
        candidates = [*named, *([self._last] if self._last and self._last not in named else [])]
        for index, address in enumerate(candidates):  # grows by what servers answer
            found = await self._prove(address, reasons)
            if found == address:
                self._last = address
                return address
            if found and found not in candidates and index < MOST_CANDIDATES:
                candidates.append(found)
        raise Nowhere(reasons.most_common(1)[0][0] if reasons else "no server named")

    async def _candidates(self) -> tuple[list[Address], Counter[str]]:
        """Return what the guides name, most votes first. A majority is enough, or half a timeout after the first."""
        loop = asyncio.get_running_loop()
        asking = {asyncio.create_task(self._ask(guide)) for guide in list(self.guides)}
        self._asking |= asking
        for task in asking:
            task.add_done_callback(self._asking.discard)
        majority = len(asking) // 2 + 1
        votes, reasons, end = Counter[Address](), Counter[str](), None
        try:
            while asking and not any(count >= majority for count in votes.values()):
                left = None if end is None else max(0.0, end - loop.time())
                done, asking = await asyncio.wait(asking, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                for task in done:
                    if error := task.exception():
                        reasons[reason_of(error) if isinstance(error, Exception) else "cancelled"] += 1
                        continue
                    for rank, address in enumerate(task.result()):
                        votes[address] += 0 if rank else 1
                    end = end or loop.time() + self.timeout / 2
        finally:
            for task in asking:
                task.cancel()
        return [address for address, _ in votes.most_common()], reasons

    async def _ask(self, guide: Address) -> Sequence[Address]:
        async with asyncio.timeout(self.timeout):
            return await self.ask(guide)

    async def _prove(self, address: Address, reasons: Counter[str]) -> Address | None:
        """Return the address if its server takes writes, the one that it names instead, or None."""
        connection = self.connect(address)
        try:
            async with asyncio.timeout(self.timeout):
                await connection.send_command(*self.proof)
                await connection.read_response()
                return address
        except MovedError as error:
            return (error.host or address[0], error.port)
        except (RedisError, OSError, TimeoutError) as error:
            reasons[reason_of(error)] += 1
            return None
        finally:
            await connection.disconnect(nowait=True)


async def _complete(closing: Coroutine[Any, Any, None]) -> None:
    """Await to the end, however often the caller is cancelled meanwhile; then it is cancelled."""
    task, cancelled = asyncio.ensure_future(closing), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


def ask_sentinel(
    service: str, logins: Sequence[Mapping[str, Any]]
) -> Callable[[Address], Awaitable[Sequence[Address]]]:
    """Return a question for one Sentinel, by redis-py's discovery. `logins`: connection options, tried in order."""

    async def ask(address: Address) -> Sequence[Address]:
        for index, options in enumerate(logins):
            sentinel = Sentinel([address], sentinel_kwargs=dict(options))  # type: ignore[no-untyped-call]  # redis-py has not typed it
            try:
                return [await sentinel.discover_master(service)]
            except RedisError as error:
                # redis-py wraps what the Sentinel refused.
                if index + 1 == len(logins) or not any(word in str(error) for word in LOGIN_REFUSED):
                    raise
            finally:
                for client in sentinel.sentinels:
                    with contextlib.suppress(RedisError, OSError):
                        await _complete(client.aclose())
        return []

    return ask


def ask_node(
    tag: str, connect: Callable[[Address], Connection], nodes: list[Address]
) -> Callable[[Address], Awaitable[Sequence[Address]]]:
    """Return a question for one cluster node: who owns the slot of a hash tag.

    Nodes that it names are added to `nodes`: the URL's own may all be replaced one day.
    """
    slot = key_slot(tag.encode())

    async def ask(address: Address) -> Sequence[Address]:
        connection = connect(address)
        try:
            await connection.send_command("CLUSTER", "SLOTS")
            ranges = await connection.read_response()
        finally:
            await connection.disconnect(nowait=True)
        owners: list[Address] = []
        for first, last, *servers in ranges:
            for rank, server in enumerate(servers):
                # Its preferred name, then others.
                extra = server[3] if len(server) > 3 and isinstance(server[3], list) else []
                hosts = [_host(name, address[0]) for name in (server[0], *extra[1::2])]
                for node in ((host, int(server[1])) for host in dict.fromkeys(hosts) if host):
                    if rank == 0 and first <= slot <= last:
                        owners.append(node)
                    if node not in nodes and len(nodes) < MOST_NODES:
                        nodes.append(node)
        # The node itself may own it under a name that is known inside only (a forwarded port, one endpoint for all).
        return [*owners, address]

    return ask


def _host(name: bytes | None, asked: str) -> str:
    if not name:
        return asked  # "the one you asked"
    return "" if name == b"?" else name.decode()
