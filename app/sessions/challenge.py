"""A bot challenge before a session: Turnstile or hCaptcha, whose verification requests are alike.

https://developers.cloudflare.com/turnstile/get-started/server-side-validation/
https://docs.hcaptcha.com/#verify-the-user-response-server-side
"""

import asyncio
import hashlib
import re
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import httpx
import structlog
from pydantic import SecretStr
from pydantic_core import from_json

from app.identity.addresses import limit_key, parse_address
from app.oneinbox.transport import read_body
from app.problems import Problem, retry_later
from app.store import LimitRequest, Rate, Store, StoreUnavailable
from app.telemetry.metrics import Metrics

FAILURES, FAILURE_SECONDS = 10, 60
"""Failed challenges allowed per address in any window of this many seconds."""
MAX_ANSWER = 64 * 1024
TOKEN = re.compile(r"[ -~]{1,2048}")  # 2,048 characters is Turnstile's bound; hCaptcha's tokens are shorter

# The service rejects the broker, not the browser: its secret is wrong or belongs to another site.
BROKERS_FAULT = ("missing-input-secret", "invalid-input-secret", "sitekey-secret-mismatch")

log = structlog.get_logger(__name__)


@dataclass(repr=False, eq=False)
class Challenge:
    """Verify with the challenge service that a browser passed. Fails closed.

    `secret`: sent in the body of that request and nowhere else. `hosts`: lower-case host names on which the challenge
    may have been solved; None: any. `transport`: to the service; follows no redirects. `timeout`: seconds for the whole
    response.
    """

    url: httpx.URL
    secret: SecretStr
    hosts: frozenset[str] | None
    transport: httpx.AsyncBaseTransport
    store: Store
    _: KW_ONLY
    timeout: float = 3
    metrics: Metrics = field(default_factory=Metrics)

    async def check(self, token: str | None, address: str) -> None:
        """Return if the challenge was passed.

        `token`: from the browser. `address`: the client's. Raises Problem: `challenge-failed`; `rate-limited` after
        too many of those; `at-capacity` while the service or the store is unavailable.
        """
        digest = hashlib.sha256(limit_key(address).encode()).hexdigest()
        failures = Rate(f"rate:challenge:{digest}:{FAILURE_SECONDS}", FAILURES, FAILURE_SECONDS)
        # Checked before and counted after, so that passed challenges never block each other.
        await self._count(failures, cost=0)
        reason = await self._failure(token, address)
        if reason is not None:
            await self._count(failures, cost=1)  # may refuse, too, if many fail at once
            raise Problem("challenge-failed", reason)

    async def _count(self, failures: Rate, *, cost: int) -> None:
        """Count `cost` failures. Raises Problem `rate-limited` if another one would exceed the limit."""
        try:
            decision = await self.store.decide(LimitRequest([failures], cost=cost))
        except StoreUnavailable:
            raise _unavailable() from None
        (state,) = decision.rates
        if not decision.allowed or (cost == 0 and state.remaining == 0):
            self.metrics.count_refusal(["failed-challenge"])
            raise retry_later("rate-limited", state.reset, "Too many failed challenges.", reason="failed-challenge")

    async def _failure(self, token: str | None, address: str) -> str | None:
        """Return why the challenge failed, for the browser's developer; None if it was passed."""
        if not token:
            return "Solve the challenge and send its token in X-Challenge-Token."
        if not TOKEN.fullmatch(token):
            return "X-Challenge-Token is not a challenge token."
        answer = await self._ask(token, address)
        if answer.get("success") is not True:
            codes = answer.get("error-codes")
            faults = [code for code in BROKERS_FAULT if code in codes] if isinstance(codes, list) else []
            if faults:  # no fault of the browser, which could not pass
                log.error("challenge_misconfigured", host=self.url.host, codes=faults)
                raise _unavailable()
            return "The challenge was not passed. A token works once and for a few minutes: solve a new challenge."
        hostname = answer.get("hostname")
        if self.hosts is None or hostname is None:
            return None
        if not isinstance(hostname, str) or hostname.lower() not in self.hosts:
            log.warning("challenge_host_mismatched", hostname=ascii(hostname)[:255])
            return "The challenge was solved on a site that may not use the broker."
        return None

    async def _ask(self, token: str, address: str) -> dict[str, Any]:
        """Return the service's response. Raises Problem `at-capacity` if it is not usable."""
        form = {"secret": self.secret.get_secret_value(), "response": token}
        if parse_address(address) is not None:  # the peer of a Unix socket has none
            form["remoteip"] = address
        # A compressed response could unpack to any size; none is requested and none accepted.
        headers = {"accept": "application/json", "accept-encoding": "identity", "user-agent": "oneinbox-broker"}
        timeouts = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), self.timeout)}
        request = httpx.Request("POST", self.url, data=form, headers=headers, extensions=timeouts)
        try:
            async with asyncio.timeout(self.timeout):
                response = await self.transport.handle_async_request(request)
                try:
                    raw = await read_body(response, MAX_ANSWER)
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
        # The URL's path and query may hold a secret, and error messages may repeat them.
        log.error("challenge_unavailable", host=self.url.host, reason=reason)
        return _unavailable()


def _unavailable() -> Problem:
    return retry_later("at-capacity", 5, "Challenges cannot be checked right now.", reason="challenge-down")
