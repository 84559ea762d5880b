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
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from app.identity import User
from app.identity.keyring import Keyring
from app.limits import LiveCalls
from app.limits.ledger import KEEP_SECONDS, Kept
from app.oneinbox import WebCall
from app.problems import Problem, invalid_request, retry_later
from app.sessions.disconnect import ClientConnection
from app.sessions.handover import StartedCall, hand_over
from app.store import Store, StoreUnavailable

BEFORE_EXPIRY = 60
"""A kept response is useless this many seconds before its token expires."""
MARK_GRACE = 10
"""Seconds that the mark of a running request outlives ONEINBOX_TIMEOUT."""
ANONYMOUS_LENGTH = 16
"""Shortest key in anonymous mode, so that users behind one address cannot guess each other's."""
RECHECK_SECONDS = 0.5
"""A waiting request checks again after this long, even without a notification."""
LATEST_TIME = 1e12
"""The year 33658; anything later is not a time."""

PRINTABLE = re.compile(r"[\x20-\x7e]{1,255}")
QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')


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


@dataclass(frozen=True, slots=True)
class Entry:
    """The stored value of a key.

    `fingerprint`: of the request's body. `nonce`: makes each mark a different value. `call`: the response, once there
    is one. `until`: Unix time until which it is kept. `request_id`: of the call's record, which says what it is worth.
    """

    fingerprint: str
    nonce: str
    call: WebCall | None = None
    until: float = 0
    request_id: str = ""


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

    async def once(
        self, user: User, key: str, body: Any, client: ClientConnection, run: Callable[[], Awaitable[StartedCall]]
    ) -> tuple[WebCall, bool]:
        """Return the call of the request with this key, and whether it was replayed. `run` starts it, once.

        Raises `idempotency-mismatch` for another body, `in-progress` if the first request runs longer than a repeat
        waits, `at-capacity` while the shared store is gone, ClientDisconnect, and the errors of `run`.
        """
        name = "answer:" + hashlib.sha256(user.canonical + b"\x1f" + key.encode()).hexdigest()
        fingerprint = hashlib.sha256(_canonical(body)).hexdigest()
        try:
            mark = await self._wait_or_mark(name, fingerprint, client)
        except StoreUnavailable:
            detail = "The store is unavailable, so repeats cannot be detected."
            raise retry_later("at-capacity", 5, detail, reason="store-down") from None
        if isinstance(mark, WebCall):
            return mark, True
        try:
            started = await run()
        except BaseException:
            await self._forget(name, mark)
            raise
        kept = self._answer_to_keep(name, mark, fingerprint, started)
        if kept is None:
            await self._forget(name, mark)
        try:
            await hand_over(self.live, started, client, kept)
        except Problem:  # it is not kept, so a repeat need not wait
            await self._forget(name, mark)
            raise
        finally:
            await self.store.publish(name, b"")
        return started.call, False

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
                if entry is not None and entry.call is not None and not self.store.settling:
                    if entry.until > self.now() and await self._collect(entry, client):
                        return entry.call
                    await self.store.delete(name, value)  # it has expired, or its call was stopped
                    continue
                if self.now() >= end:
                    raise retry_later("in-progress", 1)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RECHECK_SECONDS):
                        await anext(notifications)
        raise ClientDisconnect

    async def _collect(self, entry: Entry, client: ClientConnection) -> bool:
        """Give a kept response to a repeat; return whether its call is worth giving. Raises ClientDisconnect."""
        receiver = secrets.token_hex(8)
        if not await self.live.collect(entry.request_id, receiver):
            return False
        if client.is_closed():
            await self.live.withdraw_repeat(entry.request_id, receiver)
            raise ClientDisconnect
        return True

    def _answer_to_keep(self, name: str, mark: bytes, fingerprint: str, started: StartedCall) -> Kept | None:
        """Return the response to keep; None if its token expires too soon."""
        expires = _expiry(started.call.participant_token)
        now = self.now()
        until = now + KEEP_SECONDS if expires is None else min(now + KEEP_SECONDS, expires - BEFORE_EXPIRY)
        if until <= now:
            return None
        entry = Entry(fingerprint, secrets.token_hex(8), started.call, until, started.attempt.request_id)
        return Kept(name, mark, self._seal(entry), until - now)

    async def _forget(self, name: str, mark: bytes) -> None:
        try:
            await self.store.delete(name, mark)
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
        # Another version may have written fields that this one does not know.
        known = {name: value for name, value in fields.items() if name in Entry.__slots__}
        return Entry(**known, call=WebCall(*call) if call else None)


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
