"""LiveKit's own JavaScript client, a broker and an emulator, each in its own process."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest

from tests.e2e.conftest import control, running_broker
from tests.support.needs import node

pytestmark = pytest.mark.browser

HERE = Path(__file__).parent
PATIENCE = 30
"""Seconds; enough on a busy machine."""


@dataclass(frozen=True)
class Visit:
    """The client's tokens, and the requests that reached OneInbox."""

    fetched: dict[str, Any]
    starts: list[dict[str, Any]]
    """Bodies of the requests for a call."""
    rooms: list[str]
    """Rooms of the calls, the oldest first."""


@pytest.fixture(scope="module")
def visit(oneinbox: str) -> Visit:
    path = node("livekit-client")
    with running_broker(oneinbox) as (_, broker):
        command = [path, str(HERE / "livekit_client.mjs"), f"{broker}/session"]
        client = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert client.returncode == 0, client.stderr
    starts = [each["json"] for each in control(oneinbox, "requests") if each["path"] == "/v1/calls/web"]
    rooms = [call["room_name"] for call in reversed(control(oneinbox, "calls"))]
    return Visit(json.loads(client.stdout), starts, rooms)


def test_options_reach_oneinbox(visit: Visit) -> None:
    request = visit.starts[0]
    assert request["agent_id"] == "agt_sandbox"
    assert request["variables"] == {"plan": "gold", "participant_name": "Ada"}
    own = {name: value for name, value in request["metadata"].items() if not name.startswith("broker_")}
    assert own == {"participant_metadata": "about Ada", "agent_metadata": "from the page"}


def test_no_options_start_a_call_with_the_default_agent(visit: Visit) -> None:
    request = visit.starts[1]
    assert request["agent_id"] == "agt_sandbox"
    assert not request.get("variables")


def test_client_gets_the_token_and_address_of_its_call(visit: Visit) -> None:
    given = [visit.fetched[name] for name in ("named", "plain", "forced")]
    tokens = [jwt.decode(each["participantToken"], options={"verify_signature": False}) for each in given]
    assert [token["video"]["room"] for token in tokens] == visit.rooms
    assert [each["serverUrl"] for each in given] == ["ws://127.0.0.1:7880"] * 3
    assert all(len(each) == 2 for each in given)


def test_client_reuses_its_token_until_forced(visit: Visit) -> None:
    assert visit.fetched["again"] == visit.fetched["plain"]
    assert visit.fetched["forced"] != visit.fetched["plain"]
    assert len(visit.starts) == 3


def test_room_name_from_the_page_is_refused(visit: Visit) -> None:
    assert "received 422" in visit.fetched["refused"]
    assert "/problems/invalid-request" in visit.fetched["refused"]
