"""deploy/sentinel and compose.sentinel.yaml: valid, alike, and their topology run by processes on loopback."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from app.config.loading import load_settings
from app.store.failover import FailoverStore
from app.store.memory import MemoryStore
from app.store.valkey import ValkeyStore
from tests.deploy.settings import DEPLOY, KUBERNETES, SECRETS, file_of, objects, of_kind
from tests.deploy.test_files import SCRIPTS, check
from tests.support.needs import program
from tests.support.ports import free_port
from tests.support.stores import engine_path, until

pytestmark = [pytest.mark.process, pytest.mark.alone]

SENTINEL = DEPLOY / "sentinel"
FILES = {"start.sh", "sentinel.sh", "kustomization.yaml", "valkey.yaml", "network.yaml", "sentinels.yaml"}
HOSTS = {name: f"127.0.1.{number}" for number, name in enumerate(("first", "second", "one", "two", "three"), 1)}
GUARDS = ("one", "two", "three")


@pytest.fixture
def cluster(tmp_path: Path) -> list[dict[str, Any]]:
    """All objects that `kubectl apply -k deploy/sentinel` would send."""
    for folder in (KUBERNETES, SENTINEL):
        copy = tmp_path / folder.name
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    (tmp_path / "kubernetes" / "secrets").mkdir()
    for variable, secret in SECRETS.items():
        (tmp_path / "kubernetes" / "secrets" / file_of(variable)).write_text(secret)
    kubectl = program("kubectl", "kubernetes-client")
    text = subprocess.run(
        [kubectl, "kustomize", tmp_path / "sentinel"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    (tmp_path / "everything.yaml").write_text(text)
    return objects(text)


def test_every_object_is_valid(cluster: list[dict[str, Any]], tmp_path: Path) -> None:
    said = check(SCRIPTS / "kubernetes-validate", "--strict", tmp_path / "everything.yaml")
    assert "WARN" not in said
    assert said.count(" passed") == len(cluster)
    assert {path.name for path in SENTINEL.iterdir()} == FILES
    check(SCRIPTS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.sentinel.yaml")


def test_brokers_ask_the_sentinels_that_there_are(cluster: list[dict[str, Any]]) -> None:
    sentinels = of_kind(cluster, "StatefulSet", "sentinel")
    names = [f"sentinel-{number}.sentinel:26379" for number in range(sentinels["spec"]["replicas"])]
    url = of_kind(cluster, "ConfigMap", "broker-settings")["data"]["BROKER_STORE_URL"]
    assert url == f"valkey+sentinel://{','.join(names)}/voice"
    valkey = of_kind(cluster, "StatefulSet", "valkey")
    (container,) = valkey["spec"]["template"]["spec"]["containers"]
    environ = {each["name"]: each.get("value") for each in container["env"]}
    assert environ["SENTINELS"].split() == names
    assert environ["FIRST"] == "valkey-0.valkey"
    assert valkey["spec"]["replicas"] == 2

    services = yaml.safe_load((DEPLOY / "compose.sentinel.yaml").read_text())["services"]
    guards = [f"{name}:26379" for name in services if name.startswith("sentinel-")]
    url = services["broker"]["environment"]["BROKER_STORE_URL"]
    assert url == f"valkey+sentinel://{','.join(guards)}/voice"
    for name, service in services.items():
        if name != "broker":
            assert service["environment"]["SELF"] == name
            assert service["environment"]["SENTINELS"].split() == guards
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]
            assert service["networks"] == ["store"]
    for each in (url, of_kind(cluster, "ConfigMap", "broker-settings")["data"]["BROKER_STORE_URL"]):
        environ = {"ONEINBOX_API_KEY": "oi_sk_x", "ONEINBOX_AGENT_ID": "x", "BROKER_SECRET": "s" * 32}
        load_settings({**environ, "BROKER_STORE_URL": each}, env_file=None)
        ValkeyStore(each)


def test_sentinels_and_stores_are_reached_by_those_that_must(cluster: list[dict[str, Any]]) -> None:
    for name, port in (("valkey", 6379), ("sentinel", 26379)):
        (rule,) = of_kind(cluster, "NetworkPolicy", name)["spec"]["ingress"]
        (source,) = rule["from"]
        (expression,) = source["podSelector"]["matchExpressions"]
        assert expression["values"] == ["oneinbox-broker", "valkey", "sentinel"]
        assert rule["ports"] == [{"port": port}]
    (rule,) = of_kind(cluster, "NetworkPolicy", "to-sentinels")["spec"]["egress"]
    assert rule["ports"] == [{"port": 26379}]


class Topology:
    """The services of compose.sentinel.yaml as processes, each on an address of its own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self.port, self.guard_port = free_port(), free_port()
        programs = folder / "bin"
        programs.mkdir()
        (programs / "valkey-server").symlink_to(engine_path("valkey"))
        (programs / "valkey-cli").symlink_to(program("redis-cli", "redis-tools"))
        self._path = f"{programs}:{os.environ['PATH']}"

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a Valkey or a Sentinel by its script."""
        guard = name in GUARDS
        data = self._folder / name
        data.mkdir(exist_ok=True)
        environ = {
            "PATH": self._path,
            "SELF": HOSTS[name],
            "FIRST": HOSTS["first"],
            "SENTINELS": " ".join(f"{HOSTS[each]}:{self.guard_port}" for each in GUARDS),
            "PORT": str(self.guard_port if guard else self.port),
            "PRIMARY_PORT": str(self.port),
            "DATA": str(data),
        }
        script = SENTINEL / ("sentinel.sh" if guard else "start.sh")
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                ["/bin/sh", script, "--bind", HOSTS[name]], env=environ, cwd=data, stdout=log, stderr=log
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def role(self, name: str) -> str:
        """`master` or `slave`."""
        with redis.Redis(HOSTS[name], self.port) as client:
            return str(client.info("replication")["role"])

    def guards_know_each_other(self) -> bool:
        """All see one replica and two other Sentinels."""
        for name in GUARDS:
            with redis.Redis(HOSTS[name], self.guard_port) as client:
                replicas = client.execute_command("SENTINEL", "REPLICAS", "voice")
                if len(replicas) != 1 or len(client.execute_command("SENTINEL", "SENTINELS", "voice")) != 2:
                    return False
        return True

    @property
    def url(self) -> str:
        """The brokers' BROKER_STORE_URL."""
        return f"valkey+sentinel://{','.join(f'{HOSTS[each]}:{self.guard_port}' for each in GUARDS)}/voice"


@pytest.fixture
def topology(tmp_path: Path) -> Iterator[Topology]:
    with ExitStack() as stack:
        yield Topology(tmp_path, stack)


async def test_the_replica_takes_over_and_the_old_primary_comes_back_as_a_replica(topology: Topology) -> None:
    primary = topology.start("first")
    until(lambda: topology.role("first") == "master")
    topology.start("second")
    for name in GUARDS:
        topology.start(name)
    await asyncio.to_thread(until, topology.guards_know_each_other, 30)
    async with FailoverStore(ValkeyStore(topology.url), MemoryStore()) as store:
        await store.set("before", b"1", 600)
        await asyncio.sleep(1)
        primary.kill()
        primary.wait()
        await asyncio.to_thread(until, lambda: topology.role("second") == "master", 30)
        async with asyncio.timeout(5):
            while store.state != "ok" or await store.get("before") is None:
                await asyncio.sleep(0.05)
        await store.set("after", b"1", 600)
        topology.start("first")
        await asyncio.to_thread(until, lambda: topology.role("first") == "slave", 30)
        assert store.state == "ok"
