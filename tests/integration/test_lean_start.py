"""The commands start quickly: each imports only what it needs."""

import json
import subprocess
import sys

import pytest

from tests.support.processes import surroundings

pytestmark = pytest.mark.process

LIBRARIES = {"asyncio", "fastapi", "httpx", "jwt", "pydantic", "redis", "rich", "starlette", "structlog", "uvicorn"}

EVERY_HELP = """
from contextlib import suppress
from typer.main import get_group
from app.cli.commands import cli

words = [[]]
for name, command in get_group(cli).commands.items():
    words += [[name], *([name, inner] for inner in getattr(command, "commands", {}))]
for each in words:
    with suppress(SystemExit):
        cli([*each, "--help"])
"""
HELP = """
from contextlib import suppress
from app.cli.commands import cli

with suppress(SystemExit):
    cli(["--help"])
"""


def imported(code: str) -> set[str]:
    """The modules that a Python process has imported after running this code."""
    report = "\nimport json, sys\nsys.stderr.write(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], env=surroundings({}), capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stderr))


# typer itself imports pydantic to describe a command's options.
@pytest.mark.parametrize(("code", "unneeded"), [(HELP, LIBRARIES), (EVERY_HELP, LIBRARIES - {"pydantic"})])
def test_help_imports_only_typer(code: str, unneeded: set[str]) -> None:
    modules = imported(code)

    assert "typer" in modules
    assert modules & unneeded == set()
    assert {name for name in modules if name.startswith("app.")} == {"app.cli", "app.cli.commands", "app.cli.process"}


@pytest.mark.parametrize(
    ("command", "unneeded"),
    [
        ("serve", {"redis", "app.sandbox", "app.cli.operator", "app.doctor.checks", "app.doctor.probe"}),
        ("operator", {"uvicorn", "app.api", "app.sandbox", "app.doctor"}),
        ("doctor", {"uvicorn", "app.api", "app.sandbox", "app.cli.operator"}),
    ],
)
def test_a_command_imports_nothing_of_the_others(command: str, unneeded: set[str]) -> None:
    assert imported(f"import app.cli.{command}") & unneeded == set()
