"""Webhooks: registrations, and the delivery of events."""

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

from app.sandbox.calls import Call, Calls, CallState, timestamp
from app.sandbox.options import EmulatorOptions
from app.sandbox.schemas import RegisterWebhook

EVENTS = frozenset(
    {
        "call.started",
        "call.ended",
        "call.failed",
        "call.recording.available",
        "transcript.partial",
        "transcript.final",
    }
)
GUIDE_EVENTS = EVENTS | {"call.analyzed"}

RETRY_DELAYS = (0.5, 1.0, 2.0)
"""Seconds before each repeat of a delivery that got no 2xx."""

_MAX_CONCURRENT = 20

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

    def to_json(self) -> dict[str, Any]:
        """Return the webhook without its secret, which only the answer to its registration holds."""
        return {
            "id": self.id,
            "name": self.name,
            "url": self.url,
            "events": list(self.events),
            "status": "active",
            "created_at": timestamp(self.created_at),
            "updated_at": timestamp(self.created_at),
        }


@dataclass(frozen=True, slots=True)
class _Delivery:
    url: str
    events: list[dict[str, Any]]
    """Sent in order, so that a call's end never arrives before its start."""


class Webhooks:
    """Send calls' events to registered loopback URLs. Other URLs can be registered but are never called."""

    def __init__(self, options: EmulatorOptions, calls: Calls) -> None:
        self._options = options
        self._calls = calls
        self._webhooks: dict[str, Webhook] = {}
        self._upcoming: list[tuple[float, str]] = []
        """Heap of (time of a call's next change, call id)."""
        self._wake = asyncio.Event()

    def __iter__(self) -> Iterator[Webhook]:
        return iter(self._webhooks.values())

    def register(self, body: RegisterWebhook) -> Webhook:
        """Add a webhook for events from now on."""
        if not self._webhooks:
            # Calls are followed only while there is a webhook.
            for call in self._calls:
                state = self._calls.state(call)
                call.announced = frozenset(state.events)
                self._schedule(call, state)
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
        """Remove a webhook; return whether it existed."""
        removed = self._webhooks.pop(webhook_id, None) is not None
        if not self._webhooks:
            self._upcoming.clear()
        return removed

    def follow(self, call: Call) -> None:
        """Check a new or changed call for events."""
        if self._webhooks:
            heapq.heappush(self._upcoming, (self._options.now(), call.id))
            self._wake.set()

    async def run(self) -> None:
        """Deliver events until cancelled."""
        # No proxy and no redirect may take a delivery off this machine. A semaphore limits concurrency because
        # httpx's pool scans all its waiting requests at every step.
        slots = asyncio.Semaphore(_MAX_CONCURRENT)
        async with (
            httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=5) as client,
            asyncio.TaskGroup() as deliveries,
        ):
            while True:
                self._wake.clear()
                for delivery in self._due():
                    deliveries.create_task(_deliver(client, slots, delivery))
                pause = max(0.0, self._upcoming[0][0] - self._options.now()) if self._upcoming else None
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._wake.wait()

    def _schedule(self, call: Call, state: CallState) -> None:
        if state.next_change is not None:
            heapq.heappush(self._upcoming, (state.next_change, call.id))

    def _due(self) -> list[_Delivery]:
        due: list[_Delivery] = []
        now = self._options.now()
        while self._upcoming and self._upcoming[0][0] <= now:
            call = self._calls.get(heapq.heappop(self._upcoming)[1])
            if call is None:
                continue
            state = self._calls.state(call)
            self._schedule(call, state)
            events = [event for event in state.events if event not in call.announced]
            call.announced |= set(events)
            for webhook in self:
                wanted = [_payload(event, call, state, now) for event in events if event in webhook.events]
                if wanted and _is_loopback(webhook.url):
                    due.append(_Delivery(webhook.url, wanted))
        return due


def is_loopback_address(host: str) -> bool:
    """Return whether `host` is a loopback IP address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "localhost" or is_loopback_address(host)


def _payload(event: str, call: Call, state: CallState, now: float) -> dict[str, Any]:
    return {
        "event": event,
        "call_id": call.id,
        "agent_id": call.agent_id,
        "status": state.status,
        "duration_seconds": state.duration,
        "created_at": timestamp(now),
    }


async def _deliver(client: httpx.AsyncClient, slots: asyncio.Semaphore, delivery: _Delivery) -> None:
    for event in delivery.events:
        for delay in (0.0, *RETRY_DELAYS):
            await asyncio.sleep(delay)
            with suppress(httpx.HTTPError):
                async with slots:
                    answer = await client.post(delivery.url, json=event)
                if answer.is_success:
                    break
        else:
            _logger.warning("webhook not delivered: %s of call %s", event["event"], event["call_id"])
