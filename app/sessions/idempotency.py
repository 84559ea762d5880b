"""Idempotency-Key: a repeated request gets the first response, and starts no second call.

Follows draft-ietf-httpapi-idempotency-key-header-07. Only a 201 is kept, encrypted; anything else may be retried.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Any, NamedTuple

import structlog
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from app.identity import User
from app.identity.keyring import Keyring
from app.limits import CallAttempt, LiveCalls
from app.limits.live_calls import HUNG_UP, NOT_COLLECTED
from app.oneinbox import WebCall
from app.problems import Problem, invalid_request, retry_later
from app.sessions.disconnect import ClientConnection
from app.store import Store, StoreUnavailable

KEEP_SECONDS = 600
BEFORE_EXPIRY = 60
"""A kept response is useless this many seconds before its token expires."""
MARK_GRACE = 10
"""Seconds that the mark of a running request outlives ONEINBOX_TIMEOUT."""
ANONYMOUS_LENGTH = 16
"""Shortest key in anonymous mode, so that users behind one address cannot guess each other's."""
RECHECK_SECONDS = 0.5
"""A waiting request checks again after this long, even without a notification."""
COLLECT_SECONDS = 30
"""How long the call of a client that disconnected waits for the client to return with its key."""
UNCOLLECTED = "uncollected"
"""The set of kept responses whose clients disconnected."""
TICK_SECONDS = 1
DAY = 86400
LATEST_TIME = 1e12
"""The year 33658; anything later is not a time."""

PRINTABLE = re.compile(r"[\x20-\x7e]{1,255}")
QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')

log = structlog.get_logger(__name__)


def read_key(values: list[str], user: User) -> str | None:
    """Return the request's key, None without one. `"quoted"` (RFC 9651, section 3.3.3) equals bare. Raises 422."""
    if not values:
        return None
    key = values[0].strip()
    if quoted := QUOTED.fullmatch(key):
        key = re.sub(r"\\(.)", r"\1", quoted[1])
    least = ANONYMOUS_LENGTH if user.mode == "anonymous" else 1
    if len(values) > 1 or not PRINTABLE.fullmatch(key) or len(key) < least:
        error = {
            "loc": ("header", "Idempotency-Key"),
            "msg": f"Takes one key of {least} to 255 printable characters",
            "type": "idempotency_key",
        }
        raise invalid_request([error])
    return key


class StartedCall(NamedTuple):
    """A started call and its attempt."""

    attempt: CallAttempt
    call: WebCall


class NotKept(Exception):
    """A started call whose response could not be stored, so a repeat would start another call."""

    def __init__(self, started: StartedCall) -> None:
        super().__init__()  # without the call: its token must not get into a traceback
        self.started = started


@dataclass(frozen=True, slots=True)
class Entry:
    """The stored value of a key.

    `fingerprint`: of the request's body. `nonce`: distinguishes this state of the entry from others. `call`: the
    response, once there is one. `until`: Unix time until which it is kept. `replayed`: a repeat has received it.
    """

    fingerprint: str
    nonce: str
    call: WebCall | None = None
    until: float = 0
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Uncollected:
    """A kept response that no client received. `due`: Unix time at which its call is stopped."""

    member: str
    call_id: str
    due: float


@dataclass(repr=False, eq=False)
class Idempotency:
    """Run a request once per key, and give its response to every repeat.

    `timeout`: seconds that OneInbox may take to respond. `now`: Unix time.
    """

    store: Store
    keyring: Keyring
    live: LiveCalls
    _: KW_ONLY
    timeout: float
    now: Callable[[], float] = time.time
    # Responses that the store may have kept without confirming it, by name: they must not be replayed.
    _doubtful: dict[str, bytes] = field(default_factory=dict, init=False)

    async def once(
        self, user: User, key: str, body: Any, client: ClientConnection, run: Callable[[], Awaitable[StartedCall]]
    ) -> tuple[WebCall, bool]:
        """Return the call of the request with this key, and whether it was replayed. `run` starts it, once.

        Raises `idempotency-mismatch` for another body, `in-progress` if the first request runs longer than a repeat
        waits, `at-capacity` while the shared store is gone, NotKept, ClientDisconnect, and the errors of `run`.
        """
        name = "answer:" + hashlib.sha256(user.canonical + b"\x1f" + key.encode()).hexdigest()
        fingerprint = hashlib.sha256(_canonical(body)).hexdigest()
        try:
            mark = await self._wait_or_mark(name, fingerprint, client)
        except StoreUnavailable:
            raise retry_later("at-capacity", 5, "The store is unavailable, so repeats cannot be detected.") from None
        if isinstance(mark, WebCall):
            return mark, True
        try:
            started = await run()
        except BaseException:
            await self._forget(name, mark)
            raise
        await self._keep(name, mark, fingerprint, started)
        if await client.poll_is_closed():
            await self._leave_for_collection(name, started)
            raise ClientDisconnect
        return started.call, False

    async def stop_uncollected(self) -> None:
        """Stop the calls whose clients disconnected and did not return in time. Raises StoreUnavailable."""
        for name in await self.store.members(UNCOLLECTED):
            value = await self.store.get(f"uncollected:{name}")
            uncollected = Uncollected(**json.loads(value)) if value is not None else None
            if uncollected is None or uncollected.due > self.now():
                continue
            # Only one of delete and collect succeeds. The set comes last: if the store is lost in between, it is tried
            # again.
            if await self._withdraw(name):
                attempt = CallAttempt.from_key(uncollected.member)
                await self.live.stop(attempt, uncollected.call_id, NOT_COLLECTED)
                await self.store.remove_member([UNCOLLECTED], name)

    async def run(self) -> None:
        """Stop uncollected calls and delete doubtful responses, until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                await self._delete_doubtful()
                await self.stop_uncollected()
            except StoreUnavailable:
                continue  # retried once the store is back
            except Exception:
                log.exception("uncollected_sweep_failed")

    async def _wait_or_mark(self, name: str, fingerprint: str, client: ClientConnection) -> WebCall | bytes:
        """Return the kept response, or the mark under which this request runs if there is none."""
        mark = self._seal(Entry(fingerprint, secrets.token_hex(8)))
        lifetime = self.timeout + MARK_GRACE
        if await self.store.add(name, mark, lifetime):
            return mark
        end = self.now() + self.timeout
        async with self.store.subscribe(name) as notifications:
            while not client.is_closed():
                value = await self.store.get(name)
                if value is None:
                    if await self.store.add(name, mark, lifetime):
                        return mark
                    continue
                entry = self._open(value)
                if entry is not None and entry.fingerprint != fingerprint:
                    raise Problem("idempotency-mismatch")
                if entry is not None and entry.call is not None and value != self._doubtful.get(name):
                    if entry.replayed:
                        return entry.call
                    if (collected := await self._collect(name, value, entry)) is not None:
                        if not client.is_closed():
                            return entry.call
                        await self._put_back(name, collected, entry)
                        break
                    # It was just withdrawn or collected, or has expired; then it is deleted.
                    if entry.until <= self.now():
                        await self.store.delete(name, value)
                    continue
                if self.now() >= end:
                    raise retry_later("in-progress", 1)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RECHECK_SECONDS):
                        await anext(notifications)
        raise ClientDisconnect

    async def _collect(self, name: str, value: bytes, entry: Entry) -> bytes | None:
        """Record that a repeat receives the response. None: it has expired, or another request was faster."""
        left = entry.until - self.now()
        collected = self._seal(replace(entry, replayed=True, nonce=secrets.token_hex(8)))
        if left <= 0 or not await self.store.replace(name, value, collected, left):
            return None
        await self.store.remove_member([UNCOLLECTED], name)
        return collected

    async def _put_back(self, name: str, collected: bytes, entry: Entry) -> None:
        """Undo `_collect` for a client that disconnected, unless another one has received the response."""
        value = await self.store.get(f"uncollected:{name}")
        left = entry.until - self.now()
        again = self._seal(replace(entry, nonce=secrets.token_hex(8)))
        if value is None or left <= 0 or not await self.store.replace(name, collected, again, left):
            return
        uncollected = replace(Uncollected(**json.loads(value)), due=self.now() + COLLECT_SECONDS)
        await self._wait_for_collection(name, uncollected)

    async def _withdraw(self, name: str) -> bool:
        """Delete a kept response unless a repeat received it. Return whether it can no longer be given to anyone."""
        value = await self.store.get(name)
        if value is None:
            return True  # expired; a repeat that received it would have removed it from the set
        entry = self._open(value)
        return entry is not None and not entry.replayed and await self.store.delete(name, value)

    async def _leave_for_collection(self, name: str, started: StartedCall) -> None:
        log.warning("client_disconnected", call=started.call.id, waits=COLLECT_SECONDS)
        uncollected = Uncollected(started.attempt.key, started.call.id, self.now() + COLLECT_SECONDS)
        try:
            await self._wait_for_collection(name, uncollected)
        except StoreUnavailable:
            # It could not be stopped in time, and repeats are refused while the store is gone.
            await self.live.stop(started.attempt, started.call.id, HUNG_UP)
            await self._forget(name, None)

    async def _wait_for_collection(self, name: str, uncollected: Uncollected) -> None:
        await self.store.set(f"uncollected:{name}", json.dumps(asdict(uncollected)).encode(), DAY)
        await self.store.add_member(UNCOLLECTED, name, DAY)

    async def _keep(self, name: str, mark: bytes, fingerprint: str, started: StartedCall) -> None:
        expires = _expiry(started.call.participant_token)
        now = self.now()
        until = now + KEEP_SECONDS if expires is None else min(now + KEEP_SECONDS, expires - BEFORE_EXPIRY)
        if until <= now:
            await self._forget(name, mark)
            return
        value = self._seal(Entry(fingerprint, secrets.token_hex(8), started.call, until))
        try:
            kept = await self.store.replace(name, mark, value, until - now)
        except StoreUnavailable:
            self._doubtful[name] = value  # a stalled store may still do it
            kept = False
        if not kept:
            raise NotKept(started)
        await self.store.publish(name, b"")

    async def _delete_doubtful(self) -> None:
        for name, value in list(self._doubtful.items()):
            await self.store.delete(name, value)
            self._doubtful.pop(name, None)

    async def _forget(self, name: str, expected: bytes | None) -> None:
        try:
            await self.store.delete(name, expected)
        except StoreUnavailable:
            return  # it expires
        await self.store.publish(name, b"")

    def _seal(self, entry: Entry) -> bytes:
        return self.keyring.encrypt(json.dumps(asdict(entry)).encode())

    def _open(self, value: bytes) -> Entry | None:
        """Decrypt an entry. None: its secret is unknown, so its request counts as running."""
        plain = self.keyring.decrypt(value)
        if plain is None:
            return None
        fields = json.loads(plain)
        call = fields.pop("call")
        return Entry(**fields, call=WebCall(*call) if call else None)


def _canonical(value: Any) -> bytes:
    """Return equal bytes for equal JSON, much like RFC 8785: sorted keys, no spaces, 1.0 as 1."""
    return json.dumps(_plain_numbers(value), sort_keys=True, separators=(",", ":")).encode()


def _plain_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _plain_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(each) for each in value]
    return value


def _expiry(token: str) -> float | None:
    """Return a participant token's `exp` (RFC 7519, section 4.1.4), unverified: it only limits how long to keep it."""
    try:
        payload = token.split(".")[1]
        expires = from_json(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"]
    except (ValueError, IndexError, KeyError, TypeError):
        return None
    return float(expires) if isinstance(expires, (int, float)) and abs(expires) < LATEST_TIME else None
