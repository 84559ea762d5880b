"""Subscriptions over one connection to Valkey, which is reopened after every loss."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from redis.asyncio.connection import Connection
from redis.exceptions import RedisError

from app.store.local_pubsub import LocalPubSub

TIMEOUT = 0.25
"""Seconds to connect, and for the server to confirm a subscription."""
RETRY_SECONDS = 0.5
SILENCE_SECONDS = 5
"""After this long without a message the server gets a PING; after as long again it counts as lost."""


@dataclass(repr=False, eq=False)
class Subscriber:
    """Pass the server's messages on to `pubsub`. One task, from the first `follow` until closed."""

    connect: Callable[[], Connection]
    pubsub: LocalPubSub
    prefix: str
    _task: asyncio.Task[None] | None = field(default=None, init=False)
    _connection: Connection | None = field(default=None, init=False)
    _followed: dict[str, asyncio.Event] = field(default_factory=dict, init=False)
    _sending: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    async def follow(self, channel: str) -> None:
        """Subscribe to the channel; return when the server has confirmed it, or after 250 ms."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="store-subscriber")
        confirmed = self._followed.get(channel)
        if confirmed is None:
            confirmed = self._followed[channel] = asyncio.Event()
            self._send_soon("SUBSCRIBE", channel)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUT):
                await confirmed.wait()

    def unfollow(self, channel: str) -> None:
        """Unsubscribe if this is the channel's last subscriber; call it before the subscriber leaves `pubsub`."""
        if self.pubsub.subscribers(channel) <= 1 and channel in self._followed:
            del self._followed[channel]
            self._send_soon("UNSUBSCRIBE", channel)

    async def aclose(self) -> None:
        """End the task and its connection."""
        tasks = [*self._sending, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = None

    def _send_soon(self, *command: str) -> None:
        # In a separate task: a reader that leaves is often being cancelled and cannot wait for the network.
        if self._connection is not None:
            task = asyncio.create_task(self._send(self._connection, *command))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self, connection: Connection, command: str, *channels: str) -> None:
        with contextlib.suppress(RedisError, OSError):  # reading fails too, and reconnects
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
                    for confirmed in self._followed.values():
                        confirmed.clear()
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(RETRY_SECONDS)

    async def _read(self, connection: Connection) -> None:
        pinged = False
        while True:
            reply = await connection.read_response(timeout=SILENCE_SECONDS)
            if reply is None:
                if pinged:
                    return
                await connection.send_command("PING")
            pinged = reply is None
            if reply is None or reply[0] not in (b"message", b"subscribe"):
                continue
            channel = reply[1].decode().removeprefix(self.prefix)
            if reply[0] == b"message":
                self.pubsub.deliver(channel, reply[2])
            elif channel in self._followed:
                self._followed[channel].set()
