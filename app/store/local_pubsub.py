"""Subscriptions inside one process."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

BACKLOG = 64
"""Messages kept for a slow reader. They are hints, so the oldest are dropped first."""


class LocalPubSub:
    """Deliver messages to the subscribers of a channel in this process."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[asyncio.Queue[bytes], None]] = {}  # ordered, unlike a set

    def subscribers(self, channel: str) -> int:
        """Return the number of subscribers of the channel."""
        return len(self._queues.get(channel, ()))

    def deliver(self, channel: str, message: bytes) -> None:
        """Give a message to every subscriber of the channel."""
        for queue in self._queues.get(channel, ()):
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(message)

    @asynccontextmanager
    async def subscribe(self, channel: str) -> AsyncGenerator[AsyncIterator[bytes]]:
        """Receive the channel's messages from now on."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(BACKLOG)
        self._queues.setdefault(channel, {})[queue] = None
        try:
            yield _Messages(queue)
        finally:
            queues = self._queues[channel]
            queues.pop(queue, None)
            if not queues:
                del self._queues[channel]


@dataclass(frozen=True)
class _Messages(AsyncIterator[bytes]):
    """A subscriber's messages. Not a generator, which would end when it is cancelled while waiting."""

    queue: asyncio.Queue[bytes]

    async def __anext__(self) -> bytes:
        return await self.queue.get()
