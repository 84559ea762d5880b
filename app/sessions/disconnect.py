"""Detect clients that disconnect while their request is handled."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Receive


@dataclass(slots=True, repr=False, eq=False)
class ClientConnection:
    """The client of one request whose body has been read.

    A handler is neither notified of a disconnect nor cancelled. So ask the server where it matters: `disconnected`, if
    it offers that (app/server/protocol.py); else one step of the request's `receive`, at a tenth of the cost of a task
    that waits for the disconnect.
    """

    receive: Receive
    disconnected: Callable[[], bool] | None = None
    _closed: bool = False

    def is_closed(self) -> bool:
        """Return whether the server knows, at this moment, that the connection is closed."""
        if self.disconnected is not None:
            return self.disconnected()
        while not self._closed:
            # One step of receive(): it returns at once if the server has a message, and would wait otherwise.
            step = self.receive()
            try:
                step.send(None)  # type: ignore[attr-defined]  # servers' receive are coroutine functions
            except StopIteration as answered:  # the rest of a body is no disconnect
                self._closed = answered.value["type"] == "http.disconnect"
            else:
                step.close()  # type: ignore[attr-defined]
                return False
        return True

    async def poll_is_closed(self) -> bool:
        """Like `is_closed`, after the event loop has polled the connection; for use right before a response."""
        for _ in range(2):  # one turn reads from the kernel, the next informs the server's connection
            await asyncio.sleep(0)
        return self.is_closed()
