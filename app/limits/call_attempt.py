"""A call's entry in the store from before its POST: enough to find the call again if the process dies."""

import math
from collections.abc import Iterable
from typing import NamedTuple, Self

import structlog

NEVER = -1.0
"""`ends` of a call that may run without limit."""
AGENTS = "live:agent:"
"""Begins the name of an agent's set of live calls."""
ALL_CALLS = "live:all"
"""The set of all live calls."""

log = structlog.get_logger(__name__)


class CallAttempt(NamedTuple):
    """One POST to OneInbox.

    `request_id`: 128 random bits, `broker_request_id` on OneInbox's record. `since`: Unix time of the POST, whole
    seconds. `agent`: configured name. `user`: the user's name in the store. `owner`: the user's pseudonym,
    `broker_user` on OneInbox's record. `organization`: its name in the store; empty for a user who is in none. `ends`:
    Unix time at which the broker hangs up at the latest; NEVER; 0: not known.
    """

    request_id: str
    since: int
    agent: str
    user: str
    owner: str
    organization: str = ""
    ends: float = 0

    @property
    def key(self) -> str:
        """The call's name in the sets of live calls: every field but `ends`, so that the call can be found by it."""
        request_id, since, agent, user, owner, organization, _ = self
        key = f"{request_id} {since} {agent} {user} {owner}"
        return f"{key} {organization}" if organization else key

    def end(self, longest: float) -> float:
        """Return the Unix time at which the call must end by its own bound, or NEVER.

        `longest`: seconds of a call whose entry, of another version, does not say it; 0: no bound.
        """
        return self.ends or (self.since + longest if longest else NEVER)

    @classmethod
    def from_key(cls, key: str) -> Self:
        """Parse a `key`. Raises ValueError."""
        request_id, since, agent, user, owner, *rest = key.split(" ")
        return cls(request_id, int(since), agent, user, owner, _organization(rest))

    @property
    def unwritten(self) -> str:
        """The fields that OneInbox's record does not hold otherwise, for `restored`."""
        return f"{self.since} {self.agent} {self.user} {self.ends:.3f} {self.organization}".rstrip()

    @classmethod
    def restored(cls, unwritten: str, request_id: str, owner: str) -> Self:
        """Return the attempt of OneInbox's record. Raises ValueError."""
        since, agent, user, *rest = unwritten.split(" ")
        ends = float(rest[0]) if rest else 0
        if not math.isfinite(ends):
            raise ValueError("an end that cannot be")
        return cls(request_id, int(since), agent, user, owner, _organization(rest[1:]), ends)

    @property
    def sets(self) -> list[str]:
        """Names of the sets of live calls that the call is in."""
        sets = [calls_of_user(self.user), calls_of_agent(self.agent), ALL_CALLS]
        return [*sets, calls_of_organization(self.organization)] if self.organization else sets


def _organization(rest: list[str]) -> str:
    """Return what follows the other fields, if anything does. Raises ValueError."""
    if not rest:
        return ""
    [organization] = rest
    if not organization:
        raise ValueError("an organization without a name")
    return organization


def attempts_of(members: Iterable[str]) -> list[CallAttempt]:
    """Return the attempts of a set of live calls; what cannot be read is skipped, with a log entry."""
    attempts = []
    for member in members:
        try:
            attempts.append(CallAttempt.from_key(member))
        except ValueError:
            log.error("call_record_unreadable")
    return attempts


def calls_of_user(user: str) -> str:
    """Return the name of the set of a user's live calls; `user`: the user's name in the store."""
    return f"live:user:{user}"


def calls_of_agent(agent: str) -> str:
    """Return the name of the set of an agent's live calls."""
    return f"{AGENTS}{agent}"


def calls_of_organization(organization: str) -> str:
    """Return the name of the set of an organization's live calls; `organization`: its name in the store."""
    return f"live:org:{organization}"
