"""Connections to one host: bounded, kept open between requests, and a few of them ready at any time."""

import asyncio
import contextlib
import random

import httpx

from app.oneinbox.dialer import ADDRESS_SECONDS, Dialer
from app.oneinbox.http1 import Connection
from app.oneinbox.idle_time import IdleTime
from app.telemetry.metrics import Metrics

IDLE_SECONDS = 15.0
"""A connection beyond the warm ones is closed after this long without a request."""
LOOK_SECONDS = 1.0
"""After this long without a request the kernel is asked, too, whether a connection is still open."""
WORTH_SECONDS = 2.0
"""A server that closes idle connections sooner gets no warm ones: it would be handshake after handshake."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Shortest and longest pause in seconds between attempts that fail, before up to a quarter is added."""
CONNECT_SECONDS = 10.0
"""Longest attempt to connect that no request waits for."""


class Pool:
    """The connections to one host. Create it inside the event loop.

    `size`: most connections in use; further requests wait. `warm`: connections kept ready, however long no request
    comes: each is replaced before the server would close it, the new one first. `metrics`: counts handshakes.
    """

    def __init__(self, dialer: Dialer, *, size: int, warm: int = 0, metrics: Metrics | None = None) -> None:
        self._dialer = dialer
        self._warm = warm
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(size)
        self._in_use = 0
        self._idle: list[Connection] = []
        # A server may keep a connection that has carried nothing for another time than one that has.
        self._idle_times = {carried: IdleTime() for carried in (False, True)}
        self._closing: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._keeping = self._loop.create_task(self._keep_warm(), name="warm-connections") if warm else None

    async def enter(self) -> None:
        """Wait for room for one more request; `leave` gives it back."""
        await self._room.acquire()
        self._in_use += 1

    def leave(self, connection: Connection | None = None) -> None:
        """Give room back, and the connection that a request was answered on, if it was."""
        self._room.release()
        self._in_use -= 1
        if connection is None:
            self._changed.set()
            return
        if not connection.has_carried:
            connection.has_carried = True
            if (seconds := connection.keep_alive_seconds()) is not None:
                self._idle_times[True].hint(seconds)
        connection.idle_since = self._loop.time()
        self._keep(connection)

    def put_back(self, connection: Connection) -> None:
        """Keep a connection on which nothing was sent, for the next request."""
        self._keep(connection)
        self._idle.sort(key=lambda each: each.idle_since)

    def reuse(self) -> Connection | None:
        """Return the connection used last that can surely take a request; None if there is none."""
        now = self._loop.time()
        while self._idle:
            connection = self._idle.pop()
            connection.on_lost = None
            age = now - connection.idle_since
            if (
                connection.is_reusable
                and age < self._idle_times[connection.has_carried].usable(now)
                and (age < LOOK_SECONDS or not connection.has_news())
            ):
                return connection
            connection.abort()
        return None

    async def connect(self, seconds: float | None) -> Connection:
        """Return a new connection. Raises as `Dialer.connect` does."""
        if self._metrics is not None:
            self._metrics.count_handshake()
        begun = self._loop.time()
        connection = await self._dialer.connect(seconds)
        for idle_time in self._idle_times.values():
            idle_time.connect_seconds = self._loop.time() - begun
        connection.idle_since = self._loop.time()
        return connection

    async def aclose(self) -> None:
        """Close all idle connections, and keep none warm."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        if self._closing is not None:
            self._closing.cancel()
        self._dialer.close()
        for idle_time in self._idle_times.values():
            idle_time.close()
        while self._idle:
            self._drop(self._idle[0])

    def _keep(self, connection: Connection) -> None:
        if not connection.is_reusable:
            connection.abort()
            self._changed.set()
            return
        connection.on_lost = self._lost
        self._idle.append(connection)
        if self._closing is None and len(self._idle) > self._warm:
            self._closing = self._loop.call_later(IDLE_SECONDS, self._close_idle)

    def _lost(self, connection: Connection) -> None:
        """Note that the server closed an idle connection."""
        now = self._loop.time()
        self._idle.remove(connection)
        self._idle_times[connection.has_carried].closed(now - connection.idle_since, now)
        self._changed.set()

    def _close_idle(self) -> None:
        """Close connections idle for IDLE_SECONDS, except the warm ones; the list begins with the oldest."""
        long_ago = self._loop.time() - IDLE_SECONDS
        while len(self._idle) > self._warm and self._idle[0].idle_since <= long_ago:
            self._drop(self._idle[0])
        self._closing = None
        if len(self._idle) > self._warm:
            self._closing = self._loop.call_later(self._idle[0].idle_since - long_ago, self._close_idle)

    def _drop(self, connection: Connection) -> None:
        self._idle.remove(connection)
        connection.on_lost = None
        connection.abort()

    # --- in the background

    async def _keep_warm(self) -> None:
        pause, look_up_at = 0.0, self._loop.time()
        while True:
            self._changed.clear()
            if (now := self._loop.time()) >= look_up_at:
                look_up_at = now + ADDRESS_SECONDS
                await self._dialer.refresh()
            due = [each for each in self._idle if self._is_due(each)]
            if self._in_use + len(self._idle) - len(due) < self._warm:
                if await self._add():
                    pause = 0.0
                    self._changed.set()  # one more may be missing
                else:
                    pause = min(max(FIRST_PAUSE, 2 * pause), LONGEST_PAUSE)
                    await asyncio.sleep(pause * random.uniform(1, 1.25))  # noqa: S311 - no secret
                    continue
            for connection in due:
                if connection in self._idle and self._in_use + len(self._idle) > self._warm:
                    self._retire(connection)
            await self._wait_until(min(look_up_at, self._next_renewal()))

    def _is_due(self, connection: Connection) -> bool:
        now = self._loop.time()
        renewal = self._idle_times[connection.has_carried].renewal(now)
        return now - connection.idle_since >= renewal or self._dialer.has_moved(connection)

    def _next_renewal(self) -> float:
        """Return when the next connection is due; one that is in use now may be due a whole idle time later."""
        now = self._loop.time()
        renewals = {carried: idle_time.renewal(now) for carried, idle_time in self._idle_times.items()}
        returned = now + max(renewals[True], LOOK_SECONDS)
        return min([returned, *(each.idle_since + renewals[each.has_carried] for each in self._idle)])

    async def _add(self) -> bool:
        """Add an idle connection; return whether the server keeps such connections long enough."""
        try:
            connection = await self.connect(CONNECT_SECONDS)
        except httpx.TransportError:
            return False
        self._keep(connection)
        # A server that closes at once has done so by then; and no attempt follows another sooner.
        await asyncio.sleep(LOOK_SECONDS)
        if not (connection.is_reusable or connection.has_carried):
            return False
        return self._idle_times[False].usable(self._loop.time()) >= WORTH_SECONDS

    def _retire(self, connection: Connection) -> None:
        """Use a connection no more. It may stay open to show how long the server keeps it."""
        if self._dialer.has_moved(connection):
            self._drop(connection)
            return
        self._idle.remove(connection)
        connection.on_lost = None
        if not self._idle_times[connection.has_carried].lead(connection, self._loop.time()):
            connection.abort()

    async def _wait_until(self, time: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(max(time, self._loop.time() + 0.01)):
                await self._changed.wait()
