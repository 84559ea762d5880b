"""OneInbox's own allowance: who asks for it and when, what counts as known, and when it refuses."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from app.clock import Clock
from app.limits import Allowance
from app.limits.allowance import ASK_SECONDS, KEPT_SECONDS, LOOK_SECONDS, READING
from app.oneinbox import OneInbox
from app.problems import Problem
from app.store import StoreUnavailable
from app.store.memory import MemoryStore
from app.telemetry.metrics import Metrics
from tests.conftest import Logs
from tests.support.harness import ONEINBOX, Upstream
from tests.support.simulated_time import in_simulated_time

EIGHT = 1_800_000_000.0
"""08:00 UTC on some day."""
TO_MIDNIGHT = 16 * 3600
NONE_LEFT = {"calls_made_today": 100, "max_calls_per_day": 100, "calls_remaining_today": 0}
SOME_LEFT = {"calls_made_today": 40, "max_calls_per_day": 100, "calls_remaining_today": 60}
OPEN = ("open", None)


class Losable(MemoryStore):
    """A store that can go away: decisions are then made by each replica for itself, and values are not answered."""

    gone = False

    async def get(self, name: str) -> bytes | None:
        if self.gone:
            raise StoreUnavailable("gone")
        return await super().get(name)

    async def set(self, name: str, value: bytes, ttl: float) -> None:
        if self.gone:
            raise StoreUnavailable("gone")
        await super().set(name, value, ttl)


class World:
    """One store, one account and its usage, and replicas. Time passes when a test says so."""

    def __init__(self, passed: Callable[[], float] | None = None) -> None:
        self.passed = 0.0
        self._passed = passed or (lambda: self.passed)
        self.store = Losable(self._passed)
        self.upstream = Upstream()
        self.metrics = Metrics()
        self.says(SOME_LEFT)

    def says(self, usage: Any, status: int = 200) -> None:
        """Have OneInbox answer this from now on."""
        self.upstream.usage.respond(status, json=usage)

    @property
    def asked(self) -> int:
        """How often OneInbox was asked."""
        return self.upstream.usage.call_count

    def replica(self, skew: float = 0) -> Allowance:
        """A replica whose wall clock is off by `skew` seconds."""
        oneinbox = OneInbox(ONEINBOX, SecretStr("oi_sk_x"), self.upstream, timeout=5, connect_timeout=1)
        clock = Clock(lambda: EIGHT + self._passed() + skew, self._passed)
        return Allowance(self.store, oneinbox, clock=clock, metrics=self.metrics)

    async def read(self, *replicas: Allowance, after: float = ASK_SECONDS) -> None:
        """Time passes, and each replica looks."""
        self.passed += after
        for replica in replicas:
            await replica.refresh()

    @property
    def refusals(self) -> dict[tuple[str, str], float]:
        """What the metrics count as refused, by limit and whether it was enforced."""
        families = text_string_to_metric_families(self.metrics.text("")[0].decode())
        samples = [sample for family in families for sample in family.samples]
        return {
            (sample.labels["limit"], sample.labels["enforced"]): sample.value
            for sample in samples
            if sample.name == "broker_limits_refused_total"
        }


@pytest.fixture
def world() -> World:
    return World()


def verdict(allowance: Allowance) -> tuple[str, str | None]:
    """How a session fares: `open`, or a problem's slug; and its Retry-After."""
    try:
        allowance.check()
    except Problem as problem:
        return problem.slug, problem.headers.get("Retry-After")
    return OPEN


# Refusing


async def test_none_left_refuses_for_a_minute_at_most(world: World) -> None:
    allowance = world.replica()
    world.says(NONE_LEFT)
    assert verdict(allowance) == OPEN, "nothing is known yet"

    await world.read(allowance)

    assert verdict(allowance) == ("at-capacity", "60")
    assert world.refusals == {("oneinbox-calls", "true"): 1}


async def test_calls_that_are_left_refuse_nobody(world: World) -> None:
    allowance = world.replica()
    world.says({**NONE_LEFT, "calls_remaining_today": 1})
    await world.read(allowance)
    assert verdict(allowance) == OPEN
    assert (allowance.left, allowance.cap) == (1, 100)
    assert world.refusals == {}


async def test_a_refused_client_waits_no_longer_than_the_day_lasts(world: World) -> None:
    allowance = world.replica()
    world.says(NONE_LEFT)
    await world.read(allowance, after=TO_MIDNIGHT - 40)
    assert verdict(allowance) == ("at-capacity", "40")
    world.passed += 39.5
    assert verdict(allowance) == ("at-capacity", "1")


async def test_what_was_read_yesterday_refuses_nobody_today(world: World) -> None:
    allowance = world.replica()
    world.says(NONE_LEFT)
    await world.read(allowance, after=TO_MIDNIGHT - 1)
    world.passed += 1
    assert verdict(allowance) == OPEN
    assert (allowance.left, allowance.cap) == (None, None)


async def test_a_question_before_midnight_answers_for_the_day_before(world: World) -> None:
    allowance = world.replica()

    def late(_: httpx.Request) -> httpx.Response:
        world.passed += 2
        return httpx.Response(200, json=NONE_LEFT)

    world.upstream.usage.mock(side_effect=late)
    await world.read(allowance, after=TO_MIDNIGHT - 1)
    assert verdict(allowance) == OPEN


async def test_a_replica_whose_clock_is_ahead_is_believed(world: World) -> None:
    ahead, right = world.replica(skew=600), world.replica()
    world.says(NONE_LEFT)
    await world.read(ahead, right, after=TO_MIDNIGHT - 300)
    assert world.asked == 1
    assert verdict(right) == ("at-capacity", "60")


async def test_more_calls_are_noticed_within_a_minute(world: World) -> None:
    allowance = world.replica()
    world.says(NONE_LEFT)
    await world.read(allowance)
    world.says({**NONE_LEFT, "max_calls_per_day": 200, "calls_remaining_today": 100})
    await world.read(allowance, after=ASK_SECONDS - 2)
    assert verdict(allowance) == ("at-capacity", "60")
    await world.read(allowance, after=2)
    assert verdict(allowance) == OPEN


async def test_the_log_says_once_that_none_are_left(world: World, logs: Logs) -> None:
    allowance = world.replica()
    world.says(NONE_LEFT)
    for _ in range(3):
        await world.read(allowance)
    assert [entry for entry in logs if entry["event"] == "allowance_used_up"] == [
        {"event": "allowance_used_up", "log_level": "warning", "of": 100}
    ]


# Asking


@in_simulated_time
async def test_two_replicas_ask_once_a_minute_in_all_and_both_know() -> None:
    loop = asyncio.get_running_loop()
    world = World(loop.time)
    one, two = world.replica(), world.replica()
    tasks = [asyncio.create_task(replica.run()) for replica in (one, two)]
    await asyncio.gather(one.ready.wait(), two.ready.wait())
    assert world.asked == 1, "at the start, once"

    world.says(NONE_LEFT)
    await asyncio.sleep(10 * ASK_SECONDS - 1)
    assert world.asked == 10
    assert verdict(one) == verdict(two) == ("at-capacity", "60")

    world.says(SOME_LEFT)
    await asyncio.sleep(ASK_SECONDS + LOOK_SECONDS)
    assert (one.left, two.left) == (60, 60)
    for task in tasks:
        task.cancel()


async def test_a_new_replica_knows_at_once_what_another_has_read(world: World) -> None:
    world.says(NONE_LEFT)
    await world.read(world.replica())
    new = world.replica()
    await world.read(new, after=10)
    assert world.asked == 1
    assert verdict(new) == ("at-capacity", "60")


async def test_without_the_store_each_replica_asks_for_itself(world: World) -> None:
    allowance = world.replica()
    world.store.gone = True
    world.says(NONE_LEFT)
    with pytest.raises(StoreUnavailable):
        await world.read(allowance)
    assert verdict(allowance) == ("at-capacity", "60")


async def test_a_reading_that_the_store_has_lost_counts_on(world: World) -> None:
    allowance = world.replica()
    world.says(NONE_LEFT)
    await world.read(allowance)
    await world.store.delete(READING)
    await world.read(allowance, after=5)
    assert verdict(allowance) == ("at-capacity", "60")


@in_simulated_time
async def test_a_store_that_is_gone_for_a_while_is_no_error(logs: Logs) -> None:
    loop = asyncio.get_running_loop()
    world = World(loop.time)
    world.store.gone = True
    allowance = world.replica()
    task = asyncio.create_task(allowance.run())
    await asyncio.sleep(2 * ASK_SECONDS)
    task.cancel()
    assert world.asked == 2
    assert logs == []


@in_simulated_time
async def test_it_goes_on_after_what_it_did_not_expect() -> None:
    loop = asyncio.get_running_loop()
    world = World(loop.time)
    allowance = world.replica()
    world.upstream.usage.mock(side_effect=RuntimeError("a bug"))
    task = asyncio.create_task(allowance.run())
    await allowance.ready.wait()
    world.store.gone = True
    await asyncio.sleep(ASK_SECONDS)
    world.store.gone = False
    world.upstream.usage.mock(side_effect=None, return_value=httpx.Response(200, json=NONE_LEFT))
    await asyncio.sleep(ASK_SECONDS)
    assert verdict(allowance) == ("at-capacity", "60")
    task.cancel()


# What is not to be watched

NO_CAP = {
    "zero": {**NONE_LEFT, "max_calls_per_day": 0},
    "null": {**NONE_LEFT, "max_calls_per_day": None},
    "null-and-negative": {"max_calls_per_day": None, "calls_remaining_today": -1},
}


@pytest.mark.parametrize("usage", NO_CAP.values(), ids=NO_CAP.keys())
async def test_an_account_without_a_cap_is_not_watched(world: World, usage: Any, logs: Logs) -> None:
    allowance = world.replica()
    world.says(usage)
    await world.read(allowance)
    assert verdict(allowance) == OPEN
    assert (allowance.left, allowance.cap) == (None, None)
    assert logs == []


OTHER_SHAPES = {
    "negative-cap": {**NONE_LEFT, "max_calls_per_day": -1},
    "huge-cap": {**NONE_LEFT, "max_calls_per_day": 10**12},
    "text-for-a-cap": {**NONE_LEFT, "max_calls_per_day": "100"},
    "yes-for-a-cap": {**NONE_LEFT, "max_calls_per_day": True},
    "no-cap-at-all": {"calls_remaining_today": 0},
    "empty": {},
    "list": [NONE_LEFT],
    "text": "none",
    "null": None,
}


@pytest.mark.parametrize("usage", OTHER_SHAPES.values(), ids=OTHER_SHAPES.keys())
async def test_another_shape_is_not_watched(world: World, usage: Any, logs: Logs) -> None:
    allowance = world.replica()
    world.says(usage)
    for _ in range(3):
        await world.read(allowance)
    assert verdict(allowance) == OPEN
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("allowance_not_watched", "info")]


async def test_no_json_is_not_watched(world: World) -> None:
    allowance = world.replica()
    world.upstream.usage.respond(text="<html>")
    await world.read(allowance)
    assert verdict(allowance) == OPEN


UNKNOWN_REST = {
    "negative": {"max_calls_per_day": 100, "calls_remaining_today": -1},
    "huge": {"max_calls_per_day": 100, "calls_remaining_today": 10**400},
    "text": {"max_calls_per_day": 100, "calls_remaining_today": "0"},
    "no": {"max_calls_per_day": 100, "calls_remaining_today": False},
    "missing": {"max_calls_per_day": 100},
}


@pytest.mark.parametrize("usage", UNKNOWN_REST.values(), ids=UNKNOWN_REST.keys())
async def test_an_unusable_rest_refuses_nobody(world: World, usage: Any) -> None:
    allowance = world.replica()
    world.says(usage)
    await world.read(allowance)
    assert verdict(allowance) == OPEN
    assert allowance.left is None


@pytest.mark.parametrize(("made", "left"), [(105, 0), (100, 0), (3, 97), (-1, None)])
async def test_without_a_usable_rest_the_calls_made_say_it(world: World, made: int, left: int | None) -> None:
    allowance = world.replica()
    world.says({"calls_made_today": made, "max_calls_per_day": 100, "calls_remaining_today": -5})
    await world.read(allowance)
    assert allowance.left == left


@pytest.mark.parametrize("status", [403, 404, 405])
async def test_an_account_without_the_route_is_not_watched_and_told_once(world: World, status: int, logs: Logs) -> None:
    one, two = world.replica(), world.replica()
    world.says({"detail": "no"}, status)
    for _ in range(3):
        await world.read(one, two)
    assert verdict(one) == verdict(two) == OPEN
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("allowance_not_watched", "info")]


async def test_a_route_that_goes_away_ends_the_watch(world: World) -> None:
    one, two = world.replica(), world.replica()
    world.says(NONE_LEFT)
    await world.read(one, two)
    world.says({"detail": "no"}, 404)
    await world.read(one, two)
    assert verdict(one) == verdict(two) == OPEN


# What passes


FAILURES = {
    "500": httpx.Response(500),
    "503": httpx.Response(503),
    "401": httpx.Response(401),
    "429": httpx.Response(429),
    "302": httpx.Response(302, headers={"Location": "https://elsewhere.example"}),
    "timeout": httpx.ReadTimeout(""),
    "refused": httpx.ConnectError(""),
    "cut": httpx.ReadError(""),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
async def test_a_failure_leaves_the_last_reading_for_a_few_minutes(
    world: World, failure: httpx.Response | Exception
) -> None:
    one, two = world.replica(), world.replica()
    world.says(NONE_LEFT)
    await world.read(one, two)
    answers = {"side_effect": failure} if isinstance(failure, Exception) else {"return_value": failure}
    world.upstream.usage.mock(**answers)
    for _ in range(2):
        await world.read(one, two)
        assert verdict(one) == verdict(two) == ("at-capacity", "60")
    await world.read(one, two, after=KEPT_SECONDS - 2 * ASK_SECONDS)
    assert verdict(one) == verdict(two) == OPEN
    assert world.asked == 4


# The store


@pytest.mark.parametrize(
    "value",
    [b"", b"{", b"[]", b'{"v": 2}', b'{"v": 1, "left": "0", "cap": null}', b'{"v": 1, "left": 0, "cap": 1, "at": "x"}'],
)
async def test_what_another_version_wrote_is_skipped(world: World, value: bytes, logs: Logs) -> None:
    allowance = world.replica()
    await world.read(allowance)
    await world.store.set(READING, value, KEPT_SECONDS)
    await world.read(allowance, after=5)
    assert allowance.left == 60
    assert [entry["event"] for entry in logs] == ["store_record_skipped"]


# Metrics


def test_metrics_say_not_a_number_before_anything_is_known() -> None:
    lines = Metrics().text("")[0].decode().splitlines()
    assert {"broker_oneinbox_calls_remaining NaN", "broker_oneinbox_calls_per_day NaN"} <= set(lines)
