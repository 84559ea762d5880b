"""Server-Sent Events of one call (HTML standard, section 9.2)."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.calls.poller import Subscription

KEEP_ALIVE_SECONDS = 15.0
LONGEST_SECONDS = 3600.0


async def events(
    subscription: Subscription, public_id: str, lifetime: float, clock: Callable[[], float]
) -> AsyncIterator[bytes]:
    """The call's state at once, each new one, and `end` when nothing new will come.

    After `lifetime` seconds, or when the process goes down, the stream just closes: the browser comes back.
    """
    closing = clock() + min(lifetime, LONGEST_SECONDS)
    told = ""
    while True:
        changed = subscription.changed
        # The latest state only: a slow reader misses states, and never holds more than one in memory.
        if subscription.latest.etag != told:
            told = subscription.latest.etag
            yield b"event: call\nid: " + told.encode() + b"\ndata: " + subscription.latest.body(public_id) + b"\n\n"
            continue
        if subscription.over:
            yield b"event: end\nid: " + told.encode() + b"\ndata: {}\n\n"
            return
        left = closing - clock()
        if subscription.closed or left <= 0:
            return
        try:
            async with asyncio.timeout(min(KEEP_ALIVE_SECONDS, left)):
                await changed.wait()
        except TimeoutError:
            if closing - clock() > 0:
                yield b": keep-alive\n\n"


class EventStream(StreamingResponse):
    """A stream that gives its place back however it ends, even before its first byte."""

    def __init__(self, content: AsyncIterator[bytes], place: ExitStack) -> None:
        # Proxies that buffer would hold events back; nginx is told so by this header.
        super().__init__(content, headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream until it ends or the client is gone."""
        with self._place:
            await super().__call__(scope, receive, send)
