"""What an operator does from a terminal: the hand brake and the counters in the shared store, OneInbox's webhooks."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from app.broker.build import open_limits, open_oneinbox
from app.config.agents import load_agents
from app.config.settings import Settings, SettingsError, takes
from app.identity import User
from app.identity.addresses import limit_key, parse_address
from app.limits import KillSwitch, Limits
from app.limits.call_attempt import ALL_CALLS
from app.limits.kill_switch import BLOCKS, PAUSE
from app.limits.live_calls import UNSTOPPED
from app.oneinbox import OneInbox
from app.oneinbox.models import Webhook
from app.store import Store, StoreUnavailable, open_store


@dataclass(frozen=True, slots=True)
class Operator:
    """The parts of a broker that an operator's command needs."""

    settings: Settings
    store: Store
    kill_switch: KillSwitch
    limits: Limits

    def user(self, name: str) -> User:
        """A user as a request would make them: by id, in anonymous mode by address. Raises SettingsError."""
        if self.settings.auth != "anonymous":
            return User(mode=self.settings.auth, id=name, issuer=self.settings.jwt_issuer or "")
        address = parse_address(name)  # which reads an IPv4 address out of ::ffff:192.0.2.1, as requests' are
        if address is None:
            raise SettingsError([f"USER {name!r}: is no address; takes an IPv4 or IPv6 address"])
        return User(mode="anonymous", id=limit_key(str(address)))

    async def status(self) -> str:
        """The counters and what is stopped, a line each."""
        pause = await self.store.members(PAUSE)
        blocks = await self.store.members(BLOCKS)
        unstopped = await self.store.members(UNSTOPPED)
        return "\n".join(
            [
                *(f"{name}: {used} of {amount} sessions" for name, used, amount in await self.limits.usage()),
                f"live calls: {len(await self.store.members(ALL_CALLS))}",
                *(f"paused for {round(left)} s more" for left in pause.values()),
                *([] if pause else ["not paused"]),
                f"blocked users: {len(blocks)}",
                f"calls that could not be stopped: {len(unstopped)}",
                *(f"  {call}" for call in sorted(unstopped)),
            ]
        )


EVENTS = ("call.started", "call.ended", "call.failed", "call.analyzed", "call.recording.available")


class WebhookOperator:
    """OneInbox's webhook for this broker: its address follows from the settings."""

    def __init__(self, oneinbox: OneInbox, settings: Settings) -> None:
        """Raises SettingsError where the settings make no address."""
        missing = [
            f"{name}: is required for webhooks; takes {takes(name)}"
            for name, value in (
                ("BROKER_PUBLIC_URL", settings.public_url),
                ("BROKER_WEBHOOK_SECRET", settings.webhook_secret),
            )
            if value is None
        ]
        if settings.public_url is None or settings.webhook_secret is None:
            raise SettingsError(missing)
        self._oneinbox = oneinbox
        self._prefix = f"{settings.public_url}/webhooks/oneinbox/"
        self._url = self._prefix + settings.webhook_secret.get_secret_value()

    async def register(self) -> str:
        """Register it, unless it is."""
        for webhook in await self._oneinbox.list_webhooks():
            if webhook.url == self._url:
                return f"Registered already: {self._line(webhook)}"
        webhook = await self._oneinbox.register_webhook(name="oneinbox-broker", url=self._url, events=EVENTS)
        return f"Registered: {self._line(webhook)}"

    async def list(self) -> str:
        """All of the account's, a line each; the secret in our own is not shown."""
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


async def operate(settings: Settings, work: Callable[[Operator], Awaitable[str]]) -> str:
    """Do an operator's work on the shared store.

    Raises SettingsError without one, StoreUnavailable when it does not answer.
    """
    url = settings.store_url.get_secret_value()
    if url == "memory://":
        raise SettingsError(
            ["BROKER_STORE_URL: is memory://; a command reaches running brokers only through a shared store"]
        )
    agents = load_agents(settings)
    async with open_store(url) as store:
        said = await work(Operator(settings, store, KillSwitch(store), open_limits(settings, agents, store, lease=0)))
        if store.state == "down":
            raise StoreUnavailable
        return said
