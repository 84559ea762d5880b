"""Webhooks: who wants to be told, what is due, and the telling."""

import asyncio
import heapq
import ipaddress
import logging
import secrets
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from app.sandbox.calls import Call, Calls, Moment, timestamp
from app.sandbox.options import EmulatorOptions
from app.sandbox.schemas import RegisterWebhook

RETRY_DELAYS = (0.5, 1.0, 2.0)
"""Seconds before each repeat of a delivery that got no 2xx."""

_AT_ONCE = 20

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Webhook:
    """One registration."""

    id: str
    name: str
    url: str
    events: tuple[str, ...]
    secret: str
    created_at: float

    def shown(self) -> dict[str, Any]:
        """As a list shows it: the secret is told once, at registration."""
        return {
            "id": self.id,
            "name": self.name,
            "url": self.url,
            "events": list(self.events),
            "status": "active",
            "created_at": timestamp(self.created_at),
        }


@dataclass(frozen=True, slots=True)
class _Delivery:
    url: str
    events: list[dict[str, Any]]
    """Sent one after the other, so that a call never ends before it started."""


class Webhooks:
    """Tells registered loopback URLs what happens to calls. Any other URL may be registered but is never called."""

    def __init__(self, options: EmulatorOptions, calls: Calls) -> None:
        self._options = options
        self._calls = calls
        self._webhooks: dict[str, Webhook] = {}
        self._agenda: list[tuple[float, str]] = []
        """Heap of (time of a call's next change, its id)."""
        self._wake = asyncio.Event()

    def __iter__(self) -> Iterator[Webhook]:
        return iter(self._webhooks.values())

    def register(self, body: RegisterWebhook) -> Webhook:
        """Add a webhook. It hears of changes from now on, not of those before."""
        if not self._webhooks:
            # Nobody listened until now, so nothing was followed.
            for call in self._calls:
                at = self._calls.moment(call)
                call.announced = frozenset(at.events)
                self._schedule(call, at)
            self._wake.set()
        webhook = Webhook(
            id=str(uuid.uuid4()),
            name=body.name,
            url=body.url,
            events=tuple(body.events),
            secret=f"whsec_{secrets.token_urlsafe(24)}",
            created_at=self._options.now(),
        )
        self._webhooks[webhook.id] = webhook
        return webhook

    def remove(self, webhook_id: str) -> bool:
        """Whether there was such a webhook."""
        removed = self._webhooks.pop(webhook_id, None) is not None
        if not self._webhooks:
            self._agenda.clear()
        return removed

    def follow(self, call: Call) -> None:
        """Look at a call that was just created or changed."""
        if self._webhooks:
            heapq.heappush(self._agenda, (self._options.now(), call.id))
            self._wake.set()

    async def run(self) -> None:
        """Deliver for ever; sleeps until the next change."""
        # Neither a proxy nor a redirect may carry a delivery off this machine.
        # httpx's pool looks through all who wait for it at every step: they wait at the semaphore instead.
        turn = asyncio.Semaphore(_AT_ONCE)
        async with (
            httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=5) as client,
            asyncio.TaskGroup() as deliveries,
        ):
            while True:
                self._wake.clear()
                for delivery in self._due():
                    deliveries.create_task(_deliver(client, turn, delivery))
                pause = max(0.0, self._agenda[0][0] - self._options.now()) if self._agenda else None
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._wake.wait()

    def _schedule(self, call: Call, at: Moment) -> None:
        if at.next_change is not None:
            heapq.heappush(self._agenda, (at.next_change, call.id))

    def _due(self) -> list[_Delivery]:
        due: list[_Delivery] = []
        now = self._options.now()
        while self._agenda and self._agenda[0][0] <= now:
            call = self._calls.get(heapq.heappop(self._agenda)[1])
            if call is None:
                continue
            at = self._calls.moment(call)
            self._schedule(call, at)
            news = [event for event in at.events if event not in call.announced]
            call.announced |= set(news)
            for webhook in self:
                wanted = [_payload(event, call, at, now) for event in news if event in webhook.events]
                if wanted and _is_loopback(webhook.url):
                    due.append(_Delivery(webhook.url, wanted))
        return due


def is_loopback_address(host: str) -> bool:
    """Whether `host` is a loopback IP address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "localhost" or is_loopback_address(host)


def _payload(event: str, call: Call, at: Moment, now: float) -> dict[str, Any]:
    return {
        "event": event,
        "call_id": call.id,
        "agent_id": call.agent_id,
        "status": at.status,
        "duration_seconds": at.duration,
        "created_at": timestamp(now),
    }


async def _deliver(client: httpx.AsyncClient, turn: asyncio.Semaphore, delivery: _Delivery) -> None:
    for event in delivery.events:
        for delay in (0.0, *RETRY_DELAYS):
            await asyncio.sleep(delay)
            with suppress(httpx.HTTPError):
                async with turn:
                    answer = await client.post(delivery.url, json=event)
                if answer.is_success:
                    break
        else:
            _logger.warning("webhook given up: %s of call %s", event["event"], event["call_id"])
