"""The commands start quickly: each imports only what it needs."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.brokers import running_broker_process
from tests.support.processes import surroundings

pytestmark = pytest.mark.process

LIBRARIES = {"asyncio", "fastapi", "httpx", "jwt", "pydantic", "redis", "rich", "starlette", "structlog", "uvicorn"}

UNUSED_BY_DEFAULT = {"cryptography", "jwt", "pygments", "rich"}
"""Libraries of httpx's command line, of logins by token, and of what is encrypted in a shared store."""
HELP_CPU = 0.2
REST_MB = 65
"""Memory of an idle broker: 63 MB, of which the libraries it cannot do without take 57."""

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
        (
            "serve",
            {*UNUSED_BY_DEFAULT, "redis", "app.sandbox", "app.cli.operator", "app.doctor.checks", "app.doctor.probe"},
        ),
        ("operator", {"uvicorn", "app.api", "app.sandbox", "app.doctor"}),
        ("doctor", {"uvicorn", "app.api", "app.sandbox", "app.cli.operator"}),
    ],
)
def test_a_command_imports_nothing_of_the_others(command: str, unneeded: set[str]) -> None:
    assert imported(f"import app.cli.{command}") & unneeded == set()


def test_the_entry_for_other_servers_imports_no_more_than_serve() -> None:
    assert imported("import app.main") & UNUSED_BY_DEFAULT == set()


def test_help_takes_little_processor_time() -> None:
    def cpu() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "app", "--help"], env=surroundings({}), capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu() for _ in range(5)) <= HELP_CPU


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_an_idle_broker_takes_little_memory() -> None:
    async with running_broker_process("http://127.0.0.1:9") as broker:
        status = Path(f"/proc/{broker.process.pid}/status").read_text()
        resident = re.search(r"VmRSS:\s+([0-9]+) kB", status)

    assert resident is not None
    assert int(resident[1]) / 1024 <= REST_MB
