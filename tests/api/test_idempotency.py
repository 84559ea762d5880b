"""Idempotency-Key: the same request again gets the same answer, and no second call."""

import asyncio
import base64
import json
import time
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.types import Message

from app.identity import User
from app.identity.keyring import Keyring
from app.limits import CallAttempt, LiveCalls
from app.limits.ledger import Ledger
from app.oneinbox import OneInbox, WebCall
from app.problems import Problem
from app.sessions import idempotency
from app.sessions.disconnect import ClientConnection
from app.sessions.handover import StartedCall
from app.sessions.idempotency import Idempotency
from app.store.memory import MemoryStore
from tests.conftest import Logs, OpenBroker
from tests.support.harness import ONEINBOX, Upstream, post_session, started
from tests.support.shapes import assert_limited, assert_problem, assert_session, remaining

KEY = "0123456789abcdef"
VERIFY = "https://verify.example/siteverify"


def token(**claims: Any) -> str:
    """A participant token with these claims."""
    return f"eyJhbGciOiJIUzI1NiJ9.{base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b'=').decode()}.c2ln"


def is_replay(response: httpx.Response) -> bool:
    assert response.headers.get("idempotency-replayed") in (None, "true")
    return "idempotency-replayed" in response.headers


async def keyed(broker: httpx.AsyncClient, body: Any = None, key: str = KEY, **headers: str) -> httpx.Response:
    return await post_session(broker, body, idempotency_key=key, **headers)


async def test_a_repeat_gets_the_first_answer(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    first = await keyed(broker, {"variables": {"a": "b"}})
    again = [await keyed(broker, {"variables": {"a": "b"}}) for _ in range(3)]

    assert_session(first)
    assert not is_replay(first)
    for response in again:
        assert is_replay(response)
        assert response.status_code == 201
        assert response.content == first.content
        assert response.headers["location"] == first.headers["location"]
        assert response.headers["x-request-id"] != first.headers["x-request-id"]
    assert upstream.start.call_count == 1


async def test_without_a_key_or_with_another_each_request_starts_a_call(
    broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    responses = [
        await post_session(broker),
        await post_session(broker),
        await keyed(broker),
        await keyed(broker, key=KEY[::-1]),
    ]
    assert [response.status_code for response in responses] == [201] * 4
    assert len({response.headers["location"] for response in responses}) == 4
    assert not any(map(is_replay, responses))


async def test_keys_are_each_users_own(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(peer="10.0.0.1", BROKER_TRUSTED_PROXIES="10.0.0.0/8")
    first = await keyed(broker, x_forwarded_for="192.0.2.1")
    other = await keyed(broker, x_forwarded_for="192.0.2.2")
    assert not is_replay(other)
    assert first.headers["location"] != other.headers["location"]
    assert is_replay(await keyed(broker, x_forwarded_for="192.0.2.1"))


async def test_a_replay_spends_no_session(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_SESSION_LIMITS="2/minute", BROKER_MAX_LIVE_CALLS="1")
    assert remaining(await keyed(broker)) == 1
    upstream.has_call("call_1")
    for _ in range(10):
        replay = await keyed(broker)
        assert is_replay(replay)
        assert remaining(replay, "request-minute")
    assert_problem(await post_session(broker), "too-many-live-calls")
    assert remaining(await post_session(broker)) == 1


async def test_a_replay_is_a_request_like_any_other(open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_REQUEST_LIMITS="2/minute")
    assert_session(await keyed(broker))
    assert is_replay(await keyed(broker))
    assert_limited(await keyed(broker))


async def test_a_replay_needs_no_second_challenge(open_broker: OpenBroker, upstream: Upstream) -> None:
    verify = upstream.router.post(VERIFY).respond(json={"success": True})
    broker = await open_broker(BROKER_CHALLENGE_SECRET="a-secret", BROKER_CHALLENGE_VERIFY_URL=VERIFY)
    assert_problem(await keyed(broker), "challenge-failed")
    assert_session(await keyed(broker, x_challenge_token="solved"))
    assert is_replay(await keyed(broker, x_challenge_token="solved"))
    assert is_replay(await keyed(broker))
    assert verify.call_count == 1


# --- keys ---

TAKEN = {
    "16": "0123456789abcdef",
    "255": "k" * 255,
    "255-in-quotes": '"' + "k" * 255 + '"',
    "a-uuid": "8e03978e-40d5-43dd-bc93-6894a57f9324",
    "blanks": "with blanks in the middle",
    "marks": "~!@#$%^&*()_+{}|:<>?",
}
REFUSED = {
    "empty": "",
    "blank": " " * 20,
    "empty-in-quotes": '""',
    "15": "0123456789abcde",
    "15-in-quotes": '"0123456789abcde"',
    "256": "k" * 256,
    "256-in-quotes": '"' + "k" * 256 + '"',
    "tab": "0123456789abcdef\tx",
    "delete": "0123456789abcdef\x7f",
    "bell": "0123456789abcdef\x07",
    "latin-1": "0123456789abcdef\xe9",
    "utf-8": "0123456789abcdef\xc3\xa9",
}


@pytest.mark.parametrize("key", TAKEN.values(), ids=TAKEN.keys())
async def test_accepted_keys(broker: httpx.AsyncClient, key: str) -> None:
    assert_session(await keyed(broker, key=key))
    assert is_replay(await keyed(broker, key=key))


@pytest.mark.parametrize("key", REFUSED.values(), ids=REFUSED.keys())
async def test_refused_keys(broker: httpx.AsyncClient, upstream: Upstream, key: str) -> None:
    response = await broker.post("/session", headers=[(b"idempotency-key", key.encode("latin-1"))])
    problem = assert_problem(response, "invalid-request")
    (error,) = problem["errors"]
    assert error["loc"] == ["header", "Idempotency-Key"]
    assert not key.strip('" ') or key.strip('" ') not in json.dumps(problem)
    assert not upstream.requests


async def test_two_keys_are_one_too_many(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    for second in (KEY, KEY[::-1]):
        response = await broker.post("/session", headers=[("Idempotency-Key", KEY), ("Idempotency-Key", second)])
        assert_problem(response, "invalid-request")
    assert not upstream.requests


@pytest.mark.parametrize(("bare", "quoted"), [(KEY, f'"{KEY}"'), ('0123456789ab\\c"d', '"0123456789ab\\\\c\\"d"')])
async def test_a_quoted_key_equals_a_bare_one(broker: httpx.AsyncClient, bare: str, quoted: str) -> None:
    assert_session(await keyed(broker, key=quoted))
    assert is_replay(await keyed(broker, key=bare))


async def test_signed_in_users_may_send_short_keys(open_broker: OpenBroker) -> None:
    broker = await open_broker(BROKER_AUTH="header", BROKER_TRUSTED_PROXIES="203.0.113.0/24")
    broker.headers["Sec-Fetch-Site"] = "same-origin"
    assert (await keyed(broker, key="1", x_forwarded_user="ann")).status_code == 201
    assert is_replay(await keyed(broker, key='"1"', x_forwarded_user="ann"))
    assert not is_replay(await keyed(broker, key="1", x_forwarded_user="ben"))
    assert_problem(await keyed(broker, key="", x_forwarded_user="ann"), "invalid-request")


# --- bodies ---

SAME = {
    "order-and-blanks": (b'{"metadata":{"a":1,"b":[1,2]}}', b'{ "metadata" : {"b" : [1, 2], "a" : 1} }'),
    "numbers": (b'{"metadata":{"n":1,"z":0,"big":100}}', b'{"metadata":{"n":1.0,"z":-0.0,"big":1e2}}'),
    "escapes": (b'{"metadata":{"a":"\xc3\xa9/"}}', b'{"metadata":{"\\u0061":"\\u00e9\\/"}}'),
    "duplicates": (b'{"metadata":{"a":2}}', b'{"metadata":{"a":1,"a":2}}'),
    "nothing": (b"", b"{}"),
}
DIFFERENT = {
    "value": (b'{"metadata":{"a":1}}', b'{"metadata":{"a":2}}'),
    "type": (b'{"metadata":{"a":1}}', b'{"metadata":{"a":"1"}}'),
    "truth": (b'{"metadata":{"a":1}}', b'{"metadata":{"a":true}}'),
    "order-of-a-list": (b'{"metadata":{"a":[1,2]}}', b'{"metadata":{"a":[2,1]}}'),
    "more": (b"{}", b'{"agent":"default"}'),
    "null": (b"{}", b'{"agent":null}'),
    "nearly": (b'{"metadata":{"a":1e15}}', b'{"metadata":{"a":1000000000000001}}'),
}


@pytest.mark.parametrize(("first", "second"), SAME.values(), ids=SAME.keys())
async def test_the_same_json_is_the_same_request(broker: httpx.AsyncClient, first: bytes, second: bytes) -> None:
    assert_session(await keyed(broker, first or None))
    assert is_replay(await keyed(broker, second))


@pytest.mark.parametrize(("first", "second"), DIFFERENT.values(), ids=DIFFERENT.keys())
async def test_another_body_is_refused(
    broker: httpx.AsyncClient, upstream: Upstream, first: bytes, second: bytes
) -> None:
    assert_session(await keyed(broker, first))
    problem = assert_problem(await keyed(broker, second), "idempotency-mismatch")
    assert "default" not in problem["detail"]
    assert is_replay(await keyed(broker, first))
    assert upstream.start.call_count == 1


async def test_a_body_that_is_refused_is_not_kept(broker: httpx.AsyncClient) -> None:
    assert_problem(await keyed(broker, {"agent": "nobody"}), "agent-not-allowed")
    assert_problem(await keyed(broker, b"{"), "malformed-json")
    assert_session(await keyed(broker))


# --- failures ---


@pytest.mark.parametrize("status", [400, 401, 402, 404, 408, 422, 500, 503])
async def test_a_failure_is_not_kept(broker: httpx.AsyncClient, upstream: Upstream, status: int) -> None:
    upstream.start.respond(status, json={"detail": "no"})
    assert (await keyed(broker)).status_code >= 400
    upstream.works_again()
    second = await keyed(broker)
    assert_session(second)
    assert not is_replay(second)
    assert is_replay(await keyed(broker))


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadError, RuntimeError])
async def test_a_lost_connection_is_not_kept(
    broker: httpx.AsyncClient, upstream: Upstream, error: type[Exception]
) -> None:
    upstream.start.mock(side_effect=error)
    assert (await keyed(broker)).status_code >= 500
    upstream.works_again()
    assert not is_replay(await keyed(broker))


async def test_a_refusal_of_a_limit_is_not_kept(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(BROKER_MAX_LIVE_CALLS="1")
    path = assert_session(await post_session(broker))
    member = upstream.asked["metadata"]["broker_request_id"]
    upstream.has_call("call_1")
    assert_problem(await keyed(broker), "too-many-live-calls")
    upstream.has_call("call_1", status="completed", metadata={"broker_request_id": member})
    assert (await broker.get(path)).status_code == 200
    assert_session(await keyed(broker))


# --- at the same time ---


async def test_repeats_during_the_first_request_get_its_response(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def start(_: httpx.Request) -> httpx.Response:
        asked.set()
        await answer.wait()
        return httpx.Response(201, json=started())

    upstream.start.mock(side_effect=start)
    asking = [asyncio.create_task(keyed(broker)) for _ in range(50)]
    await asyncio.wait_for(asked.wait(), 5)
    assert_problem(await keyed(broker, {"agent": "default"}), "idempotency-mismatch")
    answer.set()
    responses = await asyncio.gather(*asking)
    assert upstream.start.call_count == 1
    assert sum(map(is_replay, responses)) == 49
    assert len({response.content for response in responses}) == 1


async def test_a_repeat_waits_as_long_as_the_first_takes(
    broker: httpx.AsyncClient, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "RECHECK_SECONDS", 0.05)
    asked = asyncio.Event()

    async def start(_: httpx.Request) -> httpx.Response:
        asked.set()
        await asyncio.sleep(0.15)  # so that a repeat checks more than once
        return httpx.Response(201, json=started())

    upstream.start.mock(side_effect=start)
    first = asyncio.create_task(keyed(broker))
    await asyncio.wait_for(asked.wait(), 5)
    assert is_replay(await keyed(broker))
    assert_session(await first)
    assert upstream.start.call_count == 1


async def test_repeats_during_a_failing_request_try_one_after_another(
    broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    failures = iter([httpx.Response(503, json={}), httpx.Response(422, json={})])
    running = most = 0

    async def start(_: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)  # OneInbox takes a while, in which a second one could begin
        running -= 1
        return next(failures, httpx.Response(201, json=started()))

    upstream.start.mock(side_effect=start)
    responses = await asyncio.gather(*(keyed(broker) for _ in range(20)))
    assert most == 1
    assert upstream.start.call_count == 3
    assert sorted(response.status_code for response in responses) == [201] * 18 + [502] * 2


async def test_a_first_request_that_outlasts_the_wait(open_broker: OpenBroker, upstream: Upstream) -> None:
    # The one part of a request that OneInbox's timeout does not bound.
    asked, passed = asyncio.Event(), asyncio.Event()

    async def verify(_: httpx.Request) -> httpx.Response:
        asked.set()
        await passed.wait()
        return httpx.Response(200, json={"success": True})

    upstream.router.post(VERIFY).mock(side_effect=verify)
    broker = await open_broker(
        ONEINBOX_TIMEOUT="0.1", BROKER_CHALLENGE_SECRET="a-secret", BROKER_CHALLENGE_VERIFY_URL=VERIFY
    )
    first = asyncio.create_task(keyed(broker, x_challenge_token="solved"))
    await asyncio.wait_for(asked.wait(), 5)
    assert_problem(await keyed(broker, x_challenge_token="solved"), "in-progress")
    passed.set()
    assert_session(await first)
    assert is_replay(await keyed(broker))
    assert upstream.start.call_count == 1


# --- how long ---


async def test_a_useless_response_is_not_kept(broker: httpx.AsyncClient, upstream: Upstream) -> None:
    upstream.start.respond(201, json=started(participant_token=token(exp=time.time() + 59)))
    assert_session(await keyed(broker))
    assert not is_replay(await keyed(broker))
    assert upstream.start.call_count == 2


ODD_TOKENS = {
    "no-jwt": "not-a-jwt",
    "no-exp": token(sub="x"),
    "text": token(exp="tomorrow"),
    "null": token(exp=None),
    "list": "e30.WzFd.c2ln",
    "not-base64": "e30.!!!.c2ln",
    "infinite": "e30." + base64.urlsafe_b64encode(b'{"exp":Infinity}').decode().rstrip("=") + ".c2ln",
    "not-a-number": "e30." + base64.urlsafe_b64encode(b'{"exp":NaN}').decode().rstrip("=") + ".c2ln",
    "beyond-all-floats": "e30."
    + base64.urlsafe_b64encode(b'{"exp":1' + b"0" * 400 + b"}").decode().rstrip("=")
    + ".c2ln",
}


@pytest.mark.parametrize("odd", ODD_TOKENS.values(), ids=ODD_TOKENS.keys())
async def test_a_token_without_an_expiry_is_kept(broker: httpx.AsyncClient, upstream: Upstream, odd: str) -> None:
    upstream.start.respond(201, json=started(participant_token=odd))
    assert_session(await keyed(broker))
    assert is_replay(await keyed(broker))


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """Idempotency on a store in memory, by a clock of the test's own. `starts`: how often a call was started."""

    def __init__(self, *secrets: str, timeout: float = 15, store: MemoryStore | None = None) -> None:
        self.clock = Clock()
        self.store = store or MemoryStore(self.clock)
        oneinbox = OneInbox(ONEINBOX, SecretStr("oi_sk_x"), Upstream(), timeout=5, connect_timeout=1)
        live = LiveCalls(self.store, oneinbox, Ledger(self.store, lease=3600), max_seconds=0, join_timeout=0)
        keyring = Keyring(secrets or ["s" * 32])
        self._idempotency = Idempotency(self.store, keyring, live, timeout=timeout, now=self.clock)
        self.attempts = 0

    async def ask(self, life: float | None = None, until: asyncio.Event | None = None) -> tuple[str, bool]:
        """The id of the call that Ann gets under her key, and whether it was replayed.

        `life`: of its token. `until`: the call starts no sooner.
        """

        async def run() -> StartedCall:
            self.attempts += 1
            number = self.attempts
            if until is not None:
                await until.wait()
            claims = {} if life is None else {"exp": self.clock.now + life}
            attempt = CallAttempt("m", int(self.clock.now), "default", ann.store_name, "pseudonym")
            return StartedCall(attempt, WebCall(f"call_{number}", "wss://voice.example", token(**claims)))

        ann = User(mode="jwt", id="ann")
        call, replayed = await self._idempotency.once(ann, "k", {}, ClientConnection(stays), run)
        return call.id, replayed


async def stays() -> Message:
    """A connection that is never closed."""
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(("life", "kept"), [(900, 600), (3600, 600), (660, 600), (300, 240), (61, 1), (None, 600)])
async def test_replayed_for_ten_minutes_or_until_a_minute_before_the_tokens_end(life: int | None, kept: int) -> None:
    desk = Desk()
    assert await desk.ask(life) == ("call_1", False)
    desk.clock.now += kept - 0.5
    assert await desk.ask(life) == ("call_1", True)
    desk.clock.now += 0.25
    assert await desk.ask(life) == ("call_1", True), "and a replay makes it no longer"
    desk.clock.now += 0.5
    assert await desk.ask(life) == ("call_2", False)


async def test_a_running_mark_expires() -> None:
    desk = Desk()
    running = asyncio.create_task(desk.ask(until=asyncio.Event()))
    async with asyncio.timeout(5):
        while not desk.attempts:
            await asyncio.sleep(0)  # until it runs, within the bound above
    desk.clock.now += 25.01  # OneInbox's 15 s, and 10
    assert await desk.ask() == ("call_2", False)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert await desk.ask() == ("call_2", True), "the one that was given up takes nothing away from its successor"


async def test_an_old_secret_still_reads_what_it_kept() -> None:
    first = Desk("old" * 11)
    await first.ask()
    assert await Desk("new" * 11, "old" * 11, store=first.store).ask() == ("call_1", True)


async def test_an_unreadable_entry_counts_as_a_running_request() -> None:
    first = Desk("old" * 11)
    await first.ask()
    with pytest.raises(Problem, match="in-progress"):
        await Desk("new" * 11, store=first.store, timeout=0).ask()


async def test_nothing_of_an_answer_is_logged(broker: httpx.AsyncClient, logs: Logs) -> None:
    answer = (await keyed(broker)).json()
    await keyed(broker)
    assert answer["participant_token"] not in str(logs)
    assert KEY not in str(logs)
