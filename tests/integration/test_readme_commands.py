"""The commands in the documents, run as they are printed. Only ports and where Python is are replaced."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import shell_lines
from tests.support.needs import program
from tests.support.processes import PATIENCE, ROOT, run, running, surroundings
from tests.support.valkey import running_valkey

pytestmark = pytest.mark.process

DOCUMENTS = ("README.md", "app/client/README.md", "deploy/README.md")
LINES = [line for name in DOCUMENTS for line in shell_lines((ROOT / name).read_text(encoding="utf-8"))]
COMMAND = r"(\.venv/bin/)?oneinbox-broker "


def lines_of(*commands: str) -> list[str]:
    """The printed lines that begin with one of the broker's commands, without the program."""
    lines = [re.sub(rf"^{COMMAND}", "", line) for line in LINES if re.match(COMMAND, line)]
    return [line for line in lines if line.split()[0] in commands]


def test_curl_lines(tmp_path: Path) -> None:
    """One after the other, against the sandbox: a call is started, followed to its end, and hung up."""
    program("curl", "curl")
    local = [line for line in LINES if "127.0.0.1:8000" in line and "curl" in line]
    lines = [line for line in local if "/metrics" not in line]  # the sandbox has none
    with running("sandbox", "--port", "0", cwd=tmp_path, environ={}) as sandbox:
        url = re.search(r"http://127\.0\.0\.1:\d+", sandbox.wait_for("-X POST"))
        assert url is not None
        script = "set -euo pipefail\n" + "\n".join(lines).replace("http://127.0.0.1:8000", url[0])
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=3 * PATIENCE, check=False
        )
    assert done.returncode == 0, done.stderr
    shown = [line for line in lines if "curl -i " in line]
    assert len(shown) >= 3
    assert re.findall(r"HTTP/1\.1 (\d+)", done.stdout) == ["201"] * len(shown)
    assert "event: call\n" in done.stdout
    assert "event: end\n" in done.stdout
    assert '"status":"completed"' in done.stdout.replace(" ", "").splitlines()[-1]
    assert "/problems/" not in done.stdout


def test_serve_line(tmp_path: Path) -> None:
    [line] = [line for line in LINES if line.endswith("oneinbox-broker serve")]
    settings = dict(word.split("=", 1) for word in shlex.split(line)[:-2])
    with running("serve", "--port", "0", cwd=tmp_path, environ=settings) as broker:
        broker.wait_for('"listening"')


def test_operators_lines(tmp_path: Path) -> None:
    lines = lines_of("pause", "resume", "block", "unblock", "status")
    assert len(lines) == 5
    with running_valkey() as valkey:
        environ = {
            "ONEINBOX_API_KEY": "oi_sk_readme",
            "ONEINBOX_AGENT_ID": "agt_readme",
            "BROKER_STORE_URL": valkey.url,
            "BROKER_SECRET": "thirty-two characters of a secret",
        }
        for line in lines:
            done = run(*shlex.split(line), cwd=tmp_path, environ=environ)
            assert (done.code, done.err) == (0, ""), line


@pytest.mark.parametrize("line", lines_of("doctor"))
def test_doctor_lines_look_and_say(line: str, tmp_path: Path) -> None:
    """There is nothing to find here: no settings, and no such host."""
    done = subprocess.run(
        [sys.executable, "-m", "app", *shlex.split(line)],
        cwd=tmp_path,
        env=surroundings({"HTTPS_PROXY": "http://127.0.0.1:1"}),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "wrong" in done.stdout
