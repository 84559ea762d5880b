"""Commands that act through the shared store or on OneInbox: pauses, blocks, status, webhooks."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from app.broker.build import open_limits, open_oneinbox
from app.broker.replicas import Report, read_reports
from app.cli.process import checked, refuse, say
from app.config.agents import load_agents
from app.config.loading import load_settings
from app.config.settings import Settings, SettingsError, takes
from app.identity import User
from app.identity.addresses import limit_key, parse_address
from app.limits import KillSwitch, Limits
from app.limits.allowance import read_allowance
from app.limits.call_attempt import ALL_CALLS
from app.limits.kill_switch import BLOCKS, CONTROLS, PAUSE
from app.limits.ledger import UNFOUND, UNSTOPPED, Ledger
from app.oneinbox import OneInbox
from app.oneinbox.errors import OneInboxError
from app.oneinbox.models import Webhook
from app.store import Store, StoreUnavailable
from app.telemetry.logging import configure_logging

CONFIRM_SECONDS = 5
"""Seconds that replicas have to confirm a control."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Operator:
    """The parts of a broker that an operator's command needs."""

    settings: Settings
    store: Store
    kill_switch: KillSwitch
    limits: Limits

    def user(self, name: str) -> User:
        """Return the user with this id, in anonymous mode with this address. Raises SettingsError."""
        if self.settings.auth != "anonymous":
            return User(mode=self.settings.auth, id=name, issuer=self.settings.jwt_issuer or "")
        address = parse_address(name)  # reads ::ffff:192.0.2.1 as IPv4, as for requests
        if address is None:
            raise SettingsError([f"USER {name!r}: is not an address; takes an IPv4 or IPv6 address"])
        return User(mode="anonymous", id=limit_key(str(address)))

    async def status(self) -> str:
        """Return the counters, pauses, blocks and unstopped calls, one per line."""
        reports = await read_reports(self.store)
        pause = await self.store.members(PAUSE)
        blocks = await self.store.members(BLOCKS)
        unstopped = await self.store.members(UNSTOPPED)
        reading = await read_allowance(self.store)
        calls = "not watched"
        if reading is not None and reading.left is not None and reading.of_today(time.time()):
            calls = f"{reading.left} of {reading.cap} left"
        return "\n".join(
            [
                *(f"{name}: {used} of {amount} sessions" for name, used, amount in await self.limits.usage()),
                f"OneInbox's calls today: {calls}",
                f"live calls: {len(await self.store.members(ALL_CALLS))}",
                *(f"paused for {round(left)} s more" for left in pause.values()),
                *([] if pause else ["not paused"]),
                f"blocked users: {len(blocks)}",
                f"replicas: {len(reports)}",
                *(f"  {_described(report)}" for report in reports),
                f"calls that could not be stopped: {len(unstopped)}",
                *(f"  {call.replace(UNFOUND, 'not found: request ')}" for call in sorted(unstopped)),
            ]
        )

    async def confirm(self) -> tuple[str, bool]:
        """Wait until every replica obeys what was written; return where it is in force, and whether that is all."""
        controls = await self.kill_switch.announce()
        end = time.monotonic() + CONFIRM_SECONDS
        while True:
            reports = await read_reports(self.store)
            # Another command may have been announced since; who has read that has read this one, too.
            latest = ((await self.store.get(CONTROLS)) or b"").decode()
            missing = [report for report in reports if report.controls not in (controls, latest)]
            if (reports and not missing) or time.monotonic() > end:
                break
            await asyncio.sleep(0.1)  # between questions to the store
        if not reports:
            return "in force on 0 of 0 replicas: no replica reports to this store, under this BROKER_STORE_PREFIX", True
        lines = [f"in force on {len(reports) - len(missing)} of {len(reports)} replicas"]
        lines += [f"not in force on {_described(report)}" for report in missing]
        return "\n".join(lines), not missing


def _described(report: Report) -> str:
    state = f"silent for {report.age:.0f} s" if report.stale else "reaches the store"
    paused = ", paused" if report.paused else ""
    blocked = f", {report.blocked} blocked" if report.blocked else ""
    return f"{report.id}: version {report.version or 'unknown'}, {state}{paused}{blocked}"


async def operate(settings: Settings, work: Callable[[Operator], Awaitable[str]]) -> str:
    """Do an operator's work on the shared store.

    Raises SettingsError if there is none, StoreUnavailable if it does not answer.
    """
    url = settings.store_url.get_secret_value()
    if url == "memory://":
        raise SettingsError(
            ["BROKER_STORE_URL: is memory://; a command reaches running brokers only through a shared store"]
        )
    agents = load_agents(settings)
    from app.store.valkey import ValkeyStore

    # Without a local store to fall back on: what was not written must not look as if it were.
    async with ValkeyStore(url, timeout=settings.store_timeout, prefix=settings.store_prefix) as store:
        limits = open_limits(settings, agents, Ledger(store, lease=0))
        return await work(Operator(settings, store, KillSwitch(store), limits))


EVENTS = ("call.started", "call.ended", "call.failed", "call.analyzed", "call.recording.available")


class WebhookOperator:
    """OneInbox's webhook for this broker; the settings give its URL."""

    def __init__(self, oneinbox: OneInbox, settings: Settings) -> None:
        """Raises SettingsError if the settings give no URL."""
        if settings.public_url is None or settings.webhook_secret is None:
            values = {"BROKER_PUBLIC_URL": settings.public_url, "BROKER_WEBHOOK_SECRET": settings.webhook_secret}
            raise SettingsError(
                [
                    f"{name}: is required for webhooks; takes {takes(name)}"
                    for name, value in values.items()
                    if value is None
                ]
            )
        self._oneinbox = oneinbox
        self._prefix = f"{settings.public_url}/webhooks/oneinbox/"
        self._url = self._prefix + settings.webhook_secret.get_secret_value()

    async def register(self) -> str:
        """Register it if it is not registered yet."""
        for webhook in await self._oneinbox.list_webhooks():
            if webhook.url == self._url:
                return f"Already registered: {self._line(webhook)}"
        webhook = await self._oneinbox.register_webhook(name="oneinbox-broker", url=self._url, events=EVENTS)
        return f"Registered: {self._line(webhook)}"

    async def list(self) -> str:
        """Return the account's webhooks, one per line, without the secrets in our own."""
        webhooks = await self._oneinbox.list_webhooks()
        return "\n".join(self._line(webhook) for webhook in webhooks) or "There are no webhooks."

    async def remove(self, webhook_id: str) -> str:
        """Remove one."""
        await self._oneinbox.remove_webhook(webhook_id)
        return f"Removed: {webhook_id}"

    def _line(self, webhook: Webhook) -> str:
        shown = f"{self._prefix}…" if webhook.url.startswith(self._prefix) else webhook.url
        return "  ".join(part for part in (webhook.id, shown, webhook.status) if part)


async def operate_webhooks(settings: Settings, work: Callable[[WebhookOperator], Awaitable[str]]) -> str:
    """Do an operator's work on OneInbox's webhooks. Raises SettingsError, OneInboxError."""
    oneinbox = open_oneinbox(settings)
    try:
        return await work(WebhookOperator(oneinbox, settings))
    finally:
        await oneinbox.aclose()


def run_operator(work: Callable[[Operator], Awaitable[str]]) -> None:
    """Do an operator's work, and print what it returns."""
    say(_run(partial(operate, work=work)))


def run_control(work: Callable[[Operator], Awaitable[bool | None]], done: str, otherwise: str = "") -> None:
    """Do work that stops or allows sessions, and print `done` and on which replicas; `otherwise` if it was False.

    Exits with status 1 when a replica has not confirmed it.
    """
    confirmed = True

    async def run(operator: Operator) -> str:
        nonlocal confirmed
        if await work(operator) is False:
            return otherwise
        try:
            lines, confirmed = await operator.confirm()
        except StoreUnavailable:
            lines, confirmed = "not confirmed: the store does not answer", False
        return f"{done}\n{lines}"

    say(_run(partial(operate, work=run)))
    if not confirmed:
        raise SystemExit(1)


def run_webhooks(work: Callable[[WebhookOperator], Awaitable[str]]) -> None:
    """Do an operator's work on OneInbox's webhooks, and print what it returns."""
    say(_run(partial(operate_webhooks, work=work)))


def _run(operation: Callable[[Settings], Coroutine[Any, Any, str]]) -> str:
    settings = checked(load_settings)
    configure_logging("error", settings.log_format)
    try:
        return checked(lambda: asyncio.run(operation(settings)))
    except StoreUnavailable as error:
        why = "does not answer" if not error.lacks_right else "denies its user a right that `doctor` names"
        refuse(f"BROKER_STORE_URL: the store {why}; nothing was changed", status=1)
    except OneInboxError as error:
        refuse(f"OneInbox {error.reason}", status=1)
