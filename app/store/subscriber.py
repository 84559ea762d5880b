"""Subscriptions over one connection to Valkey, which is reopened after every loss."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import structlog
from redis.asyncio.connection import Connection
from redis.exceptions import RedisError, ResponseError

from app.store.local_pubsub import LocalPubSub
from app.store.place import Place
from app.store.replies import is_refused_right, is_unknown_command

RETRY_SECONDS = 0.5
MOVED_SECONDS = 0.02
REFUSED_SECONDS = 30
"""Seconds until the next attempt when the user may not subscribe."""
SILENCE_SECONDS = 5
"""After this long without a message the server gets a PING; after as long again it counts as lost."""

log = structlog.stdlib.get_logger()


@dataclass(repr=False, eq=False)
class Subscriber:
    """Pass the server's messages on to `pubsub`. One task, from the first `follow` until closed.

    `timeout`: seconds to connect, and for the server to confirm a subscription. `sharded`: subscribe on the cluster
    shard of `prefix`; becomes False if the server is too old for it. `refused`: the user may not subscribe.
    """

    place: Place
    pubsub: LocalPubSub
    prefix: str
    timeout: float
    sharded: bool = False
    refused: bool = field(default=False, init=False)
    _moved: bool = field(default=False, init=False)
    _unfollowed: list[str] = field(default_factory=list, init=False)
    """Channels whose unsubscription a cluster has yet to confirm."""
    _task: asyncio.Task[None] | None = field(default=None, init=False)
    _connection: Connection | None = field(default=None, init=False)
    _followed: dict[str, asyncio.Event] = field(default_factory=dict, init=False)
    _sending: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    async def follow(self, channel: str) -> None:
        """Subscribe to the channel; return when the server has confirmed or refused it, or after `timeout`."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="store-subscriber")
        confirmed = self._followed.get(channel)
        if confirmed is None:
            confirmed = self._followed[channel] = asyncio.Event()
            self._send_soon("SUBSCRIBE", channel)
        if self.refused:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.timeout):
                await confirmed.wait()

    def unfollow(self, channel: str) -> None:
        """Unsubscribe if this is the channel's last subscriber; call it before the subscriber leaves `pubsub`."""
        if self.pubsub.subscribers(channel) <= 1 and channel in self._followed:
            del self._followed[channel]
            if self.sharded and self._connection is not None:
                self._unfollowed.append(channel)
            self._send_soon("UNSUBSCRIBE", channel)

    def move(self) -> None:
        """Reconnect: the writable server is elsewhere."""
        if self._connection is not None:
            self._moved = True
            task = asyncio.create_task(self._connection.disconnect(nowait=True))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

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
            sharded = "S" if self.sharded else ""
            await connection.send_command(sharded + command, *(self.prefix + channel for channel in channels))

    async def _run(self) -> None:
        while True:
            pause = RETRY_SECONDS
            try:
                await self._follow_server()
            except ResponseError as error:
                if is_refused_right(error):
                    pause = REFUSED_SECONDS
                    self._refuse()
                elif self.sharded and is_unknown_command(error):
                    self.sharded, pause = False, 0
                else:
                    self.place.leave()
            except (RedisError, OSError, TimeoutError):
                self.place.leave()
            if self._moved:
                self._moved, pause = False, MOVED_SECONDS
            await asyncio.sleep(pause)

    async def _follow_server(self) -> None:
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self.timeout):
                connection = await self.place.connection()
                await connection.send_command("PING")  # connects
            self._connection = connection
            if self._followed:
                await self._send(connection, "SUBSCRIBE", *self._followed)
            await self._read(connection)
        finally:
            self._connection = None
            self._unfollowed.clear()
            for confirmed in self._followed.values():
                confirmed.clear()
            if connection is not None:
                await connection.disconnect(nowait=True)

    def _refuse(self) -> None:
        if not self.refused:
            log.warning("store_channels_refused", remedy=f"allow the store's user the channels {self.prefix}*")
        self.refused = True
        for confirmed in self._followed.values():
            confirmed.set()

    async def _read(self, connection: Connection) -> None:
        pinged = False
        while True:
            reply = await connection.read_response(timeout=SILENCE_SECONDS)
            if reply is None:
                if pinged:
                    return
                await connection.send_command("PING")
            pinged = reply is None
            if not isinstance(reply, list) or len(reply) < 3 or reply[1] is None:
                continue
            channel = reply[1].decode().removeprefix(self.prefix)
            if reply[0] == b"sunsubscribe":
                if channel not in self._unfollowed:
                    self._moved = True  # the slot has moved, and the server dropped its subscriptions
                    return
                self._unfollowed.remove(channel)
            elif reply[0] in (b"message", b"smessage"):
                self.pubsub.deliver(channel, reply[2])
            elif reply[0] in (b"subscribe", b"ssubscribe") and channel in self._followed:
                self.refused = False
                self._followed[channel].set()
