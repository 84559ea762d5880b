"""The path that routes match, behind a proxy that strips its prefix or leaves it on."""

import pytest
from starlette.routing import Match, Route

from app.api.middleware.root_path import route_path


@pytest.mark.parametrize(
    ("prefix", "path", "matched"),
    [
        ("", "/session", "/session"),
        ("/voice", "/session", "/session"),
        ("/voice", "/voice/session", "/session"),
        ("/voice", "/voice", ""),
        ("/voice", "/voicemail", "/voicemail"),
        ("/voice", "/voice/voice/session", "/voice/session"),
        ("", "*", "*"),
    ],
)
def test_the_prefix_is_taken_off_once_and_only_as_a_whole_segment(prefix: str, path: str, matched: str) -> None:
    scope = {"type": "http", "method": "GET", "path": path, "root_path": prefix}

    assert route_path(scope) == matched
    # As Starlette's own routing sees it.
    if matched.startswith("/"):
        assert Route(matched, lambda _: None).matches(scope)[0] is Match.FULL


def test_a_scope_without_a_prefix_is_taken_as_it_is() -> None:
    assert route_path({"path": "/session"}) == "/session"
