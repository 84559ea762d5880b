"""What every identity source is to the rest of the house."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeGuard

from starlette.requests import HTTPConnection

from app.identity.addresses import ClientAddresses
from app.identity.user import User

MAX_ID_LENGTH = 255
# Control characters would get into logs and store names; half a surrogate pair cannot be encoded at all.
UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def is_user_id(value: object) -> TypeGuard[str]:
    """Whether this can be a user's id: non-empty text of at most 255 characters, none of them a control character."""
    return isinstance(value, str) and 0 < len(value) <= MAX_ID_LENGTH and not UNFIT.search(value)


@dataclass
class Identity(ABC):
    """A request in, a user out.

    `addresses`: the client address of a request, also of a refused one.
    """

    addresses: ClientAddresses

    @abstractmethod
    async def identify(self, request: HTTPConnection) -> User:
        """The caller. Raises Problem: `unauthenticated`, or `at-capacity` while no login can be checked."""

    async def start(self) -> None:  # noqa: B027 - most sources have nothing to start
        """Begin the work in the background, if there is any; waits for nothing."""

    async def aclose(self) -> None:  # noqa: B027 - nor to end
        """End that work."""
