"""The bot challenge: the request, the accepted answers, and that it fails closed."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
import respx
from pydantic import SecretStr
from structlog.testing import capture_logs

from app.problems import Problem
from app.sessions.challenge import Challenge
from app.store import Decision, StoreUnavailable
from app.store.memory import MemoryStore

URL = "https://verify.example/siteverify?key=hush"
SECRET = "0x4AAA-very-secret"
ADDRESS = "192.0.2.1"
PASSED = {"success": True, "hostname": "shop.example"}
FAILED = {"success": False, "error-codes": ["timeout-or-duplicate"]}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Service(httpx.AsyncBaseTransport):
    """Gives `answer`, an answer or what makes one; keeps what it is asked."""

    def __init__(self, answer: Any = PASSED) -> None:
        self.answer = answer
        self.asked: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(self.answer, dict):
            return httpx.Response(200, json=self.answer)
        answer: httpx.Response = await self.answer()
        return answer


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(clock)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def challenge(service: Service, store: MemoryStore) -> Challenge:
    return make(service, store)


def make(
    transport: httpx.AsyncBaseTransport, store: MemoryStore, hosts: frozenset[str] | None = None, timeout: float = 3
) -> Challenge:
    return Challenge(httpx.URL(URL), SecretStr(SECRET), hosts, transport, store, timeout=timeout)


async def outcome(challenge: Challenge, token: str | None = "token", address: str = ADDRESS) -> str:
    """`passed`, or the slug of the problem."""
    try:
        await challenge.check(token, address)
    except Problem as raised:
        problem = raised
    else:
        return "passed"
    assert SECRET not in repr(problem)
    assert SECRET not in str(problem)
    assert problem.__cause__ is None
    assert set(problem.headers) == (set() if problem.slug == "challenge-failed" else {"Retry-After"})
    if problem.slug == "at-capacity":
        assert problem.headers == {"Retry-After": "5"}
    return problem.slug


async def retry_after(challenge: Challenge, token: str | None = "token") -> str:
    with pytest.raises(Problem) as caught:
        await challenge.check(token, ADDRESS)
    assert caught.value.slug == "rate-limited"
    return caught.value.headers["Retry-After"]


@pytest.mark.parametrize(
    ("address", "remoteip"), [(ADDRESS, [ADDRESS]), ("2001:db8::1", ["2001:db8::1"]), ("local", None)]
)
async def test_the_request_to_the_service(
    challenge: Challenge, service: Service, address: str, remoteip: list[str] | None
) -> None:
    assert await outcome(challenge, "a token&+=", address) == "passed"
    (request,) = service.asked
    assert request.method == "POST"
    assert str(request.url) == URL
    form = parse_qs(request.content.decode(), strict_parsing=True)
    expected = {"secret": [SECRET], "response": ["a token&+="], "remoteip": remoteip}
    assert form == {name: value for name, value in expected.items() if value is not None}
    assert dict(request.headers) == {
        "host": "verify.example",
        "content-type": "application/x-www-form-urlencoded",
        "content-length": str(len(request.content)),
        "accept": "application/json",
        "accept-encoding": "identity",
        "user-agent": "oneinbox-broker",
    }
    assert request.extensions["timeout"] == {"connect": 3, "read": 3, "write": 3, "pool": 3}


async def test_a_cookie_of_the_service_is_not_sent_back(store: MemoryStore) -> None:
    router = respx.MockRouter()
    route = router.post(URL).respond(json=PASSED, headers={"set-cookie": "a=b"})
    challenge = make(httpx.MockTransport(router.async_handler), store)
    assert [await outcome(challenge) for _ in range(2)] == ["passed", "passed"]
    assert all("cookie" not in call.request.headers for call in route.calls)


@pytest.mark.parametrize("token", [None, "", "x" * 2049, "tokén", "a\nb", "a\tb", "a\x7f", "\ud800", "a\n"])
async def test_an_unfit_token_is_refused_unsent(challenge: Challenge, service: Service, token: str | None) -> None:
    assert await outcome(challenge, token) == "challenge-failed"
    assert service.asked == []


async def test_the_longest_token_is_sent(challenge: Challenge, service: Service) -> None:
    assert await outcome(challenge, "x" * 2048) == "passed"


SHOPS = frozenset({"shop.example", "localhost"})


@pytest.mark.parametrize(
    ("answer", "hosts", "expected"),
    [
        ({"success": True}, None, "passed"),
        ({"success": True}, SHOPS, "passed"),
        ({"success": True, "hostname": None}, SHOPS, "passed"),
        ({"success": True, "hostname": "shop.example"}, SHOPS, "passed"),
        ({"success": True, "hostname": "Shop.Example"}, SHOPS, "passed"),
        ({"success": True, "hostname": "other.example"}, None, "passed"),
        ({"success": True, "hostname": "other.example"}, SHOPS, "challenge-failed"),
        ({"success": True, "hostname": "evil.shop.example"}, SHOPS, "challenge-failed"),
        ({"success": True, "hostname": ""}, SHOPS, "challenge-failed"),
        ({"success": True, "hostname": ["shop.example"]}, SHOPS, "challenge-failed"),
        ({"success": True, "hostname": "shop.example"}, frozenset(), "challenge-failed"),
        ({"success": False}, None, "challenge-failed"),
        ({"success": 1}, None, "challenge-failed"),
        ({"success": "true"}, None, "challenge-failed"),
        ({"success": None}, None, "challenge-failed"),
        ({"success": [True]}, None, "challenge-failed"),
        ({}, None, "challenge-failed"),
        ({"error-codes": 7}, None, "challenge-failed"),
        ({"error-codes": [{}, 7]}, None, "challenge-failed"),
        (FAILED | {"hostname": "shop.example"}, SHOPS, "challenge-failed"),
    ],
)
async def test_which_answers_pass(
    service: Service, store: MemoryStore, answer: dict[str, Any], hosts: frozenset[str] | None, expected: str
) -> None:
    service.answer = answer
    assert await outcome(make(service, store, hosts)) == expected


def answering(*args: Any, **more: Any) -> Callable[[], Any]:
    async def answer() -> httpx.Response:
        return httpx.Response(*args, **more)

    return answer


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b" " * 1024


async def stuck() -> AsyncIterator[bytes]:
    yield b'{"success": '
    await asyncio.Event().wait()


async def broken() -> AsyncIterator[bytes]:
    yield b'{"success": '
    raise httpx.ReadError(URL)


async def never() -> httpx.Response:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (httpx.ConnectError(f"{URL} {SECRET}"), "ConnectError"),
        (httpx.ConnectTimeout(URL), "ConnectTimeout"),
        (httpx.ReadError(URL), "ReadError"),
        (httpx.RemoteProtocolError(URL), "RemoteProtocolError"),
        (never, "TimeoutError"),
        (answering(200, content=stuck()), "TimeoutError"),
        (answering(200, content=broken()), "ReadError"),
        (answering(200, content=endless()), "no JSON object"),
        (answering(200, content=b'{"success": true}' + b" " * 65536), "no JSON object"),
        (answering(200, content=b""), "no JSON object"),
        (answering(200, content=b"<html>"), "no JSON object"),
        (answering(200, content=b"\xff"), "no JSON object"),
        (answering(200, content=b"[" * 60_000), "no JSON object"),
        (answering(200, json=[PASSED]), "no JSON object"),
        (answering(200, json=True), "no JSON object"),
        (answering(200, json=PASSED, headers={"content-encoding": "x-other"}), "no JSON object"),
        (answering(302, json=PASSED, headers={"location": "https://other.example"}), "status 302"),
        (answering(201, json=PASSED), "status 201"),
        (answering(400, json=FAILED), "status 400"),
        (answering(429, json=PASSED), "status 429"),
        (answering(500, json=PASSED), "status 500"),
    ],
)
async def test_an_unavailable_service_fails_closed(
    service: Service, store: MemoryStore, answer: Any, reason: str
) -> None:
    service.answer = answer
    timeout = 0.05 if reason == "TimeoutError" else 3
    with capture_logs() as logs:
        assert await outcome(make(service, store, timeout=timeout)) == "at-capacity"
    expected = {"event": "challenge_unavailable", "log_level": "error", "host": "verify.example", "reason": reason}
    assert logs == [expected]
    assert len(service.asked) == 1
    assert len(store) == 0, "an outage is no failure of the browser's"


async def test_an_answer_of_64_kib_is_read(service: Service, store: MemoryStore) -> None:
    body = b'{"success": true}'
    service.answer = answering(200, content=body + b" " * (65536 - len(body)))
    assert await outcome(make(service, store)) == "passed"


async def test_the_answer_is_closed(service: Service, store: MemoryStore) -> None:
    for content in (b'{"success": true}', endless()):
        response = httpx.Response(200, content=content)

        async def answer(response: httpx.Response = response) -> httpx.Response:
            return response

        service.answer = answer
        await outcome(make(service, store))
        assert response.is_closed


async def test_the_eleventh_failure_of_a_minute_is_not_verified(
    challenge: Challenge, service: Service, clock: Clock
) -> None:
    service.answer = FAILED
    for _ in range(10):
        assert await outcome(challenge) == "challenge-failed"
        clock.now += 1
    assert await outcome(challenge) == "rate-limited"
    assert len(service.asked) == 10
    service.answer = PASSED
    assert await retry_after(challenge) == "50"
    assert await retry_after(challenge, None) == "50"
    assert await outcome(challenge, address="192.0.2.2") == "passed"
    clock.now += 49.5
    assert await retry_after(challenge) == "1"
    clock.now += 0.5
    assert await outcome(challenge) == "passed"
    assert await outcome(challenge, None) == "challenge-failed"
    assert await outcome(challenge) == "rate-limited"


async def test_unsent_tokens_are_failures_too(challenge: Challenge, service: Service) -> None:
    outcomes = [await outcome(challenge, token) for token in [None, "", "é", "x" * 3000] * 3]
    assert outcomes == ["challenge-failed"] * 10 + ["rate-limited"] * 2
    assert service.asked == []


async def test_a_household_is_one_address(challenge: Challenge) -> None:
    for number in range(10):
        assert await outcome(challenge, None, f"2001:db8::{number}") == "challenge-failed"
    assert await outcome(challenge, "token", "2001:db8::ffff") == "rate-limited"
    assert await outcome(challenge, "token", "2001:db8:0:1::1") == "passed"


async def test_a_passed_challenge_counts_nothing(challenge: Challenge, store: MemoryStore) -> None:
    for _ in range(30):
        assert await outcome(challenge) == "passed"
    assert len(store) == 0


async def test_of_many_at_once_the_passed_pass_and_ten_failures_are_reported(
    service: Service, store: MemoryStore
) -> None:
    challenge = make(service, store)
    all_asked = asyncio.Event()

    async def answer() -> httpx.Response:
        number = len(service.asked)
        if number == 30:
            all_asked.set()
        await all_asked.wait()
        return httpx.Response(200, json=PASSED if number % 2 else FAILED)

    service.answer = answer
    outcomes = await asyncio.gather(*[outcome(challenge) for _ in range(30)])
    assert Counter(outcomes) == {"passed": 15, "challenge-failed": 10, "rate-limited": 5}


class LostStore(MemoryStore):
    """Answers `questions` decisions, and is gone."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self._left = questions

    async def decide(self, *args: Any, **more: Any) -> Decision:
        if self._left == 0:
            raise StoreUnavailable
        self._left -= 1
        return await super().decide(*args, **more)


@pytest.mark.parametrize("questions", [0, 1])
async def test_a_lost_store_fails_closed(service: Service, questions: int) -> None:
    service.answer = FAILED
    assert await outcome(make(service, LostStore(questions))) == "at-capacity"
    assert len(service.asked) == questions


@pytest.mark.parametrize(
    ("answer", "logged"),
    [
        (FAILED, []),
        (PASSED | {"hostname": "shop.example"}, []),
        (
            {"success": False, "error-codes": ["bad-request", "invalid-input-secret", {"x": SECRET}]},
            [
                {
                    "event": "challenge_misconfigured",
                    "log_level": "error",
                    "host": "verify.example",
                    "codes": ["invalid-input-secret"],
                }
            ],
        ),
        (
            PASSED | {"hostname": "evil.example\n\x1b[2J" + "x" * 999},
            [
                {
                    "event": "challenge_host_mismatched",
                    "log_level": "warning",
                    "hostname": ("'evil.example\\n\\x1b[2J" + "x" * 999)[:255],
                }
            ],
        ),
    ],
)
async def test_what_the_operators_log_says(
    service: Service, store: MemoryStore, answer: dict[str, Any], logged: list[dict[str, Any]]
) -> None:
    service.answer = answer
    with capture_logs() as logs:
        await outcome(make(service, store, SHOPS))
    assert logs == logged


async def test_a_wrong_secret_is_no_failure_of_the_visitor(service: Service, store: MemoryStore) -> None:
    service.answer = {"success": False, "error-codes": ["invalid-input-secret"]}
    challenge = make(service, store)
    assert [await outcome(challenge) for _ in range(20)] == ["at-capacity"] * 20


def test_the_secret_is_in_no_repr(challenge: Challenge) -> None:
    assert SECRET not in repr(vars(challenge))
