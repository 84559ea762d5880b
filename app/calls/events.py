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
    """Yield the call's current state, each new state, and `end` when no more will come.

    After `lifetime` seconds, or when the process shuts down, the stream closes without `end`: browsers reconnect.
    """
    closing = clock() + min(lifetime, LONGEST_SECONDS)
    sent = ""
    while True:
        changed = subscription.changed
        # Only the latest state: a slow reader skips states, and never keeps more than one in memory.
        if subscription.latest.etag != sent:
            sent = subscription.latest.etag
            yield b"event: call\nid: " + sent.encode() + b"\ndata: " + subscription.latest.body(public_id) + b"\n\n"
            continue
        if subscription.over:
            yield b"event: end\nid: " + sent.encode() + b"\ndata: {}\n\n"
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
    """A stream that gives its place back however it ends, even before the first byte."""

    def __init__(self, content: AsyncIterator[bytes], place: ExitStack) -> None:
        # The header keeps nginx from buffering events.
        super().__init__(content, headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream until it ends or the client disconnects."""
        with self._place:
            await super().__call__(scope, receive, send)
