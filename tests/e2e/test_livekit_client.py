"""LiveKit's own JavaScript client against a broker in front of the emulator, all of them processes of their own."""

import base64
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.needs import node

HERE = Path(__file__).parent
PATIENCE = 30
"""Seconds for a process to start or to answer; ample on a busy machine."""


@dataclass(frozen=True)
class Visit:
    """What the client's fetches gave, and the emulator that the broker asked for calls."""

    fetched: dict[str, Any]
    emulator: str

    def ask(self, path: str) -> Any:
        """A page of the emulator's control surface."""
        with urllib.request.urlopen(f"{self.emulator}/_emulator/{path}", timeout=PATIENCE) as answer:
            return json.load(answer)

    def starts(self) -> list[dict[str, Any]]:
        """The requests for a call that reached OneInbox."""
        return [each for each in self.ask("requests") if (each["method"], each["path"]) == ("POST", "/v1/calls/web")]


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    path = node("livekit-client")
    empty = tmp_path_factory.mktemp("livekit")
    with ExitStack() as stack:
        emulator = stack.enter_context(_running(empty, "emulator"))
        settings = {
            "ONEINBOX_API_KEY": "oi_sk_sandbox",
            "ONEINBOX_BASE_URL": emulator,
            "ONEINBOX_AGENT_ID": "agt_sandbox",
            "BROKER_MAX_LIVE_CALLS": "10",
        }
        broker = stack.enter_context(_running(empty, "serve", settings))
        command = [path, str(HERE / "livekit_client.mjs"), f"{broker}/session"]
        client = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
        assert client.returncode == 0, client.stderr
        yield Visit(json.loads(client.stdout), emulator)


def test_options_become_the_call(visit: Visit) -> None:
    request = visit.starts()[0]["json"]
    assert request["agent_id"] == "agt_sandbox"
    assert request["variables"] == {"plan": "gold", "participant_name": "Ada"}
    own = {name: value for name, value in request["metadata"].items() if not name.startswith("broker_")}
    assert own == {"participant_metadata": "about Ada", "agent_metadata": "from the page"}


def test_no_options_start_a_call_with_the_default_agent(visit: Visit) -> None:
    request = visit.starts()[1]["json"]
    assert request["agent_id"] == "agt_sandbox"
    assert not request.get("variables")


def test_client_gets_the_token_and_address_of_its_call(visit: Visit) -> None:
    given = [visit.fetched[name] for name in ("named", "plain", "forced")]
    rooms = [call["room_name"] for call in reversed(visit.ask("calls"))]
    assert [_claims(each["participantToken"])["video"]["room"] for each in given] == rooms
    assert [each["serverUrl"] for each in given] == ["ws://127.0.0.1:7880"] * 3
    assert all(len(each) == 2 for each in given)


def test_client_caches_until_it_is_forced(visit: Visit) -> None:
    assert visit.fetched["again"] == visit.fetched["plain"]
    assert visit.fetched["forced"] != visit.fetched["plain"]
    assert len(visit.starts()) == 3


def test_a_room_of_ones_own_is_refused(visit: Visit) -> None:
    assert "received 422" in visit.fetched["refused"]
    assert "/problems/invalid-request" in visit.fetched["refused"]


def _claims(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


@contextmanager
def _running(directory: Path, command: str, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """A command of the broker on a free port, until the block ends: its URL. Settings of this machine do not count."""
    foreign = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "ONEINBOX_"))}
    with subprocess.Popen(
        [sys.executable, "-m", "app", command, "--port", "0"],
        cwd=directory,
        env={**foreign, **(settings or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            output = ""
            while not (url := re.search(r"http://127\.0\.0\.1:\d+", output)):
                line = process.stdout.readline()
                assert line, f"{command} ended: {output}"
                output += line
            yield url[0]  # it listens: a request that comes early waits
        finally:
            process.terminate()
            process.wait(PATIENCE)
