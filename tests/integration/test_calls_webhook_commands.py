"""`webhook register`, `list` and `remove`, against the emulated OneInbox."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from app.cli.operator import WebhookOperator, operate_webhooks
from app.config.settings import SettingsError
from app.oneinbox.errors import OneInboxError
from app.sandbox.schemas import RegisterWebhook
from app.sandbox.server import RunningEmulator, running_emulator
from tests.support.brokers import LONG_CALLS, environ_of, settings_of
from tests.support.commands import invoke
from tests.support.processes import Finished

SECRET = "webhook-secret-of-the-tests-0123456789"
SETTINGS = {"BROKER_PUBLIC_URL": "https://broker.example/voice", "BROKER_WEBHOOK_SECRET": SECRET}
ADDRESS = "https://broker.example/voice/webhooks/oneinbox/"
EVENTS = ["call.started", "call.ended", "call.failed", "call.recording.available", "transcript.final"]


@pytest.fixture
async def oneinbox() -> AsyncIterator[RunningEmulator]:
    async with running_emulator(LONG_CALLS) as emulator:
        yield emulator


async def command(url: str, *arguments: str, **changes: str) -> Finished:
    """Run `webhook …`; a change to nothing takes a setting away."""
    environ = {name: value for name, value in environ_of(url, {**SETTINGS, **changes}).items() if value}
    done = await asyncio.to_thread(invoke, "webhook", *arguments, environ=environ)
    assert SECRET not in done.out + done.err
    assert LONG_CALLS.api_key not in done.out + done.err
    assert "Traceback" not in done.out + done.err
    return done


async def do(url: str, what: str, *arguments: str, **changes: str) -> str:
    """The same without the command; what it would print."""

    async def work(operator: WebhookOperator) -> str:
        said: str = await getattr(operator, what)(*arguments)
        return said

    said = await operate_webhooks(settings_of(url, {**SETTINGS, **changes}), work)
    assert SECRET not in said
    return said


async def test_register_list_and_remove(oneinbox: RunningEmulator) -> None:
    registered = await command(oneinbox.url, "register")

    [kept] = list(oneinbox.emulator.webhooks)
    assert kept.url == ADDRESS + SECRET
    assert list(kept.events) == EVENTS
    asked = [request.json["events"] for request in oneinbox.emulator.requests if request.method == "POST"]
    assert asked == [[*EVENTS, "call.analyzed"], EVENTS], "the reference refuses the first"
    assert (registered.code, registered.err) == (0, "")
    assert registered.out == f"Registered: {kept.id}  {ADDRESS}…  active\n"
    again = await do(oneinbox.url, "register")
    assert again == f"Already registered: {kept.id}  {ADDRESS}…  active"
    assert len(list(oneinbox.emulator.webhooks)) == 1

    oneinbox.emulator.webhooks.register(RegisterWebhook(name="x", url="https://other.example/hook", events=EVENTS))
    ours, other = (await do(oneinbox.url, "list")).splitlines()
    assert ours == f"{kept.id}  {ADDRESS}…  active"
    assert "https://other.example/hook" in other

    # A secret that is no longer ours is not shown either.
    renewed = await do(oneinbox.url, "list", BROKER_WEBHOOK_SECRET="another-" + SECRET[::-1])
    assert SECRET not in renewed
    assert await do(oneinbox.url, "remove", kept.id) == f"Removed: {kept.id}"
    assert [each.url for each in oneinbox.emulator.webhooks] == ["https://other.example/hook"]
    with pytest.raises(OneInboxError):
        await do(oneinbox.url, "remove", kept.id)


async def test_the_guides_edition_takes_more_events() -> None:
    async with running_emulator(replace(LONG_CALLS, edition="guide")) as oneinbox:
        await do(oneinbox.url, "register")

        [kept] = list(oneinbox.emulator.webhooks)
        assert list(kept.events) == [*EVENTS, "call.analyzed"]
        assert len([each for each in oneinbox.emulator.requests if each.method == "POST"]) == 1


FORMER = "a-former-secret-0123456789"
LISTED = {
    "as-it-is": (ADDRESS + SECRET, f"{ADDRESS}…"),
    "another-host": (f"https://old.example/webhooks/oneinbox/{SECRET}", "https://old.example/webhooks/oneinbox/…"),
    "another-prefix": (
        f"https://broker.example/webhooks/oneinbox/{SECRET}",
        "https://broker.example/webhooks/oneinbox/…",
    ),
    "another-route": (f"https://old.example/hooks/{SECRET}/x", "https://old.example/hooks/…/x"),
    "a-former-secret": (ADDRESS + FORMER, f"{ADDRESS}…"),
    "a-former-secret-elsewhere": (
        f"http://1.2.3.4:8000/webhooks/oneinbox/{FORMER}/",
        "http://1.2.3.4:8000/webhooks/oneinbox/…/",
    ),
    "in-a-query": (f"https://relay.example/?to={ADDRESS}{SECRET}", "https://relay.example/?…"),
    "in-a-fragment": (f"https://relay.example/#{SECRET}", "https://relay.example/#…"),
    "in-a-login": (f"https://me:{SECRET}@relay.example/", "https://…@relay.example/"),
    "in-a-host": (f"https://{SECRET.upper()}.relay.example/", "https://….relay.example/"),
    "escaped": (f"https://old.example/{SECRET.replace('-', '%2d')}", "https://old.example/…"),
    "twice": (f"https://old.example/{SECRET}/{SECRET}", "https://old.example/…/…"),
    "anothers": ("https://me:hush@other.example/hook?key=hush", "https://…@other.example/hook?…"),
    "harmless": ("https://other.example/hook/1", "https://other.example/hook/1"),
}


@pytest.mark.parametrize(("url", "shown"), LISTED.values(), ids=LISTED.keys())
async def test_no_secret_of_a_url_is_listed(url: str, shown: str, oneinbox: RunningEmulator) -> None:
    kept = oneinbox.emulator.webhooks.register(RegisterWebhook(name="x", url=url, events=EVENTS))

    listed = await do(oneinbox.url, "list")

    assert listed == f"{kept.id}  {shown}  active"
    assert not [secret for secret in (FORMER, "hush") if secret in listed]


async def test_no_webhook_at_all(oneinbox: RunningEmulator) -> None:
    assert await do(oneinbox.url, "list") == "There are no webhooks."


async def test_missing_settings_are_lines_and_exit_2(oneinbox: RunningEmulator) -> None:
    missing = await command(oneinbox.url, "list", BROKER_PUBLIC_URL="", BROKER_WEBHOOK_SECRET="")

    assert (missing.code, missing.out) == (2, "")
    lines = [line.partition(":")[0] for line in missing.err.splitlines()]
    assert lines == ["BROKER_PUBLIC_URL", "BROKER_WEBHOOK_SECRET"]
    assert not oneinbox.emulator.requests


@pytest.mark.parametrize("name", SETTINGS)
async def test_one_missing_setting_is_named(name: str, oneinbox: RunningEmulator) -> None:
    environ = environ_of(oneinbox.url, {other: value for other, value in SETTINGS.items() if other != name})
    with pytest.raises(SettingsError) as caught:
        await operate_webhooks(settings_of(oneinbox.url, environ), lambda operator: operator.register())

    [line] = caught.value.lines
    assert line.startswith(f"{name}: ")
    assert SECRET not in line


async def test_oneinbox_may_refuse(oneinbox: RunningEmulator) -> None:
    refused = await command(oneinbox.url, "register", ONEINBOX_API_KEY="oi_sk_wrong")

    assert (refused.code, refused.out) == (1, "")
    assert refused.err == "OneInbox answered 401\n"
    with pytest.raises(OneInboxError, match="cannot be reached"):
        await do("http://127.0.0.1:1", "list")
    assert not list(oneinbox.emulator.webhooks)


@pytest.mark.parametrize("webhook_id", ["../calls", "a/b", "%2e%2e", "?x", "#", " ", "ü", "x" * 1000])
async def test_an_odd_id_reaches_no_other_route(webhook_id: str, oneinbox: RunningEmulator) -> None:
    with pytest.raises(OneInboxError):
        await do(oneinbox.url, "remove", webhook_id)

    for request in oneinbox.emulator.requests:
        assert request.method == "DELETE"
        assert request.path.startswith("/v1/webhooks/"), request.path
