"""The emulated OneInbox in process, with a clock that the tests set."""

import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import jwt
import pytest

from app.sandbox import calls as calls_module
from app.sandbox.emulator import Emulator, EmulatorOptions, create_emulator
from app.sandbox.faults import Drop, Fields, Latency, NotUtf8, Status
from app.sandbox.middleware import MAX_BODY, MAX_REQUESTS
from app.sandbox.schemas import CallOverride, StartCall

START = {"agent_id": "agt_sandbox"}
NOT_JSON = (b"{", b"\xff")


@dataclass
class Clock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class OneInbox:
    """A client with the key, the emulator behind it, and its clock."""

    http: httpx.AsyncClient
    emulator: Emulator
    clock: Clock = field(default_factory=Clock)

    async def start(self, **fields: Any) -> dict[str, Any]:
        answer = await self.http.post("/v1/calls/web", json=START | fields)
        assert answer.status_code == 201, answer.text
        started: dict[str, Any] = answer.json()
        return started

    async def call(self, call_id: str) -> dict[str, Any]:
        answer = await self.http.get(f"/v1/calls/{call_id}")
        assert answer.status_code == 200, answer.text
        call: dict[str, Any] = answer.json()
        return call

    async def override(self, call_id: str, **change: Any) -> dict[str, Any]:
        answer = await self.http.post(f"/_emulator/calls/{call_id}", json=change)
        assert answer.status_code == 200, answer.text
        inspected: dict[str, Any] = answer.json()
        return inspected


def connect(peer: str = "127.0.0.1", **options: Any) -> OneInbox:
    clock = Clock()
    app = create_emulator(EmulatorOptions(now=clock, **options))
    http = httpx.AsyncClient(
        transport=httpx.ASGITransport(app, client=(peer, 5000)),
        base_url="http://oneinbox",
        headers={"Authorization": "Bearer oi_sk_sandbox"},
    )
    return OneInbox(http, app.state.emulator, clock)


@pytest.fixture
async def oneinbox() -> AsyncIterator[OneInbox]:
    connected = connect()
    async with connected.http:
        yield connected


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer oi_sk_other", "Basic oi_sk_sandbox", "Bearer oi_sk_é"])
async def test_wrong_key_is_401(oneinbox: OneInbox, authorization: str) -> None:
    headers = {b"Authorization": authorization.encode()}
    answer = await oneinbox.http.post("/v1/calls/web", json=START, headers=headers)

    assert answer.status_code == 401
    assert answer.json() == {"detail": "Invalid API key"}
    assert len(oneinbox.emulator.calls) == 0


async def test_start_returns_a_call_and_a_livekit_token(oneinbox: OneInbox) -> None:
    started = await oneinbox.start()

    assert str(uuid.UUID(started["id"])) == started["id"]
    assert started["server_url"] == "ws://127.0.0.1:7880"
    assert (started["agent_id"], started["type"], started["status"]) == ("agt_sandbox", "web", "queued")
    assert re.fullmatch("web-[0-9a-f]{8}", started["room_name"])
    assert datetime.fromisoformat(started["created_at"]).timestamp() == oneinbox.clock.now
    claims = jwt.decode(started["participant_token"], options={"verify_signature": False})
    assert claims["iss"] == "devkey"
    assert claims["nbf"] == oneinbox.clock.now
    assert claims["exp"] == oneinbox.clock.now + 900
    assert claims["video"] == {
        "room": started["room_name"],
        "roomJoin": True,
        "canPublish": True,
        "canSubscribe": True,
    }


async def test_each_token_names_a_new_participant() -> None:
    secret = "s" * 32
    oneinbox = connect(livekit_secret=secret)

    tokens = [(await oneinbox.start())["participant_token"] for _ in range(2)]

    first, second = (
        jwt.decode(token, secret, ["HS256"], options={"verify_exp": False, "verify_nbf": False}) for token in tokens
    )
    assert first["sub"] != second["sub"]
    assert first["jti"] != second["jti"]


async def test_unknown_agent_is_404(oneinbox: OneInbox) -> None:
    answer = await oneinbox.http.post("/v1/calls/web", json={"agent_id": "agt_other"})

    assert (answer.status_code, answer.json()) == (404, {"detail": "Agent not found"})


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({}, ["body", "agent_id"]),
        ({"agent_id": 1}, ["body", "agent_id"]),
        (START | {"variables": "x"}, ["body", "variables"]),
        (START | {"metadata": []}, ["body", "metadata"]),
        (START | {"overrides": "x"}, ["body", "overrides"]),
        (START | {"overrides": {"first_message": 1}}, ["body", "overrides", "first_message"]),
        (START | {"overrides": {"llm": {"temperature": "hot"}}}, ["body", "overrides", "llm", "temperature"]),
        (START | {"overrides": {"llm": {"model": 4}}}, ["body", "overrides", "llm", "model"]),
        (START | {"overrides": {"transcriber": {"language": {}}}}, ["body", "overrides", "transcriber", "language"]),
        (START | {"overrides": {"tts": {"speed": "fast"}}}, ["body", "overrides", "tts", "speed"]),
    ],
)
async def test_wrong_types_are_fastapis_422(oneinbox: OneInbox, body: dict[str, Any], loc: list[str]) -> None:
    answer = await oneinbox.http.post("/v1/calls/web", json=body)

    assert answer.status_code == 422
    (error,) = answer.json()["detail"]
    assert error["loc"] == loc
    assert {"msg", "type"} <= error.keys()


async def test_unknown_fields_are_ignored(oneinbox: OneInbox) -> None:
    await oneinbox.start(surprise=1, overrides={"surprise": 2, "tts": {"voice_id": "v", "surprise": 3}})

    (call,) = oneinbox.emulator.calls
    assert call.overrides == {"tts": {"voice_id": "v"}}


async def test_status_follows_the_clock(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start())["id"]

    seen = []
    for _ in range(11):
        seen.append((await oneinbox.call(call_id))["status"])
        oneinbox.clock.forward(1)

    assert seen == ["queued", "initiated", *["in_progress"] * 8, "completed"]


async def test_running_call_has_no_end_and_no_transcript(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start())["id"]
    oneinbox.clock.forward(3)

    call = await oneinbox.call(call_id)

    assert datetime.fromisoformat(call["started_at"]).timestamp() == oneinbox.clock.now - 1
    assert (call["ended_at"], call["duration_seconds"], call["end_reason"]) == (None, None, None)
    assert (call["transcript"], call["messages"], call["recording_url"]) == (None, [], None)


async def test_transcript_appears_after_the_end(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start(metadata={"a": {"b": 1}}, variables={"name": "Ada"}))["id"]
    oneinbox.clock.forward(12)
    early = await oneinbox.call(call_id)
    oneinbox.clock.forward(0.5)

    late = await oneinbox.call(call_id)

    assert (early["status"], early["duration_seconds"], early["end_reason"]) == ("completed", 8, "user_hangup")
    assert (early["transcript"], early["messages"], early["ai_summary"]) == (None, [], None)
    assert {message["role"] for message in late["messages"]} == {"agent", "user", "tool_call", "tool_result"}
    assert late["transcript"].startswith("Agent: Hello")
    assert "opens" not in late["transcript"]
    assert all(late[name] for name in ("recording_url", "ai_summary", "outcome", "cost_cents", "credits_used"))
    assert (late["metadata"], late["variables"]) == ({"a": {"b": 1}}, {"name": "Ada"})
    documented = (
        "id agent_id type status from_number to_number room_name direction scheduled_at variables started_at ended_at "
        "duration_seconds end_reason transcript messages recording_url analysis latency cost_cents metadata created_at "
        "updated_at twilio_call_sid outcome ai_summary credits_used"
    )
    assert list(late) == documented.split()


async def test_agent_says_the_overridden_first_message(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start(overrides={"first_message": "Ahoy"}))["id"]
    oneinbox.clock.forward(100)

    assert (await oneinbox.call(call_id))["messages"][0] == {"role": "agent", "content": "Ahoy"}


async def test_stop_ends_a_running_call(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start())["id"]
    oneinbox.clock.forward(5)

    stopped = (await oneinbox.http.post(f"/v1/calls/{call_id}/stop")).json()

    assert (stopped["status"], stopped["end_reason"], stopped["duration_seconds"]) == ("completed", "api_stop", 3)
    oneinbox.clock.forward(2.5)
    assert (await oneinbox.call(call_id))["messages"]


async def test_call_stopped_before_it_began_has_no_transcript(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start())["id"]
    await oneinbox.http.post(f"/v1/calls/{call_id}/stop")
    oneinbox.clock.forward(100)

    call = await oneinbox.call(call_id)

    assert (call["started_at"], call["duration_seconds"], call["messages"]) == (None, 0, [])


async def test_stopping_an_ended_call_changes_nothing(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start())["id"]
    oneinbox.clock.forward(100)
    before = await oneinbox.call(call_id)

    answer = await oneinbox.http.post(f"/v1/calls/{call_id}/stop")

    assert (answer.status_code, answer.json()) == (200, before)


async def test_deleted_call_is_gone(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start())["id"]

    deleted = await oneinbox.http.delete(f"/v1/calls/{call_id}")

    assert deleted.status_code == 204
    for method, path in (("GET", ""), ("POST", "/stop"), ("DELETE", "")):
        answer = await oneinbox.http.request(method, f"/v1/calls/{call_id}{path}")
        assert (answer.status_code, answer.json()) == (404, {"detail": "Call not found"})


async def test_list_pages_newest_first(oneinbox: OneInbox) -> None:
    ids = [(await oneinbox.start())["id"] for _ in range(5)]

    answer = (await oneinbox.http.get("/v1/calls", params={"limit": 2, "offset": 1})).json()

    assert [item["id"] for item in answer["items"]] == [ids[3], ids[2]]
    assert (answer["total"], answer["limit"], answer["offset"]) == (5, 2, 1)


async def test_list_filters_by_agent_and_status() -> None:
    oneinbox = connect(agents=("a", "b"))
    old = await oneinbox.start(agent_id="a")
    oneinbox.clock.forward(100)
    new = await oneinbox.start(agent_id="a")
    await oneinbox.start(agent_id="b")

    async def found(**params: str) -> list[str]:
        answer = await oneinbox.http.get("/v1/calls", params=params)
        return [item["id"] for item in answer.json()["items"]]

    assert await found(agent_id="a") == [new["id"], old["id"]]
    assert await found(agent_id="a", status="completed") == [old["id"]]
    assert await found(status="failed") == []


async def test_cursor_pages_through_all_calls(oneinbox: OneInbox) -> None:
    ids = [(await oneinbox.start())["id"] for _ in range(5)]

    seen: list[str] = []
    params: dict[str, Any] = {"limit": 2}
    while True:
        page = (await oneinbox.http.get("/v1/calls/cursor", params=params)).json()
        seen += [item["id"] for item in page["items"]]
        if not page["has_more"]:
            break
        params["cursor"] = page["next_cursor"]
        await oneinbox.start()  # newer calls do not shift the later pages

    assert seen == ids[::-1]
    assert page["next_cursor"] is None


async def test_wrong_cursor_is_400(oneinbox: OneInbox) -> None:
    answer = await oneinbox.http.get("/v1/calls/cursor", params={"cursor": "x"})

    assert answer.status_code == 400


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 101}, {"offset": -1}])
async def test_list_parameters_out_of_bounds_are_422(oneinbox: OneInbox, params: dict[str, int]) -> None:
    assert (await oneinbox.http.get("/v1/calls", params=params)).status_code == 422


@pytest.mark.parametrize("listed", [True, False])
async def test_metadata_in_lists_is_optional(listed: bool) -> None:
    oneinbox = connect(list_metadata=listed)
    call_id = (await oneinbox.start(metadata={"a": 1}))["id"]

    (item,) = (await oneinbox.http.get("/v1/calls")).json()["items"]

    assert item.get("metadata") == ({"a": 1} if listed else None)
    assert (await oneinbox.call(call_id))["metadata"] == {"a": 1}


async def test_guide_edition_has_short_ids_and_older_fields() -> None:
    oneinbox = connect(edition="guide")
    started = await oneinbox.start(metadata={"a": 1})
    oneinbox.clock.forward(100)

    call = await oneinbox.call(started["id"])

    assert started.keys() == {"id", "server_url", "participant_token"}
    assert re.fullmatch("call_[0-9a-f]{16}", started["id"])
    assert call["transcript"][1] == {"role": "user", "content": "When do you open tomorrow?"}
    assert "messages" not in call
    assert call["metadata"] == {"a": 1}


async def test_webhooks_are_registered_listed_and_removed(oneinbox: OneInbox) -> None:
    body = {"name": "n", "url": "https://example.com", "events": ["call.ended"]}

    made = await oneinbox.http.post("/v1/webhooks", json=body)
    listed = (await oneinbox.http.get("/v1/webhooks")).json()
    removed = await oneinbox.http.delete(f"/v1/webhooks/{made.json()['id']}")
    again = await oneinbox.http.delete(f"/v1/webhooks/{made.json()['id']}")

    webhook = made.json()
    assert made.status_code == 201
    assert webhook.items() >= (body | {"status": "active"}).items()
    assert webhook.pop("secret").startswith("whsec_")
    assert listed == {"items": [webhook], "total": 1}
    assert (removed.status_code, again.status_code) == (204, 404)


@pytest.mark.parametrize("url", ["", "ftp://127.0.0.1/", "http://", "nonsense"])
async def test_webhook_url_must_be_http(oneinbox: OneInbox, url: str) -> None:
    answer = await oneinbox.http.post("/v1/webhooks", json={"name": "n", "url": url, "events": ["call.ended"]})

    assert answer.status_code == 422


@pytest.mark.parametrize(
    "change",
    [{"name": ""}, {"name": "n" * 256}, {"events": []}, {"events": ["call.ended"] * 21}, {"events": ["call.rung"]}],
)
async def test_a_webhook_has_a_name_and_known_events(oneinbox: OneInbox, change: dict[str, Any]) -> None:
    body = {"name": "n", "url": "https://example.com", "events": ["call.ended"]} | change

    answer = await oneinbox.http.post("/v1/webhooks", json=body)

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][:2] == ["body", next(iter(change))]


async def test_only_the_guide_knows_when_a_call_was_analyzed() -> None:
    body = {"name": "n", "url": "https://example.com", "events": ["call.ended", "call.analyzed"]}
    statuses = {}
    for edition in ("reference", "guide"):
        oneinbox = connect(edition=edition)
        async with oneinbox.http:
            answer = await oneinbox.http.post("/v1/webhooks", json=body)
        statuses[edition] = answer.status_code
        if answer.status_code == 422:
            assert answer.json()["detail"][0]["loc"] == ["body", "events", 1]

    assert statuses == {"reference": 422, "guide": 201}


async def test_held_status_ignores_the_clock(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start())["id"]
    held = await oneinbox.override(call_id, status="in_progress")
    oneinbox.clock.forward(1_000)

    call = await oneinbox.call(call_id)

    assert held["running"] is True
    assert (call["status"], call["ended_at"]) == ("in_progress", None)
    assert [call.id for call in oneinbox.emulator.calls.running()] == [call_id]


async def test_held_call_can_be_stopped(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start())["id"]
    await oneinbox.override(call_id, status="in_progress")
    oneinbox.clock.forward(1_000)

    stopped = (await oneinbox.http.post(f"/v1/calls/{call_id}/stop")).json()

    assert (stopped["status"], stopped["duration_seconds"]) == ("completed", 1_000)


async def test_released_call_follows_the_clock_again(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start())["id"]
    await oneinbox.override(call_id, status="queued")
    oneinbox.clock.forward(5)

    released = await oneinbox.override(call_id, status=None)

    assert released["status"] == "in_progress"


async def test_unknown_status_counts_as_running(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start())["id"]

    assert (await oneinbox.override(call_id, status="transferring"))["running"] is True


@pytest.mark.parametrize("status", ["failed", "no-answer", "cancelled"])
async def test_forced_terminal_status_ends_the_call(oneinbox: OneInbox, status: str) -> None:
    call_id = (await oneinbox.start())["id"]
    oneinbox.clock.forward(4)

    forced = await oneinbox.override(call_id, status=status)

    call = await oneinbox.call(call_id)
    assert forced["running"] is False
    assert (call["status"], call["end_reason"], call["duration_seconds"]) == (status, status, 2)


async def test_record_fields_can_be_overridden(oneinbox: OneInbox) -> None:
    call_id = (await oneinbox.start())["id"]
    await oneinbox.override(call_id, set={"transcript": 7, "new": "x"}, remove=["messages", "status"])

    call = await oneinbox.call(call_id)

    assert (call["transcript"], call["new"]) == (7, "x")
    assert not {"messages", "status"} & call.keys()
    await oneinbox.override(call_id, set={"status": "odd"})
    assert (await oneinbox.call(call_id))["status"] == "odd"


async def test_control_surface_lists_calls_in_full(oneinbox: OneInbox) -> None:
    started = await oneinbox.start(metadata={"a": 1}, variables={"b": 2}, overrides={"llm": {"model": "m"}})

    (call,) = (await oneinbox.http.get("/_emulator/calls")).json()

    assert call == {
        "id": started["id"],
        "agent_id": "agt_sandbox",
        "room_name": started["room_name"],
        "created_at": started["created_at"],
        "status": "queued",
        "running": True,
        "end_reason": None,
        "variables": {"b": 2},
        "overrides": {"llm": {"model": "m"}},
        "metadata": {"a": 1},
    }


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "calls"),
        ("POST", "calls/x"),
        ("GET", "requests"),
        ("DELETE", "requests"),
        ("POST", "faults"),
        ("DELETE", "faults"),
    ],
)
@pytest.mark.parametrize("peer", ["192.0.2.1", "testclient"])
async def test_control_surface_is_for_loopback_only(peer: str, method: str, path: str) -> None:
    oneinbox = connect(peer)

    answer = await oneinbox.http.request(method, f"/_emulator/{path}", json=[])

    assert answer.status_code == 403


async def test_usage_counts_the_calls_of_the_day_and_the_month() -> None:
    oneinbox = connect(max_calls_per_day=2, in_progress=60)
    async with oneinbox.http:
        oneinbox.clock.now = datetime(2027, 1, 31, 23, 50, tzinfo=UTC).timestamp()
        for _ in range(3):
            await oneinbox.start()
        oneinbox.clock.forward(300)

        evening = (await oneinbox.http.get("/v1/usage")).json()
        oneinbox.clock.forward(300)
        await oneinbox.start()
        next_month = (await oneinbox.http.get("/v1/usage")).json()

    assert evening == {
        "calls_made_today": 3,
        "max_calls_per_day": 2,
        "calls_remaining_today": 0,
        "calls_this_month": 3,
        "minutes_used_this_month": 3.0,
        "cost_cents_this_month": 30,
        "kb_token_budget": None,
        "period_start": "2027-01-01T00:00:00Z",
    }
    assert next_month["calls_made_today"] == next_month["calls_remaining_today"] == next_month["calls_this_month"] == 1
    assert next_month["period_start"] == "2027-02-01T00:00:00Z"


async def test_usage_without_a_cap(oneinbox: OneInbox) -> None:
    await oneinbox.start()

    usage = (await oneinbox.http.get("/v1/usage")).json()

    assert (usage["calls_made_today"], usage["max_calls_per_day"], usage["calls_remaining_today"]) == (1, None, None)


async def test_requests_are_recorded(oneinbox: OneInbox) -> None:
    await oneinbox.http.post("/v1/calls/web?a=b", json=START, headers=[("X-Twice", "1"), ("X-Twice", "2")])

    (shown,) = (await oneinbox.http.get("/_emulator/requests")).json()
    (seen,) = oneinbox.emulator.requests

    assert (shown["method"], shown["path"], shown["query"], shown["json"]) == ("POST", "/v1/calls/web", "a=b", START)
    assert shown["at"] == oneinbox.clock.now
    assert [value for name, value in shown["headers"] if name == "x-twice"] == ["1", "2"]
    assert seen.headers["Authorization"] == "Bearer oi_sk_sandbox"
    assert seen.operation == "start"
    await oneinbox.http.delete("/_emulator/requests")
    assert not oneinbox.emulator.requests


@pytest.mark.parametrize("body", NOT_JSON)
async def test_broken_request_is_422_and_recorded(oneinbox: OneInbox, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = await oneinbox.http.post("/v1/calls/web", content=body, headers=headers)

    assert answer.status_code in (400, 422)
    assert oneinbox.emulator.requests[-1].json is None


async def test_oldest_calls_and_requests_are_evicted(oneinbox: OneInbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "MAX_CALLS", 3)
    held, ended, other = [oneinbox.emulator.calls.start(StartCall(agent_id="a")) for _ in range(3)]
    oneinbox.emulator.override(held, CallOverride(status="in_progress"))
    oneinbox.clock.forward(100)

    first_more = oneinbox.emulator.calls.start(StartCall(agent_id="a"))
    assert list(oneinbox.emulator.calls) == [first_more, other, held]

    oneinbox.emulator.override(other, CallOverride(status="in_progress"))
    second_more = oneinbox.emulator.calls.start(StartCall(agent_id="a"))
    assert list(oneinbox.emulator.calls) == [second_more, first_more, other]
    assert oneinbox.emulator.calls.get(ended.id) is None
    assert oneinbox.emulator.requests.maxlen == MAX_REQUESTS


async def test_huge_request_is_413(oneinbox: OneInbox) -> None:
    answer = await oneinbox.http.post("/v1/calls/web", content=b"x" * (MAX_BODY + 1))

    assert answer.status_code == 413


async def test_control_surface_adds_faults(oneinbox: OneInbox) -> None:
    rules = [{"kind": "status", "operation": "start", "status": 503, "times": 2}]

    added = await oneinbox.http.post("/_emulator/faults", json=rules)
    statuses = [(await oneinbox.http.post("/v1/calls/web", json=START)).status_code for _ in range(3)]

    assert added.status_code == 201
    assert statuses == [503, 503, 201]
    assert len(oneinbox.emulator.calls) == 1


async def test_faults_are_cleared(oneinbox: OneInbox) -> None:
    oneinbox.emulator.faults.add(Status(operation="start", status=500))

    await oneinbox.http.delete("/_emulator/faults")

    assert (await oneinbox.http.post("/v1/calls/web", json=START)).status_code == 201


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "nonsense", "operation": "start"},
        {"kind": "drop", "operation": "nonsense"},
        {"kind": "drop", "operation": "start", "typo": 1},
        {"kind": "status", "operation": "start", "status": 200},
        {"kind": "drop", "operation": "start", "probability": 2},
    ],
)
async def test_wrong_fault_rule_is_422(oneinbox: OneInbox, rule: dict[str, Any]) -> None:
    assert (await oneinbox.http.post("/_emulator/faults", json=[rule])).status_code == 422


@pytest.mark.parametrize(
    ("operation", "method", "path"),
    [
        ("start", "POST", "/v1/calls/web"),
        ("get", "GET", "/v1/calls/web"),
        ("stop", "POST", "/v1/calls/x/stop"),
        ("list", "GET", "/v1/calls"),
        ("list", "GET", "/v1/calls/cursor"),
        ("usage", "GET", "/v1/usage"),
    ],
)
async def test_fault_affects_only_its_operation(oneinbox: OneInbox, operation: str, method: str, path: str) -> None:
    rules = [{"kind": "status", "operation": operation, "status": 418}]
    await oneinbox.http.post("/_emulator/faults", json=rules)

    hit = await oneinbox.http.request(method, path, json=START)
    missed = await oneinbox.http.get("/v1/webhooks")

    assert (hit.status_code, missed.status_code) == (418, 200)


async def test_first_matching_rule_wins(oneinbox: OneInbox) -> None:
    oneinbox.emulator.faults.add(Status(operation="start", status=500, times=1), Status(operation="start", status=503))

    statuses = [(await oneinbox.http.post("/v1/calls/web", json=START)).status_code for _ in range(2)]

    assert statuses == [500, 503]


async def test_seed_makes_probability_repeatable(oneinbox: OneInbox) -> None:
    async def statuses() -> list[int]:
        oneinbox.emulator.faults.clear()
        oneinbox.emulator.faults.add(Status(operation="list", status=500, probability=0.5, seed=7))
        return [(await oneinbox.http.get("/v1/calls")).status_code for _ in range(20)]

    first = await statuses()

    assert set(first) == {200, 500}
    assert await statuses() == first


@pytest.mark.parametrize(
    ("fault", "body", "headers"),
    [
        (Status(operation="start", status=402), {"detail": "Payment Required"}, {}),
        (Status(operation="start", status=403, detail="ORIGIN_NOT_ALLOWED"), {"detail": "ORIGIN_NOT_ALLOWED"}, {}),
        (Status(operation="start", status=422, detail=[{"loc": ["body"]}]), {"detail": [{"loc": ["body"]}]}, {}),
        (Status(operation="start", status=429, shape="error"), {"error": "Too Many Requests"}, {}),
        (
            Status(operation="start", status=429, retry_after=7, shape="message"),
            {"message": "Too Many Requests"},
            {"retry-after": "7"},
        ),
    ],
)
async def test_status_fault_answers_the_error(
    oneinbox: OneInbox, fault: Status, body: dict[str, Any], headers: dict[str, str]
) -> None:
    oneinbox.emulator.faults.add(fault)

    answer = await oneinbox.http.post("/v1/calls/web", json=START)

    assert answer.status_code == fault.status
    assert answer.json() == body
    assert answer.headers.get("retry-after") == headers.get("retry-after")


async def test_status_fault_can_take_effect(oneinbox: OneInbox) -> None:
    oneinbox.emulator.faults.add(Status(operation="start", status=500, takes_effect=True))

    answer = await oneinbox.http.post("/v1/calls/web", json=START)

    assert answer.status_code == 500
    assert len(oneinbox.emulator.calls) == 1


async def test_fields_are_set_and_removed(oneinbox: OneInbox) -> None:
    oneinbox.emulator.faults.add(
        Fields(operation="start", set={"server_url": "https://x", "extra": 1}, remove=["participant_token"])
    )

    started = await oneinbox.start()

    assert (started["server_url"], started["extra"]) == ("https://x", 1)
    assert "participant_token" not in started


async def test_refusal_is_not_altered(oneinbox: OneInbox) -> None:
    oneinbox.emulator.faults.add(NotUtf8(operation="start"))

    answer = await oneinbox.http.post("/v1/calls/web", json={"agent_id": "agt_other"})

    assert (answer.status_code, answer.json()) == (404, {"detail": "Agent not found"})


async def test_latency_keeps_the_answer(oneinbox: OneInbox) -> None:
    oneinbox.emulator.faults.add(Latency(operation="start", seconds=0))

    assert (await oneinbox.start())["status"] == "queued"


async def test_connection_faults_need_a_connection(oneinbox: OneInbox) -> None:
    oneinbox.emulator.faults.add(Drop(operation="start"))

    with pytest.raises(RuntimeError, match="running_emulator"):
        await oneinbox.http.post("/v1/calls/web", json=START)
