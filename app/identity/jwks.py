"""An issuer's key set (RFC 7517), kept fresh in the background.

Requests wait for the issuer in two cases only, and only shortly: before the first key set has come, and when a token
names a key that is not known yet, as after a rotation. An issuer that is down neither logs in nor locks out anybody,
until its keys are a day old.
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

from app.identity.keys import PUBLIC_KEY_ALGORITHMS, VerifyingKey, jwk_key
from app.problems import Problem

REFRESH_SECONDS = 300
RETRY_SECONDS = 30  # after a fetch that failed
FIRST_RETRY_SECONDS = 5  # after one that failed while there are no keys at all
UNKNOWN_KEY_SECONDS = 30  # an unknown key id makes us ask at most this often
BELIEVED_SECONDS = 24 * 3600
FETCH_SECONDS = 5
WAIT_SECONDS = 3  # that a request waits for a fetch under way
MAX_BYTES = 1_000_000
MAX_KEYS = 100

log = structlog.get_logger(__name__)


class KeySetError(Exception):
    """An answer that is no usable key set. Says why, without repeating it."""


@dataclass
class KeySet:
    """The keys behind a JWKS URL.

    `algorithms`: only these; empty: all that fit each key. `transport`: httpx's own unless told. `clock`: seconds,
    monotonic. `sleep`: waits so many seconds.
    """

    url: str = field(repr=False)
    algorithms: Collection[str] = ()
    _: KW_ONLY
    transport: httpx.AsyncBaseTransport | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    version: int = field(default=0, init=False)
    _keys: list[VerifyingKey] = field(default_factory=list, init=False)
    _fetched_at: float | None = field(default=None, init=False)
    _asked_for_unknown_at: float = field(default=float("-inf"), init=False)
    _fetching: asyncio.Task[bool] | None = field(default=None, init=False)
    _refreshing: asyncio.Task[None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        unfit = sorted(set(self.algorithms) - PUBLIC_KEY_ALGORITHMS)
        if unfit:
            raise ValueError(f"does not go with {', '.join(unfit)}, only with public-key algorithms")
        self.algorithms = self.algorithms or PUBLIC_KEY_ALGORITHMS
        # A redirect would let whoever answers there choose the keys.
        self._client = httpx.AsyncClient(transport=self.transport, follow_redirects=False, timeout=FETCH_SECONDS)

    async def start(self) -> None:
        """Fetch now, and again every REFRESH_SECONDS. Does not wait for it."""
        self._refreshing = asyncio.create_task(self._refresh(self._begin_fetch()))

    async def aclose(self) -> None:
        """Stop fetching."""
        tasks = [task for task in (self._refreshing, self._fetching) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def find(self, algorithm: str, kid: str | None) -> VerifyingKey | None:
        """The key for a token. Raises Problem `at-capacity` while there are none to be believed."""
        if algorithm not in self.algorithms:
            return None
        if self._fetched_at is None:
            await self._fetched()
        self._check_age()
        if kid is not None and not self._knows(kid):
            if self.clock() - self._asked_for_unknown_at >= UNKNOWN_KEY_SECONDS:
                self._asked_for_unknown_at = self.clock()
                self._begin_fetch()
            await self._fetched()
        fitting = [key for key in self._keys if algorithm in key.algorithms and kid in (None, key.kid)]
        if kid is None and len(fitting) != 1:
            return None  # a guess among several would verify a token with keys that its issuer did not mean
        return fitting[0] if fitting else None

    def _knows(self, kid: str) -> bool:
        return any(key.kid == kid for key in self._keys)

    def _check_age(self) -> None:
        if self._fetched_at is None or self.clock() - self._fetched_at > BELIEVED_SECONDS:
            raise Problem("at-capacity", "Logins cannot be checked right now.", {"Retry-After": "5"})

    def _begin_fetch(self) -> asyncio.Task[bool]:
        """The fetch under way, or a new one: there are never two."""
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetched(self) -> None:
        """Wait a while for the fetch under way, if there is one. A caller who is cancelled does not cancel it."""
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
        """Whether it worked."""
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                body = await self._download()
            keys = self._read(body)
        except Exception as error:  # whatever a transport raises: the keys at hand stay good
            # Neither the path and query of the URL, which may hold a secret, nor a message that may repeat them.
            reason = str(error) if isinstance(error, KeySetError) else type(error).__name__
            log.error("jwks_fetch_failed", host=urlsplit(self.url).hostname, reason=reason)
            return False
        self._keys = keys
        self._fetched_at = self.clock()
        self.version += 1
        return True

    async def _download(self) -> bytes:
        # Not compressed: the bound holds for what is read, not for what a small answer unpacks to.
        headers = {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}
        async with self._client.stream("GET", self.url, headers=headers) as response:
            if response.status_code != 200:
                raise KeySetError(f"status {response.status_code}")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise KeySetError("compressed though asked not to be")
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
            raise KeySetError("no key set")
        keys = []
        for entry in islice(entries, MAX_KEYS):
            with suppress(ValueError):  # RFC 7517, section 5: what is not understood is ignored
                keys.append(jwk_key(entry, self.algorithms))
        if not keys:
            # More likely an accident than a revocation of everything, which would lock everybody out.
            raise KeySetError("no usable key")
        return keys
