"""The files of deploy/ and .github/ are what their readers take: checked by the field's own checkers."""

import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from app import __version__
from app.config.loading import load_settings
from app.sandbox.livekit_server import HTTP_PORT, KEY, MEDIA_PORT, SECRET, config
from app.server.server import GRACE
from tests.deploy.settings import (
    DEPLOY,
    KUBERNETES,
    PASSWORD,
    SECRETS,
    compose,
    environ_of_compose,
    environ_of_kubernetes,
    file_of,
    kustomized,
    objects,
    of_kind,
    shell_of_compose,
)
from tests.documents import ROOT
from tests.support.livekit import VERSION
from tests.support.needs import program

pytestmark = pytest.mark.process

LOCKS = ("deploy/requirements.lock", "deploy/sandbox.lock", "deploy/build.lock", ".ci/test.lock")
SCRIPTS = Path(sys.executable).parent
EXPOSURE = 1.5
"""Of 10, as `systemd-analyze security` counts; what the broker cannot do without (a network) makes 1.2."""


def check(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a checker, of this environment first; what it said. It has nothing to complain about."""
    environ = os.environ | {"PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def in_files(environ: dict[str, str], folder: Path) -> dict[str, str]:
    """The same settings, with their secrets where this machine can read them."""
    for name, secret in SECRETS.items():
        (folder / name).write_text(secret)
    return {**environ, **{name: str(folder / name) for name in SECRETS if name in environ}}


@pytest.fixture
def cluster(tmp_path: Path) -> list[dict[str, Any]]:
    """All objects that `kubectl apply -k` would send."""
    return objects(kustomized(tmp_path))


def test_every_file_is_tested() -> None:
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    files = [path for path in DEPLOY.rglob("*") if path.is_file()]
    named = [path for path in files if re.search(rf'["/]{re.escape(path.name)}"', tests)]
    assert [str(path.relative_to(DEPLOY)) for path in files if path not in named] == []


def test_dockerfile_is_clean() -> None:
    check("hadolint", "--failure-threshold", "style", "Dockerfile")


def test_compose_file_keeps_to_the_specification() -> None:
    check("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


def test_workflows_and_updates_are_what_github_takes_and_give_nothing_away() -> None:
    schema = (SCRIPTS / "check-jsonschema", "--builtin-schema")
    workflows = sorted((ROOT / ".github/workflows").iterdir())
    assert workflows
    check(*schema, "vendor.github-workflows", *workflows)
    check(*schema, "vendor.dependabot", ROOT / ".github/dependabot.yml")
    check("zizmor", "--offline", "--persona=pedantic", ".github")


def test_workflows_run_the_same_checks_and_attach_what_the_image_is_made_of() -> None:
    checks, release = ((ROOT / ".github/workflows" / name).read_text() for name in ("checks.yml", "release.yml"))
    assert "bash .ci/run" in checks
    assert "bash .ci/run" in release
    assert "sbom: true" in release
    assert "provenance: mode=max" in release
    assert [
        line for line in (checks + release).splitlines() if re.search(r"uses: .*@(?![0-9a-f]{40} # v\d)", line)
    ] == []


def test_what_may_write_packages_runs_no_packages() -> None:
    """Checks install and run packages as root; a job that may write runs pinned actions and images only."""
    files = [file.read_text(encoding="utf-8") for file in sorted((ROOT / ".github/workflows").iterdir())]
    workflows = [yaml.safe_load(text) for text in files]
    jobs = list(chain.from_iterable(workflow["jobs"].values() for workflow in workflows))
    writing = [job for job in jobs if "write" in job["permissions"].values()]

    assert [workflow["permissions"] for workflow in workflows] == [{}] * len(workflows)
    assert len(writing) == 1
    for job in writing:
        assert [step for step in job["steps"] if "run" in step] == []
        assert job["needs"] == "checks"
    run = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert run.index("--require-hashes --only-binary :all: -r .ci/test.lock") < run.index("export PIP_NO_INDEX=1")
    assert run.index("export PIP_NO_INDEX=1") < run.index("readme_command '")
    images = re.findall(r"\bimage[:=] ?(\S+)", "".join(files))
    assert images
    assert [image for image in images if not re.search(r":[^@]+@sha256:[0-9a-f]{64}$", image)] == []


def test_compose_services_can_do_no_more_than_they_must() -> None:
    for name, service in compose()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("cap_add", []) == (["NET_BIND_SERVICE"] if name == "caddy" else []), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        assert service["mem_limit"], name


def test_only_the_proxy_is_reachable_from_outside() -> None:
    services = compose()["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    sandbox = published.pop("sandbox")
    assert published == {"caddy": ["80:80", "443:443", "443:443/udp"]}
    assert "127.0.0.1:8000:8000" in sandbox
    assert all(each.startswith("127.0.0.1:") for each in sandbox)
    assert compose()["networks"]["store"] == {"internal": True}
    assert services["valkey"]["networks"] == ["store"]


def test_compose_starts_in_order() -> None:
    services = compose()["services"]
    assert services["broker"]["depends_on"] == {"valkey": {"condition": "service_healthy"}}
    assert services["caddy"]["depends_on"] == {"broker": {"condition": "service_healthy"}}
    assert services["valkey"]["healthcheck"]["test"][0] == services["caddy"]["healthcheck"]["test"][0] == "CMD"


def test_compose_believes_its_proxy_and_nobody_else() -> None:
    services = compose()["services"]
    address = services["caddy"]["networks"]["edge"]["ipv4_address"]
    assert services["broker"]["environment"]["BROKER_TRUSTED_PROXIES"] == address


def test_compose_holds_no_secret_and_hands_them_out_as_files(tmp_path: Path) -> None:
    secrets = compose()["secrets"]
    assert {name: set(each) for name, each in secrets.items()} == {name: {"file"} for name in secrets}
    environ = environ_of_compose()
    given = [variable for variable in SECRETS if variable in environ]
    assert [environ[variable] for variable in given] == [f"/run/secrets/{file_of(variable)}" for variable in given]
    assert {file_of(variable) for variable in given} == set(compose()["services"]["broker"]["secrets"])
    assert {*compose()["services"]["broker"]["secrets"], PASSWORD} == secrets.keys()
    load_settings({**in_files(environ, tmp_path), "ONEINBOX_AGENT_ID": "agt_1"}, env_file=None)


def test_compose_sandbox_needs_neither_key_nor_neighbour() -> None:
    services = compose()["services"]
    sandboxed = {name: service for name, service in services.items() if service["profiles"] == ["sandbox"]}
    assert sandboxed.keys() == {"sandbox", "livekit"}
    assert not [name for service in sandboxed.values() for name in ("secrets", "depends_on") if name in service]


def test_compose_sandbox_talks_on_the_livekit_server_beside_it() -> None:
    sandbox, livekit = (compose()["services"][name] for name in ("sandbox", "livekit"))
    assert sandbox["build"]["args"]["LOCK"] == "sandbox.lock"
    assert sandbox["command"][3:] == ["--livekit-url", f"ws://127.0.0.1:{HTTP_PORT}", "--livekit-key", KEY]
    assert sandbox["environment"] == {"LIVEKIT_API_SECRET": SECRET}
    assert livekit["image"] == f"livekit/livekit-server:v{VERSION}"
    assert livekit["network_mode"] == "service:sandbox"
    dev, flag, body = livekit["command"]
    assert (dev, flag) == ("--dev", "--config-body")
    given, ours = yaml.safe_load(body), config(HTTP_PORT, MEDIA_PORT)
    # As the sandbox configures its own server, but for what a container needs.
    assert {name: each for name, each in ours.items() if given.get(name) != each}.keys() == {
        "port",
        "bind_addresses",
        "rtc",
    }
    differing = {name for name, each in ours["rtc"].items() if given["rtc"].get(name) != each}
    assert differing == {"tcp_port", "interfaces", "ips"}


def test_compose_waits_for_running_sessions() -> None:
    assert int(compose()["services"]["broker"]["stop_grace_period"].removesuffix("s")) > GRACE


def test_every_kubernetes_object_is_valid(tmp_path: Path) -> None:
    """Each as it stands, strictly, and all as they are sent."""
    everything = tmp_path / "everything.yaml"
    everything.write_text(kustomized(tmp_path))
    manifests = [path for path in sorted(KUBERNETES.glob("*.yaml")) if path.name != "kustomization.yaml"]
    said = check("kubernetes-validate", "--strict", everything, *manifests)
    assert "WARN" not in said
    assert said.count(f"{everything} passed") == len(objects(everything.read_text()))


def test_kustomization_takes_every_manifest() -> None:
    (kustomization,) = objects((KUBERNETES / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == sorted(
        [
            "autoscaler.yaml",
            "deployment.yaml",
            "disruption.yaml",
            "ingress.yaml",
            "namespace.yaml",
            "network.yaml",
            "service.yaml",
            "valkey.yaml",
        ]
    )
    assert {path.name for path in KUBERNETES.glob("*.yaml")} == {*kustomization["resources"], "kustomization.yaml"}


def test_pods_keep_to_the_strictest_standard(cluster: list[dict[str, Any]]) -> None:
    """Kubernetes' own "restricted" (kubernetes.io/docs/concepts/security/pod-security-standards), and more."""
    for workload in (of_kind(cluster, "Deployment"), of_kind(cluster, "StatefulSet", "valkey")):
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_pod_runs_as_the_images_user(cluster: list[dict[str, Any]]) -> None:
    context = of_kind(cluster, "Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in (ROOT / "Dockerfile").read_text()


def test_settings_of_the_deployment_work(cluster: list[dict[str, Any]], tmp_path: Path) -> None:
    environ = in_files(environ_of_kubernetes(cluster), tmp_path)
    agents = tmp_path / "agents.toml"
    agents.write_text(of_kind(cluster, "ConfigMap", "broker-agents")["data"]["agents.toml"])
    settings = load_settings({**environ, "BROKER_AGENTS_FILE": str(agents)}, env_file=None)
    assert tomllib.loads(agents.read_text())["agents"]["support"]["default"] is True
    assert settings.drain_seconds > 0
    secret = of_kind(cluster, "Secret")
    mounts = of_kind(cluster, "Deployment")["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    (folder,) = [mount["mountPath"] for mount in mounts if mount["name"] == "secrets"]
    for variable in SECRETS:
        path = Path(environ_of_kubernetes(cluster)[variable])
        assert (str(path.parent), path.name in secret["data"]) == (folder, True)


def test_pod_that_goes_away_is_unready_before_it_stops_and_has_time_to_end(cluster: list[dict[str, Any]]) -> None:
    """Promise 7: /readyz says draining for BROKER_DRAIN_SECONDS, then running requests have their grace."""
    pod = of_kind(cluster, "Deployment")["spec"]["template"]["spec"]
    drain = int(environ_of_kubernetes(cluster)["BROKER_DRAIN_SECONDS"])
    probe = pod["containers"][0]["readinessProbe"]
    assert probe["httpGet"]["path"] == "/readyz"
    assert drain >= 2 * (probe["periodSeconds"] * probe["failureThreshold"]) + probe["timeoutSeconds"]
    assert pod["terminationGracePeriodSeconds"] >= drain + GRACE + 5
    assert pod["containers"][0]["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_all_selectors_mean_the_same_pods(cluster: list[dict[str, Any]]) -> None:
    deployment = of_kind(cluster, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert of_kind(cluster, "Service")["spec"]["selector"] == labels
    assert deployment["selector"]["matchLabels"] == labels
    assert of_kind(cluster, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert of_kind(cluster, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    for spread in deployment["template"]["spec"]["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"] == labels
    target = of_kind(cluster, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", of_kind(cluster, "Deployment")["metadata"]["name"])
    assert "replicas" not in deployment, "the autoscaler's number would be put back at each apply"


def test_store_is_where_the_settings_look_for_it(cluster: list[dict[str, Any]]) -> None:
    service = of_kind(cluster, "Service", "valkey")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert address == "valkey:6379", "README.md writes it into store_url"
    (container,) = of_kind(cluster, "StatefulSet", "valkey")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == shell_of_compose("valkey")


def test_the_store_has_a_password_that_brokers_get_in_their_url_and_no_settings_show(
    cluster: list[dict[str, Any]],
) -> None:
    for environ in (environ_of_compose(), environ_of_kubernetes(cluster)):
        assert "BROKER_STORE_URL" not in environ
        assert Path(environ["BROKER_STORE_URL_FILE"]).name == "store_url"
    valkey = compose()["services"]["valkey"]
    assert (valkey["secrets"], valkey["environment"]) == ([PASSWORD], {"PASSWORD_FILE": f"/run/secrets/{PASSWORD}"})
    pod = of_kind(cluster, "StatefulSet", "valkey")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (path,) = [Path(each["value"]) for each in container["env"] if each["name"] == "PASSWORD_FILE"]
    (volume,) = [each["name"] for each in container["volumeMounts"] if each["mountPath"] == str(path.parent)]
    (secret,) = [each["secret"] for each in pod["volumes"] if each["name"] == volume]
    store, broker = of_kind(cluster, "Secret", "store"), of_kind(cluster, "Secret")
    assert secret["secretName"] == store["metadata"]["name"]
    assert store["data"].keys() == {path.name} == {PASSWORD}, "Valkey gets no key of OneInbox"
    assert PASSWORD not in broker["data"]
    probe = container["readinessProbe"]["exec"]["command"]
    assert ["CMD", *probe] == shell_of_compose("valkey", "healthcheck")


def test_the_store_listens_to_brokers_only(cluster: list[dict[str, Any]]) -> None:
    policy = of_kind(cluster, "NetworkPolicy", "valkey")["spec"]
    assert [source["podSelector"]["matchLabels"] for rule in policy["ingress"] for source in rule["from"]] == [
        of_kind(cluster, "Deployment")["spec"]["template"]["metadata"]["labels"]
    ]
    assert "egress" not in policy


def test_ingress_leaves_event_streams_alone(cluster: list[dict[str, Any]]) -> None:
    annotations = of_kind(cluster, "Ingress")["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"]) > 15
    assert annotations["nginx.org/proxy-buffering"] == "False"


def test_systemd_takes_the_unit_and_finds_little_exposed(tmp_path: Path) -> None:
    analyze = program("systemd-analyze", "systemd")
    text = (DEPLOY / "systemd" / "oneinbox-broker.service").read_text()
    command = "/opt/oneinbox-broker/bin/oneinbox-broker"
    assert f"ExecStart={command} serve\n" in text
    unit = tmp_path / "oneinbox-broker.service"
    unit.write_text(text.replace(command, str(SCRIPTS / "oneinbox-broker")))

    assert check(analyze, "verify", unit) == ""
    said = check(analyze, "security", "--offline=true", f"--threshold={round(EXPOSURE * 10)}", unit)

    assert "Overall exposure level" in said


def test_unit_waits_for_running_sessions_and_gives_settings_that_work(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "oneinbox-broker.service").read_text()
    lines = [line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#")]
    environ = dict(
        word.split("=", 1) for word in chain(*(value.split() for name, value in lines if name == "Environment"))
    )
    credentials = {value.split(":")[0] for name, value in lines if name == "LoadCredential"}
    assert {environ[name] for name in SECRETS if name in environ} == {f"%d/{each}" for each in credentials}
    load_settings({**in_files(environ, tmp_path), "ONEINBOX_AGENT_ID": "agt_1"}, env_file=None)
    assert int(dict(lines)["TimeoutStopSec"]) > GRACE


def test_locks_are_what_their_script_writes(tmp_path: Path) -> None:
    """Run in a copy: what fits stays, so a new run moves no version."""
    for name in ("pyproject.toml", "README.md", "deploy/lock.sh", *LOCKS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())

    check("bash", tmp_path / "deploy" / "lock.sh", cwd=tmp_path)

    for name in LOCKS:
        before, after = ((folder / name).read_text() for folder in (ROOT, tmp_path))
        assert re.findall(r"^\S+==.*$", after, re.MULTILINE) == re.findall(r"^\S+==.*$", before, re.MULTILINE)


@pytest.mark.parametrize("lock", ["requirements.lock", "sandbox.lock"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_lock_has_a_wheel_of_everything_for_the_image(machine: str, lock: str, tmp_path: Path) -> None:
    """For the Dockerfile's Python, which the image of these tests has not."""
    (version,) = set(re.findall(r"^FROM python:(\d\.\d+)-slim", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    target = (f"--python-version={version}", f"--python-platform={machine}-manylinux_2_28", "--target", tmp_path)
    options = ("--quiet", "--dry-run", "--require-hashes", "--only-binary=:all:", "--system-certs", "--no-cache")
    check("uv", "pip", "install", *options, *target, "-r", DEPLOY / lock)


def test_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "app/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert f"newTag: {__version__}\n" in (KUBERNETES / "kustomization.yaml").read_text()


def test_changelog_keeps_to_its_format() -> None:
    """keepachangelog.com: newest first, each version with its day, and chapters of known names."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    title, *rest = re.findall(r"^#{1,2} .*$", text, re.MULTILINE)
    assert title == "# Changelog"
    assert rest[0] == "## [Unreleased]"
    released = [re.fullmatch(r"## \[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d{2}-\d{2})", line) for line in rest[1:]]
    assert all(released)
    versions = [tuple(map(int, match.groups()[:3])) for match in released if match]
    assert versions == sorted(versions, reverse=True)
    chapters = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert set(chapters) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert not re.search(r"^### .*\n\n?(?=#|\Z)", text, re.MULTILINE), "a chapter is empty"
