"""GET /calls/{call}: what its owner sees, and what everybody else does."""

import json
import re
import time
from typing import Any

import httpx
import pytest

from app.clock import Clock
from tests.conftest import OpenBroker
from tests.support.harness import AGENT_ID, API_KEY, Upstream, start_call
from tests.support.shapes import assert_problem, assert_safe_headers

BASIC = {
    "id",
    "agent",
    "status",
    "created_at",
    "started_at",
    "ended_at",
    "duration_seconds",
    "end_reason",
    "ends_at",
    "stopped_because",
}
TIMES = {
    "created_at": "2026-03-01T10:00:00Z",
    "started_at": "2026-03-01T10:00:02Z",
    "ended_at": "2026-03-01T10:01:02.5+00:00",
}
STARTED_AT = 1772359200.0
"""2026-03-01T10:00:00Z."""
OFF = {"BROKER_WARN_SECONDS": "0"}
SECRETS = {
    "from_number": "+43 MARKER",
    "to_number": "MARKER",
    "room_name": "web-MARKER",
    "direction": "MARKER",
    "scheduled_at": "MARKER",
    "variables": {"card": "MARKER"},
    "analysis": {"mood": "MARKER"},
    "latency": {"p50": "MARKER"},
    "cost_cents": 987654,
    "credits_used": 987654,
    "metadata": {"broker_user": "MARKER", "broker_request_id": "MARKER", "order": "MARKER"},
    "updated_at": "2027-12-31T00:00:00Z MARKER",
    "twilio_call_sid": "MARKER",
    "api_key": "MARKER",
    "participant_token": "MARKER",
    "webhook_secret": "MARKER",
    "system_prompt": "MARKER",
    "new_field": {"deep": ["MARKER"]},
    "transcript": "agent: MARKER",
    "messages": [{"role": "agent", "content": "MARKER"}],
    "recording_url": "https://MARKER.example",
    "ai_summary": "MARKER",
    "outcome": "MARKER",
    "type": "MARKER",
    "agent": "MARKER",
    "summary": "MARKER",
    "owner": "MARKER",
}


async def read(broker: httpx.AsyncClient, upstream: Upstream, **record: Any) -> dict[str, Any]:
    """Start a call that has this record, and read it."""
    path = await start_call(broker)
    upstream.has_call("call_1", **record)
    response = await broker.get(path)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert_safe_headers(response)
    call: dict[str, Any] = response.json()
    assert call["id"] == path.removeprefix("/calls/")
    return call


async def test_shows_the_basic_fields_and_nothing_else(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    call = await read(
        broker, upstream, status="completed", duration_seconds=60.5, end_reason="hangup", **TIMES, **SECRETS
    )

    assert call.keys() == BASIC
    assert "MARKER" not in json.dumps(call)
    assert "987654" not in json.dumps(call)
    assert call["agent"] == "default"
    assert call["status"] == "completed"
    assert call["created_at"] == "2026-03-01T10:00:00Z"
    assert call["started_at"] == "2026-03-01T10:00:02Z"
    assert call["ended_at"] == "2026-03-01T10:01:02.500000Z"
    assert call["duration_seconds"] == 60.5
    assert call["end_reason"] == "hangup"


async def test_asks_oneinbox_with_the_key(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    await read(broker, upstream)

    request = upstream.requests[-1]
    assert str(request.url) == "https://api.oneinbox.ai/v1/calls/call_1"
    assert request.method == "GET"
    assert request.headers["authorization"] == f"Bearer {API_KEY}"
    assert request.content == b""


async def test_a_record_with_nothing_but_an_id(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = await start_call(broker)
    upstream.router.get("/v1/calls/call_1").respond(json={"id": "call_1"})

    call = (await broker.get(path)).json()

    assert call.keys() == BASIC
    assert isinstance(call["status"], str)
    others = BASIC - {"id", "status", "ends_at"}
    assert {name: call[name] for name in others} == dict.fromkeys(others)


ODD_FIELDS: dict[str, dict[str, Any]] = {
    "times": {"created_at": "yesterday", "started_at": {}, "ended_at": []},
    "duration": {"duration_seconds": "long"},
    "end-reason": {"end_reason": {"code": 1}},
    "agent": {"agent_id": 7},
    "metadata": {"metadata": "text"},
}


@pytest.mark.parametrize("record", ODD_FIELDS.values(), ids=ODD_FIELDS.keys())
async def test_an_odd_field_does_not_hide_the_call(
    record: dict[str, Any], broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    call = await read(broker, upstream, **record)

    assert call["status"] == "in_progress"
    assert all(call[name] is None for name in record if name in BASIC)


@pytest.mark.parametrize(
    "status",
    ["queued", "initiated", "in_progress", "completed", "failed", "no_answer", "no-answer", "cancelled", "wibbling"],
)
async def test_any_status_is_passed_on(status: str, broker: httpx.AsyncClient, upstream: Upstream) -> None:
    assert (await read(broker, upstream, status=status))["status"] == status


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("in-progress", "in_progress"),
        ("In-Progress", "in_progress"),
        ("IN_PROGRESS", "in_progress"),
        ("Completed", "completed"),
        ("No-Answer", "no-answer"),
        ("in progress, maybe", "in progress, maybe"),
        ("On-Hold", "On-Hold"),
        ("", "unknown"),
        (7, "unknown"),
        (None, "unknown"),
    ],
)
async def test_a_status_is_spelled_as_documented(
    said: Any, status: str, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    assert (await read(broker, upstream, status=said))["status"] == status


async def test_an_agent_that_is_not_configured_has_no_name(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    call = await read(broker, upstream, agent_id="agt_of_somebody_else")

    assert call["agent"] is None


EXPOSED: dict[str, tuple[str, Any, Any]] = {
    "recording_url": ("recording_url", {"recording_url": "https://r.example/1.mp3"}, "https://r.example/1.mp3"),
    "recording_url-missing": ("recording_url", {}, None),
    "summary": ("summary", {"ai_summary": "They agreed.", "summary": "MARKER"}, "They agreed."),
    "summary-of-the-analysis": ("summary", {"analysis": {"summary": "They agreed.", "x": "MARKER"}}, "They agreed."),
    "summary-null-but-analyzed": ("summary", {"ai_summary": None, "analysis": {"summary": "Yes."}}, "Yes."),
    "summary-empty-but-analyzed": ("summary", {"ai_summary": "", "analysis": {"summary": "Yes."}}, "Yes."),
    "summary-twice": ("summary", {"ai_summary": "They agreed.", "analysis": {"summary": "MARKER"}}, "They agreed."),
    "summary-odd": ("summary", {"analysis": {"summary": {"x": "MARKER"}}}, None),
    "analysis-odd": ("summary", {"analysis": ["MARKER"]}, None),
    "analysis-null": ("summary", {"analysis": None}, None),
    "outcome": ("outcome", {"outcome": "sold"}, "sold"),
    "outcome-of-the-analysis": ("outcome", {"analysis": {"outcome": "sold", "summary": 7}}, "sold"),
    "outcome-odd-but-analyzed": ("outcome", {"outcome": ["MARKER"], "analysis": {"outcome": "sold"}}, "sold"),
    "outcome-odd": ("outcome", {"outcome": {"secret": "MARKER"}}, None),
    "transcript-missing": ("transcript", {}, None),
    "transcript-null": ("transcript", {"transcript": None}, None),
    "transcript-odd": ("transcript", {"transcript": 7}, None),
    "transcript-text": (
        "transcript",
        {"transcript": "agent: Hello.\nuser: Hi: there\nHow are you?\nAgent: Fine."},
        [
            {"role": "agent", "content": "Hello."},
            {"role": "user", "content": "Hi: there\nHow are you?"},
            {"role": "agent", "content": "Fine."},
        ],
    ),
    "transcript-text-with-tools": (
        "transcript",
        {
            "transcript": 'system: MARKER\nagent: One moment.\ntool_call: find({"card": "MARKER"})\nTool_result: {\n'
            ' "MARKER": 1}\nagent: Found: it\nis here.'
        },
        [{"role": "agent", "content": "One moment."}, {"role": "agent", "content": "Found: it\nis here."}],
    ),
    "transcript-list": (
        "transcript",
        {
            "transcript": [
                {"role": "agent", "content": "Hello.", "latency": "MARKER"},
                {"role": "user", "content": "Hi."},
            ]
        },
        [{"role": "agent", "content": "Hello."}, {"role": "user", "content": "Hi."}],
    ),
    "transcript-list-of-anything": (
        "transcript",
        {
            "transcript": [
                "MARKER",
                1,
                None,
                {"role": "user"},
                {"content": "MARKER"},
                {"role": "user", "content": "Hi."},
            ]
        },
        [{"role": "user", "content": "Hi."}],
    ),
    "transcript-list-with-tools": (
        "transcript",
        {"transcript": [{"role": "tool_call", "content": "MARKER"}, {"role": "user", "content": "Hi."}]},
        [{"role": "user", "content": "Hi."}],
    ),
    "messages": (
        "messages",
        {
            "messages": [
                {"role": "agent", "content": "Hello."},
                {"role": "tool_call", "content": "MARKER", "name": "lookup", "arguments": {"card": "MARKER"}},
                {"role": "tool_result", "content": "MARKER", "tool_call_id": "1", "is_error": False},
                {"role": "system", "content": "MARKER"},
                {"role": ["agent"], "content": "MARKER"},
                {"role": "user", "content": "Hi.", "name": "MARKER"},
                {"role": "user", "content": {"text": "MARKER"}},
            ]
        },
        [{"role": "agent", "content": "Hello."}, {"role": "user", "content": "Hi."}],
    ),
    "messages-empty": ("messages", {"messages": []}, []),
    "messages-odd": ("messages", {"messages": {"role": "agent", "content": "MARKER"}}, None),
}


@pytest.mark.parametrize(("name", "record", "shown"), EXPOSED.values(), ids=EXPOSED.keys())
async def test_exposed_fields(
    name: str, record: dict[str, Any], shown: Any, open_broker: OpenBroker, upstream: Upstream
) -> None:
    broker = await open_broker(BROKER_EXPOSE=name)

    call = await read(broker, upstream, status="completed", **record)

    assert call.keys() == BASIC | {name}
    assert call[name] == shown
    assert "MARKER" not in json.dumps(call)


async def test_several_exposed_fields(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_EXPOSE="outcome, summary ,messages")

    assert (await read(broker, upstream, outcome="x")).keys() == BASIC | {"outcome", "summary", "messages"}


async def test_a_matching_etag_gets_304_without_a_body(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = await start_call(broker)
    upstream.has_call("call_1")
    first = await broker.get(path)
    etag = first.headers["etag"]
    assert re.fullmatch(r'"[^"]+"', etag)

    for given in (etag, f"W/{etag}", f'"other", {etag}', f'W/"x" ,W/{etag}', "*"):
        again = await broker.get(path, headers={"If-None-Match": given})

        assert again.status_code == 304, given
        assert again.content == b""
        assert again.headers["etag"] == etag
        assert_safe_headers(again)


async def test_an_etag_may_be_in_any_of_several_lines(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = await start_call(broker)
    upstream.has_call("call_1")
    etag = (await broker.get(path)).headers["etag"]

    again = await broker.get(path, headers=[("If-None-Match", '"other"'), ("If-None-Match", etag)])

    assert again.status_code == 304


async def test_another_etag_gets_the_full_response(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = await start_call(broker)
    upstream.has_call("call_1")
    etag = (await broker.get(path)).headers["etag"]

    for given in ('"other"', etag.strip('"'), "", 'W/"other", "more"'):
        again = await broker.get(path, headers={"If-None-Match": given})

        assert again.status_code == 200, given
        assert again.headers["etag"] == etag


async def test_the_etag_changes_with_the_visible_fields_only(open_broker: OpenBroker) -> None:
    etags = []
    began = time.time()
    records: list[dict[str, Any]] = [{}, {"cost_cents": 5}, {"status": "completed"}]
    for record in records:
        upstream = Upstream()
        broker = await open_broker(transport=upstream, clock=Clock(now=lambda: began), BROKER_SECRET="s" * 32)
        path = await start_call(broker)
        upstream.has_call("call_1", **record)
        etags.append((await broker.get(path)).headers["etag"])

    assert etags[0] == etags[1] != etags[2]


@pytest.mark.parametrize("peer", ["203.0.113.7", "198.51.100.99"])
async def test_the_call_key_is_enough_to_read(peer: str, open_broker: OpenBroker, upstream: Upstream) -> None:
    path = await start_call(await open_broker(BROKER_SECRET="s" * 32))
    upstream.has_call("call_1")

    elsewhere = await open_broker(peer=peer, BROKER_SECRET="s" * 32)

    assert (await elsewhere.get(path)).status_code == 200


async def test_keys_outlive_a_change_of_secret(open_broker: OpenBroker, upstream: Upstream) -> None:
    old, new = "o" * 32, "n" * 32
    path = await start_call(await open_broker(BROKER_SECRET=old))
    upstream.has_call("call_1")

    assert (await (await open_broker(BROKER_SECRET=f"{new}\n{old}")).get(path)).status_code == 200
    assert_problem(await (await open_broker(BROKER_SECRET=new)).get(path), "not-found")


def swapped(path: str) -> str:
    """The same path with its last letter's case changed."""
    position = max(index for index, letter in enumerate(path) if letter.isalpha())
    return path[:position] + path[position].swapcase() + path[position + 1 :]


def test_swapped_changes_one_letter() -> None:
    assert swapped("/calls/a.bC9") == "/calls/a.bc9"


async def forbidden_paths(broker: httpx.AsyncClient) -> dict[str, str]:
    """Paths that name none of the user's calls, made from two existing calls."""
    one, two = await start_call(broker), await start_call(broker)
    (id_one, key_one), (_, key_two) = (path.removeprefix("/calls/").split(".") for path in (one, two))
    return {
        "no-key": f"/calls/{id_one}",
        "empty-key": f"/calls/{id_one}.",
        "no-id": f"/calls/.{key_one}",
        "key-of-another-call": f"/calls/{id_one}.{key_two}",
        "key-twice": f"/calls/{id_one}.{key_one}.{key_one}",
        "key-and-more": f"/calls/{id_one}.{key_one}x",
        "key-cut": f"/calls/{id_one}.{key_one[:-1]}",
        "key-padded": f"/calls/{id_one}.{key_one}%3D",
        "key-with-a-newline": f"/calls/{id_one}.{key_one}%0A",
        "key-with-other-letters": f"/calls/{id_one}.{key_one[:-1]}%C3%A9",
        "key-with-half-a-letter": f"/calls/{id_one}.{key_one[:-1]}%ED%A0%80",
        "key-in-upper-case": f"/calls/{id_one}.{key_one.upper()}",
        "key-with-one-letter-swapped": swapped(one),
        "id-in-upper-case": f"/calls/{id_one.upper()}.{key_one}",
        "id-with-a-newline": f"/calls/{id_one}%0A.{key_one}",
        "id-of-129-characters": f"/calls/{'a' * 129}.{key_one}",
        "id-of-129-characters-bare": f"/calls/{'a' * 129}",
        "huge": f"/calls/{'a' * 10_000}",
        "encoded-way-up": "/calls/%2e%2e%2fagents",
        "encoded-way-up-with-a-key": f"/calls/%2e%2e%2fagents.{key_one}",
        "double-encoded-way-up": "/calls/%252e%252e%252fagents",
        "backslash-way-up": "/calls/..%5cagents",
        "way-up-and-down": f"/calls/x%2F..%2F{id_one}.{key_one}",
        "slash-at-the-end": f"{one}/",
        "query-in-the-id": f"/calls/{id_one}%3Fx=1.{key_one}",
        "fragment-in-the-id": f"/calls/{id_one}%23.{key_one}",
        "nul": f"/calls/{id_one}%00.{key_one}",
        "cursor": "/calls/cursor",
        "web": "/calls/web",
        "empty": "/calls/",
        "all": "/calls",
        "upper-case-route": one.replace("/calls", "/Calls"),
        "double-slash": one.replace("/calls/", "/calls//"),
    }


async def test_anything_that_is_not_the_users_is_the_same_404(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    paths = await forbidden_paths(broker)
    asked = len(upstream.requests)

    bodies = {}
    for name, path in paths.items():
        problem = assert_problem(await broker.get(path), "not-found")
        del problem["request_id"]
        bodies[name] = problem

    assert all(body == bodies["no-key"] for body in bodies.values())
    assert len(upstream.requests) == asked, "OneInbox was not asked"


async def test_a_404_of_oneinbox_is_believed_when_it_comes_again_a_minute_later(
    open_broker: OpenBroker, upstream: Upstream
) -> None:
    passed = 0.0
    clock = Clock(lambda: time.time() + passed, lambda: time.monotonic() + passed)
    broker = await open_broker(clock=clock)
    path = await start_call(broker)
    missing = upstream.router.get("/v1/calls/call_1").respond(404, json={"detail": "Call not found"})

    never_seen = await broker.get(path)
    assert (never_seen.status_code, never_seen.json()["status"]) == (200, "queued"), "as it was started"
    passed += 10
    missing.respond(json={"id": "call_1", "status": "in_progress"})
    assert (await broker.get(path)).json()["status"] == "in_progress"
    passed += 10
    missing.respond(404, json={"detail": "Call not found"})
    assert (await broker.get(path)).json()["status"] == "in_progress", "the last known state"
    passed += 61

    gone = assert_problem(await broker.get(path), "not-found")
    wrong = assert_problem(await broker.get("/calls/call_1"), "not-found")

    assert {**gone, "request_id": ""} == {**wrong, "request_id": ""}


@pytest.mark.parametrize(("seconds", "ends_at"), [("90", "2026-03-01T10:01:30Z"), ("0", None)])
async def test_a_running_call_shows_when_the_broker_ends_it(
    seconds: str, ends_at: str | None, open_broker: OpenBroker, upstream: Upstream
) -> None:
    broker = await open_broker(clock=Clock(now=lambda: STARTED_AT), BROKER_MAX_CALL_SECONDS=seconds)

    call = await read(broker, upstream)

    assert (call["ends_at"], call["stopped_because"]) == (ends_at, None)


async def test_an_ended_call_shows_no_end_to_come(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    call = await read(broker, upstream, status="completed")

    assert (call["ends_at"], call["stopped_because"]) == (None, None)


CUT = {
    "a-high-half": r"Hello \ud83d",
    "a-low-half": r"\ude00 hello",
    "the-wrong-order": r"\ude00\ud83d",
}


@pytest.mark.parametrize("text", CUT.values(), ids=CUT.keys())
async def test_half_an_emoji_hides_neither_a_call_nor_its_end(
    open_broker: OpenBroker, upstream: Upstream, text: str
) -> None:
    broker = await open_broker(BROKER_EXPOSE="summary", BROKER_MAX_LIVE_CALLS="1")
    path = await start_call(broker)
    record = json.dumps({"id": "call_1", "status": "completed", "metadata": upstream.asked["metadata"]})[:-1]
    content = f'{record}, "ai_summary": "{text}", "end_reason": "\\u00e9\\ud83d\\ude00"}}'.encode()
    upstream.router.get("/v1/calls/call_1").respond(200, content=content)

    response = await broker.get(path)

    assert response.status_code == 200
    assert response.json()["summary"].strip("? ").lower() in ("hello", "")
    assert response.json()["end_reason"] == "é😀"
    await start_call(broker)  # its slot is free


async def test_proxies_leave_events_as_they_are(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = await start_call(broker)
    upstream.has_call("call_1", status="completed")

    response = await broker.get(f"{path}/events")

    assert response.headers.get_list("cache-control") == ["no-store, no-transform"]
    assert response.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize(("warned", "names"), [({}, ["call", "ending", "call", "end"]), (OFF, ["call", "call", "end"])])
async def test_the_events_announce_the_end_without_an_id(
    warned: dict[str, str], names: list[str], open_broker: OpenBroker, upstream: Upstream
) -> None:
    broker = await open_broker(warned, clock=Clock(now=lambda: STARTED_AT), BROKER_MAX_CALL_SECONDS="20")
    path = await start_call(broker)
    upstream.has_call("call_1").mock(side_effect=[call_state("in_progress"), call_state("completed")])

    answer = await broker.get(f"{path}/events")  # ends when the second poll sees the end, a second later

    events = [event.split("\n") for event in answer.text.split("\n\n")[:-1]]
    assert [lines[0].removeprefix("event: ") for lines in events] == names
    assert [len(lines) for lines in events] == [2 if name == "ending" else 3 for name in names]
    if not warned:
        data = json.loads(events[1][1].removeprefix("data: "))
        assert data == {"ends_at": "2026-03-01T10:00:20Z", "seconds_left": 20, "reason": "max-call-seconds"}
    last = events[-1][1].removeprefix("id: ")
    assert (await broker.get(f"{path}/events", headers={"Last-Event-ID": last})).status_code == 204


def call_state(status: str) -> httpx.Response:
    """OneInbox's answer about a call."""
    return httpx.Response(200, json={"id": "call_1", "agent_id": AGENT_ID, "status": status})


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "400": ({"status_code": 400}, "upstream-error"),
    "401": ({"status_code": 401}, "upstream-misconfigured"),
    "402": ({"status_code": 402}, "upstream-misconfigured"),
    "403": ({"status_code": 403}, "upstream-misconfigured"),
    "408": ({"status_code": 408}, "upstream-error"),
    "422": (
        {"status_code": 422, "json": {"detail": [{"loc": ["path", "call_id"], "msg": "x"}]}},
        "upstream-misconfigured",
    ),
    "429": ({"status_code": 429}, "upstream-busy"),
    "429-retry-after": ({"status_code": 429, "headers": {"Retry-After": "7"}}, "upstream-busy"),
    "500": ({"status_code": 500}, "upstream-error"),
    "503": ({"status_code": 503, "headers": {"Retry-After": "7"}}, "upstream-error"),
    "redirect": ({"status_code": 307, "headers": {"Location": "https://evil.example/"}}, "upstream-error"),
    "broken-json": ({"content": b'{"id": "call_1"'}, "upstream-invalid"),
    "empty": ({"content": b""}, "upstream-invalid"),
    "array": ({"json": [{"id": "call_1"}]}, "upstream-invalid"),
    "no-id": ({"json": {"agent_id": AGENT_ID, "status": "queued"}}, "upstream-invalid"),
    "another-call": ({"json": {"id": "call_2", "status": "queued"}}, "upstream-invalid"),
    "id-number": ({"json": {"id": 1}}, "upstream-invalid"),
}
ERRORS = {
    "timeout": (httpx.ReadTimeout, "upstream-timeout"),
    "connect-error": (httpx.ConnectError, "upstream-unreachable"),
    "connect-timeout": (httpx.ConnectTimeout, "upstream-unreachable"),
    "connection-lost": (httpx.ReadError, "upstream-error"),
}


@pytest.mark.parametrize(("answer", "slug"), FAILURES.values(), ids=FAILURES.keys())
async def test_failures_of_oneinbox(
    answer: dict[str, Any], slug: str, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    path = await start_call(broker)
    upstream.router.get("/v1/calls/call_1").respond(**answer)

    response = await broker.get(path)

    assert_problem(response, slug)
    if slug == "upstream-busy":
        assert response.headers["retry-after"] == answer.get("headers", {}).get("Retry-After", "5")


@pytest.mark.parametrize(("error", "slug"), ERRORS.values(), ids=ERRORS.keys())
async def test_failures_of_the_connection(
    error: type[httpx.TransportError], slug: str, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    path = await start_call(broker)
    upstream.router.get("/v1/calls/call_1").mock(side_effect=error("internal.host"))

    assert_problem(await broker.get(path), slug)


async def test_reading_costs_no_session(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = await start_call(broker)
    upstream.has_call("call_1")

    for _ in range(10):
        assert (await broker.get(path)).status_code == 200

    for _ in range(4):
        await start_call(broker)


async def test_other_methods_are_refused(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    path = await start_call(broker)

    for method in ("POST", "PUT", "PATCH", "DELETE"):
        response = await broker.request(method, path)
        assert_problem(response, "method-not-allowed")
        assert response.headers["allow"] == "GET, HEAD, OPTIONS"
    assert len(upstream.requests) == 1
