"""The interface of all identity sources."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeGuard

from starlette.requests import HTTPConnection

from app.identity.addresses import ClientAddresses
from app.identity.user import User

MAX_ID_LENGTH = 255
# Control characters would get into logs and store names; lone surrogates cannot be encoded.
UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def is_user_id(value: object) -> TypeGuard[str]:
    """Return whether this can be a user id: 1 to 255 characters, none of them a control character."""
    return isinstance(value, str) and 0 < len(value) <= MAX_ID_LENGTH and not UNFIT.search(value)


@dataclass(repr=False, eq=False)
class Identity(ABC):
    """A source of users. `addresses`: finds the client address of any request, also of a refused one."""

    addresses: ClientAddresses

    @abstractmethod
    async def identify(self, request: HTTPConnection) -> User:
        """Return the request's user. Raises Problem: `unauthenticated`, or `at-capacity` if it cannot be checked."""
