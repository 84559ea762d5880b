"""A bot challenge before a session: Turnstile or hCaptcha, whose verify calls are alike.

https://developers.cloudflare.com/turnstile/get-started/server-side-validation/
https://docs.hcaptcha.com/#verify-the-user-response-server-side
"""

import asyncio
import hashlib
import math
import re
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import httpx
import structlog
from pydantic import SecretStr
from pydantic_core import from_json

from app.identity.addresses import limit_key, parse_address
from app.problems import Problem
from app.store import LimitRequest, Rate, Store, StoreUnavailable
from app.telemetry.metrics import Metrics

FAILURES, FAILURE_SECONDS = 10, 60
"""Failed challenges of an address at most, in any window of so many seconds."""
MAX_ANSWER = 64 * 1024
TOKEN = re.compile(r"[ -~]{1,2048}")  # 2,048 characters is Turnstile's bound; hCaptcha's tokens are shorter

# The service refuses the broker and not the browser: the secret is wrong, or another site's.
BROKERS_FAULT = ("missing-input-secret", "invalid-input-secret", "sitekey-secret-mismatch")

log = structlog.get_logger(__name__)


@dataclass
class Challenge:
    """Asks the challenge's service whether a browser passed. Fails closed.

    `secret` goes into the body of that question and nowhere else. `hosts`: host names, in lower case, that the
    challenge may have been solved on; None: any. `transport`: to the service; follows no redirect. `timeout`: seconds
    for its whole answer. `metrics`: count what is refused.
    """

    url: httpx.URL = field(repr=False)
    secret: SecretStr
    hosts: frozenset[str] | None
    transport: httpx.AsyncBaseTransport
    store: Store
    _: KW_ONLY
    timeout: float = 3
    metrics: Metrics = field(default_factory=Metrics)

    async def check(self, token: str | None, address: str) -> None:
        """Return if the challenge was passed.

        `token`: what the browser sent. `address`: the client's. Raises Problem: `challenge-failed`; `rate-limited`
        after too many of those; `at-capacity` while the service or the store cannot be asked.
        """
        digest = hashlib.sha256(limit_key(address).encode()).hexdigest()
        failures = Rate(f"rate:challenge:{digest}:{FAILURE_SECONDS}", FAILURES, FAILURE_SECONDS)
        # Looked at before and counted after, so that those who pass are never held up by each other.
        await self._room(failures, cost=0)
        why = await self._failure(token, address)
        if why is not None:
            await self._room(failures, cost=1)  # also of many at once, only so many are told
            raise Problem("challenge-failed", why)

    async def _room(self, failures: Rate, *, cost: int) -> None:
        """Count `cost` failures. Raises Problem `rate-limited` when there is no room for another one."""
        try:
            decision = await self.store.decide(LimitRequest([failures], cost=cost))
        except StoreUnavailable:
            raise _unavailable() from None
        (state,) = decision.rates
        if not decision.allowed or (cost == 0 and state.remaining == 0):
            self.metrics.refused(["failed-challenge"])
            headers = {"Retry-After": str(max(1, math.ceil(state.reset)))}
            raise Problem("rate-limited", "Too many challenges failed.", headers)

    async def _failure(self, token: str | None, address: str) -> str | None:
        """Why the challenge is failed, in words for the browser's developer; None: it is passed."""
        if not token:
            return "Solve the challenge and send its token in X-Challenge-Token."
        if not TOKEN.fullmatch(token):
            return "X-Challenge-Token is no token of a challenge."
        answer = await self._ask(token, address)
        if answer.get("success") is not True:
            codes = answer.get("error-codes")
            faults = [code for code in BROKERS_FAULT if code in codes] if isinstance(codes, list) else []
            if faults:
                log.error("challenge_misconfigured", host=self.url.host, codes=faults)
            return "The challenge was not passed. A token counts once and for a few minutes: solve a new one."
        hostname = answer.get("hostname")
        if self.hosts is None or hostname is None:
            return None
        if not isinstance(hostname, str) or hostname.lower() not in self.hosts:
            log.warning("challenge_host_mismatched", hostname=ascii(hostname)[:255])
            return "The challenge was solved on a site that may not use the broker."
        return None

    async def _ask(self, token: str, address: str) -> dict[str, Any]:
        """The service's answer; raises Problem `at-capacity` where it is none."""
        form = {"secret": self.secret.get_secret_value(), "response": token}
        if parse_address(address) is not None:  # a Unix socket's peer has none
            form["remoteip"] = address
        # A compressed answer could unpack to anything; none is asked for and none is taken.
        headers = {"accept": "application/json", "accept-encoding": "identity", "user-agent": "oneinbox-broker"}
        timeouts = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), self.timeout)}
        request = httpx.Request("POST", self.url, data=form, headers=headers, extensions=timeouts)
        try:
            async with asyncio.timeout(self.timeout):
                response = await self.transport.handle_async_request(request)
                try:
                    raw = await _read(response)
                finally:
                    await response.aclose()
        except (TimeoutError, httpx.TransportError) as error:
            raise self._down(type(error).__name__) from None
        if response.status_code != 200:
            raise self._down(f"status {response.status_code}")
        try:
            answer = from_json(raw)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._down("no JSON object")
        return answer

    def _down(self, reason: str) -> Problem:
        # Neither the URL's path and query, which may hold a secret, nor a message that may repeat them.
        log.error("challenge_unavailable", host=self.url.host, reason=reason)
        return _unavailable()


def _unavailable() -> Problem:
    return Problem("at-capacity", "Challenges cannot be checked right now.", {"Retry-After": "5"})


async def _read(response: httpx.Response) -> bytes:
    """The whole body; nothing, which is no JSON, when it is encoded or larger than MAX_ANSWER."""
    if response.headers.get("content-encoding", "identity") != "identity":
        return b""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_ANSWER:
            return b""
    return bytes(body)
