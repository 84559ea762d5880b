"""What the store knows of a call from before it exists: enough to find it again, whatever becomes of the process."""

from dataclasses import dataclass
from typing import Self

ALL_CALLS = "live:all"
"""The set of all live calls."""


@dataclass(frozen=True, slots=True)
class CallAttempt:
    """One POST to OneInbox.

    `request_id`: 128 random bits of the broker's own, on OneInbox's record as `broker_request_id`. `since`: Unix time
    of the POST, whole seconds. `agent`: configured name. `user`: the user's name in the store. `owner`: the user's
    pseudonym, on OneInbox's record as `broker_user`.
    """

    request_id: str
    since: int
    agent: str
    user: str
    owner: str

    @property
    def key(self) -> str:
        """The call's name in the sets of live calls. It says all there is to say, so that no second write can miss."""
        return " ".join((self.request_id, str(self.since), self.agent, self.user, self.owner))

    @classmethod
    def from_key(cls, member: str) -> Self:
        """What `member` made."""
        request_id, since, agent, user, owner = member.split(" ")
        return cls(request_id, int(since), agent, user, owner)

    @property
    def sets(self) -> list[str]:
        """The sets whose member the call is."""
        return [calls_of_user(self.user), calls_of_agent(self.agent), ALL_CALLS]


def calls_of_user(user: str) -> str:
    """Name of the set of a user's live calls; `user` is the user's name in the store."""
    return f"live:user:{user}"


def calls_of_agent(agent: str) -> str:
    """Name of the set of an agent's live calls."""
    return f"live:agent:{agent}"
