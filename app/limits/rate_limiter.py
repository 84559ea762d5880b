"""Check a request or session against all limits, in one store request."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache
from typing import Literal, cast

import structlog
from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit, LimitGroup

from app.config.agents import Agent
from app.config.plans import Entitlement
from app.identity import User
from app.identity.addresses import limit_key
from app.limits.call_attempt import ALL_CALLS, CallAttempt, calls_of_agent, calls_of_organization, calls_of_user
from app.limits.headers import policy_header, policy_name, rate_limit_headers
from app.limits.ledger import Ledger
from app.limits.record import no_call, reserve
from app.problems import Problem, retry_later
from app.store import BUDGET, Budget, Decision, LimitRequest, Rate, RateState, Slot, Store
from app.telemetry.metrics import Metrics

FAILED_LOGINS = 60
"""Failed logins per minute and address; further ones are refused with a 429."""
LIVE_RETRY_AFTER = 10
"""Retry-After in seconds for a live call to end: its end is not known."""
STORE_RETRY_AFTER = 5
"""Retry-After in seconds while the shared store is gone; it is reused within this time."""
NEARLY = 0.8
"""Share of a global limit that is worth a warning."""
TALK_RETRY_AFTER = 60
"""Retry-After in seconds while running calls use the last minutes: their end is not known."""
ORGANIZATION_REFUSED = "Your organization has reached a limit that all of its users share."

MINUTES = "-talk-minutes"
GLOBAL_MINUTES = f"global{MINUTES}"

CACHED_LIMITS = 256
"""Agents with the entitlements of their users, whose applicable limits are cached: without the user's name."""
ANY_USER = "\0"
"""Stands for the user's name in these; no name has it."""
CACHED_DECLARATIONS = 256
"""Texts of limits that are kept parsed: the settings', agents' and plans'."""

log = structlog.get_logger(__name__)

Owner = Literal["user", "agent", "org", "all"]
KeyFunction = Callable[[str, str, str], str]


def for_user(user: str, agent: str, organization: str) -> str:
    """Key function: a budget for each user. `user`, `organization`: names in the store; `agent`: configured name."""
    return user


def for_user_and_agent(user: str, agent: str, organization: str) -> str:
    """Key function: a budget for each user of each agent."""
    return f"{agent}:{user}"


def for_organization(user: str, agent: str, organization: str) -> str:
    """Key function: a budget for each organization."""
    return organization


def for_all(user: str, agent: str, organization: str) -> str:
    """Key function: one budget for all users."""
    return "all"


@lru_cache(CACHED_DECLARATIONS)
def declare(limits: str | None, key_function: KeyFunction, scope: Owner | Literal["request"]) -> tuple[Limit, ...]:
    """Return limits in slowapi's terms, parsed from a string such as `5/minute;50/day`; None: no limits.

    slowapi only declares them: it would decide one limit after the other, in fixed windows, and block the event loop on
    a shared store. Here the store decides about all at once.
    """
    if limits is None:
        return ()
    return tuple(LimitGroup(limits, key_function, scope, False, None, None, None, 1, False))


class Refused(RateLimitExceeded):
    """No room under a declared rate. `problem`: the answer to the browser."""

    def __init__(self, limit: Limit, problem: Problem) -> None:
        super().__init__(limit)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class UserLimits:
    """The limits that apply to each user of a kind, asked for in one request.

    `request`: without its member and lease; ANY_USER stands for the user's name. `owners` and `names` (none names a
    user or an organization): of the rates, slots and budgets. `own`: indices of the rates that the user is told: all
    but the global ones. `policy`: the header that tells them.
    """

    limits: Sequence[Limit]
    request: LimitRequest
    owners: Sequence[Owner]
    names: Sequence[str]
    own: Sequence[int]
    policy: str

    def headers(self, states: Sequence[RateState]) -> dict[str, str]:
        """Return headers that say what is left of the user's own rates; the global ones stay private."""
        return rate_limit_headers(self.policy, [(self.names[index], states[index]) for index in self.own])


@dataclass(frozen=True, slots=True)
class Reservation:
    """One session's counts, for undoing them. `headers`: what is left, for the browser."""

    attempt: CallAttempt
    request: LimitRequest
    decision: Decision
    headers: Mapping[str, str]


@dataclass(repr=False, eq=False)
class Limits:
    """Declare the limits once, and ask the store about all of them in one request.

    `ledger`: holds the records of calls. `enforce` False: log what would be refused and let it
    through. `count_locally` False: refuse sessions while the shared store is gone. `metrics`: counts refusals.
    """

    store: Store
    ledger: Ledger
    agents: Sequence[Agent]
    _: KW_ONLY
    global_session_limits: str
    request_limits: str
    max_live_calls_total: int | None
    talk_minutes_total: int | None = None
    enforce: bool = True
    count_locally: bool = True
    clock: Callable[[], float] = time.monotonic
    metrics: Metrics = field(default_factory=Metrics)
    _nearly_until: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._global = declare(self.global_session_limits, for_all, "all")
        self._agents = {agent.name: agent for agent in self.agents}
        self._requests = declare(self.request_limits, for_user, "request")
        # Not made for each user: that would take more memory than all else that is kept of them.
        self._limits_of_session = lru_cache(CACHED_LIMITS)(self._make_session_limits)
        self._limits_of_request = self._make_request_limits()

    async def count_request(self, user: User) -> dict[str, str]:
        """Count a request, whatever its outcome; return headers that say what is left. Raises Refused."""
        limits = self._limits_of_request
        request = LimitRequest(_rates_of(user.store_name, limits.request.rates), enforce=self.enforce)
        decision = await self.store.decide(request)
        headers = limits.headers(decision.rates)
        if decision.refused and not self._is_observed(limits, request, decision):
            wait = max(decision.rates[index].reset for index in decision.refused)
            problem = retry_later("rate-limited", wait, headers=headers, reason=_names(limits, decision))
            raise Refused(self._requests[decision.refused[0]], problem)
        return headers

    async def count_failed_login(self, address: str) -> None:
        """Count a failed login. Raises a 429 problem when the address has failed too often."""
        digest = hashlib.sha256(limit_key(address).encode()).hexdigest()[:32]
        decision = await self.store.decide(LimitRequest([Rate(f"rate:login:{digest}:60", FAILED_LOGINS, 60)]))
        if decision.refused:
            self.metrics.count_refusal(["failed-login"])
            raise retry_later("rate-limited", decision.rates[0].reset, "Too many failed logins.", reason="failed-login")

    async def reserve(self, user: User, agent: Agent, attempt: CallAttempt, entitlement: Entitlement) -> Reservation:
        """Count a session against every limit and take its live slots, or do nothing.

        `entitlement`: the limits of the user and of the user's organization. Raises Refused and Problem, the user's own
        limits first.
        """
        limits = self._limits_of_session(agent.name, entitlement)
        rates, slots, _, _, cost, enforce, _, budgets = limits.request
        name = user.store_name
        rates = _rates_of(name, rates)
        slots = [
            Slot(slot.name.replace(ANY_USER, name), slot.capacity) if ANY_USER in slot.name else slot for slot in slots
        ]
        record = self.ledger.reserved(attempt)
        request = LimitRequest(rates, slots, attempt.key, record.ttl, cost, enforce, record, budgets)
        decision = await self.store.decide(request)
        if decision.local and decision.counted:
            await self.ledger.hold(attempt.request_id, reserve(attempt))
        elif decision.doubtful:
            await self.ledger.hold(attempt.request_id, no_call(attempt))
        if decision.local and not self.count_locally:
            await self._give_back(attempt, request, decision)
            raise retry_later("at-capacity", STORE_RETRY_AFTER, reason="store-down")
        self._warn_when_nearly_used_up(limits, decision)
        headers = limits.headers(decision.rates)
        if decision.refused and not self._is_observed(limits, request, decision):
            raise self._refusal(limits, decision, headers)
        return Reservation(attempt, request, decision, headers)

    async def release(self, reservation: Reservation) -> None:
        """Give a reservation back; only if its call cannot exist."""
        await self._give_back(reservation.attempt, reservation.request, reservation.decision)

    async def usage(self) -> list[tuple[str, int, int]]:
        """Return the global limits: name, and sessions (or seconds of talk) counted and allowed."""
        rates = [_rate(limit, "all") for limit in self._global]
        most = None if self.talk_minutes_total is None else self.talk_minutes_total * 60
        budgets = [] if most is None else [Budget(0, most)]
        request = LimitRequest(rates, [Slot(ALL_CALLS, None)], cost=0, budgets=budgets)
        decision = await self.store.decide(request)
        counts = [
            (policy_name("global", rate), rate.amount - state.remaining, rate.amount)
            for rate, state in zip(rates, decision.rates, strict=True)
        ]
        if most is not None:
            counts.append((GLOBAL_MINUTES, most - math.floor(decision.budgets[0].remaining), most))
        return counts

    async def _give_back(self, attempt: CallAttempt, request: LimitRequest, decision: Decision) -> None:
        confirmed = await self.store.give_back(request, decision)
        if not confirmed and (decision.doubtful or not self.ledger.drop_unsent(attempt.request_id)):
            await self.ledger.hold(attempt.request_id, no_call(attempt))

    def _make_session_limits(self, agent: str, entitlement: Entitlement) -> UserLimits:
        organization, shared = entitlement.organization, entitlement.organization_limits
        limits = [
            *declare(entitlement.session_limits, for_user, "user"),
            *declare(self._agents[agent].session_limits, for_user_and_agent, "agent"),
            *declare(shared.session_limits, for_organization, "org"),
            *self._global,
        ]
        rates = [_rate(limit, limit.key_func(ANY_USER, agent, organization)) for limit in limits]
        owners = [cast("Owner", limit.scope) for limit in limits]
        # Owner, prefix of names, the slot, and the minutes of the calls in it.
        slots: list[tuple[Owner, str, Slot, int | None]] = [
            ("user", "user", Slot(calls_of_user(ANY_USER), entitlement.max_live_calls), entitlement.talk_minutes),
            ("all", "agent", Slot(calls_of_agent(agent), self._agents[agent].max_live_calls), None),
            ("all", "global", Slot(ALL_CALLS, self.max_live_calls_total), self.talk_minutes_total),
        ]
        if organization:
            slot = Slot(calls_of_organization(organization), shared.max_live_calls)
            slots.append(("org", "org", slot, shared.talk_minutes))
        timed = [
            (owner, f"{prefix}{MINUTES}", Budget(index, None if minutes is None else minutes * 60, self.enforce))
            for index, (owner, prefix, slot, minutes) in enumerate(slots)
            if self.ledger.is_timed(slot.name)
        ]
        prefixes = ["global" if owner == "all" else owner for owner in owners]
        names = [policy_name(prefix, rate) for prefix, rate in zip(prefixes, rates, strict=True)]
        own = [index for index, owner in enumerate(owners) if owner != "all"]
        owners += [*(owner for owner, *_ in slots), *(owner for owner, *_ in timed)]
        names += [*(f"{prefix}-live-calls" for _, prefix, *_ in slots), *(name for _, name, _ in timed)]
        rooms, budgets = [slot for *_, slot, _ in slots], [budget for *_, budget in timed]
        request = LimitRequest(rates, rooms, enforce=self.enforce, budgets=budgets)
        policy = policy_header([(names[index], rates[index]) for index in own])
        return UserLimits(limits, request, owners, names, own, policy)

    def _make_request_limits(self) -> UserLimits:
        rates = [_rate(limit, ANY_USER) for limit in self._requests]
        names = [policy_name("request", rate) for rate in rates]
        request = LimitRequest(rates, enforce=self.enforce)
        policy = policy_header(list(zip(names, rates, strict=True)))
        return UserLimits(self._requests, request, ["user"] * len(rates), names, range(len(rates)), policy)

    def _refusal(self, limits: UserLimits, decision: Decision, headers: dict[str, str]) -> Exception:
        reason = _names(limits, decision)
        own_minutes = [
            index
            for index in decision.refused
            if limits.names[index].endswith(MINUTES) and limits.owners[index] != "all"
        ]
        own_rates = [index for index in decision.refused if index in limits.own]
        deciding = own_minutes or own_rates or decision.refused
        wait = max(self._wait(index, decision) for index in deciding)
        owners = {limits.owners[index] for index in deciding}
        detail = ORGANIZATION_REFUSED if "org" in owners and not owners & {"user", "agent"} else ""
        if own_minutes:
            return retry_later("talk-time-used-up", wait, detail, headers, reason)
        if own_rates:
            problem = retry_later("rate-limited", wait, detail, headers, reason)
            return Refused(limits.limits[own_rates[0]], problem)
        if owners & {"user", "org"}:
            return retry_later("too-many-live-calls", LIVE_RETRY_AFTER, detail, headers, reason)
        return retry_later("at-capacity", wait, headers=headers, reason=reason)

    def _wait(self, index: int, decision: Decision) -> float:
        """Return the seconds until what was refused may have room."""
        rates, slots = len(decision.rates), len(decision.used)
        if index < rates:
            return decision.rates[index].reset
        if index < rates + slots:
            return LIVE_RETRY_AFTER
        return decision.budgets[index - rates - slots].reset or TALK_RETRY_AFTER

    def _is_observed(self, limits: UserLimits, request: LimitRequest, decision: Decision) -> bool:
        """Count a refusal; return True, and log the limits, if they are not enforced."""
        self.metrics.count_refusal([limits.names[index] for index in decision.refused], enforced=self.enforce)
        if self.enforce:
            return False
        rates, slots, budgets = request.rates, request.slots, request.budgets
        names = [*(rate.name for rate in rates), *(slot.name for slot in slots)]
        names += [BUDGET + slots[budget.slot].name for budget in budgets]
        log.warning("would_refuse", limits=[names[index] for index in decision.refused])
        return True

    def _warn_when_nearly_used_up(self, limits: UserLimits, decision: Decision) -> None:
        """Log once per window that 80% of a global limit are used."""
        for owner, rate, state in zip(limits.owners, limits.request.rates, decision.rates, strict=False):
            used = rate.amount - state.remaining
            if owner != "all" or used < NEARLY * rate.amount or self._nearly_until.get(rate.name, 0) > self.clock():
                continue
            self._nearly_until[rate.name] = self.clock() + rate.seconds
            log.warning("global_limit_nearly_reached", limit=policy_name("global", rate), used=used, of=rate.amount)


def _names(limits: UserLimits, decision: Decision) -> str:
    """Return the names of the limits that refused, for the log."""
    return ", ".join(limits.names[index] for index in decision.refused)


def _rates_of(user: str, rates: Sequence[Rate]) -> list[Rate]:
    return [
        Rate(
            rate.name.replace(ANY_USER, user),
            rate.amount,
            rate.seconds,
            user if rate.owner == ANY_USER else rate.owner.replace(ANY_USER, user),
            rate.kind,
        )
        if ANY_USER in rate.name
        else rate
        for rate in rates
    ]


def _rate(limit: Limit, key: str) -> Rate:
    seconds = limit.limit.get_expiry()
    return Rate(f"rate:{limit.scope}:{key}:{seconds}", limit.limit.amount, seconds, key, f"{limit.scope}:{seconds}")
