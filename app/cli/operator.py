"""Commands that act through the shared store or on OneInbox: pauses, blocks, webhooks."""

import asyncio
import os
import pwd
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from pydantic_core import to_json

from app.broker.build import load_checked_settings, open_ledger, open_limits, open_oneinbox
from app.broker.replicas import read_reports
from app.cli.process import checked, refuse, say
from app.cli.status import Status, described, read_status
from app.config.agents import load_agents
from app.config.loading import secret_lines
from app.config.plans import load_plans
from app.config.settings import Settings, SettingsError, takes
from app.identity import User
from app.identity.addresses import parse_address
from app.identity.keyring import LOGGED, Keyring
from app.identity.user import user_named
from app.limits import KillSwitch, Limits
from app.limits.kill_switch import BY_PSEUDONYM, CONTROLS, LONGEST_NAME, Note, printable, read_controls
from app.oneinbox import OneInbox
from app.oneinbox.errors import OneInboxError, Rejected
from app.oneinbox.models import Webhook
from app.store import Store, StoreUnavailable
from app.telemetry.logging import configure_logging

CONFIRM_SECONDS = 5
"""Seconds that replicas have to confirm a control."""
PSEUDONYM = re.compile(rf"[A-Za-z0-9_-]{{{LOGGED}}}(?:[A-Za-z0-9_-]{{{43 - LOGGED}}})?")
"""As logs show it, or the whole one, as on OneInbox's record."""

T = TypeVar("T")


class Said(NamedTuple):
    """The output of a command; `fine` False: it exits with status 1."""

    text: str
    fine: bool = True


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
            if not name or name.encode(errors="replace").decode() != name:  # it was given in bytes that are no UTF-8
                raise SettingsError([f"USER {name!r}: is not a user's id"])
            return user_named(self.settings.auth, name, self.settings.jwt_issuer or "")
        address = parse_address(name)  # reads ::ffff:192.0.2.1 as IPv4, as for requests
        if address is None:
            what = "takes an IPv4 or IPv6 address, or the pseudonym that logs show"
            raise SettingsError([f"USER {name!r}: is not an address; {what}"])
        return user_named("anonymous", str(address))

    def users(self, text: str) -> dict[str, str]:
        """Return whom USER means: names as in the set of blocks, each with the pseudonym that logs show.

        A text that may be an id or a pseudonym means both. Raises SettingsError.
        """
        names = {}
        is_pseudonym = PSEUDONYM.fullmatch(text) is not None
        if is_pseudonym:
            names[BY_PSEUDONYM + text[:LOGGED]] = text[:LOGGED]
        if not is_pseudonym or self.settings.auth != "anonymous":
            user = self.user(text)
            names[user.store_name] = Keyring(secret_lines(self.settings)).pseudonym(user)[:LOGGED]
        return names

    async def pause(self, seconds: float, reason: str) -> None:
        """Refuse all sessions for `seconds`."""
        await self.kill_switch.pause(seconds, Note(by=operator_name(), reason=reason, since=time.time()))

    async def resume(self) -> bool:
        """End a pause; return whether there was one."""
        return await self.kill_switch.resume(operator_name())

    async def block(self, user: str, seconds: float, reason: str) -> None:
        """Refuse the sessions of USER for `seconds`. Raises SettingsError."""
        for name, pseudonym in self.users(user).items():
            note = Note(user=pseudonym, by=operator_name(), reason=reason, since=time.time())
            await self.kill_switch.block(name, seconds, note)

    async def unblock(self, user: str) -> bool:
        """End the blocks of USER, by id and by pseudonym; return whether there was one. Raises SettingsError."""
        users = self.users(user)
        found = [
            control.name
            for control in await read_controls(self.store)
            if control.name in users or control.note.user in users.values()
        ]
        return any([await self.kill_switch.unblock(name, operator_name()) for name in found])

    async def status(self) -> Status:
        """Return the state of the deployment."""
        return await read_status(self.store, self.limits)

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
        lines += [f"not in force on {described(report)}" for report in missing]
        return "\n".join(lines), not missing


def operator_name() -> str:
    """Return the name of the user who runs this command, as the operating system has it."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name  # `getpass.getuser` believes LOGNAME
    except KeyError:  # a container's user may have no name
        name = f"uid {os.getuid()}"
    return printable(name, LONGEST_NAME)


async def operate(settings: Settings, work: Callable[[Operator], Awaitable[T]]) -> T:
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
        limits = open_limits(settings, agents, open_ledger(settings, load_plans(settings), store, hangs_up=False))
        return await work(Operator(settings, store, KillSwitch(store), limits))


EVENTS = ("call.started", "call.ended", "call.failed", "call.recording.available", "transcript.final")
ANALYZED = "call.analyzed"
"""OneInbox's guide has this event, its reference refuses it."""
HOOK_SECRET = re.compile(r"(/webhooks/oneinbox/)[^/?#\s]+", re.IGNORECASE)
"""The secret of any broker's webhook, also of a former one."""
LOGIN_OR_QUERY = re.compile(r"(?<=//)[^/?#@\s]*(?=@)|(?<=\?)\S+")
"""What may be a secret in the URL of another service's webhook."""


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
        secret = settings.webhook_secret.get_secret_value()
        self._url = f"{settings.public_url}/webhooks/oneinbox/{secret}"
        # OneInbox may have changed the case of a host, or have escaped a character (RFC 3986, section 6.2.2).
        anyhow = "".join(f"(?:{re.escape(each)}|%{ord(each):02X})" for each in secret)
        self._secret = re.compile(anyhow, re.IGNORECASE)

    async def register(self) -> str:
        """Register it if it is not registered yet."""
        for webhook in await self._oneinbox.list_webhooks():
            if webhook.url == self._url:
                return f"Already registered: {self._line(webhook)}"
        register = partial(self._oneinbox.register_webhook, name="oneinbox-broker", url=self._url)
        try:
            webhook = await register(events=(*EVENTS, ANALYZED))
        except Rejected:
            webhook = await register(events=EVENTS)
        return f"Registered: {self._line(webhook)}"

    async def list(self) -> str:
        """Return the account's webhooks, one per line, without the secrets in their URLs."""
        webhooks = await self._oneinbox.list_webhooks()
        return "\n".join(self._line(webhook) for webhook in webhooks) or "There are no webhooks."

    async def remove(self, webhook_id: str) -> str:
        """Remove one."""
        await self._oneinbox.remove_webhook(webhook_id)
        return f"Removed: {webhook_id}"

    def _line(self, webhook: Webhook) -> str:
        url = LOGIN_OR_QUERY.sub("…", HOOK_SECRET.sub(r"\1…", webhook.url))
        return self._secret.sub("…", "  ".join(part for part in (webhook.id, url, webhook.status) if part))


async def operate_webhooks(settings: Settings, work: Callable[[WebhookOperator], Awaitable[str]]) -> str:
    """Do an operator's work on OneInbox's webhooks. Raises SettingsError, OneInboxError."""
    oneinbox = open_oneinbox(settings)
    try:
        return await work(WebhookOperator(oneinbox, settings))
    finally:
        await oneinbox.aclose()


def run_operator(work: Callable[[Operator], Awaitable[Said]]) -> None:
    """Do an operator's work, and print what it says."""
    said = reach_store(work)
    say(said.text)
    if not said.fine:
        raise SystemExit(1)


def run_status(*, as_json: bool) -> None:
    """Print the state of the deployment."""

    async def run(operator: Operator) -> Said:
        status = await operator.status()
        return Said(to_json(status.as_object(), indent=2).decode() if as_json else "\n".join(status.lines()))

    run_operator(run)


def run_control(
    work: Callable[[Operator], Awaitable[bool | None]],
    done: str,
    otherwise: str = "",
    then: Callable[[Operator], Awaitable[Said]] | None = None,
) -> None:
    """Do work that stops or allows sessions, and print `done`, or `otherwise` if it was False, and on which replicas.

    Exits with status 1 when a replica has not confirmed it. `then`: done afterwards.
    """

    async def run(operator: Operator) -> Said:
        said = otherwise if await work(operator) is False else done
        try:
            lines, fine = await operator.confirm()
            if then is not None:
                more = await then(operator)
                lines, fine = f"{lines}\n{more.text}", fine and more.fine
        except StoreUnavailable:
            lines, fine = "not confirmed: the store does not answer", False
        return Said(f"{said}\n{lines}", fine)

    run_operator(run)


def reach_store(work: Callable[[Operator], Awaitable[T]]) -> T:
    """Do an operator's work and return what it returns, or refuse with the reason why it cannot be done."""
    return _run(partial(operate, work=work))


def run_webhooks(work: Callable[[WebhookOperator], Awaitable[str]]) -> None:
    """Do an operator's work on OneInbox's webhooks, and print what it returns."""
    say(_run(partial(operate_webhooks, work=work)))


def _run(operation: Callable[[Settings], Coroutine[Any, Any, T]]) -> T:
    settings = checked(load_checked_settings)
    configure_logging("error", settings.log_format)
    try:
        return checked(lambda: asyncio.run(operation(settings)))
    except StoreUnavailable as error:
        why = "does not answer" if not error.lacks_right else "denies its user a right that `doctor` names"
        refuse(f"BROKER_STORE_URL: the store {why}; nothing was changed", status=1)
    except OneInboxError as error:
        refuse(f"OneInbox {error.reason}", status=1)
