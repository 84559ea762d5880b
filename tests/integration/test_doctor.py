"""`doctor` over real sockets: the emulated OneInbox, a real Valkey, and the command as its users run it."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from app.broker.build import refuse_foreign_store
from app.config.loading import load_settings
from app.doctor.checks import diagnose
from app.doctor.findings import Finding, as_json
from app.sandbox.emulator import EmulatorOptions
from app.sandbox.faults import Drip, Drop, Hang, Status
from app.sandbox.server import RunningEmulator, running_emulator
from tests.support.commands import invoke
from tests.support.processes import PATIENCE, Finished, run
from tests.support.valkey import Valkey, running_valkey

KEY = "oi_sk_PLANTEDKEY_77c1d0"
PASSWORD = "PLANTEDPASSWORD"
NOWHERE = "http://127.0.0.1:1"
DAY = 86400

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def emulator() -> AsyncIterator[RunningEmulator]:
    async with running_emulator(EmulatorOptions(api_key=KEY)) as running:
        yield running


@pytest.fixture(autouse=True)
def no_call(emulator: RunningEmulator) -> Iterator[None]:
    """No test may start a call."""
    yield
    emulator.emulator.faults.clear()
    assert not [request for request in emulator.emulator.requests if request.method != "GET"]
    assert not list(emulator.emulator.calls)


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with running_valkey(durable=True) as server:
        yield server


@pytest.fixture
def environ(emulator: RunningEmulator, valkey: Valkey) -> dict[str, str]:
    """Settings with which nothing is to be said."""
    return {
        "ONEINBOX_API_KEY": KEY,
        "ONEINBOX_BASE_URL": emulator.url,
        "ONEINBOX_AGENT_ID": "agt_sandbox",
        "BROKER_STORE_URL": valkey.url,
        "BROKER_SECRET": "PLANTEDSECRET-of-more-than-32-characters",
        "BROKER_ALLOWED_ORIGINS": "https://www.example.com",
        "BROKER_ALLOWED_VARIABLES": "customer_name",
        "BROKER_MAX_CALL_SECONDS": "600",
        "BROKER_MAX_WAITING": "100",
        "BROKER_MAX_STREAMS_TOTAL": "100",
    }


async def examine(environ: dict[str, str]) -> dict[str, Finding]:
    """The findings, by name; no secret in them."""
    found = await diagnose(environ, None)
    assert "PLANTED" not in as_json(found)
    return {finding.name: finding for finding in found}


async def command(environ: dict[str, str], *arguments: str) -> Finished:
    """Run `doctor`, while the emulator goes on answering; no secret in what it prints."""
    done = await asyncio.to_thread(invoke, "doctor", *arguments, environ=environ)
    assert "PLANTED" not in done.out + done.err
    assert "Traceback" not in done.err
    return done


async def test_all_green(environ: dict[str, str]) -> None:
    done = await command(environ)
    assert (done.code, done.err) == (0, "")
    *lines, last = done.out.splitlines()
    assert all(line.startswith("✓ ") for line in lines)
    assert len(lines) == 16
    assert last == "Nothing is wrong."


async def test_wrong_key_as_json(environ: dict[str, str]) -> None:
    done = await command(environ | {"ONEINBOX_API_KEY": KEY + "x"}, "--json")
    assert (done.code, done.err) == (1, "")
    document = json.loads(done.out)
    assert document["ok"] is False
    (wrong,) = [check for check in document["checks"] if not check["ok"]]
    assert (wrong["name"], wrong["level"]) == ("oneinbox", "error")
    assert "401" in wrong["detail"]
    assert "ONEINBOX_API_KEY" in wrong["remedy"]


async def test_wrong_settings_are_findings_and_no_usage_error() -> None:
    environ = {
        "ONEINBOX_API_KEY": "oi_pk_PLANTED",
        "BROKER_STORE_URL": f"mysql://:{PASSWORD}@h",
        "BROKER_SECRET": "PLANTED",
    }
    done = await command(environ)
    assert (done.code, done.err) == (1, "")
    wrong = [line for line in done.out.splitlines() if line.startswith("✗ settings: ")]
    for name in ("ONEINBOX_API_KEY", "ONEINBOX_AGENT_ID", "BROKER_STORE_URL", "BROKER_SECRET"):
        assert any(f" {name}: " in line for line in wrong)


async def test_dead_oneinbox(environ: dict[str, str]) -> None:
    found = await examine(environ | {"ONEINBOX_BASE_URL": NOWHERE})
    assert [name for name, finding in found.items() if not finding.ok] == ["oneinbox"]
    assert "nothing listens there" in found["oneinbox"].detail


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Hang(operation="list"), "did not answer in time"),
        (Drip(operation="list"), "did not answer in time"),
        (Drop(operation="list"), "connection lost"),
        (Status(operation="list", status=503, detail=KEY), "answered 503"),
    ],
)
async def test_sick_oneinbox(environ: dict[str, str], emulator: RunningEmulator, fault: Any, words: str) -> None:
    emulator.emulator.faults.add(fault)
    found = await examine(environ | {"ONEINBOX_TIMEOUT": "0.5"})
    assert not found["oneinbox"].ok
    assert words in found["oneinbox"].detail
    assert found["store"].level == "ok"


async def test_clock_skew(environ: dict[str, str]) -> None:
    """By an OneInbox that lives an hour ago."""
    date = formatdate(0, usegmt=True)
    body = b'{"items": []}'
    head = f"HTTP/1.1 200 OK\r\nDate: {date}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        found = await examine(environ | {"ONEINBOX_BASE_URL": f"http://127.0.0.1:{port}"})
    assert [name for name, finding in found.items() if not finding.ok] == ["clock"]
    assert "NTP" in found["clock"].remedy


async def test_dead_store(environ: dict[str, str]) -> None:
    found = await examine(environ | {"BROKER_STORE_URL": f"redis://:{PASSWORD}@127.0.0.1:1"})
    assert [name for name, finding in found.items() if not finding.ok] == ["store"]
    assert found["store"].detail == "does not work: nothing listens there"
    assert "BROKER_STORE_URL" in found["store"].remedy


async def test_silent_store(environ: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        found = await examine(environ | {"BROKER_STORE_URL": f"redis://127.0.0.1:{port}"})
    assert found["store"].detail == "does not work: no answer within 250 ms"


async def test_store_leaves_nothing_behind(environ: dict[str, str], valkey: Valkey) -> None:
    with valkey.client() as client:
        client.flushall()
        found = await examine(environ)
        assert found["store"].level == "ok"
        assert "Valkey " in found["store"].detail
        assert client.keys("*") == []


async def test_store_with_password(environ: dict[str, str]) -> None:
    with running_valkey(durable=True) as valkey, valkey.client() as client:
        client.config_set("requirepass", PASSWORD)
        address = f"127.0.0.1:{valkey.port}"
        for password in ("", f":{PASSWORD}wrong@"):
            found = await examine(environ | {"BROKER_STORE_URL": f"redis://{password}{address}"})
            assert not found["store"].ok
            assert "password" in found["store"].remedy
        found = await examine(environ | {"BROKER_STORE_URL": f"redis://:{PASSWORD}@{address}"})
        assert found["store"].level == "ok"
        client.config_set("requirepass", "")


async def test_store_for_readers_only(environ: dict[str, str]) -> None:
    with running_valkey(durable=True) as valkey, valkey.client() as client:
        client.replicaof("127.0.0.1", "1")
        found = await examine(environ | {"BROKER_STORE_URL": valkey.url})
        assert not found["store"].ok
        assert "primary" in found["store"].remedy


async def test_store_whose_user_may_not_ask_for_its_version(environ: dict[str, str]) -> None:
    with running_valkey(durable=True) as valkey, valkey.client() as client:
        client.execute_command("ACL SETUSER broker on >hush ~oib:* +@all -info")
        url = f"redis://broker:hush@127.0.0.1:{valkey.port}"
        first, *others = await store_findings(environ, url)
        assert first.level == "ok"
        assert "version unknown" in first.detail
        assert [finding.level for finding in others] == ["warning", "warning"]
        assert "channels" in others[0].detail
        assert "INFO" in others[1].detail
        client.execute_command("ACL SETUSER broker -set")
        (lacking,) = await store_findings(environ, url)
        assert not lacking.ok
        assert "~oib:*" in lacking.remedy


async def store_findings(environ: dict[str, str], url: str) -> list[Finding]:
    """What is found about a store."""
    return [each for each in await diagnose(environ | {"BROKER_STORE_URL": url}, None) if each.name == "store"]


async def test_store_of_another_deployment(environ: dict[str, str]) -> None:
    """What `serve` refuses, doctor finds."""
    with running_valkey(durable=True) as valkey:
        settings = load_settings(environ | {"BROKER_STORE_URL": valkey.url, "BROKER_SECRET": "o" * 32}, env_file=None)
        refuse_foreign_store(settings)
        found = await store_findings(environ | {"BROKER_SECRET": "s" * 32}, valkey.url)
        assert [finding.level for finding in found] == ["error"]
        assert "another BROKER_SECRET" in found[0].detail
        assert "BROKER_STORE_PREFIX" in found[0].remedy


async def test_store_whose_user_may_not_use_channels(environ: dict[str, str]) -> None:
    """The default of Redis 7 and Valkey; the line that doctor and the documents give is enough."""
    with running_valkey(durable=True) as valkey, valkey.client() as client:
        client.execute_command("ACL SETUSER broker on >hush ~oib:* +@all -@admin -@dangerous +info")
        url = f"redis://broker:hush@127.0.0.1:{valkey.port}"
        fine, lacking = await store_findings(environ, url)
        assert (fine.level, lacking.level) == ("ok", "warning")
        rights = lacking.remedy.partition(": ")[2]
        assert "&oib:*" in rights
        assert rights in (Path(__file__).parents[2] / "deploy" / "README.md").read_text()
        client.execute_command(f"ACL SETUSER broker reset on >hush {rights}")
        (fine,) = await store_findings(environ, url)
        assert fine.level == "ok"


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("appendonly", "no", "keeps nothing on disk"),
        ("maxmemory-policy", "allkeys-lru", "drops keys"),
        ("maxmemory", "1500kb", "% of its maxmemory"),
    ],
)
async def test_store_with_a_weakness(environ: dict[str, str], setting: str, value: str, words: str) -> None:
    with running_valkey(durable=True) as valkey, valkey.client() as client:
        client.config_set(setting, value)
        _, weak = await store_findings(environ, valkey.url)
    assert weak.level == "warning"
    assert words in weak.detail
    assert weak.remedy


async def test_store_that_forgets_under_pressure(environ: dict[str, str], valkey: Valkey) -> None:
    with valkey.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        found = await examine(environ)
        client.config_set("maxmemory-policy", "noeviction")
    assert found["store"].level == "warning"


async def test_store_that_keeps_nothing(environ: dict[str, str]) -> None:
    """Something that says yes to everything."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            writer.write(b"+OK\r\n")
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        found = await examine(environ | {"BROKER_STORE_URL": f"redis://127.0.0.1:{port}"})
    assert found["store"].detail == "does not answer as a store does"


async def test_an_agent_that_is_not_there(environ: dict[str, str]) -> None:
    found = await examine(environ | {"ONEINBOX_AGENT_ID": "agt_gone"})
    assert [name for name, finding in found.items() if not finding.ok] == ["agents"]
    assert found["agents"].detail.startswith("OneInbox has no agent default (agt_gone)")


async def test_an_agent_whose_calls_end_sooner(environ: dict[str, str]) -> None:
    found = await examine(environ | {"BROKER_MAX_CALL_SECONDS": "601"})
    assert found["agents"].level == "warning"
    assert "set BROKER_MAX_CALL_SECONDS to 600" in found["agents"].remedy


@pytest.mark.process
async def test_it_is_quick_though_nothing_answers(environ: dict[str, str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        changes = {
            "ONEINBOX_BASE_URL": f"http://{url}",
            "ONEINBOX_TIMEOUT": "0.5",
            "BROKER_STORE_URL": f"redis://{url}",
        }
        done = await asyncio.to_thread(run, "doctor", cwd=tmp_path, environ=environ | changes)
    assert done.code == 1
    assert done.seconds < PATIENCE
