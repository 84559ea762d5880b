"""Keys derived from BROKER_SECRET, one per purpose. The first secret signs, all verify, so it can be rotated."""

import base64
import hashlib
import hmac
import os
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.identity.user import User

PSEUDONYMS = 512
"""Users whose pseudonyms are cached."""
LOGGED = 16
"""Characters of a pseudonym that logs show."""

Purpose = Literal["call-key", "pseudonym", "stored-answer", "call-record"]
NONCE = 12


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
        stored = _derive(secrets, "stored-answer")
        self._sealers = [AESGCM(key) for key in _derive(secrets, "call-record")]
        self._box = MultiFernet([Fernet(base64.urlsafe_b64encode(key)) for key in stored])

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
        nonce = os.urandom(NONCE)
        return base64.urlsafe_b64encode(
            nonce + self._sealers[0].encrypt(nonce, text.encode(), context.encode())
        ).decode()

    def unseal(self, sealed: str, context: str) -> str | None:
        """Decrypt a text of `seal`; None if no secret fits, or the context differs."""
        try:
            value = base64.urlsafe_b64decode(sealed)
        except ValueError:
            return None
        for sealer in self._sealers if len(value) > NONCE else ():
            try:
                return sealer.decrypt(value[:NONCE], value[NONCE:], context.encode()).decode()
            except InvalidTag:
                continue
        return None

    def encrypt(self, value: bytes) -> bytes:
        """Encrypt a value (Fernet: AES-128-CBC with HMAC-SHA256)."""
        return self._box.encrypt(value)

    def decrypt(self, value: bytes) -> bytes | None:
        """Decrypt a value of `encrypt`; None if no secret fits."""
        try:
            return self._box.decrypt(value)
        except InvalidToken:
            return None


def _derive(secrets: Sequence[str], purpose: Purpose) -> list[bytes]:
    message = b"oneinbox-broker " + purpose.encode()
    return [hmac.digest(secret.encode(), message, hashlib.sha256) for secret in secrets]


def _mac(key: bytes, message: bytes) -> str:
    return base64.urlsafe_b64encode(hmac.digest(key, message, hashlib.sha256)).rstrip(b"=").decode()
