"""An issuer's key set (RFC 7517), refreshed in the background.

Requests wait for the issuer only briefly and only in two cases: before the first key set has arrived, and if a token
names an unknown key, as after a rotation. While the issuer is down, logins continue until its keys are a day old.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import httpx
import structlog

from app.config.surroundings import open_client
from app.identity.keys import PUBLIC_KEY_ALGORITHMS, VerifyingKey, all_names, jwk_key
from app.problems import retry_later

REFRESH_SECONDS = 300
RETRY_SECONDS = 30  # after a failed fetch
FIRST_RETRY_SECONDS = 5  # after a failed fetch while there are no keys
UNKNOWN_KEY_SECONDS = 30  # an unknown key id causes a fetch at most this often
MAX_AGE_SECONDS = 24 * 3600
FETCH_SECONDS = 5
WAIT_SECONDS = 3  # that a request waits for a running fetch
MAX_BYTES = 1_000_000
MAX_KEYS = 100

log = structlog.get_logger(__name__)


class KeySetError(Exception):
    """A response that is not a usable key set. The message does not quote it."""


@dataclass(repr=False, eq=False)
class KeySet:
    """The keys behind a JWKS URL. Raises ValueError for algorithms without public keys.

    `algorithms`: only these; empty: all that fit each key. `transport` replaces the connection. `clock`: monotonic
    seconds. `sleep`: waits seconds.
    """

    url: str
    algorithms: Collection[str] = ()
    _: KW_ONLY
    transport: httpx.AsyncBaseTransport | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    version: int = field(default=0, init=False)
    _keys: list[VerifyingKey] = field(default_factory=list, init=False)
    _fetched_at: float | None = field(default=None, init=False)
    _unknown_fetch_at: float = field(default=float("-inf"), init=False)
    _fetching: asyncio.Task[bool] | None = field(default=None, init=False)
    _refreshing: asyncio.Task[None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        unfit = sorted(set(self.algorithms) - PUBLIC_KEY_ALGORITHMS)
        if unfit:
            raise ValueError(f"does not support {', '.join(unfit)}, only public-key algorithms")
        self.algorithms = self.algorithms or PUBLIC_KEY_ALGORITHMS
        self._names = all_names(self.algorithms)
        # A redirect would let another server choose the keys.
        # A step ends before the whole: httpx closes a connection that timed out, but not one that was cancelled.
        self._client = open_client(self.url, transport=self.transport, timeout=FETCH_SECONDS - 1)

    async def start(self) -> None:
        """Start to fetch now and every REFRESH_SECONDS, without waiting."""
        self._refreshing = asyncio.create_task(self._refresh(self._begin_fetch()))

    async def ready(self) -> None:
        """Wait for the first fetch to end, up to WAIT_SECONDS."""
        if self._fetched_at is None:
            await self._wait_for_fetch()

    async def aclose(self) -> None:
        """Stop fetching."""
        tasks = [task for task in (self._refreshing, self._fetching) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def use(self, key: VerifyingKey) -> None:
        """Only the issuer replaces its keys."""

    async def find(self, algorithm: str, kid: str | None) -> VerifyingKey | None:
        """Return the key for a token. Raises Problem `at-capacity` while there are no usable keys."""
        if algorithm not in self._names:
            return None
        if self._fetched_at is None:
            await self._wait_for_fetch()
        if self._fetched_at is None or self.clock() - self._fetched_at > MAX_AGE_SECONDS:
            raise retry_later("at-capacity", 5, "Logins cannot be checked right now.", reason="login-keys")
        if kid is not None and not any(key.kid == kid for key in self._keys):
            if self.clock() - self._unknown_fetch_at >= UNKNOWN_KEY_SECONDS:
                self._unknown_fetch_at = self.clock()
                self._begin_fetch()
            await self._wait_for_fetch()
        fitting = [key for key in self._keys if algorithm in key.algorithms and kid in (None, key.kid)]
        if kid is None and len(fitting) != 1:
            return None  # a guess among several could pick a key that the issuer did not mean
        return fitting[0] if fitting else None

    async def fetch(self) -> list[VerifyingKey]:
        """Fetch the usable keys once. Raises KeySetError, ValueError, TimeoutError, and errors of the connection."""
        async with asyncio.timeout(FETCH_SECONDS):
            return self._read(await self._download())

    def _begin_fetch(self) -> asyncio.Task[bool]:
        """Return the running fetch, or start one: there are never two."""
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _wait_for_fetch(self) -> None:
        """Wait up to WAIT_SECONDS for the running fetch, if any. Cancelling the wait does not cancel the fetch."""
        if self._fetching is not None and not self._fetching.done():
            await asyncio.wait({self._fetching}, timeout=WAIT_SECONDS)

    async def _refresh(self, fetch: asyncio.Task[bool]) -> None:
        while True:
            if await fetch:
                await self.sleep(REFRESH_SECONDS)
            else:
                await self.sleep(FIRST_RETRY_SECONDS if self._fetched_at is None else RETRY_SECONDS)
            fetch = self._begin_fetch()

    async def _fetch(self) -> bool:
        """Replace the keys; return whether that succeeded."""
        try:
            self._keys = await self.fetch()
        except Exception as error:  # any error of a transport: the present keys stay valid
            # The URL's path and query may hold a secret, and error messages may repeat them.
            reason = str(error) if isinstance(error, KeySetError) else type(error).__name__
            log.error("jwks_fetch_failed", host=urlsplit(self.url).hostname, reason=reason)
            return False
        self._fetched_at = self.clock()
        self.version += 1
        return True

    async def _download(self) -> bytes:
        # Not compressed: MAX_BYTES limits what is read, not what it unpacks to.
        headers = {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}
        async with self._client.stream("GET", self.url, headers=headers) as response:
            if response.status_code != 200:
                raise KeySetError(f"status {response.status_code}")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise KeySetError("compressed unasked")
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise KeySetError(f"larger than {MAX_BYTES} bytes")
        return bytes(body)

    def _read(self, body: bytes) -> list[VerifyingKey]:
        document: Any = json.loads(body)
        entries = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(entries, list):
            raise KeySetError("not a key set")
        keys = []
        for entry in islice(entries, MAX_KEYS):
            with suppress(ValueError):  # RFC 7517, section 5: ignore keys that are not understood
                keys.append(jwk_key(entry, self.algorithms))
        if not keys:
            # More likely a mistake than a revocation of all keys, which would lock every user out.
            raise KeySetError("no usable key")
        return keys
