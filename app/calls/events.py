"""Server-Sent Events of one call (HTML standard, section 9.2)."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.calls.poller import Subscription
from app.calls.schemas import Ending
from app.limits import Bounds

KEEP_ALIVE_SECONDS = 15.0
LONGEST_SECONDS = 3600.0
NEARER_SECONDS = 10.0
"""An end that comes nearer by more than this is announced again."""


@dataclass(slots=True)
class EndNotice:
    """The announcement of a call's end, once per stream, unless the end comes nearer.

    `warn_seconds`: how long before the end; 0: never. `now`: Unix time.
    """

    warn_seconds: float
    now: Callable[[], float]
    _announced: float = math.inf
    """The end that clients know of, once one was announced."""

    def due_in(self, bounds: Bounds) -> float:
        """Return the seconds until the end is to be announced."""
        ends_at = bounds.ends_at
        if ends_at is None or not self.warn_seconds:
            return math.inf
        if self._announced != math.inf:
            self._announced = max(self._announced, ends_at)  # it was put off, and may come nearer again
        if self._announced - ends_at <= NEARER_SECONDS:
            return math.inf
        return ends_at - self.warn_seconds - self.now()

    def take(self, bounds: Bounds) -> bytes | None:
        """Return the event if it is due. It has no id: a client that reconnects still names the state it has seen."""
        if bounds.ends_at is None or self.due_in(bounds) > 0:
            return None
        self._announced = bounds.ends_at
        ending = Ending(
            ends_at=datetime.fromtimestamp(int(bounds.ends_at), UTC),
            seconds_left=max(0, math.ceil(int(bounds.ends_at) - self.now())),
            reason=bounds.reason,
        )
        return b"event: ending\ndata: " + ending.model_dump_json().encode() + b"\n\n"


async def events(
    subscription: Subscription, public_id: str, lifetime: float, clock: Callable[[], float], notice: EndNotice
) -> AsyncIterator[bytes]:
    """Yield the call's current state, each new state, a notice of its end, and `end` when no more will come.

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
        if (ending := notice.take(subscription.latest.bounds)) is not None:
            yield ending
            continue
        due = notice.due_in(subscription.latest.bounds)
        try:
            async with asyncio.timeout(min(KEEP_ALIVE_SECONDS, left, due)):
                await changed.wait()
        except TimeoutError:
            if due > KEEP_ALIVE_SECONDS and closing - clock() > 0:
                yield b": keep-alive\n\n"


class EventStream(StreamingResponse):
    """A stream that gives its place back however it ends, even before the first byte."""

    def __init__(self, content: AsyncIterator[bytes], place: ExitStack) -> None:
        headers = {
            "Content-Type": "text/event-stream",
            # A proxy that compresses would collect events until there are enough (RFC 9111, section 5.2.2.6).
            "Cache-Control": "no-store, no-transform",
            "X-Accel-Buffering": "no",  # keeps nginx from buffering
        }
        super().__init__(content, headers=headers)
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream until it ends or the client disconnects."""
        with self._place:
            await super().__call__(scope, receive, send)
