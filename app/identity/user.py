"""Who is asking."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

Mode = Literal["anonymous", "jwt", "header"]


@dataclass(frozen=True, slots=True)
class User:
    """One caller, as its identity source names it.

    `id`: the user's id; in anonymous mode the client address (IPv6: its /64). `issuer`: who vouches for it (jwt mode).
    `claims`: the verified token's. `expires_at`: when the login ends, as a Unix time; None: never by itself.
    `address`: the client address, whatever the mode. `by_cookie`: the browser sent the login along by itself, so that
    another site could make it do so.
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
        """Mode, issuer and id in one unambiguous text: what pseudonyms and store names are made of."""
        return "\x1f".join((self.mode, self.issuer, self.id)).encode()

    @property
    def store_name(self) -> str:
        """The user's name in the store. Keyless, so that rotating BROKER_SECRET resets no limit."""
        return _store_name(self.canonical)


@lru_cache(4096)
def _store_name(canonical: bytes) -> str:
    return hashlib.sha256(canonical).hexdigest()[:32]
