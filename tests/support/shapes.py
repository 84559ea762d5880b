"""One check for each shape of answer, whole."""

import json
import re
from typing import Any

import httpx

from tests.documents import document

# The contract's table of errors.
STATUS = {
    "malformed-json": 400,
    "body-too-large": 413,
    "unsupported-media-type": 415,
    "invalid-request": 422,
    "unauthenticated": 401,
    "forbidden-origin": 403,
    "variable-not-allowed": 403,
    "override-not-allowed": 403,
    "agent-not-allowed": 403,
    "identity-mismatch": 403,
    "challenge-failed": 403,
    "blocked": 403,
    "not-found": 404,
    "method-not-allowed": 405,
    "in-progress": 409,
    "idempotency-mismatch": 422,
    "rate-limited": 429,
    "too-many-live-calls": 429,
    "too-many-streams": 429,
    "talk-time-used-up": 429,
    "at-capacity": 503,
    "upstream-busy": 503,
    "upstream-rejected": 422,
    "upstream-misconfigured": 502,
    "upstream-error": 502,
    "upstream-unreachable": 502,
    "upstream-invalid": 502,
    "upstream-timeout": 504,
    "internal-error": 500,
}
RETRY_LATER = {slug for slug, status in STATUS.items() if status in (429, 503)} | {"in-progress"}
WITH_ERRORS = {"invalid-request", "upstream-rejected"}

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CALL_LOCATION = re.compile(r"/calls/[A-Za-z0-9_-]{1,128}\.[A-Za-z0-9_-]{43}")
POLICY = re.compile(r'"([a-z0-9-]+)";q=(\d+);w=(\d+)')
STATE = re.compile(r'"([a-z0-9-]+)";r=(\d+);t=(\d+)')


def assert_safe_headers(response: httpx.Response) -> None:
    """Check the headers of every answer."""
    headers = response.headers
    assert REQUEST_ID.fullmatch(headers["x-request-id"])
    # Event streams say, too, that no proxy may transform them.
    assert headers["cache-control"] in ("no-store", "no-store, no-transform")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "origin" in headers["vary"].lower()
    assert "server" not in headers
    for name in ("x-request-id", "cache-control", "content-security-policy", "vary", "access-control-allow-origin"):
        assert len(headers.get_list(name)) <= 1, name


async def assert_documented(response: httpx.Response) -> None:
    """An answer, its type, its problem and its headers stand in the OpenAPI document, where its route does."""
    paths = document()["paths"]
    path = response.request.url.path.removeprefix("/voice")
    route = next((each for each in paths if re.fullmatch(re.sub(r"{[a-z]+}", "[^/]+", each), path)), None)
    operation = paths[route].get(response.request.method.lower()) if route else None
    if operation is None:
        return
    where = f"{operation['operationId']}, {response.status_code}"
    assert str(response.status_code) in operation["responses"], where
    described = operation["responses"][str(response.status_code)]
    media_type = response.headers.get("content-type", "").partition(";")[0]
    assert media_type in described.get("content", {"": {}}), where
    if media_type == "application/problem+json":
        slug = json.loads(await response.aread())["type"].rpartition("/")[2]
        assert slug in described["content"][media_type]["examples"], f"{where}, {slug}"
    for name in document()["components"]["headers"]:
        assert name not in response.headers or name in described["headers"], f"{where}, {name}"


def assert_problem(response: httpx.Response, slug: str, *, prefix: str = "") -> dict[str, Any]:
    """A whole RFC 9457 problem; its members."""
    assert response.status_code == STATUS[slug], response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert_safe_headers(response)
    problem: dict[str, Any] = response.json()
    assert problem["type"] == f"{prefix}/problems/{slug}"
    assert problem["status"] == response.status_code
    for name in ("title", "detail"):
        assert isinstance(problem[name], str)
        assert problem[name]
    assert problem["request_id"] == response.headers["x-request-id"]
    assert ("retry-after" in response.headers) == (slug in RETRY_LATER)
    if slug in RETRY_LATER:
        assert re.fullmatch(r"[1-9][0-9]*", response.headers["retry-after"])
    if slug == "method-not-allowed":
        assert response.headers["allow"]
    if slug == "unauthenticated":
        assert response.headers["www-authenticate"].startswith("Bearer")
    errors = problem.get("errors", [])
    assert slug in WITH_ERRORS or not errors
    assert slug != "upstream-rejected" or errors
    for error in errors:
        assert error.keys() == {"loc", "msg", "type"}
    assert problem.keys() - {"errors"} == {"type", "title", "status", "detail", "request_id"}
    return problem


def assert_session(response: httpx.Response, *, prefix: str = "") -> str:
    """A started call in anonymous mode; the path to follow it under."""
    assert response.status_code == 201, response.text
    assert response.headers["content-type"] == "application/json"
    assert_safe_headers(response)
    # Exactly these two, and nothing twice.
    assert [name for name, _ in json.loads(response.text, object_pairs_hook=list)] == [
        "server_url",
        "participant_token",
    ]
    location: str = response.headers["location"]
    assert location.startswith(prefix)
    assert CALL_LOCATION.fullmatch(location.removeprefix(prefix)), location
    assert states(response)
    return location


def assert_limited(response: httpx.Response, slug: str = "rate-limited") -> int:
    """A refusal for having asked too often; the seconds to wait."""
    assert_problem(response, slug)
    wait = int(response.headers["retry-after"])
    used_up = [reset for left, reset in states(response).values() if left == 0]
    assert used_up
    assert wait >= max(used_up)
    return wait


def policies(response: httpx.Response) -> dict[str, tuple[int, int]]:
    """RateLimit-Policy: quota and window in seconds, by name."""
    return _members(POLICY, response.headers["ratelimit-policy"])


def states(response: httpx.Response) -> dict[str, tuple[int, int]]:
    """RateLimit: what is left and for how many seconds, by name, the closest limit first."""
    found = _members(STATE, response.headers["ratelimit"])
    assert found.keys() <= policies(response).keys()
    left = [left for left, _ in found.values()]
    assert left == sorted(left), "the closest limit comes first"
    return found


def remaining(response: httpx.Response, name: str = "user-minute") -> int:
    """How often the caller may still ask, by one policy."""
    assert states(response)[name][0] <= policies(response)[name][0]
    return states(response)[name][0]


def _members(form: re.Pattern[str], header: str) -> dict[str, tuple[int, int]]:
    matches = [form.fullmatch(member) for member in header.split(", ")]
    assert all(matches), header
    return {match[1]: (int(match[2]), int(match[3])) for match in matches if match}
