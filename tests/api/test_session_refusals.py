"""POST /session: what is refused, before OneInbox or any session limit hears of it."""

import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.api.test_session import nested
from tests.conftest import OpenBroker
from tests.support.harness import AGENT_ID, JSON, Upstream, post_session
from tests.support.shapes import assert_problem, assert_session, remaining


async def assert_nothing_was_spent(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    """OneInbox was not asked, and a good request finds its limits untouched."""
    assert not upstream.requests
    good = await post_session(broker)
    assert_session(good)
    assert remaining(good, "user-minute") == 4
    assert remaining(good, "user-day") == 49


def value(text: Any) -> dict[str, Any]:
    """A body with one variable."""
    return {"variables": {"name": text}}


def raw_value(text: bytes) -> bytes:
    """A body with one variable whose JSON is given."""
    return b'{"variables": {"name": ' + text + b"}}"


BODIES: dict[str, tuple[Any, str]] = {
    # not JSON
    "broken": (b"{", "malformed-json"),
    "broken-end": (b"{}}", "malformed-json"),
    "two-values": (b"{} {}", "malformed-json"),
    "blanks": (b" \n", "malformed-json"),
    "single-quotes": (b"{'a': 1}", "malformed-json"),
    "trailing-comma": (b'{"agent": "default",}', "malformed-json"),
    "comment": (b"{/**/}", "malformed-json"),
    "byte-order-mark": (b"\xef\xbb\xbf{}", "malformed-json"),
    "utf-16": ("{}".encode("utf-16"), "malformed-json"),
    "10000-levels": (b"[" * 8000 + b"]" * 8000, "malformed-json"),
    "10000-objects": (b'{"a":' * 2500 + b"1" + b"}" * 2500, "malformed-json"),
    "33-levels": (nested(33), "malformed-json"),
    "nan": (raw_value(b"NaN"), "malformed-json"),
    "infinity": (raw_value(b"Infinity"), "malformed-json"),
    "minus-infinity": (raw_value(b"-Infinity"), "malformed-json"),
    "1e999": (raw_value(b"1e999"), "malformed-json"),
    "minus-1e999": (b'{"metadata": {"a": [-1e999]}}', "malformed-json"),
    "lone-high-surrogate": (raw_value(rb'"\ud800"'), "malformed-json"),
    "lone-low-surrogate": (raw_value(rb'"a\udc00b"'), "malformed-json"),
    "lone-surrogate-in-a-key": (rb'{"metadata": {"\udfff": 1}}', "malformed-json"),
    "invalid-utf-8": (raw_value(b'"\xff\xfe"'), "malformed-json"),
    "overlong-utf-8": (raw_value(b'"\xc0\xaf"'), "malformed-json"),
    "surrogate-in-utf-8": (raw_value(b'"\xed\xa0\x80"'), "malformed-json"),
    "raw-control-character": (raw_value(b'"\x01"'), "malformed-json"),
    "raw-nul": (raw_value(b'"\x00"'), "malformed-json"),
    "number-of-5000-digits": (raw_value(b"9" * 5000), "malformed-json"),
    # JSON, but no request
    "null": (b"null", "invalid-request"),
    "array": (b"[]", "invalid-request"),
    "array-of-objects": (b"[{}]", "invalid-request"),
    "string": (b'"{}"', "invalid-request"),
    "number": (b"0", "invalid-request"),
    "true": (b"true", "invalid-request"),
    "nul": (raw_value(rb'"a\u0000b"'), "invalid-request"),
    "nul-in-metadata": (rb'{"metadata": {"a": ["\u0000"]}}', "invalid-request"),
    "nul-in-a-key": (rb'{"metadata": {"\u0000": 1}}', "invalid-request"),
    "nul-in-an-override": (rb'{"overrides": {"first_message": "\u0000"}}', "invalid-request"),
    "unknown-field": ({"voice": "x"}, "invalid-request"),
    "upper-case-field": ({"Agent": "default"}, "invalid-request"),
    "upstream-field": ({"type": "web"}, "invalid-request"),
    # variables
    "33-variables": ({"variables": {f"v{number}": 1 for number in range(33)}}, "invalid-request"),
    "33-variables-in-both-styles": (
        {
            "variables": {f"v{number}": 1 for number in range(17)},
            "participant_attributes": {f"w{number}": "1" for number in range(16)},
        },
        "invalid-request",
    ),
    "1001-characters": (value("x" * 1001), "invalid-request"),
    "number-of-1001-digits": (raw_value(b"9" * 1001), "invalid-request"),
    "braces": (value("{{x}}"), "invalid-request"),
    "opening-braces": (value("a {{ b"), "invalid-request"),
    "closing-braces": (value("a }} b"), "invalid-request"),
    "carriage-return": (value("a\rb"), "invalid-request"),
    "escape": (value("\x1b[31m"), "invalid-request"),
    "backspace": (value("\b"), "invalid-request"),
    "delete": (value("\x7f"), "invalid-request"),
    "c1-control": (value("\x85"), "invalid-request"),
    "object-value": (value({"a": 1}), "invalid-request"),
    "array-value": (value(["a"]), "invalid-request"),
    "null-value": (value(None), "invalid-request"),
    "variables-as-a-list": ({"variables": ["a"]}, "invalid-request"),
    "variables-as-text": ({"variables": "a=b"}, "invalid-request"),
    "name-with-a-dash": ({"variables": {"a-b": "x"}}, "invalid-request"),
    "name-with-a-digit-first": ({"variables": {"1a": "x"}}, "invalid-request"),
    "name-with-a-dot": ({"variables": {"a.b": "x"}}, "invalid-request"),
    "name-with-a-newline": ({"variables": {"a\n": "x"}}, "invalid-request"),
    "name-of-another-script": ({"variables": {"nämé": "x"}}, "invalid-request"),
    "name-with-another-digit": ({"variables": {"a\u0663": "x"}}, "invalid-request"),
    "empty-name": ({"variables": {"": "x"}}, "invalid-request"),
    "name-of-65-characters": ({"variables": {"a" * 65: "x"}}, "invalid-request"),
    # metadata
    "metadata-broker-user": ({"metadata": {"broker_user": "somebody"}}, "invalid-request"),
    "metadata-broker-prefix": ({"metadata": {"broker_": 1}}, "invalid-request"),
    "metadata-over-4-kib": ({"metadata": {"k": "x" * (4096 - 7)}}, "invalid-request"),
    "metadata-over-4-kib-of-utf-8": ({"metadata": {"k": "ä" * 2045}}, "invalid-request"),
    "metadata-over-4-kib-in-both-styles": (
        {"metadata": {"k": "x" * 3000}, "participant_metadata": "y" * 1100},
        "invalid-request",
    ),
    "metadata-as-a-list": ({"metadata": []}, "invalid-request"),
    "metadata-as-text": ({"metadata": "x"}, "invalid-request"),
    # LiveKit's fields
    "room-name": ({"room_name": "my-room"}, "invalid-request"),
    "room-config-other": ({"room_config": {"max_participants": 2}}, "invalid-request"),
    "room-config-name": ({"room_config": {"name": "x", "agents": [{"agent_name": "default"}]}}, "invalid-request"),
    "room-config-deployment": ({"room_config": {"agents": [{"deployment": "x"}]}}, "invalid-request"),
    "two-agents": ({"room_config": {"agents": [{"agent_name": "default"}, {}]}}, "invalid-request"),
    "agents-as-an-object": ({"room_config": {"agents": {"agent_name": "default"}}}, "invalid-request"),
    "attribute-number": ({"participant_attributes": {"a": 1}}, "invalid-request"),
    "attribute-braces": ({"participant_attributes": {"a": "{{b}}"}}, "invalid-request"),
    "attribute-bad-name": ({"participant_attributes": {"lk.agent": "b"}}, "invalid-request"),
    "participant-name-braces": ({"participant_name": "{{b}}"}, "invalid-request"),
    "participant-name-control": ({"participant_name": "a\x00b".replace("\x00", "\x07")}, "invalid-request"),
    "participant-metadata-object": ({"participant_metadata": {}}, "invalid-request"),
    # agents
    "unknown-agent": ({"agent": "sales"}, "agent-not-allowed"),
    "agent-by-anothers-id": ({"agent": AGENT_ID}, "agent-not-allowed"),
    "unknown-agent-id": ({"agent_id": "agt_other"}, "agent-not-allowed"),
    "agent-id-upper-case": ({"agent_id": AGENT_ID.upper()}, "agent-not-allowed"),
    "unknown-livekit-agent": ({"room_config": {"agents": [{"agent_name": "sales"}]}}, "agent-not-allowed"),
    "agent-number": ({"agent": 1}, "invalid-request"),
    "agent-empty": ({"agent": ""}, "invalid-request"),
    "agent-and-other-livekit-agent": (
        {"agent": "default", "room_config": {"agents": [{"agent_name": "sales"}]}},
        "invalid-request",
    ),
    # overrides: none is allowed unless the operator says so
    "override": ({"overrides": {"first_message": "x"}}, "override-not-allowed"),
    "override-nested": ({"overrides": {"llm": {"system_prompt": "x"}}}, "override-not-allowed"),
    "override-unknown": ({"overrides": {"webhook_url": "https://evil.example"}}, "override-not-allowed"),
    "overrides-as-a-list": ({"overrides": []}, "invalid-request"),
}


@pytest.mark.parametrize(("body", "slug"), BODIES.values(), ids=BODIES.keys())
async def test_bodies(body: Any, slug: str, broker: httpx.AsyncClient, upstream: Upstream) -> None:
    response = await post_session(broker, body)

    assert_problem(response, slug)
    await assert_nothing_was_spent(broker, upstream)


async def test_an_invalid_body_is_answered_with_places_and_no_values(broker: httpx.AsyncClient) -> None:
    body = {
        "variables": {"name": "MARKER{{1}}", "other": ["MARKER2"]},
        "metadata": {"broker_x": "MARKER3"},
        "agent": {"MARKER4": "MARKER4"},
    }

    problem = assert_problem(await post_session(broker, body), "invalid-request")

    places = [error["loc"][:3] for error in problem["errors"]]
    assert ["body", "variables", "name"] in places
    assert ["body", "metadata"] in [place[:2] for place in places]
    assert ["body", "agent"] in [place[:2] for place in places]
    assert "MARKER" not in json.dumps(problem)


@pytest.mark.parametrize("value", [None, [], {}], ids=str)
async def test_a_variable_of_another_type_is_one_error(broker: httpx.AsyncClient, value: Any) -> None:
    problem = assert_problem(await post_session(broker, {"variables": {"a": value, "b": 1}}), "invalid-request")
    assert [error["loc"] for error in problem["errors"]] == [["body", "variables", "a"]]


@pytest.mark.parametrize("body", [[], 7, {"room_config": 5}, {"metadata": []}], ids=str)
async def test_no_error_names_a_class_of_ours(broker: httpx.AsyncClient, body: Any) -> None:
    problem = assert_problem(await post_session(broker, body), "invalid-request")
    assert [error["msg"] for error in problem["errors"]] == ["Input should be an object"]


TYPES = [
    "text/plain",
    "text/plain; charset=application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "text/json",
    "application/jsonp",
    "application/json-seq",
    "json",
    "*/*",
]


@pytest.mark.parametrize("content", [b"{}", b""], ids=["body", "empty"])
@pytest.mark.parametrize("content_type", TYPES)
async def test_types_that_are_not_json(
    content_type: str, content: bytes, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    response = await broker.post("/session", content=content, headers={"Content-Type": content_type})

    assert_problem(response, "unsupported-media-type")
    await assert_nothing_was_spent(broker, upstream)


async def test_one_type_too_many(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    headers = [("Content-Type", "application/json"), ("Content-Type", "text/plain")]

    assert_problem(await broker.post("/session", content=b"{}", headers=headers), "unsupported-media-type")
    await assert_nothing_was_spent(broker, upstream)


CODED = {
    "gzip": (gzip.compress(b"{}"), ["gzip"]),
    "x-gzip": (gzip.compress(b"{}"), ["x-gzip"]),
    "deflate": (zlib.compress(b"{}"), ["deflate"]),
    "brotli": (b"\x0b\x00\x80{}\x03", ["br"]),
    "zstd": (b"(\xb5/\xfd", ["zstd"]),
    "two": (b"{}", ["gzip, br"]),
    "two-lines": (b"{}", ["", "gzip"]),
    "identity": (b"{}", ["identity"]),
    "unknown": (b"{}", ["x-own"]),
    "empty": (b"", ["gzip"]),
}


@pytest.mark.parametrize(("content", "codings"), CODED.values(), ids=CODED.keys())
async def test_a_body_with_a_content_coding(
    content: bytes, codings: list[str], broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    headers = [*JSON.items(), *(("Content-Encoding", coding) for coding in codings)]

    response = await broker.post("/session", content=content, headers=headers)

    problem = assert_problem(response, "unsupported-media-type")
    assert response.headers["accept-encoding"] == "identity"
    assert "Content-Encoding" in problem["detail"]
    await assert_nothing_was_spent(broker, upstream)


async def test_a_type_that_is_refused_says_nothing_about_codings(broker: httpx.AsyncClient) -> None:
    response = await broker.post("/session", content=b"{}", headers={"Content-Type": "text/plain"})

    assert "accept-encoding" not in response.headers


async def test_a_body_without_a_type(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    assert_problem(await broker.post("/session", content=b"{}"), "unsupported-media-type")
    await assert_nothing_was_spent(broker, upstream)


async def test_a_body_that_is_too_large(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    response = await broker.post("/session", content=b"{" + b" " * (16 * 1024 - 1) + b"}", headers=JSON)

    assert_problem(response, "body-too-large")
    await assert_nothing_was_spent(broker, upstream)


async def test_a_body_declared_too_large_is_not_read(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"{}"

    response = await broker.post("/session", content=body(), headers={**JSON, "Content-Length": str(16 * 1024 + 1)})

    assert_problem(response, "body-too-large")
    assert read == 0
    await assert_nothing_was_spent(broker, upstream)


async def test_a_chunked_body_is_read_no_further_than_the_bound(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1024
            yield b" " * 1024

    response = await broker.post("/session", content=endless(), headers=JSON)

    assert_problem(response, "body-too-large")
    assert sent <= 18 * 1024
    await assert_nothing_was_spent(broker, upstream)


async def test_a_chunked_body_one_byte_too_large(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"{" + b" " * (16 * 1024 - 2)
        yield b" "
        yield b"}"

    assert_problem(await broker.post("/session", content=body(), headers=JSON), "body-too-large")
    await assert_nothing_was_spent(broker, upstream)


async def test_agent_and_agent_id_that_disagree(open_broker: OpenBroker, upstream: Upstream) -> None:
    # With one agent only, an id that disagrees is an unknown one as well; both refuse.
    broker = await open_broker()

    response = await post_session(broker, {"agent": "default", "agent_id": "agt_other"})

    assert response.status_code in (403, 422)
    await assert_nothing_was_spent(broker, upstream)


VARIABLES_NOT_ALLOWED: dict[str, tuple[str, Any]] = {
    "another-name": ("plan", {"variables": {"plan": "pro", "name": "Ada"}}),
    "upper-case": ("plan", {"variables": {"PLAN": "pro"}}),
    "none": ("", {"variables": {"plan": "pro"}}),
    "livekits-attributes": ("plan", {"participant_attributes": {"name": "Ada"}}),
    "participant-name-as-a-variable": ("plan", {"variables": {"participant_name": "Ada"}}),
}


@pytest.mark.parametrize(("allowed", "body"), VARIABLES_NOT_ALLOWED.values(), ids=VARIABLES_NOT_ALLOWED.keys())
async def test_variables_that_are_not_allowed(
    allowed: str, body: Any, open_broker: OpenBroker, upstream: Upstream
) -> None:
    broker = await open_broker(BROKER_ALLOWED_VARIABLES=allowed)

    assert_problem(await post_session(broker, body), "variable-not-allowed")
    await assert_nothing_was_spent(broker, upstream)


OVERRIDES_NOT_ALLOWED: dict[str, tuple[Any, str]] = {
    "other-leaf": ({"tts": {"voice_id": "v"}}, "tts.voice_id"),
    "one-of-two": ({"first_message": "x", "llm": {"model": "m"}}, "llm.model"),
    "unknown": ({"recording": True}, "recording"),
    "text-as-a-number": ({"first_message": 5}, "first_message"),
    "text-as-null": ({"first_message": None}, "first_message"),
    "text-as-a-list": ({"first_message": ["x"]}, "first_message"),
    "text-as-an-object": ({"first_message": {"text": "x"}}, "first_message"),
    "text-as-an-empty-object": ({"first_message": {}}, "first_message"),
    "number-as-text": ({"tts": {"speed": "1"}}, "tts.speed"),
    "number-as-a-boolean": ({"tts": {"speed": True}}, "tts.speed"),
    "number-as-null": ({"tts": {"speed": None}}, "tts.speed"),
    "number-as-an-object": ({"tts": {"speed": {"value": 1}}}, "tts.speed"),
    "branch-as-text": ({"tts": "speed"}, "tts"),
    "branch-as-a-list": ({"tts": [{"speed": 1}]}, "tts"),
    "branch-as-null": ({"tts": None}, "tts"),
    "branch-empty": ({"llm": {}}, "llm"),
    "dotted": ({"tts.speed": 1}, "tts.speed"),
    "dotted-branch": ({"tts.speed": {"": 1}}, "tts.speed"),
    "dotted-below": ({"tts": {"speed.x": 1}}, "tts.speed.x"),
    "dot-at-the-end": ({"tts.": {"speed": 1}}, "tts."),
    "empty-key-above": ({"": {"first_message": "x"}}, ".first_message"),
    "empty-key-below": ({"first_message": {"": "x"}}, "first_message"),
    "upper-case": ({"First_Message": "x"}, "First_Message"),
    "blank": ({"first_message ": "x"}, "first_message "),
    "deeper": ({"tts": {"tts": {"speed": 1}}}, "tts.tts.speed"),
}


@pytest.mark.parametrize(("overrides", "path"), OVERRIDES_NOT_ALLOWED.values(), ids=OVERRIDES_NOT_ALLOWED.keys())
async def test_overrides_that_are_not_allowed(
    overrides: Any, path: str, open_broker: OpenBroker, upstream: Upstream
) -> None:
    broker = await open_broker(BROKER_ALLOWED_OVERRIDES="first_message,tts.speed")

    problem = assert_problem(await post_session(broker, {"overrides": overrides}), "override-not-allowed")

    assert path in problem["detail"]
    await assert_nothing_was_spent(broker, upstream)


async def test_what_is_checked_first(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_ALLOWED_ORIGINS="https://app.example", BROKER_ALLOWED_VARIABLES="")
    large, typed = b"{" * 20_000, {"Content-Type": "text/plain"}
    foreign = {"Origin": "https://evil.example"}

    # Origin, then size and type, then the body, then policy.
    assert_problem(await broker.post("/session", content=large, headers=typed | foreign), "forbidden-origin")
    assert_problem(await broker.post("/session", content=b"{", headers=typed), "unsupported-media-type")
    assert_problem(await post_session(broker, large), "body-too-large")
    assert_problem(await post_session(broker, {"variables": {"a": "{{"}, "agent": "x"}), "invalid-request")
    await assert_nothing_was_spent(broker, upstream)
