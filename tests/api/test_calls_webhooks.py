"""POST /webhooks/oneinbox/{secret}: accepted with the secret, but never trusted."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from app.api.webhooks import MAX_WEBHOOK as MAX_BODY
from tests.conftest import OpenBroker
from tests.support.harness import JSON, Upstream, post_session
from tests.support.shapes import STATUS, assert_problem

SECRET = "abcdefghijklmnopqrstuvwxyz-_0123456789"
PATH = f"/webhooks/oneinbox/{SECRET}"
SETTINGS = {"BROKER_WEBHOOK_SECRET": SECRET, "BROKER_MAX_LIVE_CALLS": "1"}
EVENT = {"event": "call.ended", "call_id": "call_1", "status": "completed"}


@pytest.fixture
async def hooked(open_broker: OpenBroker) -> httpx.AsyncClient:
    return await open_broker(SETTINGS)


def assert_refused(response: httpx.Response, slug: str) -> None:
    """A problem; no browser is meant, so that nothing depends on an Origin."""
    assert response.status_code == STATUS[slug]
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == f"/problems/{slug}"
    assert SECRET[:-1] not in response.text


async def fetches(upstream: Upstream, least: int = 0) -> int:
    """Return how often calls were fetched, once that is at least `least` and the queue is empty."""
    async with asyncio.timeout(5):
        while True:
            for _ in range(50):  # enough steps of the event loop for a fetch through the canned transport
                await asyncio.sleep(0)
            count = len([request for request in upstream.requests if request.method == "GET"])
            if count >= least:
                return count


@pytest.mark.parametrize("call_id", ["call_1", "call_1.with-a-key", "call_2", "", "../agents", "cursor", "x" * 200])
async def test_only_a_tracked_call_is_fetched(call_id: str, hooked: httpx.AsyncClient, upstream: Upstream) -> None:
    await post_session(hooked)
    upstream.has_call("call_1", status="in_progress", metadata=upstream.asked["metadata"])

    response = await hooked.post(PATH, json={**EVENT, "call_id": call_id})

    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["cache-control"] == "no-store"
    assert await fetches(upstream, least=int(call_id == "call_1")) == (call_id == "call_1")


async def test_what_it_says_is_not_believed(hooked: httpx.AsyncClient, upstream: Upstream) -> None:
    path = (await post_session(hooked)).headers["location"]
    upstream.has_call("call_1", status="in_progress", metadata=upstream.asked["metadata"])

    await hooked.post(PATH, json=EVENT)
    await fetches(upstream, least=1)

    assert (await hooked.get(path)).json()["status"] == "in_progress"
    assert_problem(await post_session(hooked), "too-many-live-calls")


async def test_an_end_frees_the_slot(hooked: httpx.AsyncClient, upstream: Upstream) -> None:
    await post_session(hooked)
    upstream.has_call("call_1", status="completed", metadata=upstream.asked["metadata"])

    for event in ("call.ended", "call.started", "call.analyzed", "call.ended"):
        assert (await hooked.post(PATH, json={**EVENT, "event": event})).status_code == 204
    await fetches(upstream, least=1)

    assert (await post_session(hooked)).status_code == 201


BODIES = {
    "empty": b"",
    "no-json": b"{",
    "not-utf8": b"\xff\xfe",
    "null": b"null",
    "array": b"[1]",
    "text": b'"call_1"',
    "number": b"1e999",
    "deep": b"[" * 200_000,
    "deep-objects": b'{"a":' * 50_000,
    "nul": b"\0" * 10,
    "no-call": b"{}",
    "call-is-a-number": b'{"call_id": 7}',
    "call-is-a-list": b'{"call_id": ["call_1"]}',
    "call-is-an-object": b'{"call_id": {"id": "call_1"}}',
    "surrogate": rb'{"call_id": "\ud800"}',
    "newline": rb'{"call_id": "call_1\n"}',
    "huge-number": b'{"call_id": ' + b"9" * 10_000 + b"}",
    "a-megabyte": b'{"call_id": "x", "more": "' + b"x" * (MAX_BODY - 28) + b'"}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
async def test_any_body_is_accepted(body: bytes, hooked: httpx.AsyncClient, upstream: Upstream) -> None:
    await post_session(hooked)
    assert len(body) <= MAX_BODY

    response = await hooked.post(PATH, content=body)

    assert response.status_code == 204
    assert not await fetches(upstream)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_larger_body_is_not(chunked: bool, hooked: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b" " * (MAX_BODY // 10)

    response = await hooked.post(PATH, content=chunks() if chunked else b" " * (MAX_BODY + 1))

    assert_refused(response, "body-too-large")


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "image/png", "x", ""]
)
async def test_it_needs_nothing_but_the_secret(
    content_type: str | None, open_broker: OpenBroker, upstream: Upstream
) -> None:
    broker = await open_broker(
        {
            **SETTINGS,
            "BROKER_AUTH": "jwt",
            "BROKER_JWT_SECRET": "s" * 32,
            "BROKER_REQUIRE_ORIGIN": "true",
            "BROKER_ALLOWED_ORIGINS": "https://shop.example",
        }
    )
    headers = {} if content_type is None else {"Content-Type": content_type}

    for origin in ({}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Authorization": "Bearer nonsense"}):
        response = await broker.post(PATH, content=json.dumps(EVENT), headers={**headers, **origin})
        assert response.status_code == 204, origin


async def test_it_counts_against_no_limit(open_broker: OpenBroker) -> None:
    broker = await open_broker({**SETTINGS, "BROKER_REQUEST_LIMITS": "1/minute", "BROKER_SESSION_LIMITS": "1/minute"})

    for _ in range(30):
        response = await broker.post(PATH, json=EVENT)
        assert response.status_code == 204
        assert "ratelimit" not in response.headers
        assert (await broker.post(PATH[:-1], json=EVENT)).status_code == 404

    assert (await post_session(broker)).status_code == 201


WRONG = {
    "nothing": "/webhooks/oneinbox/",
    "no-slash": "/webhooks/oneinbox",
    "cut": PATH[:-1],
    "longer": PATH + "x",
    "other-case": PATH.replace("abc", "ABC"),
    "with-a-slash": PATH + "/",
    "encoded-newline": PATH + "%0A",
    "not-ascii": PATH[:-1] + "%C3%A9",
    "not-utf8": PATH[:-1] + "%FF",
    "long": PATH + "x" * 5000,
    "other-service": f"/webhooks/twilio/{SECRET}",
}


@pytest.mark.parametrize("path", WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_secret_is_as_unknown_as_any_path(
    path: str, hooked: httpx.AsyncClient, open_broker: OpenBroker, upstream: Upstream
) -> None:
    await post_session(hooked)
    headers = {**JSON, "X-Request-ID": "the-same"}
    body = json.dumps(EVENT)

    wrong = await hooked.post(path, content=body, headers=headers)
    unknown = await hooked.post("/no/such/route", content=body, headers=headers)
    without = await (await open_broker()).post(PATH, content=body, headers=headers)

    assert_refused(wrong, "not-found")
    assert wrong.content == unknown.content == without.content
    assert not await fetches(upstream)


async def test_a_wrong_secret_reads_no_body(hooked: httpx.AsyncClient) -> None:
    read = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(50):
            read += 1
            yield b" " * MAX_BODY

    assert_refused(await hooked.post(PATH[:-1], content=chunks()), "not-found")


async def test_a_failing_fetch_does_not_fail_the_webhook(hooked: httpx.AsyncClient, upstream: Upstream) -> None:
    await post_session(hooked)
    upstream.router.get("/v1/calls/call_1").respond(500)

    for _ in range(3):
        assert (await hooked.post(PATH, json=EVENT)).status_code == 204
        await fetches(upstream, least=1)


async def test_other_methods_are_refused(hooked: httpx.AsyncClient) -> None:
    assert_refused(await hooked.get(PATH), "method-not-allowed")
