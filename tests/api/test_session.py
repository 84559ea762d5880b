"""POST /session: accepted bodies, the request to OneInbox, the response."""

import re
from typing import Any

import httpx
import pytest

from tests.conftest import OpenBroker
from tests.support.harness import AGENT_ID, API_KEY, JSON, TOKEN, Upstream, post_session, started
from tests.support.shapes import assert_problem, assert_session, remaining

ALL_LEAVES = (
    "llm.provider,llm.model,llm.temperature,llm.system_prompt,transcriber.model,transcriber.language,"
    "tts.provider,tts.voice_id,tts.model,tts.speed,tts.stability,first_message"
)


async def test_answers_two_fields_and_the_location(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    upstream.start.respond(201, json=started(id="call_9", agent_id="agt_x", room_name="web-1", secret="s"))

    response = await post_session(broker)

    location = assert_session(response)
    assert response.json() == {"server_url": "wss://voice.oneinbox.ai", "participant_token": TOKEN}
    assert location.startswith("/calls/call_9.")


@pytest.mark.parametrize("body", [None, {}, b"", b"  {}\n"], ids=["none", "empty-object", "no-bytes", "blanks"])
async def test_starts_the_default_agent_and_sends_no_more_than_needed(
    body: Any, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    assert_session(await post_session(broker, body))

    [request] = upstream.requests
    assert request.method == "POST"
    assert str(request.url) == "https://api.oneinbox.ai/v1/calls/web"
    assert request.headers["authorization"] == f"Bearer {API_KEY}"
    assert request.headers["content-type"] == "application/json"
    assert upstream.asked.keys() == {"agent_id", "metadata"}
    assert upstream.asked["agent_id"] == AGENT_ID
    assert upstream.asked["metadata"].keys() == {"broker_user", "broker_request_id"}


async def test_marks_each_call_with_the_user_and_a_request_id_of_128_bits(
    open_broker: OpenBroker, upstream: Upstream
) -> None:
    first, second = await open_broker(peer="203.0.113.1"), await open_broker(peer="203.0.113.2")

    marks = []
    for client in (first, first, second):
        assert_session(await post_session(client, x_request_id="chosen-by-the-client"))
        marks.append(upstream.asked["metadata"])

    users = [mark["broker_user"] for mark in marks]
    assert users[0] == users[1] != users[2]
    assert not any("203.0.113" in user for user in users)
    ids = [mark["broker_request_id"] for mark in marks]
    assert len(set(ids)) == 3
    assert all(re.fullmatch(r"[0-9a-f]{32}", each) for each in ids)


async def test_passes_the_brokers_own_fields_on(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_ALLOWED_OVERRIDES="first_message,tts.speed")
    body = {
        "agent": "default",
        "agent_id": AGENT_ID,
        "variables": {"customer_name": "Ada Lovelace", "_age": 36, "Vip2": True, "balance": -1.5},
        "metadata": {"order": {"id": 7, "tags": ["a", None]}, "BROKER_x": 1, "nested": {"broker_user": "mine"}},
        "overrides": {"first_message": "Hi!\n{{name}}", "tts": {"speed": 1}},
    }

    assert_session(await post_session(broker, body))

    asked = upstream.asked
    assert asked.keys() == {"agent_id", "variables", "overrides", "metadata"}
    assert asked["variables"] == body["variables"]
    assert asked["variables"]["Vip2"] is True
    assert asked["overrides"] == body["overrides"]
    own = {key: value for key, value in asked["metadata"].items() if not key.startswith("broker_")}
    assert own == body["metadata"]


async def test_takes_livekits_standard_token_request(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    body = {
        "participant_name": "Ada",
        "participant_identity": "whoever",
        "participant_metadata": '{"tier": 1}',
        "participant_attributes": {"plan": "pro", "city": "Graz"},
        "room_config": {"agents": [{"agent_name": "default", "metadata": "from the app"}]},
    }

    assert_session(await post_session(broker, body))

    asked = upstream.asked
    assert asked["agent_id"] == AGENT_ID
    assert asked["variables"] == {"participant_name": "Ada", "plan": "pro", "city": "Graz"}
    assert asked["metadata"]["participant_metadata"] == '{"tier": 1}'
    assert asked["metadata"]["agent_metadata"] == "from the app"
    assert asked["metadata"].keys() - {"broker_user", "broker_request_id"} == {"participant_metadata", "agent_metadata"}


async def test_a_participant_name_that_is_no_allowed_variable_is_dropped(
    open_broker: OpenBroker, upstream: Upstream
) -> None:
    broker = await open_broker(BROKER_ALLOWED_VARIABLES="plan")

    assert_session(await post_session(broker, {"participant_name": "Ada", "variables": {"plan": "pro"}}))

    assert upstream.asked["variables"] == {"plan": "pro"}


async def test_a_dropped_participant_name_is_no_variable(open_broker: OpenBroker, upstream: Upstream) -> None:
    variables = {f"v{number}": number for number in range(32)}
    broker = await open_broker(BROKER_ALLOWED_VARIABLES=",".join(variables))

    assert_session(await post_session(broker, {"participant_name": "Ada", "variables": variables}))

    assert upstream.asked["variables"] == variables


@pytest.mark.parametrize(
    "body",
    [
        {"variables": {}},
        {"overrides": {}},
        {"metadata": {}},
        {"room_config": {}},
        {"room_config": {"agents": []}},
        {"room_config": {"agents": [{}]}},
        {"participant_attributes": {}},
    ],
    ids=str,
)
async def test_empty_parts_are_not_sent(body: dict[str, Any], broker: httpx.AsyncClient, upstream: Upstream) -> None:
    assert_session(await post_session(broker, body))

    assert upstream.asked.keys() == {"agent_id", "metadata"}


async def test_of_duplicate_keys_the_last_counts(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    body = b'{"agent": "nobody", "agent": "default", "variables": {"a": "1"}, "variables": {"b": "2", "b": "3"}}'

    assert_session(await post_session(broker, body))

    assert upstream.asked["variables"] == {"b": "3"}


NAMED = {"by-name": {"agent": "default"}, "by-id": {"agent_id": AGENT_ID}}


@pytest.mark.parametrize("body", NAMED.values(), ids=NAMED.keys())
async def test_the_agent_can_be_named(body: dict[str, Any], broker: httpx.AsyncClient, upstream: Upstream) -> None:
    assert_session(await post_session(broker, body))

    assert upstream.asked["agent_id"] == AGENT_ID


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/json ;charset=UTF-8",
        "application/vnd.api+json",
    ],
)
async def test_types_that_are_json_are_taken(content_type: str, broker: httpx.AsyncClient) -> None:
    response = await broker.post("/session", content=b"{}", headers={"Content-Type": content_type})

    assert_session(response)


@pytest.mark.parametrize("content_type", [None, "application/json"], ids=str)
async def test_an_empty_body_needs_no_type(content_type: str | None, broker: httpx.AsyncClient) -> None:
    headers = {"Content-Type": content_type} if content_type else {}

    assert_session(await broker.post("/session", content=b"", headers=headers))


def nested(levels: int) -> bytes:
    """A body of so many levels, its own object included."""
    inner = levels - 2
    return b'{"metadata": {"a": ' + b"[" * (inner) + b"]" * (inner) + b"}}"


BOUNDS = {
    "32-levels": nested(32),
    "16-kib": b"{" + b" " * (16 * 1024 - 2) + b"}",
    "32-variables": {"variables": {f"v{number}": number for number in range(32)}},
    "32-variables-one-in-both-styles": {
        "variables": {"participant_name": "A", **{f"v{number}": number for number in range(31)}},
        "participant_name": "Ada",
    },
    "1000-characters": {"variables": {"text": "ä" * 1000}},
    "newline-and-tab": {"variables": {"text": "a\n\tb"}},
    "single-braces": {"variables": {"text": "{a} } {"}},
    "longest-name": {"variables": {"a" * 64: "x"}},
    "emoji-pair": b'{"variables": {"text": "\\ud83d\\ude00"}}',
    # {"k":"…"} is 8 characters more than its text.
    "4-kib-of-metadata": {"metadata": {"k": "x" * (4096 - 8)}},
    "large-number": b'{"metadata": {"n": 1e308, "i": 123456789012345678901234567890}}',
}


@pytest.mark.parametrize("body", BOUNDS.values(), ids=BOUNDS.keys())
async def test_what_just_fits_is_taken(body: Any, broker: httpx.AsyncClient) -> None:
    assert_session(await post_session(broker, body))


async def test_text_arrives_as_it_was_sent(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    text = "Zoë \U0001f600 \u2028 </script> \\ \" '"

    assert_session(await post_session(broker, {"variables": {"text": text}}))

    assert upstream.asked["variables"]["text"] == text


LEAVES: dict[str, tuple[str, Any]] = {
    "text": ("first_message", {"first_message": "Hello"}),
    "empty-text": ("first_message", {"first_message": ""}),
    "number": ("tts.speed", {"tts": {"speed": 1.25}}),
    "whole-number": ("llm.temperature", {"llm": {"temperature": 0}}),
    "all": (
        ALL_LEAVES,
        {
            "llm": {"provider": "p", "model": "m", "temperature": 0.5, "system_prompt": "s"},
            "transcriber": {"model": "m", "language": "de"},
            "tts": {"provider": "p", "voice_id": "v", "model": "m", "speed": 1, "stability": 0.1},
            "first_message": "Hi",
        },
    ),
}


@pytest.mark.parametrize(("allowed", "overrides"), LEAVES.values(), ids=LEAVES.keys())
async def test_allowed_overrides_go_upstream(
    allowed: str, overrides: dict[str, Any], open_broker: OpenBroker, upstream: Upstream
) -> None:
    broker = await open_broker(BROKER_ALLOWED_OVERRIDES=allowed)

    assert_session(await post_session(broker, {"overrides": overrides}))

    assert upstream.asked["overrides"] == overrides


async def test_an_answer_of_200_is_as_good_as_201(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    upstream.start.respond(200, json=started())

    assert_session(await post_session(broker))


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "localhost:9000", "[::1]:9000"])
async def test_an_insecure_server_url_is_taken_from_a_oneinbox_on_loopback(host: str, open_broker: OpenBroker) -> None:
    upstream = Upstream(f"http://{host}")
    upstream.start.respond(201, json=started(server_url="ws://127.0.0.1:7880"))
    broker = await open_broker(transport=upstream, ONEINBOX_BASE_URL=f"http://{host}")

    response = await post_session(broker)

    assert_session(response)
    assert response.json()["server_url"] == "ws://127.0.0.1:7880"


async def test_a_base_url_may_have_a_path(open_broker: OpenBroker) -> None:
    upstream = Upstream("https://gateway.example/oneinbox")
    broker = await open_broker(transport=upstream, ONEINBOX_BASE_URL="https://gateway.example/oneinbox/")

    assert_session(await post_session(broker))

    assert str(upstream.requests[0].url) == "https://gateway.example/oneinbox/v1/calls/web"


async def test_a_session_counts_once_in_every_window(broker: httpx.AsyncClient) -> None:
    response = await post_session(broker)

    assert remaining(response, "user-minute") == 4
    assert remaining(response, "user-day") == 49


async def test_a_client_that_disconnects_during_its_body_is_no_bug(
    broker: httpx.AsyncClient, upstream: Upstream, logs: list[dict[str, Any]]
) -> None:
    transport = broker._transport
    assert isinstance(transport, httpx.ASGITransport)
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(_: Any) -> None:
        return None

    headers = [(b"content-type", b"application/json"), (b"content-length", b"100")]
    await transport.app(
        {
            "type": "http",
            "method": "POST",
            "path": "/session",
            "raw_path": b"/session",
            "query_string": b"",
            "headers": headers,
            "client": ("203.0.113.7", 1),
            "server": ("broker.example", 443),
            "scheme": "https",
            "http_version": "1.1",
            "asgi": {"version": "3.0"},
        },
        receive,
        send,
    )

    assert not [entry for entry in logs if entry["log_level"] in ("error", "critical")]
    assert not upstream.requests


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD"])
async def test_other_methods_are_refused(method: str, broker: httpx.AsyncClient, upstream: Upstream) -> None:
    response = await broker.request(method, "/session", headers=JSON)

    if method == "HEAD":
        assert response.status_code == 405
    else:
        assert_problem(response, "method-not-allowed")
    assert response.headers["allow"] == "POST, OPTIONS"
    assert not upstream.requests
