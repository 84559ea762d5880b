"""A server in simulated time, as a pool of connections meets it: how it accepts them, and when it closes them."""

import asyncio
from itertools import pairwise
from typing import cast

import httpx

from app.oneinbox.dialer import Dialer
from app.oneinbox.http1 import Connection


class Wire(asyncio.Transport):
    """The open end of a simulated connection."""

    def __init__(self, server: "IdleServer", connection: Connection) -> None:
        super().__init__()
        self._server, self.connection = server, connection
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.arm(server.keeps_unused)

    def arm(self, seconds: float | None) -> None:
        """Close the connection after this long without a request; None: never."""
        if self._timer is not None:
            self._timer.cancel()
        if seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self.abort)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Answer a request at once."""
        self._server.requests += 1
        asyncio.get_running_loop().call_soon(self.connection.data_received, self._server.answer)
        self.arm(self._server.keeps_used)

    def abort(self) -> None:
        """End the connection, from either side."""
        if not self._closed:
            self._closed = True
            self._server.open.remove(self)
            asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)

    def is_closing(self) -> bool:
        return self._closed


class IdleServer(Dialer):
    """Connects at once, or as a test has it.

    `keeps_unused`, `keeps_used`: seconds that it keeps idle connections; None: for ever. `connect_seconds`: of a
    handshake. `fails`: connects are refused. `address`: of new connections. `attempts`: times of all connects.
    """

    def __init__(self, keeps_unused: float | None = None, keeps_used: float | None = None) -> None:
        super().__init__(httpx.URL("http://oneinbox.invalid"))
        self.keeps_unused = keeps_unused
        self.keeps_used = keeps_used if keeps_used is not None else keeps_unused
        self.connect_seconds = 0.2
        self.fails = False
        self.address = "192.0.2.1"
        self.moved: set[str] = set()
        self.answer = b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\n{}"
        self.attempts: list[float] = []
        self.requests = 0
        self.open: list[Wire] = []

    async def connect(self, seconds: float | None) -> Connection:
        self.attempts.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.connect_seconds)
        if self.fails:
            raise httpx.ConnectError("refused")
        connection = Connection()
        wire = Wire(self, connection)
        self.open.append(wire)
        connection.connection_made(cast("asyncio.BaseTransport", wire))
        connection.address = self.address
        return connection

    async def refresh(self) -> None:
        """The test says which addresses are gone."""

    def has_moved(self, connection: Connection) -> bool:
        return connection.address in self.moved

    @property
    def shortest_gap(self) -> float:
        """Seconds between the two attempts that were closest together."""
        return min(b - a for a, b in pairwise(self.attempts))
