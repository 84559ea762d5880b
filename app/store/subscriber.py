"""Subscriptions over one connection to Valkey, made again by itself after every loss."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from redis.asyncio.connection import Connection
from redis.exceptions import RedisError

from app.store.local_pubsub import LocalPubSub

TIMEOUT = 0.25
"""Seconds to connect, and that a subscriber waits for the server's word."""
RETRY_SECONDS = 0.5
SILENCE_SECONDS = 5
"""After so long without a message the server is asked for a sign of life; after as long again it counts as lost."""


@dataclass
class Subscriber:
    """Feeds the hub from the server. One task, from the first subscriber on until closed."""

    connect: Callable[[], Connection]
    pubsub: LocalPubSub
    prefix: str
    _task: asyncio.Task[None] | None = field(default=None, init=False)
    _connection: Connection | None = field(default=None, init=False)
    _followed: dict[str, asyncio.Event] = field(default_factory=dict, init=False)
    _orders: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    async def follow(self, channel: str) -> None:
        """Make the server send the channel; returns when it does, or after 250 ms without a server."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="store-listener")
        followed = self._followed.get(channel)
        if followed is None:
            followed = self._followed[channel] = asyncio.Event()
            self._order("SUBSCRIBE", channel)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUT):
                await followed.wait()

    def forget(self, channel: str) -> None:
        """Call before a listener leaves the hub: with the last one the server need not send any more."""
        if self.pubsub.listeners(channel) <= 1 and channel in self._followed:
            del self._followed[channel]
            self._order("UNSUBSCRIBE", channel)

    async def aclose(self) -> None:
        """End the task and its connection."""
        tasks = [*self._orders, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = None

    def _order(self, *command: str) -> None:
        # In a task of its own: a reader that leaves is often being cancelled and cannot wait for the network.
        if self._connection is not None:
            order = asyncio.create_task(self._send(self._connection, *command))
            self._orders.add(order)
            order.add_done_callback(self._orders.discard)

    async def _send(self, connection: Connection, command: str, *channels: str) -> None:
        with contextlib.suppress(RedisError, OSError):  # the reading side notices, and starts again
            await connection.send_command(command, *(self.prefix + channel for channel in channels))

    async def _run(self) -> None:
        while True:
            connection = self.connect()
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                try:
                    async with asyncio.timeout(TIMEOUT):
                        await connection.send_command("PING")  # connects
                    self._connection = connection
                    if self._followed:
                        await self._send(connection, "SUBSCRIBE", *self._followed)
                    await self._read(connection)
                finally:
                    self._connection = None
                    for followed in self._followed.values():
                        followed.clear()
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(RETRY_SECONDS)

    async def _read(self, connection: Connection) -> None:
        asked = False
        while True:
            reply = await connection.read_response(timeout=SILENCE_SECONDS)
            if reply is None:
                if asked:
                    return
                await connection.send_command("PING")
            asked = reply is None
            if reply is None or reply[0] not in (b"message", b"subscribe"):
                continue
            channel = reply[1].decode().removeprefix(self.prefix)
            if reply[0] == b"message":
                self.pubsub.deliver(channel, reply[2])
            elif channel in self._followed:
                self._followed[channel].set()
