"""What each secret's new value means for requests, before and after it is read."""

import asyncio
import time
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs

import httpx
import jwt
import pytest

from app.broker.secret_reload import SecretReloader
from tests.conftest import Logs, OpenBroker
from tests.support.harness import API_KEY, ONEINBOX, Upstream, post_session, start_call, started
from tests.support.shapes import assert_problem, assert_session

NEW_KEY = "oi_sk_new_9876543210"
OLD, NEW = "old-" * 8, "new-" * 8


class Ticks:
    """Replaces the pause between two reads of the files."""

    def __init__(self) -> None:
        self._waits, self._over = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def sleep(self, _: float) -> None:
        self._waits.release()
        await self._over.acquire()

    async def __call__(self) -> None:
        """End a pause, and wait for the read that follows."""
        async with asyncio.timeout(10):
            await self._waits.acquire()
            self._over.release()
            await self._waits.acquire()
        self._waits.release()


@pytest.fixture(autouse=True)
def tick(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    """Make every broker read its files only when this is called."""
    ticks = Ticks()
    monkeypatch.setattr("app.broker.build.SecretReloader", partial(SecretReloader, sleep=ticks.sleep))
    return ticks


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "secret"


class Keyed(httpx.AsyncBaseTransport):
    """A OneInbox that takes one key only, in front of a canned one."""

    def __init__(self, upstream: Upstream, key: str) -> None:
        self._upstream, self.key = upstream, key
        self.refused = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.headers["authorization"] != f"Bearer {self.key}":
            self.refused += 1
            return httpx.Response(401, json={"detail": "Invalid API key"})
        return await self._upstream.handle_async_request(request)


async def open_with_key_file(
    open_broker: OpenBroker, transport: httpx.AsyncBaseTransport, file: Path, **environ: str
) -> httpx.AsyncClient:
    file.write_text(API_KEY)
    return await open_broker(
        {"ONEINBOX_API_KEY": "", "ONEINBOX_API_KEY_FILE": str(file), "BROKER_SECRET": OLD, **environ},
        transport=transport,
    )


async def test_a_new_api_key_is_used_after_the_next_reload(
    open_broker: OpenBroker, upstream: Upstream, file: Path, tick: Ticks, logs: Logs
) -> None:
    broker = await open_with_key_file(open_broker, upstream, file)
    assert_session(await post_session(broker))

    file.write_text(NEW_KEY)
    assert_session(await post_session(broker))
    await tick()
    assert_session(await post_session(broker))

    keys = [request.headers["authorization"].removeprefix("Bearer ") for request in upstream.requests]
    assert keys == [API_KEY, API_KEY, NEW_KEY]
    assert API_KEY not in repr(logs)
    assert NEW_KEY not in repr(logs)


async def test_an_old_key_refused_before_the_reload_costs_no_session(
    open_broker: OpenBroker, upstream: Upstream, file: Path
) -> None:
    oneinbox = Keyed(upstream, API_KEY)
    broker = await open_with_key_file(
        open_broker, oneinbox, file, BROKER_SESSION_LIMITS="1000/minute", BROKER_GLOBAL_SESSION_LIMITS="1000/minute"
    )

    file.write_text(NEW_KEY)
    oneinbox.key = NEW_KEY
    responses = await asyncio.gather(*(post_session(broker) for _ in range(100)))

    for response in responses:
        assert_session(response)
    assert upstream.start.call_count == 100


async def test_a_key_that_stays_refused_is_a_misconfiguration(
    open_broker: OpenBroker, upstream: Upstream, file: Path, logs: Logs
) -> None:
    oneinbox = Keyed(upstream, NEW_KEY)
    broker = await open_with_key_file(open_broker, oneinbox, file, BROKER_SESSION_LIMITS="1/minute")
    oneinbox.refused = 0

    for content in (API_KEY, "oi_pk_0123456789abcdef", ""):
        file.write_text(content)
        assert_problem(await post_session(broker), "upstream-misconfigured")

    assert oneinbox.refused == 3
    assert sum(entry["event"] == "secret_rejected" for entry in logs) == 2
    # It spent nothing.
    file.write_text(NEW_KEY)
    assert_session(await post_session(broker))


async def test_a_call_keeps_its_name_while_its_secret_is_there(
    open_broker: OpenBroker, upstream: Upstream, file: Path, tick: Ticks
) -> None:
    file.write_text(OLD)
    broker = await open_broker(BROKER_SECRET_FILE=str(file))
    upstream.has_call("call_1")
    upstream.has_call("call_2")
    old = await start_call(broker)
    answer = (await post_session(broker, Idempotency_Key="a-key-of-sixteen")).json()

    file.write_text(f"{NEW}\n{OLD}\n")
    await tick()
    new = await start_call(broker)
    assert (await broker.get(old)).status_code == 200
    replayed = await post_session(broker, Idempotency_Key="a-key-of-sixteen")
    assert replayed.headers["idempotency-replayed"] == "true"
    assert replayed.json() == answer

    file.write_text(f"{NEW}\n")
    await tick()
    upstream.has_call("call_3")
    assert (await broker.get(new)).status_code == 200
    assert_problem(await broker.get(old), "not-found")


def token(secret: str) -> str:
    return "Bearer " + jwt.encode({"sub": "user-1", "exp": time.time() + 600}, secret, "HS256")


async def test_a_login_under_the_old_secret_is_none(open_broker: OpenBroker, file: Path, tick: Ticks) -> None:
    file.write_text(OLD)
    broker = await open_broker(BROKER_AUTH="jwt", BROKER_JWT_SECRET_FILE=str(file))
    old = token(OLD)
    assert (await post_session(broker, Authorization=old)).status_code == 201

    file.write_text(NEW)
    await tick()

    assert_problem(await post_session(broker, Authorization=old), "unauthenticated")
    assert (await post_session(broker, Authorization=token(NEW))).status_code == 201


async def test_challenges_are_verified_with_the_new_secret(
    open_broker: OpenBroker, upstream: Upstream, file: Path, tick: Ticks
) -> None:
    verify = upstream.router.post("/siteverify").respond(json={"success": True})
    file.write_text(OLD)
    broker = await open_broker(
        BROKER_CHALLENGE_SECRET_FILE=str(file), BROKER_CHALLENGE_VERIFY_URL=f"{ONEINBOX}/siteverify"
    )

    for secret in (OLD, NEW):
        file.write_text(secret)
        await tick()
        assert_session(await post_session(broker, X_Challenge_Token="token"))
        assert parse_qs(verify.calls.last.request.content.decode())["secret"] == [secret]


async def test_webhooks_arrive_under_the_new_secret(open_broker: OpenBroker, file: Path, tick: Ticks) -> None:
    file.write_text(OLD)
    broker = await open_broker(BROKER_WEBHOOK_SECRET_FILE=str(file))
    assert (await broker.post(f"/webhooks/oneinbox/{OLD}")).status_code == 204

    file.write_text(NEW)
    await tick()

    assert (await broker.post(f"/webhooks/oneinbox/{NEW}")).status_code == 204
    assert (await broker.post(f"/webhooks/oneinbox/{OLD}")).status_code == 404


async def test_another_store_needs_a_restart(open_broker: OpenBroker, file: Path, tick: Ticks, logs: Logs) -> None:
    file.write_text("memory://")
    broker = await open_broker(BROKER_STORE_URL_FILE=str(file))

    file.write_text("redis://:hush@127.0.0.1:1/0")
    await tick()
    await tick()

    [error] = [entry for entry in logs if entry["log_level"] == "error"]
    assert "BROKER_STORE_URL" in repr(error)
    assert "restart" in repr(error)
    assert "hush" not in repr(logs)
    assert_session(await post_session(broker))


async def test_a_running_session_finishes_with_the_old_key(
    open_broker: OpenBroker, upstream: Upstream, file: Path, tick: Ticks
) -> None:
    async def slow(_: httpx.Request) -> httpx.Response:
        arrived.set()
        await go_on.wait()
        return httpx.Response(201, json=started())

    arrived, go_on = asyncio.Event(), asyncio.Event()
    broker = await open_with_key_file(open_broker, upstream, file)
    upstream.start.mock(side_effect=slow)
    under_way = asyncio.create_task(post_session(broker))
    await arrived.wait()

    file.write_text(NEW_KEY)
    await tick()
    go_on.set()

    assert_session(await under_way)
    assert upstream.start.call_count == 1
