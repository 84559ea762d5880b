"""Rates and slots of requests and sessions, by an injected clock: what is allowed, and what refusals say."""

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.config.agents import Agent
from app.config.plans import Entitlement, OrganizationLimits
from app.identity import User
from app.limits import Limits, Refused, Reservation
from app.limits.call_attempt import CallAttempt
from app.limits.headers import policy_header, policy_name
from app.limits.ledger import Ledger
from app.problems import Problem
from app.store import Rate
from app.store.failover import FailoverStore
from app.store.memory import MemoryStore
from app.store.valkey import ValkeyStore

ANN, BEN = User(mode="jwt", id="ann"), User(mode="jwt", id="ben")
MAIN = Agent("main", "agt_main", None, frozenset())
SMALL = Agent("small", "agt_small", None, frozenset(), session_limits="1/minute", max_live_calls=2)
LEASE = 3900.0
NOWHERE = "redis://127.0.0.1:1"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """Limits on a store in memory, and a clock that both go by. Members are numbered."""

    def __init__(
        self,
        *,
        sessions: str = "1000/minute",
        everybody: str = "1000/minute",
        requests: str = "1000/minute",
        live: int = 1000,
        live_total: int | None = None,
        enforce: bool = True,
    ) -> None:
        self.clock = Clock()
        self.store = MemoryStore(self.clock)
        self.entitlement = Entitlement(sessions, live, None, 3600)
        self.limits = Limits(
            self.store,
            Ledger(self.store, lease=LEASE, now=self.clock),
            [MAIN, SMALL],
            global_session_limits=everybody,
            request_limits=requests,
            max_live_calls_total=live_total,
            enforce=enforce,
            clock=self.clock,
        )
        self._members = 0

    def of(self, organization: str, **shared: Any) -> Entitlement:
        """What a user of an organization is entitled to."""
        return self.entitlement._replace(organization=organization, organization_limits=OrganizationLimits(**shared))

    async def reserve(
        self, user: User = ANN, agent: Agent = MAIN, entitlement: Entitlement | None = None
    ) -> Reservation:
        self._members += 1
        entitlement = entitlement or self.entitlement
        attempt = CallAttempt(
            f"m{self._members}", int(self.clock.now), agent.name, user.store_name, "pseudonym", entitlement.organization
        )
        return await self.limits.reserve(user, agent, attempt, entitlement)

    async def refusal(self, user: User = ANN, agent: Agent = MAIN, entitlement: Entitlement | None = None) -> Problem:
        try:
            await self.reserve(user, agent, entitlement)
        except Refused as refused:
            return refused.problem
        except Problem as problem:
            return problem
        raise AssertionError("was let in")

    async def used_by_all(self) -> int:
        return (await self.limits.usage())[0][1]


def numbers(headers: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """What is left and for how many seconds, by policy."""
    found = re.findall(r'"([a-z0-9-]+)";r=(\d+);t=(\d+)', headers["RateLimit"])
    return {name: (int(left), int(seconds)) for name, left, seconds in found}


def wait(problem: Problem) -> int:
    return int(problem.headers["Retry-After"])


# --- rates ---


async def test_the_edge_of_a_window_is_no_way_to_ten() -> None:
    desk = Desk(sessions="5/minute")
    desk.clock.now = 59.9
    for _ in range(5):
        await desk.reserve()
    desk.clock.now = 60.1  # another minute by the clock on the wall

    assert (await desk.refusal()).slug == "rate-limited"
    desk.clock.now = 119.8
    assert (await desk.refusal()).slug == "rate-limited"
    desk.clock.now = 119.95
    for _ in range(5):
        await desk.reserve()
    assert (await desk.refusal()).slug == "rate-limited"


@given(st.lists(st.floats(0, 40), min_size=1, max_size=60), st.sampled_from(["5/minute", "3/minute;8/2 minutes"]))
async def test_never_more_than_n_in_any_window(gaps: list[float], limits: str) -> None:
    desk = Desk(sessions=limits)
    taken: list[float] = []
    for gap in gaps:
        desk.clock.now += gap
        try:
            await desk.reserve()
        except Refused:
            continue
        taken.append(desk.clock.now)
    bounds = {60: 5} if limits == "5/minute" else {60: 3, 120: 8}
    for span, most in bounds.items():
        assert all(len([other for other in taken if time <= other < time + span]) <= most for time in taken)


@given(st.lists(st.floats(0, 30), min_size=5, max_size=30))
async def test_who_waits_as_told_gets_in(gaps: list[float]) -> None:
    desk = Desk(sessions="5/minute;8/2 minutes")
    refused: Refused | None = None
    for gap in [*gaps, *[0.0] * 8]:
        desk.clock.now += gap
        try:
            await desk.reserve()
        except Refused as caught:
            refused = caught
            break
    assert refused is not None
    seconds = wait(refused.problem)
    assert seconds >= max(1, *(reset for left, reset in numbers(refused.problem.headers).values() if left == 0))
    told = desk.clock.now
    desk.clock.now = told + seconds - 1.001
    assert (await desk.refusal()).slug == "rate-limited", "Retry-After is no longer than needed"
    desk.clock.now = told + seconds
    await desk.reserve()


async def test_users_have_budgets_of_their_own() -> None:
    desk = Desk(sessions="1/minute")
    await desk.reserve(ANN)
    assert (await desk.refusal(ANN)).slug == "rate-limited"
    await desk.reserve(BEN)
    for other in (
        User(mode="header", id="ann"),
        User(mode="jwt", id="ann", issuer="x"),
        User(mode="anonymous", id="ann"),
    ):
        await desk.reserve(other)


async def test_headers_tell_the_users_own_limits_and_the_closest_first() -> None:
    desk = Desk(sessions="5/minute;50/day", everybody="7/minute;70/day")
    reservation = await desk.reserve(agent=SMALL)
    assert reservation.headers == {
        "RateLimit-Policy": '"user-minute";q=5;w=60, "user-day";q=50;w=86400, "agent-minute";q=1;w=60',
        "RateLimit": '"agent-minute";r=0;t=60, "user-minute";r=4;t=60, "user-day";r=49;t=86400',
    }
    assert (await desk.reserve()).headers["RateLimit"] == '"user-minute";r=3;t=60, "user-day";r=48;t=86400'


def test_a_policy_of_an_odd_window_is_named_by_its_seconds() -> None:
    rate = Rate("x", 3, 90)
    assert policy_name("user", rate) == "user-90s"
    assert policy_header([("user-90s", rate)]) == '"user-90s";q=3;w=90'


# --- all or nothing ---


@pytest.mark.parametrize(
    ("desk", "agent", "slug"),
    [
        (Desk(sessions="2/minute"), MAIN, "rate-limited"),
        (Desk(), SMALL, "rate-limited"),
        (Desk(everybody="2/minute"), MAIN, "at-capacity"),
        (Desk(live=2), MAIN, "too-many-live-calls"),
        (Desk(live_total=2), MAIN, "at-capacity"),
    ],
    ids=["user", "agent", "everybody", "live", "live-in-all"],
)
async def test_a_refusal_spends_nothing_anywhere(desk: Desk, agent: Agent, slug: str) -> None:
    used = 1 if agent is SMALL else 2
    for _ in range(used):
        await desk.reserve(agent=agent)

    for _ in range(20):
        problem = await desk.refusal(agent=agent)
        assert problem.slug == slug
        assert wait(problem) >= 1
        assert await desk.used_by_all() == used
        assert numbers(problem.headers)["user-minute"][0] == (
            0 if desk.entitlement.session_limits == "2/minute" else 1000 - used
        )
        assert len(await desk.store.members("live:all")) == used
        assert len(await desk.store.members(f"live:user:{ANN.store_name}")) == used
        assert len(await desk.store.members(f"live:agent:{agent.name}")) == used


async def test_what_is_given_back_can_be_had_again() -> None:
    desk = Desk(sessions="1/minute", everybody="1/minute", live=1, live_total=1)
    reservation = await desk.reserve()
    assert (await desk.refusal()).slug == "rate-limited"

    await desk.limits.release(reservation)

    assert await desk.used_by_all() == 0
    assert await desk.store.members("live:all") == {}
    await desk.reserve()


async def test_giving_back_late_frees_nobody_elses_place() -> None:
    desk = Desk(sessions="1/minute", live=1)
    first = await desk.reserve()
    desk.clock.now += LEASE + 1  # the first one's slot and window are long gone
    second = await desk.reserve()

    await desk.limits.release(first)

    assert (await desk.refusal()).slug == "rate-limited"
    assert list(await desk.store.members("live:all")) == [second.request.member]


# --- everybody's limits ---


async def test_everybodys_limit_is_nobodys_business() -> None:
    desk = Desk(everybody="3/minute;30/day")
    for user in (ANN, BEN, ANN):
        await desk.reserve(user)
    desk.clock.now += 12.5

    problem = await desk.refusal(BEN)

    assert problem.slug == "at-capacity"
    assert wait(problem) == 48
    assert numbers(problem.headers) == {"user-minute": (999, 48)}
    desk.clock.now += 47.5
    await desk.reserve(BEN)


async def test_the_users_own_limit_is_told_first() -> None:
    desk = Desk(sessions="1/minute", everybody="1/day", live=1, live_total=1)
    await desk.reserve()
    problem = await desk.refusal()
    assert problem.slug == "rate-limited"
    assert wait(problem) == 60, "and nothing of the day that all share"
    assert (await desk.refusal(BEN)).slug == "at-capacity"


async def test_nearly_used_up_is_said_once_per_window() -> None:
    desk = Desk(everybody="10/minute")
    expected = {"event": "global_limit_nearly_reached", "log_level": "warning", "limit": "global-minute", "of": 10}
    with capture_logs() as logs:
        for _ in range(7):
            await desk.reserve()
        assert logs == []
        await desk.reserve()
        assert logs == [expected | {"used": 8}]
        for _ in range(2):
            await desk.reserve()
        for _ in range(5):
            await desk.refusal()
        assert len(logs) == 1
        desk.clock.now += 61
        for _ in range(9):
            await desk.reserve()
        assert len(logs) == 2


# --- live calls ---


async def test_slots_are_each_users_own() -> None:
    desk = Desk(live=2)
    for _ in range(2):
        await desk.reserve(ANN)
    problem = await desk.refusal(ANN)
    assert (problem.slug, wait(problem)) == ("too-many-live-calls", 10)
    for _ in range(2):
        await desk.reserve(BEN)
    assert (await desk.refusal(BEN)).slug == "too-many-live-calls"


async def test_an_agents_slots_are_shared_by_all_users() -> None:
    desk = Desk()
    await desk.reserve(ANN, SMALL)
    await desk.reserve(BEN, SMALL)
    desk.clock.now += 61
    problem = await desk.refusal(User(mode="jwt", id="eve"), SMALL)
    assert (problem.slug, wait(problem)) == ("at-capacity", 10)
    await desk.reserve(ANN, MAIN)


async def test_an_agents_rate_is_for_each_user() -> None:
    desk = Desk()
    await desk.reserve(ANN, SMALL)
    problem = await desk.refusal(ANN, SMALL)
    assert (problem.slug, wait(problem)) == ("rate-limited", 60)
    assert numbers(problem.headers)["agent-minute"] == (0, 60)
    await desk.reserve(ANN, MAIN)
    await desk.reserve(BEN, SMALL)


async def test_live_calls_in_all() -> None:
    desk = Desk(live_total=2)
    await desk.reserve(ANN)
    reservation = await desk.reserve(BEN)
    problem = await desk.refusal(ANN)
    assert (problem.slug, wait(problem)) == ("at-capacity", 10)
    await desk.limits.release(reservation)
    await desk.reserve(ANN)


async def test_a_slot_nobody_confirms_is_free_after_its_lease() -> None:
    desk = Desk(live=1)
    await desk.reserve()
    desk.clock.now += LEASE - 0.01
    assert (await desk.refusal()).slug == "too-many-live-calls"
    desk.clock.now += 0.02
    newer = await desk.reserve()
    # The end of the first lease was no end of the second.
    desk.clock.now += LEASE - 1
    assert list(await desk.store.members("live:all")) == [newer.request.member]
    assert (await desk.refusal()).slug == "too-many-live-calls"


# --- plans and organizations ---


async def test_each_user_has_the_limits_of_a_plan() -> None:
    desk = Desk(sessions="1/minute", live=1)
    more = desk.entitlement._replace(session_limits="2/minute;3/hour", max_live_calls=5, plan="pro")
    await desk.reserve(ANN)
    assert (await desk.refusal(ANN)).slug == "rate-limited"
    for left in (1, 0):
        headers = (await desk.reserve(BEN, MAIN, more)).headers
        assert numbers(headers)["user-minute"][0] == left
    problem = await desk.refusal(BEN, MAIN, more)
    assert numbers(problem.headers) == {"user-minute": (0, 60), "user-hour": (1, 3600)}


async def test_a_new_plan_forgets_no_session() -> None:
    desk = Desk(sessions="2/minute")
    more = desk.entitlement._replace(session_limits="3/minute", plan="pro")
    for _ in range(2):
        await desk.reserve()
    assert (await desk.refusal()).slug == "rate-limited"
    await desk.reserve(ANN, MAIN, more)
    assert (await desk.refusal(ANN, MAIN, more)).slug == "rate-limited"


async def test_users_of_an_organization_share_its_rates() -> None:
    desk = Desk(sessions="2/minute")
    shop, bank = desk.of("shop", session_limits="3/minute"), desk.of("bank", session_limits="3/minute")
    for user in (ANN, ANN, BEN):
        reservation = await desk.reserve(user, MAIN, shop)

    assert reservation.headers == {
        "RateLimit-Policy": '"user-minute";q=2;w=60, "org-minute";q=3;w=60',
        "RateLimit": '"org-minute";r=0;t=60, "user-minute";r=1;t=60',
    }
    problem = await desk.refusal(BEN, MAIN, shop)
    assert (problem.slug, wait(problem)) == ("rate-limited", 60)
    assert problem.detail == "Your organization has reached a limit that all of its users share."
    assert (await desk.refusal(ANN, MAIN, shop)).detail == "", "the user's own limit is told first"
    await desk.reserve(BEN, MAIN, bank)
    assert (await desk.refusal(BEN, MAIN, desk.entitlement)).slug == "rate-limited", (
        "an own limit is of no organization"
    )
    await desk.reserve(User(mode="jwt", id="eve"), MAIN, desk.entitlement)


async def test_users_of_an_organization_share_its_slots() -> None:
    desk = Desk(live=2)
    shop = desk.of("shop", max_live_calls=3)
    last = [await desk.reserve(user, MAIN, shop) for user in (ANN, ANN, BEN)][-1]

    problem = await desk.refusal(BEN, MAIN, shop)

    assert (problem.slug, wait(problem)) == ("too-many-live-calls", 10)
    assert problem.detail == "Your organization has reached a limit that all of its users share."
    assert (await desk.refusal(ANN, MAIN, shop)).detail == ""
    assert len(await desk.store.members("live:org:shop")) == 3
    await desk.reserve(BEN, MAIN, desk.of("bank", max_live_calls=3))
    await desk.limits.release(last)
    await desk.reserve(User(mode="jwt", id="eve"), MAIN, shop)


async def test_a_refusal_by_an_organizations_rate_says_so_whatever_else_is_full() -> None:
    desk = Desk(live=1)
    shop = desk.of("shop", session_limits="1/minute")
    await desk.reserve(ANN, MAIN, shop)
    problem = await desk.refusal(ANN, MAIN, shop)
    assert problem.slug == "rate-limited"
    assert problem.detail == "Your organization has reached a limit that all of its users share."


async def test_an_organization_without_a_limit_on_calls_knows_its_calls() -> None:
    desk = Desk()
    reservation = await desk.reserve(ANN, MAIN, desk.of("shop", talk_minutes=1))
    assert list(await desk.store.members("live:org:shop")) == [reservation.attempt.key]
    assert list(reservation.headers) == ["RateLimit-Policy", "RateLimit"]
    assert "org" not in reservation.headers["RateLimit"]


async def test_an_organizations_refusal_spends_nothing() -> None:
    desk = Desk(sessions="5/minute", everybody="5/minute")
    shop = desk.of("shop", session_limits="1/minute", max_live_calls=1)
    await desk.reserve(ANN, MAIN, shop)
    for _ in range(10):
        problem = await desk.refusal(BEN, MAIN, shop)
        assert numbers(problem.headers)["user-minute"] == (5, 60)
    assert await desk.used_by_all() == 1
    assert len(await desk.store.members("live:all")) == 1


async def test_an_organizations_limits_are_told_before_everybodys() -> None:
    desk = Desk(live_total=1)
    shop = desk.of("shop", max_live_calls=1)
    await desk.reserve(ANN, MAIN, shop)
    assert (await desk.refusal(BEN, MAIN, shop)).slug == "too-many-live-calls"
    assert (await desk.refusal(BEN)).slug == "at-capacity"


async def test_refusals_are_counted_by_limit_and_not_by_organization() -> None:
    desk = Desk()
    shop = desk.of("shop-of-eve", session_limits="1/minute", max_live_calls=1)
    await desk.reserve(ANN, MAIN, shop)
    await desk.refusal(BEN, MAIN, shop)
    text = desk.limits.metrics.text("")[0].decode()
    for limit in ("org-minute", "org-live-calls"):
        assert f'broker_limits_refused_total{{enforced="true",limit="{limit}"}} 1.0' in text
    assert "shop-of-eve" not in text


# --- observing ---


async def test_observing_lets_through_and_says_what_it_would_have_refused() -> None:
    desk = Desk(sessions="1/minute", everybody="1/minute", live=1, requests="1/minute", enforce=False)
    with capture_logs() as logs:
        for _ in range(3):
            await desk.reserve()
            await desk.limits.count_request(ANN)
    said = [entry["limits"] for entry in logs if entry["event"] == "would_refuse"]
    user, slot = f"rate:user:{ANN.store_name}:60", f"live:user:{ANN.store_name}"
    assert said == [[user, "rate:all:all:60", slot], [f"rate:request:{ANN.store_name}:60"]] * 2
    assert await desk.used_by_all() == 1, "as much as there is"
    assert len(await desk.store.members("live:all")) == 3


async def test_observing_does_not_let_forged_logins_through() -> None:
    desk = Desk(enforce=False)
    for _ in range(60):
        await desk.limits.count_failed_login("192.0.2.1")
    with pytest.raises(Problem, match="rate-limited"):
        await desk.limits.count_failed_login("192.0.2.1")


# --- requests and failures ---


async def test_requests_are_counted_apart_from_sessions() -> None:
    desk = Desk(requests="2/minute", sessions="1/minute")
    assert numbers(await desk.limits.count_request(ANN)) == {"request-minute": (1, 60)}
    await desk.reserve(ANN)
    await desk.limits.count_request(ANN)
    desk.clock.now += 0.4
    with pytest.raises(Refused) as caught:
        await desk.limits.count_request(ANN)
    assert caught.value.problem.slug == "rate-limited"
    assert wait(caught.value.problem) == 60
    await desk.limits.count_request(BEN)
    desk.clock.now += 59.6
    await desk.limits.count_request(ANN)


async def test_sixty_failures_an_address_and_a_minute() -> None:
    desk = Desk()
    for second in range(60):
        desk.clock.now = 1000 + second / 2
        await desk.limits.count_failed_login(f"2001:db8:1:2::{second:x}")
    with pytest.raises(Problem) as caught:
        await desk.limits.count_failed_login("2001:db8:1:2:3::1")
    assert (caught.value.slug, wait(caught.value)) == ("rate-limited", math.ceil(60 - 29.5))
    await desk.limits.count_failed_login("2001:db8:1:3::1")
    await desk.limits.count_failed_login("192.0.2.1")
    desk.clock.now = 1060
    await desk.limits.count_failed_login("2001:db8:1:2::1")


# --- without a store ---


async def test_without_its_store_sessions_may_be_refused() -> None:
    async with FailoverStore(ValkeyStore(NOWHERE), MemoryStore()) as store:
        limits = Limits(
            store,
            Ledger(store, lease=LEASE),
            [MAIN],
            global_session_limits="5/minute",
            request_limits="5/minute",
            max_live_calls_total=None,
            count_locally=False,
        )
        for number in range(3):
            attempt = CallAttempt(f"m{number}", 0, "main", ANN.store_name, "pseudonym")
            with pytest.raises(Problem) as caught:
                await limits.reserve(ANN, MAIN, attempt, Entitlement("5/minute", 1, None, 3600))
            assert (caught.value.slug, caught.value.headers) == ("at-capacity", {"Retry-After": "5"})
        assert await store.members("live:all") == {}
        assert (await limits.usage())[0][1] == 0, "nothing was counted"
        await limits.count_request(ANN)
