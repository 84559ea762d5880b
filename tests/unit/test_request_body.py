"""Reading a body: whatever arrives, in whatever pieces, the outcome is a value or a problem."""

import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.requests import Request

from app.api.request_body import read_json
from app.problems import Problem
from app.sessions.schemas import SessionRequest

LIMIT = 4096
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)
# JSON as people break it: what a generator of random bytes would hardly hit.
WORDS = ["{", "}", "[", "]", '"', ":", ",", "1", "1e999", "-", "NaN", "Infinity", "null", "true", '"a"', "{{", "'", " "]
ODDITIES = ["\\", "\\u0000", "\\ud800", "\\udc00", "\ud83d", "é", "\n", "\x00", "/**/"]
SCRAPS = st.lists(st.sampled_from(WORDS + ODDITIES), max_size=60).map(
    lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
)
BODIES = st.binary(max_size=200) | SCRAPS | VALUES.map(lambda value: json.dumps(value).encode())


async def read(pieces: list[bytes], limit: int = LIMIT) -> Any:
    """What is made of a body that arrives in pieces."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Any:
        return messages.pop(0)

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    return await read_json(Request(scope, receive), limit)


async def outcome_of(pieces: list[bytes], limit: int = LIMIT) -> Any:
    """The value or the problem; any other exception is a failure."""
    try:
        return await read(pieces, limit)
    except Problem as problem:
        return problem


def is_strict(value: Any, levels: int = 32) -> bool:
    """Whether a value is one that strict JSON of so many levels can hold."""
    if isinstance(value, str):
        return "\0" not in value and value == value.encode("utf-8", "ignore").decode()
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return levels > 0 and all(is_strict(key) and is_strict(each, levels - 1) for key, each in value.items())
    if isinstance(value, list):
        return levels > 0 and all(is_strict(each, levels - 1) for each in value)
    return value is None or isinstance(value, (bool, int))


@given(BODIES, st.integers(1, 50))
async def test_a_body_is_a_value_or_a_problem(body: bytes, size: int) -> None:
    outcome = await outcome_of([body[start : start + size] for start in range(0, len(body), size)])

    if isinstance(outcome, Problem):
        assert outcome.slug in ("malformed-json", "invalid-request")
    else:
        assert is_strict(outcome)


@given(VALUES, st.integers(1, 50))
async def test_what_was_sent_is_what_is_read(sent: Any, size: int) -> None:
    body = json.dumps(sent, ensure_ascii=False).encode()
    if len(body) > LIMIT:
        return

    assert await read([body[start : start + size] for start in range(0, len(body), size)]) == sent


@given(st.lists(st.integers(0, 40), max_size=10))
async def test_the_bound_holds_for_the_sum_of_the_pieces(sizes: list[int]) -> None:
    outcome = await outcome_of([b" " * size for size in sizes], limit=100)

    if sum(sizes) == 0:
        assert outcome == {}
    else:
        assert isinstance(outcome, Problem)
        assert outcome.slug == ("body-too-large" if sum(sizes) > 100 else "malformed-json")


NAMES = st.sampled_from([*SessionRequest.model_fields, "room_name", "extra"])


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_object_is_a_request_or_a_list_of_errors(body: dict[str, Any]) -> None:
    try:
        request = SessionRequest.model_validate(body)
    except ValidationError:
        return
    assert all(isinstance(value, (str, int, float, bool)) for value in request.all_variables.values())
    assert len(request.all_variables) <= 32
    assert not any(name.startswith("broker_") for name in request.all_metadata)
