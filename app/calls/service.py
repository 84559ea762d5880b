"""Read, list, follow and stop calls, for their owners."""

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from app.calls.cache import CallCache
from app.calls.events import LONGEST_SECONDS, EndNotice, EventStream, events
from app.calls.ownership import Ownership
from app.calls.poller import CallPoller
from app.calls.snapshots import Snapshot
from app.identity import User
from app.limits import LiveCalls
from app.oneinbox import OneInbox
from app.oneinbox.errors import Failed, NoSuchCall, OneInboxError
from app.problems import Problem, retry_later
from app.store import StoreUnavailable

AT_ONCE = 8
"""Calls of one list that are fetched at once."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Calls:
    """Calls, each visible to its owner only.

    Another user's call and no call are the same `not-found`. `call_id`, wherever a method takes one, is what
    `Ownership.call_id` made of the user's path. `warn_seconds`: how long before a call's end its streams are told; 0:
    never. `now`: Unix time.
    """

    oneinbox: OneInbox
    ownership: Ownership
    cache: CallCache
    poller: CallPoller
    live: LiveCalls
    warn_seconds: float
    now: Callable[[], float] = time.time

    async def read(self, user: User, call_id: str) -> Snapshot:
        """Return the state of a user's call; a `stop_later` is taken back. Raises `not-found`."""
        snapshot = await self._read(user, call_id)
        await self.live.keep(call_id)
        return snapshot

    async def _read(self, user: User, call_id: str) -> Snapshot:
        if is_users := await self._is_users(user, call_id):
            snapshot = await self.cache.get(call_id)
        else:
            snapshot = await self.cache.get_if(partial(self._owns, user), call_id)
        if snapshot is None or not self._owns(user, snapshot, started=is_users):
            raise Problem("not-found")
        return snapshot

    async def list(self, user: User) -> list[bytes]:
        """Return the user's calls of the last day, as JSON. Raises `not-found` in anonymous mode."""
        if user.mode == "anonymous":
            raise Problem("not-found")  # an address is no identity
        try:
            started = await self.live.of_user(user)
        except StoreUnavailable:
            raise retry_later("at-capacity", 5, reason="store-down") from None
        places = asyncio.Semaphore(AT_ONCE)

        async def body(call_id: str) -> bytes | None:
            async with places:
                snapshot = await self.cache.get(call_id)
            # A call that cannot be read is not listed.
            if snapshot is None or not self._owns(user, snapshot, started=True):
                return None
            return snapshot.body(call_id)

        bodies = await asyncio.gather(*(body(call_id) for call_id in started))
        return [each for each in bodies if each is not None]

    async def stop(self, user: User, call_id: str) -> Snapshot:
        """Hang up. A call that has already ended is fine. Raises `not-found`, OneInboxError."""
        snapshot = await self._read(user, call_id)
        return snapshot if snapshot.ended else await self._stop(call_id)

    async def stop_later(self, user: User, call_id: str, seconds: int) -> Snapshot:
        """Hang up in some seconds, unless the owner reads or follows the call before. Raises like `stop`.

        A call that the store does not know, or cannot be asked for, is hung up at once: no one could do so later.
        """
        snapshot = await self._read(user, call_id)
        if snapshot.ended or await self.live.stop_later(call_id, seconds):
            return snapshot
        return await self._stop(call_id)

    async def _stop(self, call_id: str) -> Snapshot:
        try:
            record = await self.oneinbox.stop_call(call_id)
        except NoSuchCall as error:
            if await self.live.note_missing(call_id):
                raise
            raise Failed(error.reason, may_have_acted=False) from error  # a rumour: the call may be running
        # Dated now: an end is final, so it must win over a fetch that began during the stop.
        return await self.cache.update(record, self.cache.clock())

    async def follow(self, user: User, call_id: str, last_event_id: str | None) -> EventStream | None:
        """Return a stream of the call's states; None if the client has seen the last one.

        Raises `not-found`, `too-many-streams`, `at-capacity`.
        """
        snapshot = await self.read(user, call_id)
        seen = (last_event_id or "").strip('"')
        if seen == snapshot.etag.strip('"') and self.poller.finished(snapshot):
            return None
        lifetime = LONGEST_SECONDS if user.expires_at is None else user.expires_at - self.now()
        with ExitStack() as place:
            subscription = place.enter_context(self.poller.subscribe(user, call_id, snapshot))
            notice = EndNotice(self.warn_seconds, self.now)
            public_id = self.ownership.public_id(call_id, user)
            return EventStream(events(subscription, public_id, lifetime, self.cache.clock, notice), place.pop_all())

    async def refresh(self, call_id: str) -> None:
        """Fetch a call again after a hint that it changed, if it is followed or counted as live."""
        if not self.poller.is_followed(call_id) and not await self.live.is_live(call_id):
            return
        try:
            await self.cache.refetch(call_id)
        except OneInboxError:
            return  # the next poll or sweep finds out

    async def _is_users(self, user: User, call_id: str) -> bool:
        """Return whether a call is surely the user's, as far as is known without OneInbox."""
        if user.mode == "anonymous":
            return True  # the key is valid, and only this deployment makes keys
        latest = self.cache.latest(call_id)
        if latest is not None and latest.owner:
            return self._owns(user, latest)
        return await self.live.started_by(user, call_id)

    def _owns(self, user: User, snapshot: Snapshot, *, started: bool = False) -> bool:
        """Return whether the call is the user's. `started`: says the store, if the record lost its metadata."""
        return self.ownership.owns(user, snapshot.owner) or (started and not snapshot.owner)
