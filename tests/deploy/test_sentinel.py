"""deploy/sentinel and compose.sentinel.yaml: valid, alike, and their topology run by processes on loopback."""

import asyncio
import base64
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.config.loading import load_settings
from app.store.failover import FailoverStore
from app.store.memory import MemoryStore
from app.store.valkey import ValkeyStore
from tests.deploy.settings import DEPLOY, KUBERNETES, PASSWORD, objects, of_kind, write_secrets
from tests.deploy.settings import compose as base
from tests.deploy.test_files import SCRIPTS, check
from tests.deploy.test_operator import prepare
from tests.support.brokers import eventually
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
    write_secrets(tmp_path / "kubernetes" / "secrets")
    (tmp_path / "sentinel" / "secrets").mkdir()
    (tmp_path / "sentinel" / "secrets" / "store_url").write_text("the Sentinels' URL")
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


def url_of(chapter: str, folder: Path, name: str) -> str:
    """The URL that a chapter's commands write for Sentinels, without the password, which they write too."""
    prepare(chapter, folder)
    place = "kubernetes/secrets" if chapter == "Kubernetes" else "secrets"
    password = (folder / "deploy" / place / PASSWORD).read_text().strip()
    assert len(password) == 64
    url = (folder / "deploy" / name).read_text().strip()
    environ = {"ONEINBOX_API_KEY": "oi_sk_x", "ONEINBOX_AGENT_ID": "x", "BROKER_SECRET": "s" * 32}
    load_settings({**environ, "BROKER_STORE_URL": url}, env_file=None)
    ValkeyStore(url)
    return url.replace(f":{password}@", "")


def test_brokers_ask_the_sentinels_that_there_are(cluster: list[dict[str, Any]], tmp_path: Path) -> None:
    sentinels = of_kind(cluster, "StatefulSet", "sentinel")
    names = [f"sentinel-{number}.sentinel:26379" for number in range(sentinels["spec"]["replicas"])]
    url = url_of("Kubernetes", tmp_path / "k", "sentinel/secrets/store_url")
    assert url == f"valkey+sentinel://{','.join(names)}/voice"
    valkey = of_kind(cluster, "StatefulSet", "valkey")
    (container,) = valkey["spec"]["template"]["spec"]["containers"]
    environ = {each["name"]: each.get("value") for each in container["env"]}
    assert environ["SENTINELS"].split() == names
    assert environ["FIRST"] == "valkey-0.valkey"
    assert valkey["spec"]["replicas"] == 2

    compose = yaml.safe_load((DEPLOY / "compose.sentinel.yaml").read_text())
    services, files = compose["services"], compose["secrets"]
    guards = [f"{name}:26379" for name in services if name.startswith("sentinel-")]
    url = url_of("Docker Compose", tmp_path / "c", files["store_url"]["file"])
    assert url == f"valkey+sentinel://{','.join(guards)}/voice"
    assert services["valkey"].keys() == {"entrypoint", "command", "environment", "volumes"}
    services["valkey"] = base()["services"]["valkey"] | services["valkey"]
    for name, service in services.items():
        if name != "broker":
            assert service["environment"]["SELF"] == name
            assert service["environment"]["SENTINELS"].split() == guards
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]
            assert service["networks"] == ["store"]
            assert service["secrets"] == [PASSWORD]
            assert service["environment"]["PASSWORD_FILE"] == f"/run/secrets/{PASSWORD}"


def test_every_server_gets_the_password_and_brokers_the_sentinels_url(cluster: list[dict[str, Any]]) -> None:
    store = of_kind(cluster, "Secret", "store")["metadata"]["name"]
    for name in ("valkey", "sentinel"):
        pod = of_kind(cluster, "StatefulSet", name)["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert {"name": "PASSWORD_FILE", "value": f"/secrets/{PASSWORD}"} in container["env"]
        assert {"name": "secrets", "mountPath": "/secrets", "readOnly": True} in container["volumeMounts"]
        (volume,) = [each for each in pod["volumes"] if each["name"] == "secrets"]
        assert volume["secret"]["secretName"] == store
        assert {each["name"] for each in pod["volumes"]} == {"secrets", "scripts"}
    broker = of_kind(cluster, "Secret")
    assert base64.b64decode(broker["data"]["store_url"]) == b"the Sentinels' URL"
    (volume,) = [
        each for each in of_kind(cluster, "Deployment")["spec"]["template"]["spec"]["volumes"] if "secret" in each
    ]
    assert volume["secret"]["secretName"] == broker["metadata"]["name"]


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
        self.change_password()
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
            "PASSWORD_FILE": str(self._folder / PASSWORD),
        }
        script = SENTINEL / ("sentinel.sh" if guard else "start.sh")
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                ["/bin/sh", script, "--bind", HOSTS[name]], env=environ, cwd=data, stdout=log, stderr=log
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def change_password(self) -> None:
        """Write a new one; servers take it when they start."""
        self.password = secrets.token_hex(32)
        (self._folder / PASSWORD).write_text(f"{self.password}\n")

    def client(self, name: str, password: str | None = "") -> redis.Redis:
        """A client that does not retry, with the password, unless it is given another or none."""
        port = self.guard_port if name in GUARDS else self.port
        own = self.password if password == "" else password
        return redis.Redis(HOSTS[name], port, password=own, retry=Retry(NoBackoff(), 0))

    def refuses(self, name: str, password: str | None) -> bool:
        """True when a server answers nothing to a client with this password, or with none."""
        with self.client(name, password=password) as client:
            try:
                client.ping()
            except redis.AuthenticationError:
                return True
        return False

    def replication(self, name: str) -> dict[str, Any]:
        """A Valkey's INFO."""
        with self.client(name) as client:
            return dict(client.info("replication"))

    def role(self, name: str) -> str:
        """`master` or `slave`."""
        return str(self.replication(name)["role"])

    def guards_know_each_other(self) -> bool:
        """All see one replica and two other Sentinels."""
        for name in GUARDS:
            with self.client(name) as client:
                replicas = client.execute_command("SENTINEL", "REPLICAS", "voice")
                if len(replicas) != 1 or len(client.execute_command("SENTINEL", "SENTINELS", "voice")) != 2:
                    return False
        return True

    def all_follow_second(self) -> bool:
        """Every Sentinel names it, and the first is its replica."""
        for name in GUARDS:
            with self.client(name) as client:
                if (
                    client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "voice")[0].decode()
                    != HOSTS["second"]
                ):
                    return False
        return self.replication("first").get("master_link_status") == "up"

    def files(self, name: str) -> list[Path]:
        """A file of every server that has one."""
        return list(self._folder.glob(f"*/{name}"))

    def wait_for_copy(self) -> None:
        """Wait until the replica has every write so far: the copy is in order."""
        with self.client("first") as client:
            client.set("copied", "", px=1000)
            assert client.execute_command("WAIT", 1, 5000)

    @property
    def url(self) -> str:
        """The brokers' BROKER_STORE_URL."""
        guards = ",".join(f"{HOSTS[each]}:{self.guard_port}" for each in GUARDS)
        return f"valkey+sentinel://:{self.password}@{guards}/voice"


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
        await asyncio.to_thread(topology.wait_for_copy)
        primary.kill()
        primary.wait()
        await asyncio.to_thread(until, lambda: topology.role("second") == "master", 30)
        await eventually(lambda: has_value(store), within=5)
        await store.set("after", b"1", 600)
        topology.start("first")
        await asyncio.to_thread(until, lambda: topology.role("first") == "slave", 30)
        assert store.state == "ok"


async def has_value(store: FailoverStore) -> bool:
    """Whether the store answers, with what was written before."""
    return store.state == "ok" and await store.get("before") is not None


def shown_by(process: subprocess.Popen[bytes]) -> str:
    """The command line and the environment of a process."""
    return "".join(Path(f"/proc/{process.pid}/{name}").read_text() for name in ("cmdline", "environ"))


async def test_servers_refuse_clients_without_the_password_and_take_a_new_one(topology: Topology) -> None:
    processes = {"first": topology.start("first")}
    until(lambda: topology.role("first") == "master")
    processes |= {name: topology.start(name) for name in ("second", *GUARDS)}
    await asyncio.to_thread(until, topology.guards_know_each_other, 30)
    old = topology.password
    for name, process in processes.items():
        assert topology.refuses(name, None)
        assert topology.refuses(name, "another")
        assert old not in shown_by(process)
    assert {file.stat().st_mode & 0o077 for file in topology.files("sentinel.conf")} == {0}
    async with FailoverStore(ValkeyStore(topology.url), MemoryStore()) as store:
        await store.set("before", b"1", 600)
        await asyncio.to_thread(topology.wait_for_copy)
        with topology.client("one") as client:
            # It says no until it has seen the replica linked.
            await asyncio.to_thread(until, lambda: client.execute_command("SENTINEL", "FAILOVER", "voice"), 30)
        await asyncio.to_thread(until, lambda: topology.role("second") == "master", 30)
        await asyncio.to_thread(until, topology.all_follow_second, 30)

    for process in processes.values():
        process.terminate()
        process.wait(30)
    topology.change_password()
    for name in GUARDS:
        topology.start(name)
    for name in GUARDS:
        await asyncio.to_thread(until, topology.client(name).ping)
    topology.start("second")
    await asyncio.to_thread(until, lambda: topology.role("second") == "master")
    topology.start("first")
    await asyncio.to_thread(until, lambda: topology.replication("first").get("master_link_status") == "up", 30)
    assert topology.role("second") == "master"
    await asyncio.to_thread(until, topology.guards_know_each_other, 30)
    for name in processes:
        assert topology.refuses(name, None)
        assert topology.refuses(name, old)
    assert [file for file in topology.files("sentinel.conf") if old in file.read_text()] == []
    async with FailoverStore(ValkeyStore(topology.url), MemoryStore()) as store:
        await eventually(lambda: has_value(store), within=5)
