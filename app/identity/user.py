"""The user of a request."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from app.identity.addresses import limit_key

Mode = Literal["anonymous", "jwt", "header"]


@dataclass(frozen=True, slots=True)
class User:
    """A user, as named by the identity source.

    `id`: in anonymous mode the client address (IPv6: its /64). `issuer`: of the token (jwt mode). `claims`: of the
    verified token. `expires_at`: Unix time at which the login ends; None: never. `address`: the client's, in any mode.
    `by_cookie`: the browser sent the login by itself, so another site could cause the request.
    """

    mode: Mode
    id: str
    issuer: str = ""
    claims: Mapping[str, Any] = field(default_factory=dict)
    expires_at: float | None = None
    address: str = ""
    by_cookie: bool = False

    @property
    def canonical(self) -> bytes:
        """Mode, issuer and id as one unambiguous value, from which pseudonyms and store names are made."""
        return "\x1f".join((self.mode, self.issuer, self.id)).encode()

    @property
    def store_name(self) -> str:
        """The user's name in the store; unkeyed, so that rotating BROKER_SECRET resets no limits."""
        return _store_name(self.canonical)


def user_named(mode: Mode, name: str, issuer: str = "", *, address: str = "") -> User:
    """Return the user whom this name means: everyone who names users, requests and operators alike, asks here.

    `name`: the user's id, in anonymous mode the address. `issuer`: of tokens; in other modes it does not count.
    `address`: the client's.
    """
    if mode == "anonymous":
        return User(mode, limit_key(name), address=address)
    return User(mode, name, issuer if mode == "jwt" else "", address=address)


@lru_cache(512)
def _store_name(canonical: bytes) -> str:
    return hashlib.sha256(canonical).hexdigest()[:32]
