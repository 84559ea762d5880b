"""The path that routes match, behind a proxy that strips its prefix or leaves it on."""

import pytest
from starlette.routing import Match, Mount, Route

from app.api.app import create_app
from app.api.middleware.root_path import route_path
from app.config.settings import ROUTES
from tests.support.harness import settings


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


def test_no_prefix_begins_as_a_path_of_the_brokers_own_does() -> None:
    """Behind a proxy that strips it, /calls/x could mean either."""
    paths = [route.path for route in create_app(settings()).routes if isinstance(route, Route | Mount)]

    assert {path.split("/")[1] for path in paths} <= ROUTES


def test_a_scope_without_a_prefix_is_taken_as_it_is() -> None:
    assert route_path({"path": "/session"}) == "/session"
