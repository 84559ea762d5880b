"""Keys derived from BROKER_SECRET, one per purpose. The first secret signs, all verify, so it can be rotated."""

import base64
import hashlib
import hmac
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Literal

from app.identity.user import User

if TYPE_CHECKING:
    from app.identity.ciphers import Ciphers

PSEUDONYMS = 512
"""Users whose pseudonyms are cached."""
LOGGED = 16
"""Characters of a pseudonym that logs show."""

Purpose = Literal["call-key", "pseudonym", "stored-answer", "call-record"]


class Keyring:
    """Sign short texts, and encrypt values in the store.

    Each purpose has its own key: HMAC-SHA256 of the purpose under a secret.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        """`secrets`: newest first, at least one."""
        self.use(secrets)

    def use(self, secrets: Sequence[str]) -> None:
        """Sign with the first of these from now on, and verify with only these."""
        signing: tuple[Purpose, ...] = ("call-key", "pseudonym")
        self._keys = {purpose: _derive(secrets, purpose) for purpose in signing}
        # Each request needs its user's pseudonym.
        self._pseudonym = lru_cache(PSEUDONYMS)(partial(_mac, self._keys["pseudonym"][0]))
        self._cipher_keys = _derive(secrets, "call-record"), _derive(secrets, "stored-answer")
        self.__dict__.pop("_ciphers", None)

    def load_ciphers(self) -> None:
        """Import cryptography now: 7 MB and 10 ms, which a broker that encrypts nothing does without."""
        _ = self._ciphers

    @cached_property
    def _ciphers(self) -> "Ciphers":
        from app.identity.ciphers import Ciphers  # noqa: PLC0415

        return Ciphers(*self._cipher_keys)

    def sign(self, purpose: Purpose, message: bytes) -> str:
        """Return a URL-safe MAC of 43 characters, made with the newest secret."""
        return self._pseudonym(message) if purpose == "pseudonym" else _mac(self._keys[purpose][0], message)

    def verify(self, purpose: Purpose, message: bytes, mac: str) -> bool:
        """Return whether any secret made this MAC; comparisons take constant time."""
        given = mac.encode("utf-8", "surrogatepass")
        return any(hmac.compare_digest(_mac(key, message).encode(), given) for key in self._keys[purpose])

    def pseudonym(self, user: User) -> str:
        """Return a user's pseudonym, for OneInbox's record and for logs."""
        return self.sign("pseudonym", user.canonical)

    def seal(self, text: str, context: str) -> str:
        """Encrypt a short text for OneInbox's record (AES-256-GCM, a tenth of Fernet's cost). `context`: to open it."""
        return self._ciphers.seal(text, context)

    def unseal(self, sealed: str, context: str) -> str | None:
        """Decrypt a text of `seal`; None if no secret fits, or the context differs."""
        return self._ciphers.unseal(sealed, context)

    def encrypt(self, value: bytes) -> bytes:
        """Encrypt a value (Fernet: AES-128-CBC with HMAC-SHA256)."""
        return self._ciphers.encrypt(value)

    def decrypt(self, value: bytes) -> bytes | None:
        """Decrypt a value of `encrypt`; None if no secret fits."""
        return self._ciphers.decrypt(value)


def _derive(secrets: Sequence[str], purpose: Purpose) -> list[bytes]:
    message = b"oneinbox-broker " + purpose.encode()
    return [hmac.digest(secret.encode(), message, hashlib.sha256) for secret in secrets]


def _mac(key: bytes, message: bytes) -> str:
    return base64.urlsafe_b64encode(hmac.digest(key, message, hashlib.sha256)).rstrip(b"=").decode()
