"""Subscriptions inside one process."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

BACKLOG = 64
"""Messages kept for a reader that is slow; they are hints, so the oldest go first."""


class LocalPubSub:
    """Hands a channel's messages to whoever listens in this process."""

    def __init__(self) -> None:
        self._queues: dict[str, set[asyncio.Queue[bytes]]] = {}

    def listeners(self, channel: str) -> int:
        """How many listen to the channel."""
        return len(self._queues.get(channel, ()))

    def deliver(self, channel: str, message: bytes) -> None:
        """Hand a message to every listener of the channel."""
        for queue in self._queues.get(channel, ()):
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(message)

    @asynccontextmanager
    async def listen(self, channel: str) -> AsyncGenerator[AsyncIterator[bytes]]:
        """The channel's messages from entering on."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(BACKLOG)
        self._queues.setdefault(channel, set()).add(queue)
        try:
            yield _Messages(queue)
        finally:
            listeners = self._queues[channel]
            listeners.discard(queue)
            if not listeners:
                del self._queues[channel]


class _Messages(AsyncIterator[bytes]):
    """A listener's messages. No generator: one that is cancelled while it waits would be over for good."""

    def __init__(self, queue: asyncio.Queue[bytes]) -> None:
        self._queue = queue

    async def __anext__(self) -> bytes:
        return await self._queue.get()
