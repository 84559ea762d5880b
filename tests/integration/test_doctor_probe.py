"""`doctor --probe` against running brokers, well set up and badly: what it finds, and that no call is ever started."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from app.doctor.probe import probe
from app.sandbox.server import RunningEmulator, running_emulator
from tests.support.brokers import served, settings_of
from tests.support.commands import invoke

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

JWT = {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": "a secret shared with the issuer, long enough"}
HEADER = {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "10.0.0.0/8"}
LISTED = {"BROKER_ALLOWED_ORIGINS": "https://www.example.com"}
ANYBODY = {"BROKER_TRUSTED_PROXIES": "0.0.0.0/0,::/0"}
PROBER = {"BROKER_TRUSTED_PROXIES": "127.0.0.0/8"}
OPEN = {"BROKER_ALLOWED_ORIGINS": "*", "BROKER_LIMITS_MODE": "observe", "BROKER_ALLOWED_OVERRIDES": "llm.model"}
AFTER_LOGIN = {"no identity", "forged identity", "forged user header", "forged address header", "odd ids"}

BROKERS: dict[str, tuple[dict[str, str], set[str], set[str]]] = {
    "anonymous": ({}, set(), {"no identity"}),
    "listed-origins": (LISTED, set(), {"no identity"}),
    "jwt": (JWT, set(), set()),
    "jwt-cookie": ({**JWT, **LISTED, "BROKER_JWT_COOKIE": "login"}, set(), set()),
    "header": (HEADER, set(), set()),
    "wants-an-origin": ({"BROKER_REQUIRE_ORIGIN": "true"}, set(), {"no identity"}),
    "challenge": ({"BROKER_CHALLENGE_SECRET": "secret"}, set(), {"no identity"}),
    "under-a-prefix": ({"BROKER_ROOT_PATH": "/voice"}, set(), {"no identity"}),
    "any-origin": ({"BROKER_ALLOWED_ORIGINS": "*"}, {"forged Origin"}, {"no identity"}),
    "jwt-any-origin": ({**JWT, "BROKER_ALLOWED_ORIGINS": "*"}, {"forged Origin"}, set()),
    "believes-the-prober's-address": (PROBER, {"forged address header"}, {"no identity"}),
    "takes-all-for-proxies": (ANYBODY, set(), {"no identity"}),  # then no hop is a client, and the peer counts
    "believes-any-user": ({**HEADER, **ANYBODY}, {"forged user header"}, set()),
    "everything-open": (
        {**PROBER, **OPEN},
        {"forged Origin", "forged address header"},
        {"no identity"},
    ),
    "few-requests": (
        {"BROKER_REQUEST_LIMITS": "1/minute"},
        set(),
        AFTER_LOGIN | {"large chunked body"},
    ),
}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def emulator() -> AsyncIterator[RunningEmulator]:
    async with running_emulator() as running:
        yield running


@pytest.mark.parametrize(("changes", "wrong", "warned"), BROKERS.values(), ids=BROKERS.keys())
async def test_brokers(emulator: RunningEmulator, changes: dict[str, str], wrong: set[str], warned: set[str]) -> None:
    async with served(settings_of(emulator.url, changes)) as url:
        found = await probe(url + changes.get("BROKER_ROOT_PATH", ""))
    assert {finding.name: finding for finding in found if not finding.ok}.keys() == wrong
    assert {finding.name for finding in found if finding.level == "warning"} == warned
    assert [request for request in emulator.emulator.requests if request.method != "GET"] == []


async def test_the_command(emulator: RunningEmulator) -> None:
    async with served(settings_of(emulator.url, {"BROKER_ALLOWED_ORIGINS": "*"})) as url:
        # No settings, not even readable ones: they are not needed.
        environ = {"BROKER_NO_SUCH": "1"}
        text = await asyncio.to_thread(invoke, "doctor", "--probe", url, environ=environ)
        document = await asyncio.to_thread(invoke, "doctor", "--json", "--probe", url, environ=environ)
    assert (text.code, text.err) == (1, "")
    assert [line.partition(":")[0] for line in text.out.splitlines() if line.startswith("✗")] == ["✗ forged Origin"]
    assert document.code == 1
    assert json.loads(document.out)["ok"] is False
    assert [request for request in emulator.emulator.requests if request.method != "GET"] == []


async def test_a_oneinbox_is_no_broker(emulator: RunningEmulator) -> None:
    before = len(emulator.emulator.requests)
    done = await asyncio.to_thread(invoke, "doctor", "--probe", emulator.url, environ={})
    assert done.code == 1
    assert done.out.startswith("✗ broker: this is not a broker: ")
    assert len(emulator.emulator.requests) == before + 1


@pytest.mark.parametrize(
    "url", ["voice.example.com", "ftp://a.example", "https://u:hush@a.example", "https://a/?b=hush"]
)
async def test_what_is_no_url_of_a_broker(url: str) -> None:
    done = await asyncio.to_thread(invoke, "doctor", "--probe", url, environ={})
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("--probe: ")
    assert "takes a broker's public URL" in done.err
    assert "hush" not in done.err


async def test_nobody_there() -> None:
    done = await asyncio.to_thread(invoke, "doctor", "--probe", "http://127.0.0.1:1", environ={})
    assert done.code == 1
    assert "cannot be reached" in done.out
    assert done.err == ""
