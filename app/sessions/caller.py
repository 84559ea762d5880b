"""Whether whoever asked is still there."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Receive


class Caller:
    """The other end of one request whose body has been read. `receive`: the request's."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Notice a hang-up at once, for as long as the context lasts.

        By a task of its own, as a handler is neither told nor cancelled; racing each wait against the hang-up would
        cost four times as much.
        """
        task = asyncio.create_task(self._notice(), name="caller")
        try:
            yield
        finally:
            task.cancel()

    def has_gone(self) -> bool:
        """Whether the connection is known to be closed, by this moment and not by the last turn of the event loop."""
        if not self._gone:
            # One step of receive(): it ends at once where the server knows of the end, and would wait otherwise.
            step = self._receive()
            try:
                step.send(None)  # type: ignore[attr-defined]  # servers' receive are coroutine functions
            except StopIteration as answered:
                self._gone = answered.value["type"] == "http.disconnect"
            else:
                step.close()  # type: ignore[attr-defined]
        return self._gone

    async def has_left(self) -> bool:
        """As `has_gone`, after the event loop has had a look at the connection: for the moment before an answer."""
        for _ in range(2):  # one turn reads what the kernel knows, the next tells the server's connection
            await asyncio.sleep(0)
        return self.has_gone()

    async def _notice(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
