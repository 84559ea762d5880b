"""The owner of a call: shown by the call key in anonymous mode, else by the record's `broker_user`.

Neither needs stored state, so every replica knows it, also after a restart.
"""

from dataclasses import dataclass

from app.identity import User
from app.identity.keyring import Keyring
from app.oneinbox.models import CALL_ID

RESERVED_IDS = frozenset({"cursor", "web"})
"""Words that OneInbox uses for routes in place of a call's id."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Ownership:
    """Make public ids of calls, and check who owns one."""

    keyring: Keyring

    def public_id(self, call_id: str, user: User) -> str:
        """Return the id that its owner uses for a call: `{id}.{key}` in anonymous mode, else OneInbox's."""
        if user.mode != "anonymous":
            return call_id
        return f"{call_id}.{self.keyring.sign('call-key', call_id.encode())}"

    def call_id(self, public_id: str, user: User) -> str | None:
        """Return OneInbox's id for a public id; None if that is malformed or its key is wrong."""
        call_id, key = public_id, None
        if user.mode == "anonymous":
            call_id, _, key = public_id.partition(".")
        if not CALL_ID.fullmatch(call_id) or call_id in RESERVED_IDS:
            return None
        if key is not None and not self.keyring.verify("call-key", call_id.encode(), key):
            return None
        return call_id

    def owns(self, user: User, pseudonym: str) -> bool:
        """Return whether a call with this `broker_user` is the user's.

        Always true in anonymous mode, where `call_id` has checked the key.
        """
        return user.mode == "anonymous" or self.keyring.verify("pseudonym", user.canonical, pseudonym)
