"""Idempotency-Key: the same request again gets the same answer, and no second call.

After draft-ietf-httpapi-idempotency-key-header-07. Only a 201 is kept, encrypted; everything else may be tried again.
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
from app.problems import Problem, invalid_request
from app.sessions.disconnect import ClientConnection
from app.store import Store, StoreUnavailable

KEEP_SECONDS = 600
BEFORE_EXPIRY = 60
"""Seconds before its token's end from which a kept answer is of no use."""
MARK_GRACE = 10
"""Seconds that a running request's mark outlives the longest answer of OneInbox."""
ANONYMOUS_LENGTH = 16
"""Least length in anonymous mode, where users behind one address must not find each other's keys."""
LOOK_SECONDS = 0.5
"""A waiting request looks again after this long, even if nobody told it to."""
COLLECT_SECONDS = 30
"""So long the call of a caller who hung up waits for them to come back with their key."""
UNCOLLECTED = "uncollected"
"""The set of kept answers whose callers hung up."""
TICK_SECONDS = 1
DAY = 86400
LATEST_TIME = 1e12
"""The year 33658; what lies beyond, and what is no number, is no time."""

PRINTABLE = re.compile(r"[\x20-\x7e]{1,255}")
QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')

log = structlog.get_logger(__name__)


def read_key(values: list[str], user: User) -> str | None:
    """The request's key, None without one. `"quoted"` (RFC 9651, section 3.3.3) equals bare. Raises 422."""
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
    """A call, and what the store knows of it from before it existed."""

    attempt: CallAttempt
    call: WebCall


@dataclass(eq=False)
class NotKept(Exception):
    """A started call's answer could not be kept: given all the same, a repeat would start another."""

    started: StartedCall


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands under a key.

    `fingerprint`: of the request's body. `nonce`: tells this state of the entry from any other. `call`: the answer,
    once there is one. `until`: Unix time to which it is kept. `replayed`: whether a repeat has been given it.
    """

    fingerprint: str
    nonce: str
    call: WebCall | None = None
    until: float = 0
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Uncollected:
    """A kept answer that nobody was given. `due`: Unix time at which its call is stopped."""

    member: str
    call_id: str
    due: float


@dataclass
class Idempotency:
    """Runs a request once per key, and gives its answer to all who send it again.

    `timeout`: seconds that OneInbox may take to answer. `now`: Unix time.
    """

    store: Store
    keyring: Keyring
    live: LiveCalls
    _: KW_ONLY
    timeout: float
    now: Callable[[], float] = time.time
    # Answers that the store may have kept although it did not say so, by name: nobody may be given them.
    _doubtful: dict[str, bytes] = field(default_factory=dict, init=False)

    async def once(
        self, user: User, key: str, body: Any, client: ClientConnection, run: Callable[[], Awaitable[StartedCall]]
    ) -> tuple[WebCall, bool]:
        """The call of the request with this key, and whether it was replayed; `run` starts it, once.

        Raises `idempotency-mismatch` for another body, `in-progress` when the first request outlasts the waiting,
        `at-capacity` while the shared store is gone, NotKept, ClientDisconnect, and what `run` raises.
        """
        name = "answer:" + hashlib.sha256(user.canonical + b"\x1f" + key.encode()).hexdigest()
        fingerprint = hashlib.sha256(_canonical(body)).hexdigest()
        try:
            mark = await self._wait_or_mark(name, fingerprint, client)
        except StoreUnavailable:
            detail = "Nobody can tell now whether this request is a repeat."
            raise Problem("at-capacity", detail, headers={"Retry-After": "5"}) from None
        if isinstance(mark, WebCall):
            return mark, True
        try:
            started = await run()
        except BaseException:
            await self._forget(name, mark)
            raise
        await self._keep(name, mark, fingerprint, started)
        if await client.has_left():
            await self._leave_for_collection(name, started)
            raise ClientDisconnect
        return started.call, False

    async def stop_uncollected(self) -> None:
        """Stop the calls whose callers hung up and did not come back in time. Raises StoreUnavailable."""
        for name in await self.store.members(UNCOLLECTED):
            value = await self.store.get(f"uncollected:{name}")
            uncollected = Uncollected(**json.loads(value)) if value is not None else None
            if uncollected is None or uncollected.due > self.now():
                continue
            # Whoever takes the kept answer decides: one replica, once, or the repeat that collects it. It leaves the
            # set last: a store that is lost in between may carry that out without saying so.
            if await self._withdraw(name):
                attempt = CallAttempt.from_key(uncollected.member)
                await self.live.stop(attempt, uncollected.call_id, NOT_COLLECTED)
                await self.store.remove_member([UNCOLLECTED], name)

    async def run(self) -> None:
        """Stop uncollected calls, and take back doubtful answers, for ever."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                await self._delete_doubtful()
                await self.stop_uncollected()
            except StoreUnavailable:
                continue  # all of it is still there when the store is back
            except Exception:
                log.exception("uncollected_sweep_failed")

    async def _wait_or_mark(self, name: str, fingerprint: str, client: ClientConnection) -> WebCall | bytes:
        """The kept answer; or, where there is none, the mark with which this request runs."""
        mark = self._seal(Entry(fingerprint, secrets.token_hex(8)))
        lifetime = self.timeout + MARK_GRACE
        if await self.store.add(name, mark, lifetime):
            return mark
        end = self.now() + self.timeout
        async with self.store.subscribe(name) as told:
            while not client.has_gone():
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
                    if (noted := await self._collect(name, value, entry)) is not None:
                        if not client.has_gone():
                            return entry.call
                        await self._put_back(name, noted, entry)
                        break
                    # It was withdrawn or noted in this very moment, or is of no use any more; if so, it goes.
                    if entry.until <= self.now():
                        await self.store.delete(name, value)
                    continue
                if self.now() >= end:
                    raise Problem("in-progress", headers={"Retry-After": "1"})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await anext(told)
        raise ClientDisconnect

    async def _collect(self, name: str, value: bytes, entry: Entry) -> bytes | None:
        """Note that a repeat is given the answer; None: not any more, or noted by another in this very moment."""
        left = entry.until - self.now()
        noted = self._seal(replace(entry, replayed=True, nonce=secrets.token_hex(8)))
        if left <= 0 or not await self.store.replace(name, value, noted, left):
            return None
        await self.store.remove_member([UNCOLLECTED], name)
        return noted

    async def _put_back(self, name: str, noted: bytes, entry: Entry) -> None:
        """Whoever collected has gone, too: where nobody else was given the answer, it waits once more."""
        value = await self.store.get(f"uncollected:{name}")
        left = entry.until - self.now()
        again = self._seal(replace(entry, nonce=secrets.token_hex(8)))
        if value is None or left <= 0 or not await self.store.replace(name, noted, again, left):
            return
        uncollected = replace(Uncollected(**json.loads(value)), due=self.now() + COLLECT_SECONDS)
        await self._wait_for_collection(name, uncollected)

    async def _withdraw(self, name: str) -> bool:
        """Delete a kept answer, unless a repeat has been given it; whether nobody was, and nobody can be any more."""
        value = await self.store.get(name)
        if value is None:
            return True  # expired; a repeat that was given it would have taken it out of the set
        entry = self._open(value)
        return entry is not None and not entry.replayed and await self.store.delete(name, value)

    async def _leave_for_collection(self, name: str, started: StartedCall) -> None:
        log.warning("caller_gone", call=started.call.id, waits=COLLECT_SECONDS)
        uncollected = Uncollected(started.attempt.key, started.call.id, self.now() + COLLECT_SECONDS)
        try:
            await self._wait_for_collection(name, uncollected)
        except StoreUnavailable:
            # Nobody could stop it in time; and a repeat is refused while the store is gone.
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
            self._doubtful[name] = value  # a frozen store may do it yet
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
            return  # it dies by itself
        await self.store.publish(name, b"")

    def _seal(self, entry: Entry) -> bytes:
        return self.keyring.encrypt(json.dumps(asdict(entry)).encode())

    def _open(self, value: bytes) -> Entry | None:
        """None: written under a secret that is not known (any more); its request is taken as running."""
        plain = self.keyring.decrypt(value)
        if plain is None:
            return None
        fields = json.loads(plain)
        call = fields.pop("call")
        return Entry(**fields, call=WebCall(*call) if call else None)


def _canonical(value: Any) -> bytes:
    """One text for all ways to write the same JSON, much as RFC 8785 has it: sorted keys, no spaces, 1.0 as 1."""
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
    """A participant token's `exp` (RFC 7519, section 4.1.4), unverified: it only says how long keeping makes sense."""
    try:
        payload = token.split(".")[1]
        expires = from_json(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"]
    except (ValueError, IndexError, KeyError, TypeError):
        return None
    return float(expires) if isinstance(expires, (int, float)) and abs(expires) < LATEST_TIME else None
