"""The operator's commands against two running brokers."""

import asyncio
import getpass
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx
import jwt
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from app import __version__
from app.cli.operator import Operator, operate
from app.sandbox.server import RunningEmulator, running_emulator
from tests.conftest import Logs, OpenBroker
from tests.support.brokers import (
    LONG_CALLS,
    SECRET,
    BrokerProcess,
    environ_of,
    eventually,
    from_address,
    outcomes,
    post_many,
    running_broker_processes,
)
from tests.support.commands import invoke
from tests.support.harness import Upstream, post_session, settings
from tests.support.processes import Finished
from tests.support.shapes import assert_problem
from tests.support.valkey import Valkey, running_valkey

SETTINGS = {"BROKER_TRUSTED_PROXIES": "127.0.0.0/8"}
NOWHERE = "redis://127.0.0.1:1"
HOUSEHOLD = "2001:db8:1:2::1"

in_modules_loop = pytest.mark.asyncio(loop_scope="module")


async def command(*arguments: str, **changes: str) -> Finished:
    """Run a command of the broker, with no OneInbox that could be reached."""
    environ = environ_of("http://127.0.0.1:1", {**SETTINGS, **changes})
    return await asyncio.to_thread(invoke, *arguments, environ=environ)


@dataclass(frozen=True)
class Deployment:
    """Two brokers on one store, and commands for them."""

    brokers: list[BrokerProcess]
    oneinbox: RunningEmulator
    valkey: Valkey

    async def command(self, *arguments: str) -> str:
        said = await command(*arguments, BROKER_STORE_URL=self.valkey.url)
        assert (said.code, said.err) == (0, "")
        return said.out

    async def answers(self, outcome: str, address: str) -> None:
        """Both brokers answer a client this way at once: a command that returned is in force."""
        assert outcomes(await post_many(self.brokers, 2, from_address(address))) == {outcome: 2}


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with running_valkey() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment(valkey: Valkey) -> AsyncIterator[Deployment]:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_processes(2, oneinbox.url, **SETTINGS, BROKER_STORE_URL=valkey.url) as brokers,
    ):
        yield Deployment(brokers, oneinbox, valkey)


@pytest.mark.process
@in_modules_loop
async def test_pause_and_resume(deployment: Deployment) -> None:
    await deployment.answers("201", "192.0.2.1")

    assert "Paused for 90s" in await deployment.command("pause", "--for", "90s")
    await deployment.answers("at-capacity", "192.0.2.1")
    starts = len(deployment.oneinbox.emulator.calls)
    assert outcomes(await post_many(deployment.brokers, 20, from_address("192.0.2.2"))) == {"at-capacity": 20}
    assert len(deployment.oneinbox.emulator.calls) == starts
    status = (await deployment.command("status")).splitlines()
    assert any(line.startswith("paused for ") and int(line.split()[2]) <= 90 for line in status)

    assert await deployment.command("resume") == "Sessions can start again.\nin force on 2 of 2 replicas\n"
    await deployment.answers("201", "192.0.2.1")
    assert await deployment.command("resume") == "There was no pause.\nin force on 2 of 2 replicas\n"


@pytest.mark.process
@in_modules_loop
async def test_block_and_unblock_an_address(deployment: Deployment) -> None:
    blocked = await deployment.command("block", HOUSEHOLD, "--for", "1h", "--reason", "fifty calls a minute")
    assert blocked == "Blocked for 1h.\nin force on 2 of 2 replicas\n"
    await deployment.answers("blocked", HOUSEHOLD)
    assert outcomes(await post_many(deployment.brokers, 2, from_address("2001:db8:1:2:ffff::9"))) == {"blocked": 2}
    assert outcomes(await post_many(deployment.brokers, 2, from_address("2001:db8:1:3::1"))) == {"201": 2}

    live = len(deployment.oneinbox.emulator.calls)
    *lines, block, replicas, first, second, unstopped = (await deployment.command("status")).splitlines()
    assert lines == [
        f"global-minute: {live} of 100000 sessions",
        "OneInbox's calls today: not watched",
        f"live calls: {live}",
        "not paused",
        "blocked users: 1",
    ]
    assert block.endswith(f", by {getpass.getuser()}, because: fifty calls a minute")
    assert replicas == "replicas: 2"
    assert unstopped == "calls that could not be stopped: 0"
    for line in (first, second):
        assert line.endswith(f": version {__version__}, reaches the store, 1 blocked")

    unblocked = await deployment.command("unblock", "2001:db8:1:2::abcd")
    assert unblocked == "Unblocked.\nin force on 2 of 2 replicas\n"
    await deployment.answers("201", HOUSEHOLD)


REFUSED = {
    "in-memory": (("pause",), "memory://", 2, "BROKER_STORE_URL: is memory://; a command reaches running brokers only"),
    "no-store": (("pause",), "redis://h..invalid", 2, "BROKER_STORE_URL: the URL has an invalid host"),
    "dead-store": (("status",), NOWHERE, 1, "BROKER_STORE_URL: the store does not answer; nothing was changed"),
    "no-duration": (("pause", "--for", "soon"), NOWHERE, 2, "--for 'soon': is not a duration; takes a number and"),
    "too-long": (("pause", "--for", "9999999d"), NOWHERE, 2, "--for '9999999d': takes at most 3650d"),
    "long-reason": (("pause", "--reason", "x" * 201), NOWHERE, 2, "--reason: takes at most 200 characters on one line"),
    "two-lines": (("block", "192.0.2.1", "--reason", "a\nb"), NOWHERE, 2, "--reason: takes at most 200 characters on"),
    "escape": (("pause", "--reason", "\x1b[2J"), NOWHERE, 2, "--reason: takes at most 200 characters on one line"),
    "no-address": (("block", "ann"), NOWHERE, 2, "USER 'ann': is not an address; takes an IPv4 or IPv6 address"),
}


@pytest.mark.parametrize(("arguments", "store", "code", "line"), REFUSED.values(), ids=REFUSED.keys())
async def test_what_cannot_be_done_is_said_in_a_line(
    arguments: tuple[str, ...], store: str, code: int, line: str
) -> None:
    said = await command(*arguments, BROKER_STORE_URL=store)
    assert said.code == code
    assert said.err.splitlines()[-1].startswith(line)
    assert "Traceback" not in said.err
    assert said.out == ""


@pytest.fixture
def environ() -> Iterator[dict[str, str]]:
    """Settings of brokers and commands on one store."""
    with running_valkey() as valkey:
        yield {"BROKER_STORE_URL": valkey.url, "BROKER_SECRET": SECRET, "BROKER_METRICS_TOKEN": METRICS_TOKEN}


METRICS_TOKEN = "metrics-token-of-the-operator"
ADDRESSES = ["192.0.2.1", "192.0.2.6"]
"""The second one's pseudonym begins with a dash."""


@pytest.mark.parametrize("address", ADDRESSES)
async def test_block_takes_the_user_that_the_log_names(
    environ: dict[str, str], open_broker: OpenBroker, logs: Logs, address: str
) -> None:
    broker = await open_broker(environ, peer=address)
    assert (await post_session(broker)).status_code == 201
    user = next(entry["user"] for entry in logs if entry["event"] == "request")

    blocked = await command("block", user, "--reason", "see the log", **environ)

    assert (blocked.code, blocked.out) == (0, "Blocked for 1d.\nin force on 1 of 1 replicas\n")
    assert (await post_session(broker)).status_code == 403
    assert await gauges(broker) == {"broker_paused": 0, "broker_blocks": 1}
    (block,) = json.loads((await command("status", "--json", **environ)).out)["blocks"]
    assert (block["user"], block["reason"], block["by"]) == (user, "see the log", getpass.getuser())

    assert (await command("unblock", address, **environ)).out.startswith("Unblocked.")
    assert (await post_session(broker)).status_code == 201
    assert await gauges(broker) == {"broker_paused": 0, "broker_blocks": 0}


async def gauges(broker: httpx.AsyncClient) -> dict[str, float]:
    """What the metrics say about pauses and blocks."""
    page = await broker.get("/metrics", headers={"Authorization": f"Bearer {METRICS_TOKEN}"})
    families = text_string_to_metric_families(page.text)
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    return {name: samples[name] for name in ("broker_paused", "broker_blocks")}


async def test_status_is_an_object_for_programs(environ: dict[str, str], open_broker: OpenBroker) -> None:
    environ |= {"BROKER_GLOBAL_TALK_MINUTES": "60", "BROKER_GLOBAL_SESSION_LIMITS": "1000/day"}
    broker = await open_broker(environ)
    assert (await post_session(broker)).status_code == 201
    await command("pause", "--for", "90s", "--reason", "invoice in dispute", **environ)

    status = json.loads((await command("status", "--json", **environ)).out)

    sessions, minutes = status["limits"]
    assert sessions == {"name": "global-day", "used": 1, "allowed": 1000, "unit": "sessions"}
    assert (minutes["name"], minutes["allowed"], minutes["unit"]) == ("global-talk-minutes", 3600, "seconds")
    pause = status["pause"]
    until, since = (datetime.fromisoformat(pause.pop(name)) for name in ("until", "since"))
    assert 85 <= (until - since).total_seconds() <= 92
    assert pause == {"by": getpass.getuser(), "reason": "invoice in dispute"}
    (replica,) = status["replicas"]
    assert (replica["version"], replica["reaches_store"], replica["controls_confirmed"], replica["paused"]) == (
        __version__,
        True,
        True,
        True,
    )
    assert (status["running_calls"], status["blocks"], status["unstopped"]) == (1, [], [])


JWT_SECRET = "a secret shared with the issuer, long enough"


@pytest.mark.parametrize("issuer", [None, "https://login.example"])
async def test_block_a_user_who_signs_in(open_broker: OpenBroker, issuer: str | None) -> None:
    modes: dict[str, Any] = {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": JWT_SECRET, "BROKER_SECRET": "s" * 32}
    with running_valkey() as valkey:
        modes |= {"BROKER_STORE_URL": valkey.url} | ({"BROKER_JWT_ISSUER": issuer} if issuer else {})
        broker = await open_broker(**modes)

        async def post(user: str) -> int:
            claims = {"sub": user, "exp": 4_000_000_000, "iss": issuer or "https://somebody.example"}
            token = jwt.encode(claims, JWT_SECRET, "HS256")
            return (await broker.post("/session", headers={"Authorization": f"Bearer {token}"})).status_code

        async def block(operator: Operator) -> str:
            await operator.block("ann", 60, "")
            return "done"

        async def is_blocked() -> bool:
            return await post("ann") == 403

        assert await post("ann") == 201
        assert await operate(settings(modes), block) == "done"
        await eventually(is_blocked, 2)
        assert await post("ben") == 201


SIGN_INS: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "anonymous": (
        {"BROKER_TRUSTED_PROXIES": "127.0.0.0/8"},
        {"X-Forwarded-For": "2001:db8:1:2::9"},
        "2001:db8:1:2:ffff::1",
    ),
    "anonymous-by-another-header": (
        {"BROKER_TRUSTED_PROXIES": "127.0.0.0/8", "BROKER_CLIENT_IP_HEADER": "Fly-Client-IP"},
        {"Fly-Client-IP": "::ffff:192.0.2.1"},
        "192.0.2.1",
    ),
    "header": (
        {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "127.0.0.0/8"},
        {"X-Forwarded-User": "ann@example.com", "Sec-Fetch-Site": "same-origin"},
        "ann@example.com",
    ),
    "jwt": (
        {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": JWT_SECRET},
        {"Authorization": f"Bearer {jwt.encode({'sub': 'ann', 'exp': 4_000_000_000}, JWT_SECRET, 'HS256')}"},
        "ann",
    ),
    "jwt-of-an-issuer": (
        {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": JWT_SECRET, "BROKER_JWT_ISSUER": "https://a.example\r"},
        {
            "Authorization": "Bearer "
            + jwt.encode({"sub": "ann", "exp": 4_000_000_000, "iss": "https://a.example"}, JWT_SECRET, "HS256")
        },
        "ann",
    ),
}


@pytest.mark.process
@pytest.mark.parametrize("sign_in", SIGN_INS)
async def test_an_operator_names_a_user_as_requests_do(
    environ: dict[str, str], open_broker: OpenBroker, logs: Logs, sign_in: str
) -> None:
    """In every mode, by the id or by the pseudonym in the log."""
    mode, login, name = SIGN_INS[sign_in]
    environ |= mode
    broker = await open_broker(environ, peer="127.0.0.1")
    assert (await post_session(broker, **login)).status_code == 201
    pseudonym = next(entry["user"] for entry in logs if entry["event"] == "request")

    for user, other in ((name, pseudonym), (pseudonym, name)):
        assert (await command("block", user, **environ)).code == 0
        assert_problem(await post_session(broker, **login), "blocked")
        assert (await command("unblock", other, **environ)).out.startswith("Unblocked.")
        assert (await post_session(broker, **login)).status_code in (201, 429)


async def test_two_replicas_share_what_oneinbox_allows_and_status_says_it(
    open_broker: OpenBroker, upstream: Upstream
) -> None:
    upstream.usage.respond(json={"max_calls_per_day": 40, "calls_remaining_today": 0})
    with running_valkey() as valkey:
        shared = {"BROKER_STORE_URL": valkey.url, "BROKER_SECRET": "s" * 32}
        replicas = [await open_broker(shared) for _ in range(2)]

        for replica in replicas:
            assert_problem(await post_session(replica), "at-capacity")
        status = await operate(settings(shared), Operator.status)

    assert upstream.usage.call_count == 1
    assert not upstream.start.called
    assert "OneInbox's calls today: 0 of 40 left" in status.lines()
    assert status.as_object()["oneinbox_calls_today"] == {"left": 0, "allowed": 40}
