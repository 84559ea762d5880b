"""Replicas of the broker: start, SIGTERM, SIGKILL."""

import asyncio
from collections.abc import Mapping
from contextvars import copy_context
from functools import lru_cache
from typing import Any

import httpx
from fastapi import FastAPI

from app.api.app import create_app
from app.config.loading import load_settings
from app.store import Store
from tests.simulation.connections import Connection
from tests.simulation.loop import CLOCK, HOST, REQUEST
from tests.simulation.world import World

GRACE = 20.0
"""Seconds that requests have to finish after SIGTERM, as in `serve`."""
LONGEST_SHUTDOWN = 60.0


class _Transport(httpx.AsyncBaseTransport):
    """The transport of every app: each replica has a connection to OneInbox of its own."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        transport: httpx.AsyncBaseTransport = HOST.get().transport
        return await transport.handle_async_request(request)

    async def aclose(self) -> None:
        """Leave it open for the others."""


def _open_store() -> Store:
    store: Store = HOST.get().open_store()
    return store


@lru_cache(512)
def _app_of(environ: tuple[tuple[str, str], ...]) -> FastAPI:
    """Return an app with these settings: made once, since all its state belongs to a replica."""
    return create_app(load_settings(dict(environ), env_file=None), _Transport(), store_factory=_open_store, clock=CLOCK)


class Replica:
    """One process of the broker. `store`: opens its store; `transport`: its connection to OneInbox."""

    def __init__(
        self, world: World, name: str, environ: Mapping[str, str], transport: httpx.AsyncBaseTransport, skew: float = 0
    ) -> None:
        self.world, self.name, self.environ, self.transport, self.skew = world, name, environ, transport, skew
        self.dead = False
        self.died: float | None = None
        """When it was killed."""
        self.told: float | None = None
        """When it got SIGTERM."""
        self.over: float | None = None
        """When it had ended after that."""
        self.up = False
        self.connections: dict[Connection, None] = {}
        self.state: dict[str, Any] = {}
        self.app = _app_of(tuple(sorted(environ.items())))
        self._context = copy_context()
        self._context.run(HOST.set, self)
        self._end = asyncio.Event()
        self.ended: asyncio.Future[None] = world.loop.create_future()
        self.store: Any = None

    def open_store(self) -> Store:
        """Return the store that its settings name; set by the scenario."""
        opened: Store = self.store()
        return opened

    async def start(self) -> None:
        """Start the process, until it serves requests."""
        ready: asyncio.Future[None] = self.world.loop.create_future()

        async def live() -> None:
            try:
                async with self.app.router.lifespan_context(self.app) as state:
                    self.state = dict(state or {})
                    ready.set_result(None)
                    await self._end.wait()
            except Exception as error:
                self.world.violate("X-exception", f"lifespan of {self.name}: {type(error).__name__}: {error}")
                if not ready.done():
                    ready.set_result(None)
            if not self.ended.done():
                self.ended.set_result(None)

        self._life = self.world.loop.create_task(live(), context=self._context)
        await ready
        self.up = True
        self.world.note(self.name, "is up" + (f", its clock {self.skew:+.2f} s" if self.skew else ""))

    def accept(self, connection: Connection) -> None:
        """Serve a request."""
        if self.dead or not self.up:
            connection.break_off("reset")
            return
        if connection.hung_up is not None:
            return
        self.world.note(connection.name, f"{connection.method} {connection.shown} arrives at {self.name}")
        connection.arrived = self.world.now
        context = self._context.copy()
        context.run(REQUEST.set, connection)
        self.connections[connection] = None
        connection.task = self.world.loop.create_task(connection.serve(), context=context)

    def kill(self) -> None:
        """SIGKILL: no further step of its code runs, not even a `finally`."""
        self.world.note(self.name, "is killed (SIGKILL)")
        self.up, self.dead, self.died = False, True, self.world.now
        for connection in list(self.connections):
            self.world.later(0.01, connection.break_off, "reset")

    async def terminate(self) -> None:
        """SIGTERM, as the broker and uvicorn handle it; return when the process has ended."""
        world = self.world
        world.note(self.name, "is told to end (SIGTERM)")
        self.told = world.now
        told: asyncio.Future[None] = world.loop.create_future()

        def end_server() -> None:
            self.up = False
            if not told.done():
                told.set_result(None)

        world.loop.call_soon(self.state["broker"].shutdown.begin, end_server, context=self._context)
        await told
        end = world.now + GRACE
        while self.connections and world.now < end:
            await asyncio.sleep(0.1)
        for connection in list(self.connections):
            world.note(self.name, f"gives {connection} up after {GRACE:.0f} s")
            assert connection.task is not None
            world.loop.call_soon(connection.task.cancel, context=self._context)
        world.loop.call_soon(self._end.set, context=self._context)
        try:
            await asyncio.wait_for(asyncio.shield(self.ended), LONGEST_SHUTDOWN)
            world.note(self.name, "has ended")
        except TimeoutError:
            world.violate("H-stuck", f"{self.name} does not end")
        for connection in list(self.connections):
            connection.break_off("reset")
        self.dead, self.over = True, world.now
