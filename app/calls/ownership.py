"""Whose a call is: by the call key in anonymous mode, by the record's `broker_user` otherwise.

Both hold without any memory: every replica, restarted, still knows.
"""

from dataclasses import dataclass

from app.identity import User
from app.identity.keyring import Keyring
from app.oneinbox.models import CALL_ID

ROUTES = frozenset({"cursor", "web"})
"""Names that OneInbox has routes for where a call's id stands."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """Names calls for browsers, and knows whose they are."""

    keyring: Keyring

    def public_id(self, call_id: str, user: User) -> str:
        """A call as its owner may name it: `{id}.{key}` in anonymous mode, else the id."""
        if user.mode != "anonymous":
            return call_id
        return f"{call_id}.{self.keyring.sign('call-key', call_id.encode())}"

    def call_id(self, public_id: str, user: User) -> str | None:
        """OneInbox's id out of a public one; None when it is not one, or its key is wrong."""
        call_id, key = public_id, None
        if user.mode == "anonymous":
            call_id, _, key = public_id.partition(".")
        if not CALL_ID.fullmatch(call_id) or call_id in ROUTES:
            return None
        if key is not None and not self.keyring.verify("call-key", call_id.encode(), key):
            return None
        return call_id

    def owns(self, user: User, pseudonym: str) -> bool:
        """Whether a call with this `broker_user` is the user's.

        In anonymous mode the call's key, checked before, has already said so.
        """
        return user.mode == "anonymous" or self.keyring.verify("pseudonym", user.canonical, pseudonym)
