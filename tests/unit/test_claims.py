"""Claims by name: top-level ones, and JSON pointers (RFC 6901)."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.claims import check_claim_name, claim_of

# RFC 6901, section 5
DOCUMENT = {
    "foo": ["bar", "baz"],
    "": 0,
    "a/b": 1,
    "c%d": 2,
    "e^f": 3,
    "g|h": 4,
    "i\\j": 5,
    'k"l': 6,
    " ": 7,
    "m~n": 8,
}
POINTERS: dict[str, Any] = {
    "/foo": ["bar", "baz"],
    "/foo/0": "bar",
    "/": 0,
    "/a~1b": 1,
    "/c%d": 2,
    "/e^f": 3,
    "/g|h": 4,
    "/i\\j": 5,
    '/k"l': 6,
    "/ ": 7,
    "/m~0n": 8,
}


@pytest.mark.parametrize(("pointer", "value"), POINTERS.items())
def test_the_examples_of_the_rfc(pointer: str, value: Any) -> None:
    assert check_claim_name(pointer) == pointer
    assert claim_of(DOCUMENT, pointer) == value


TOKEN = {
    "sub": "ann",
    "https://example.com/plan": "pro",
    "o": {"id": "org_1", "a/b": 1},
    "list": [{"x": 1}, 2],
    "~1": 3,
}
NAMES: dict[str, Any] = {
    "sub": "ann",
    "https://example.com/plan": "pro",
    "~1": 3,
    "/~01": 3,
    "/o/id": "org_1",
    "/o/a~1b": 1,
    "/list/0/x": 1,
    "/list/1": 2,
    "o/id": None,
    "/nothing": None,
    "/o/nothing": None,
    "/o/id/more": None,
    "/sub/0": None,
    "/list/2": None,
    "/list/-": None,
    "/list/-1": None,
    "/list/01": None,
    "/list/+1": None,
    "/list/١": None,
    f"/list/{'9' * 5000}": None,
    "/list/x": None,
}


@pytest.mark.parametrize(("name", "value"), NAMES.items(), ids=range(len(NAMES)))
def test_a_name_that_begins_with_a_slash_is_a_pointer(name: str, value: Any) -> None:
    assert claim_of(TOKEN, name) == value


@pytest.mark.parametrize("name", ["", "/a~", "/~2", "/~~0", "/a/b~x"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="is"):
        check_claim_name(name)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab/~01", max_size=3), inner, max_size=3),
    max_leaves=12,
)


def places(value: Any, pointer: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document, with its pointer."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        inside = f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}"
        yield inside, inner
        yield from places(inner, inside)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["C", "Z"]), max_size=3), values, max_size=4))
def test_every_value_of_a_token_can_be_named(token: dict[str, Any]) -> None:
    for pointer, value in places(token):
        assert check_claim_name(pointer) == pointer
        assert claim_of(token, pointer) is value


@given(st.dictionaries(st.text(max_size=3), values, max_size=4), st.text("/ab~01-", max_size=8))
def test_any_name_finds_something_or_nothing(token: dict[str, Any], name: str) -> None:
    known = dict(places(token)) if name.startswith("/") else token
    assert claim_of(token, name) == known.get(name)
