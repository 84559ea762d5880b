"""What deploy/ gives the broker and its store, read out of the files that operators use."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.documents import ROOT
from tests.support.needs import program

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"

SECRETS = {
    "ONEINBOX_API_KEY_FILE": "oi_sk_of_the_test",
    "BROKER_SECRET_FILE": "a secret of more than 32 characters",
    "BROKER_METRICS_TOKEN_FILE": "a-token-of-the-operators",
    "BROKER_STORE_URL_FILE": "valkey://:a-password@valkey:6379",
}
"""Settings whose files the operator writes, and what stands in them here."""
PASSWORD = "store_password"
"""The file with the store's password."""


def file_of(variable: str) -> str:
    """What such a file is called: `broker_secret`, but `metrics_token` and `store_url`."""
    return re.sub("broker_(metrics|store)", r"\1", variable.removesuffix("_FILE").lower())


def compose() -> dict[str, Any]:
    """deploy/compose.yaml, with its anchors resolved and variables as they stand."""
    parsed: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return parsed


def kustomized(folder: Path) -> str:
    """What `kubectl kustomize` makes of deploy/kubernetes, with secrets, in a copy in `folder`."""
    copy = folder / "kubernetes"
    (copy / "secrets").mkdir(parents=True)
    for file in KUBERNETES.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    write_secrets(copy / "secrets")
    kubectl = program("kubectl", "kubernetes-client")
    return subprocess.run([kubectl, "kustomize", copy], capture_output=True, text=True, check=True, timeout=60).stdout


def write_secrets(folder: Path) -> None:
    """Write what the operator writes into deploy/kubernetes/secrets."""
    for variable, secret in SECRETS.items():
        (folder / file_of(variable)).write_text(secret)
    (folder / PASSWORD).write_text("a-password")


def shell_of_compose(service: str, what: str = "command") -> list[str]:
    """The command of a service of compose.yaml or its `healthcheck`, as Compose hands it to the container."""
    given = compose()["services"][service][what]
    return [word.replace("$$", "$") for word in (given["test"] if what == "healthcheck" else given)]


def objects(text: str) -> list[dict[str, Any]]:
    """The objects of a stream of YAML documents."""
    return [each for each in yaml.safe_load_all(text) if each]


def of_kind(found: list[dict[str, Any]], kind: str, name: str = "broker") -> dict[str, Any]:
    """The one object of a kind whose name begins so."""
    (one,) = [each for each in found if each["kind"] == kind and each["metadata"]["name"].startswith(name)]
    return one


def environ_of_compose() -> dict[str, str]:
    """The settings that compose.yaml gives its broker, for localhost."""
    given: Mapping[str, str] = compose()["services"]["broker"]["environment"]
    return {name: value.replace("${DOMAIN:-localhost}", "localhost") for name, value in given.items()}


def environ_of_kubernetes(found: list[dict[str, Any]]) -> dict[str, str]:
    """The settings that the Deployment gives its broker."""
    (container,) = of_kind(found, "Deployment")["spec"]["template"]["spec"]["containers"]
    own = {each["name"]: each["value"] for each in container["env"]}
    return {**of_kind(found, "ConfigMap", "broker-settings")["data"], **own}
