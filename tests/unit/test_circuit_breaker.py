"""When the circuit breaker pauses requests to OneInbox, by an injected clock."""

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from app.oneinbox import OneInbox
from app.oneinbox.circuit_breaker import (
    DEFAULT_PAUSE,
    FAILURE_PAUSE,
    FAILURES_IN_A_ROW,
    LONGEST_PAUSE,
    WHILE_PROBING,
    CircuitBreaker,
    parse_retry_after,
)
from app.oneinbox.errors import Busy, CircuitOpen, Failed, OneInboxError, TimedOut, Unreachable
from tests.conftest import Logs
from tests.support.harness import API_KEY, ONEINBOX, Upstream

NO_ANSWERS: dict[str, OneInboxError] = {
    "unreachable": Unreachable("cannot be reached", may_have_acted=False),
    "timed-out-before-sending": TimedOut("did not answer in time", may_have_acted=False),
    "timed-out": TimedOut("did not answer in time", may_have_acted=True),
    "connection-lost": Failed("connection lost", may_have_acted=True),
}
NO_ANSWER = NO_ANSWERS["unreachable"]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(clock)


def answered(breaker: CircuitBreaker) -> None:
    """A request that is let through and answered."""
    with breaker.guard():
        pass


def fails(breaker: CircuitBreaker, error: OneInboxError = NO_ANSWER, times: int = 1) -> None:
    """Requests that are let through and end in an error."""
    for _ in range(times):
        with pytest.raises(type(error)) as raised, breaker.guard():
            raise error
        assert raised.value is error


def refused(breaker: CircuitBreaker) -> int:
    """Seconds to wait of a request that is refused."""
    with pytest.raises(CircuitOpen) as raised, breaker.guard():
        pytest.fail("it was let through")
    assert raised.value.slug == "upstream-busy"
    assert raised.value.may_have_acted is False
    assert raised.value.status is None
    return raised.value.retry_after


def test_nothing_is_refused_at_first(breaker: CircuitBreaker) -> None:
    for _ in range(3):
        answered(breaker)

    assert breaker.seconds_left == 0


def test_a_429_is_a_pause_of_its_length(breaker: CircuitBreaker, clock: Clock) -> None:
    fails(breaker, Busy(7))

    assert refused(breaker) == 7
    clock.now += 5.5
    assert breaker.seconds_left == 1.5
    assert refused(breaker) == 2  # whole seconds, after which a try really passes
    clock.now += 1.4
    assert refused(breaker) == 1
    clock.now += 0.11
    assert breaker.seconds_left == 0
    answered(breaker)
    answered(breaker)


@pytest.mark.parametrize("error", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
def test_ten_requests_without_an_answer_are_a_pause(
    error: OneInboxError, breaker: CircuitBreaker, clock: Clock
) -> None:
    fails(breaker, error, times=FAILURES_IN_A_ROW - 1)
    assert breaker.seconds_left == 0

    fails(breaker, error)

    assert breaker.seconds_left == FAILURE_PAUSE
    assert refused(breaker) == FAILURE_PAUSE
    clock.now += FAILURE_PAUSE
    answered(breaker)


def test_failures_of_different_kinds_are_one_row(breaker: CircuitBreaker) -> None:
    for error in (list(NO_ANSWERS.values()) * 3)[:FAILURES_IN_A_ROW]:
        fails(breaker, error)

    refused(breaker)


def test_any_answer_ends_the_row(breaker: CircuitBreaker) -> None:
    fails(breaker, times=FAILURES_IN_A_ROW - 1)
    answered(breaker)
    fails(breaker, times=FAILURES_IN_A_ROW - 1)

    answered(breaker)


def test_a_pause_ends_the_row_too(breaker: CircuitBreaker, clock: Clock) -> None:
    fails(breaker, times=FAILURES_IN_A_ROW - 1)
    fails(breaker, Busy(1))
    clock.now += 1
    answered(breaker)

    fails(breaker, times=FAILURES_IN_A_ROW - 1)

    answered(breaker)


def test_one_request_probes_and_the_others_wait_for_it(breaker: CircuitBreaker, clock: Clock) -> None:
    fails(breaker, Busy(7))
    clock.now += 7

    with breaker.guard():
        assert breaker.seconds_left == 0
        for _ in range(100):
            assert refused(breaker) == WHILE_PROBING

    answered(breaker)


def test_a_probe_without_an_answer_begins_it_anew(breaker: CircuitBreaker, clock: Clock) -> None:
    fails(breaker, times=FAILURES_IN_A_ROW)
    for _ in range(3):
        clock.now += FAILURE_PAUSE
        fails(breaker)
        assert refused(breaker) == FAILURE_PAUSE

    clock.now += FAILURE_PAUSE
    answered(breaker)
    answered(breaker)


def test_a_probe_with_a_429_begins_it_anew(breaker: CircuitBreaker, clock: Clock) -> None:
    fails(breaker, Busy(7))
    clock.now += 7

    fails(breaker, Busy(3))

    assert refused(breaker) == 3


def test_a_cancelled_probe_locks_nobody_out(breaker: CircuitBreaker, clock: Clock) -> None:
    fails(breaker, Busy(7))
    clock.now += 7

    with pytest.raises(asyncio.CancelledError), breaker.guard():
        raise asyncio.CancelledError
    # It found out nothing: the next request is the probe, and the only one.
    with breaker.guard():
        refused(breaker)

    answered(breaker)


def test_a_cancelled_request_is_no_failure(breaker: CircuitBreaker) -> None:
    fails(breaker, times=FAILURES_IN_A_ROW - 1)
    with pytest.raises(asyncio.CancelledError), breaker.guard():
        raise asyncio.CancelledError

    answered(breaker)


def begun(breaker: CircuitBreaker, error: OneInboxError | None = None) -> Iterator[None]:
    """A request that is under way from the first step to the second."""
    with breaker.guard():
        yield
        if error is not None:
            raise error


def test_what_was_sent_before_the_pause_does_not_lengthen_it(breaker: CircuitBreaker, clock: Clock) -> None:
    under_way = [begun(breaker, NO_ANSWER) for _ in range(5 * FAILURES_IN_A_ROW)]
    for request in under_way:
        next(request)
    for request in under_way[:FAILURES_IN_A_ROW]:
        assert_fails(request)
    assert breaker.seconds_left == FAILURE_PAUSE

    clock.now += 1
    for request in under_way[FAILURES_IN_A_ROW : 3 * FAILURES_IN_A_ROW]:
        assert_fails(request)
    assert breaker.seconds_left == FAILURE_PAUSE - 1

    clock.now += FAILURE_PAUSE
    answered(breaker)
    for request in under_way[3 * FAILURES_IN_A_ROW :]:
        assert_fails(request)
    answered(breaker)


def test_an_answer_to_what_was_sent_before_the_pause_does_not_end_it(breaker: CircuitBreaker) -> None:
    under_way = begun(breaker)
    next(under_way)
    fails(breaker, Busy(7))

    assert next(under_way, None) is None

    assert refused(breaker) == 7


@pytest.mark.parametrize(("first", "second"), [(7, 3), (3, 7)])
def test_of_two_pauses_the_longer_counts(first: int, second: int, breaker: CircuitBreaker) -> None:
    under_way = begun(breaker, Busy(second))
    next(under_way)
    fails(breaker, Busy(first))

    assert_fails(under_way)

    assert refused(breaker) == 7


def test_a_good_probe_does_not_end_a_pause_asked_for_meanwhile(breaker: CircuitBreaker, clock: Clock) -> None:
    under_way = begun(breaker, Busy(30))
    next(under_way)
    fails(breaker, Busy(7))
    clock.now += 7
    with breaker.guard():
        assert_fails(under_way)

    assert refused(breaker) == 30
    clock.now += 30
    answered(breaker)
    answered(breaker)


def assert_fails(request: Iterator[None]) -> None:
    with pytest.raises(OneInboxError):
        next(request)


def test_beginning_and_end_are_said_once(breaker: CircuitBreaker, clock: Clock, logs: Logs) -> None:
    fails(breaker, times=FAILURES_IN_A_ROW)
    for _ in range(3):
        refused(breaker)
        clock.now += FAILURE_PAUSE
        fails(breaker)
    clock.now += FAILURE_PAUSE
    answered(breaker)
    answered(breaker)

    assert [entry["event"] for entry in logs] == ["oneinbox_paused", "oneinbox_recovered"]


NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
PAUSES: dict[str, tuple[str | None, int]] = {
    "missing": (None, DEFAULT_PAUSE),
    "empty": ("", DEFAULT_PAUSE),
    "seconds": ("7", 7),
    "blanks": (" 7\t", 7),
    "leading-zeros": ("007", 7),
    "zero": ("0", 1),
    "an-hour": ("3600", LONGEST_PAUSE),
    "beyond-all-numbers": ("9" * 5000, LONGEST_PAUSE),
    "negative": ("-3", DEFAULT_PAUSE),
    "fraction": ("1.5", DEFAULT_PAUSE),
    "other-digits": ("٣", DEFAULT_PAUSE),
    "nonsense": ("soon", DEFAULT_PAUSE),
    "date": ("Sun, 01 Mar 2026 12:00:20 GMT", 20),
    "date-of-rfc-850": ("Sunday, 01-Mar-26 12:00:20 GMT", 20),
    "date-of-asctime": ("Sun Mar  1 12:00:20 2026", 20),
    "date-now": ("Sun, 01 Mar 2026 12:00:00 GMT", 1),
    "date-gone-by": ("Wed, 21 Oct 2015 07:28:00 GMT", 1),
    "date-far-off": ("Wed, 21 Oct 2099 07:28:00 GMT", LONGEST_PAUSE),
    "no-such-date": ("Sun, 31 Feb 2026 12:00:20 GMT", DEFAULT_PAUSE),
    "no-such-year": ("Sun, 01 Mar 99999 12:00:20 GMT", DEFAULT_PAUSE),
}


@pytest.fixture
def far_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine nine hours ahead of UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC-9")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_east")
@pytest.mark.parametrize(("value", "seconds"), PAUSES.values(), ids=PAUSES.keys())
def test_a_retry_after(value: str | None, seconds: int) -> None:
    assert parse_retry_after(value, NOW.timestamp()) == seconds


def test_a_retry_after_within_a_second() -> None:
    assert parse_retry_after(format_datetime(NOW, usegmt=True), NOW.timestamp() - 6.5) == 7


@given(st.text(max_size=60) | st.text("SunMar 0123456789:,+-GMT", max_size=40))
def test_any_retry_after_is_bounded(value: str) -> None:
    assert 1 <= parse_retry_after(value, NOW.timestamp()) <= LONGEST_PAUSE


ERRORS = {"500": 500, "503": 503, "404": 404, "401": 401, "302": 302, "no-session": 200}


@pytest.mark.parametrize("status", ERRORS.values(), ids=ERRORS.keys())
async def test_every_status_but_429_is_an_answer(status: int, breaker: CircuitBreaker, upstream: Upstream) -> None:
    oneinbox = client(breaker, upstream)
    upstream.start.mock(side_effect=httpx.ConnectError(""))
    for _ in range(FAILURES_IN_A_ROW - 1):
        with pytest.raises(Unreachable):
            await start(oneinbox)
    upstream.start.mock(return_value=httpx.Response(status))
    with pytest.raises(OneInboxError):
        await start(oneinbox)

    upstream.start.mock(side_effect=httpx.ConnectError(""))
    for _ in range(FAILURES_IN_A_ROW):
        with pytest.raises(Unreachable):
            await start(oneinbox)
    with pytest.raises(CircuitOpen):
        await start(oneinbox)


async def test_what_is_refused_is_not_sent(breaker: CircuitBreaker, upstream: Upstream) -> None:
    oneinbox = client(breaker, upstream)
    upstream.start.respond(429, headers={"Retry-After": "7"})
    with pytest.raises(Busy):
        await start(oneinbox)

    for _ in range(5):
        with pytest.raises(CircuitOpen):
            await start(oneinbox)

    assert upstream.start.call_count == 1


class Telling(httpx.AsyncBaseTransport):
    """Answers every read with this status; None: cannot be reached."""

    status: int | None = 200

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.status is None:
            raise httpx.ConnectError("")
        return httpx.Response(self.status, json={"id": "call_1", "items": []})


async def test_reads_neither_begin_it_nor_mind_it(breaker: CircuitBreaker) -> None:
    transport = Telling()
    oneinbox = client(breaker, transport)
    reads = (lambda: oneinbox.get_call("call_1"), lambda: oneinbox.stop_call("call_1"), oneinbox.list_calls)
    for transport.status in (429, *[None] * FAILURES_IN_A_ROW):
        for read in reads:
            with pytest.raises(OneInboxError):
                await read()
    assert breaker.seconds_left == 0
    answered(breaker)

    fails(breaker, Busy(7))
    transport.status = 200
    for read in reads:
        await read()
    # Nor do their answers say anything of starting calls.
    assert refused(breaker) == 7


async def test_a_cancelled_caller_of_the_probe(breaker: CircuitBreaker, clock: Clock, upstream: Upstream) -> None:
    async def never(_: httpx.Request) -> httpx.Response:
        arrived.set()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    arrived = asyncio.Event()
    oneinbox = client(breaker, upstream)
    fails(breaker, Busy(7))
    clock.now += 7
    upstream.start.mock(side_effect=never)
    probe = asyncio.create_task(start(oneinbox))
    await arrived.wait()
    with pytest.raises(CircuitOpen):
        await start(oneinbox)

    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    upstream.works_again()

    await start(oneinbox)
    await start(oneinbox)


def client(breaker: CircuitBreaker, transport: httpx.AsyncBaseTransport) -> OneInbox:
    return OneInbox(ONEINBOX, SecretStr(API_KEY), transport, timeout=15, connect_timeout=3, breaker=breaker)


async def start(oneinbox: OneInbox) -> None:
    await oneinbox.start_web_call(agent_id="agt_1", variables={}, overrides={}, metadata={})
