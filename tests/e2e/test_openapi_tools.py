"""What others make of the OpenAPI document: a linter, and a typed client that runs."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.documents import ROOT
from tests.support.needs import NODE_MODULES, node

pytestmark = pytest.mark.browser

HERE = Path(__file__).parent
DOCUMENT = ROOT / "deploy" / "openapi.json"
PATIENCE = 120
"""Seconds; ample on a busy machine."""


def run(*command: str | Path, cwd: Path) -> str:
    """What a command of an npm package, or a script, printed; it has to end well."""
    done = subprocess.run([node(), *command], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package(name: str, command: str) -> Path:
    """A command of an npm package."""
    node(name)
    return NODE_MODULES / ".bin" / command


def test_spectral_finds_nothing(tmp_path: Path) -> None:
    spectral = package("@stoplight/spectral-cli", "spectral")
    ruleset = HERE / "spectral.yaml"
    run(spectral, "lint", DOCUMENT, "--ruleset", ruleset, "--fail-severity", "hint", cwd=tmp_path)


def test_typed_client_compiles_and_runs(sandbox: str, tmp_path: Path) -> None:
    node("openapi-fetch", "@types/node")
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(HERE / "typed_client.ts", tmp_path)

    run(package("openapi-typescript", "openapi-typescript"), DOCUMENT, "-o", "broker.d.ts", cwd=tmp_path)
    strict = ("--strict", "--module", "nodenext", "--target", "es2022", "--skipLibCheck", "false")
    run(package("typescript", "tsc"), *strict, "typed_client.ts", cwd=tmp_path)
    got: dict[str, Any] = json.loads(run("typed_client.js", sandbox, cwd=tmp_path))

    assert got["session"].keys() == {"server_url", "participant_token"}
    assert got["read"]["agent"] == "default"
    assert got["again"] == 304
    assert got["stopped"] == "completed"
    assert got["problem"]["type"] == "/problems/invalid-request"
    assert got["nowhere"] == 404
