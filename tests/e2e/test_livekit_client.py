"""LiveKit's own JavaScript client against a broker in front of the emulator, all of them processes of their own."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

HERE = Path(__file__).parent
ORIGIN = re.compile(r"http://127\.0\.0\.1:\d+")
PATIENCE = 30
"""Seconds for a process to start or to answer; ample on a busy machine."""


@dataclass(frozen=True)
class Sandbox:
    broker: str
    emulator: str

    def ask(self, path: str) -> Any:
        """A page of the emulator's control surface."""
        with urllib.request.urlopen(f"{self.emulator}/_emulator/{path}", timeout=PATIENCE) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def tokens() -> Iterator[tuple[Sandbox, dict[str, Any]]]:
    """A sandbox, and what the client's fetches gave."""
    node = shutil.which("node")
    if node is None:
        _cannot("there is no node")
    if not (HERE / "node_modules" / "livekit-client").is_dir():
        _cannot("livekit-client is not installed: npm install --prefix tests/e2e")
    with _sandbox() as sandbox:
        command = [str(node), str(HERE / "livekit_client.mjs"), f"{sandbox.broker}/session"]
        client = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
        assert client.returncode == 0, client.stderr
        yield sandbox, json.loads(client.stdout)


def test_options_become_the_call(tokens: tuple[Sandbox, dict[str, Any]]) -> None:
    sandbox, _ = tokens
    request = _starts(sandbox)[0]["json"]
    assert request["agent_id"] == "agt_sandbox"
    assert request["variables"] == {"plan": "gold", "participant_name": "Ada"}
    own = {name: value for name, value in request["metadata"].items() if not name.startswith("broker_")}
    assert own == {"participant_metadata": "about Ada", "agent_metadata": "from the page"}


def test_no_options_start_a_call_with_the_default_agent(tokens: tuple[Sandbox, dict[str, Any]]) -> None:
    sandbox, _ = tokens
    request = _starts(sandbox)[1]["json"]
    assert request["agent_id"] == "agt_sandbox"
    assert not request.get("variables")


def test_client_gets_the_token_and_address_of_its_call(tokens: tuple[Sandbox, dict[str, Any]]) -> None:
    sandbox, fetched = tokens
    rooms = [call["room_name"] for call in reversed(sandbox.ask("calls"))]
    assert [_claims(fetched[name])["video"]["room"] for name in ("named", "plain", "forced")] == rooms
    assert all(set(fetched[name]) == {"serverUrl", "participantToken"} for name in ("named", "plain", "forced"))
    assert fetched["named"]["serverUrl"].startswith("ws://127.0.0.1")


def test_client_caches_until_it_is_forced(tokens: tuple[Sandbox, dict[str, Any]]) -> None:
    sandbox, fetched = tokens
    assert fetched["again"] == fetched["plain"]
    assert fetched["forced"] != fetched["plain"]
    assert len(_starts(sandbox)) == 3


def test_a_room_of_ones_own_is_refused(tokens: tuple[Sandbox, dict[str, Any]]) -> None:
    _, fetched = tokens
    assert "received 422" in fetched["refused"]
    assert "/problems/invalid-request" in fetched["refused"]


def _starts(sandbox: Sandbox) -> list[dict[str, Any]]:
    return [each for each in sandbox.ask("requests") if (each["method"], each["path"]) == ("POST", "/v1/calls/web")]


def _claims(fetched: dict[str, str]) -> dict[str, Any]:
    payload = fetched["participantToken"].split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


@contextmanager
def _sandbox() -> Iterator[Sandbox]:
    command = [sys.executable, "-m", "app", "sandbox", "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            yield _announced(process.stdout)
        finally:
            process.terminate()
            process.wait(PATIENCE)


def _announced(output: IO[str]) -> Sandbox:
    """The two addresses that the sandbox prints; only the emulator has a control surface."""
    origins: set[str] = set()
    for line in output:
        origins.update(ORIGIN.findall(line))
        if len(origins) == 2:
            break
    emulator = next((origin for origin in origins if _is_emulator(origin)), "")
    broker = (origins - {emulator}).pop()
    assert emulator, f"no emulator among {origins}"
    return Sandbox(broker, emulator)


def _is_emulator(origin: str) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{origin}/_emulator/requests", timeout=1) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            time.sleep(0.05)  # printed, but not yet up
    return False


def _cannot(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
