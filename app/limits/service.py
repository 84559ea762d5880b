"""The one decision: may this user have what they ask for, now?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit, LimitGroup
from starlette.requests import Request
from starlette.responses import Response

from app.identity import User
from app.limits.headers import policy_name, rate_limit_headers
from app.problems import Problem, problem_response
from app.store import Decision, Rate, Store


def by_user(user: User) -> str:
    """Key function: a budget for each user."""
    return user.store_name


def declare(limits: str, scope: str) -> list[Limit]:
    """Limits in slowapi's terms, read from a string such as `5/minute;50/day`.

    slowapi only declares: it would decide one limit after the other, in fixed windows, and block the event loop on a
    shared store. The store decides all at once.
    """
    group = LimitGroup(limits, by_user, scope, False, None, None, None, 1, False)
    return list(group)


class Refused(RateLimitExceeded):
    """No room. `problem`: what the browser is told."""

    def __init__(self, limit: Limit, problem: Problem) -> None:
        super().__init__(limit)
        self.problem = problem


async def on_refused(request: Request, error: Exception) -> Response:
    """Exception handler: the refusal as a problem."""
    assert isinstance(error, Refused)  # noqa: S101 - registered for this class
    return problem_response(request.scope, error.problem)


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one session counted; `headers` tell the browser what is left."""

    rates: Sequence[Rate]
    decision: Decision
    headers: Mapping[str, str] = field(default_factory=dict)


class Limits:
    """Declares the limits from the settings, and asks the store about all of them in one question."""

    def __init__(self, store: Store, *, session_limits: str) -> None:
        self._store = store
        self._per_user = declare(session_limits, "session")

    async def reserve(self, user: User) -> Reservation:
        """Count a session against every limit, or against none. Raises Refused."""
        rates = [_rate(limit, user) for limit in self._per_user]
        decision = await self._store.decide(rates)
        named = [(policy_name("user", rate), rate, state) for rate, state in zip(rates, decision.rates, strict=True)]
        headers = rate_limit_headers(named)
        if decision.refused:
            wait = max(decision.rates[index].reset for index in decision.refused)
            headers["Retry-After"] = str(max(1, math.ceil(wait)))
            raise Refused(self._per_user[decision.refused[0]], Problem("rate-limited", headers=headers))
        return Reservation(rates, decision, headers)

    async def release(self, reservation: Reservation) -> None:
        """Give a reservation back; only where no call can exist."""
        await self._store.give_back(reservation.rates, reservation.decision)


def _rate(limit: Limit, user: User) -> Rate:
    item = limit.limit
    seconds = item.get_expiry()
    return Rate(f"rate:{limit.scope}:{limit.key_func(user)}:{seconds}", item.amount, seconds)
