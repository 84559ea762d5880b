"""Ciphers of a keyring."""

import base64
import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE = 12


class Ciphers:
    """Encrypt with the first of several keys, decrypt with any. Keys have 32 bytes."""

    def __init__(self, record_keys: Sequence[bytes], answer_keys: Sequence[bytes]) -> None:
        """`record_keys`: of short texts in OneInbox's record. `answer_keys`: of values in the store."""
        self._sealers = [AESGCM(key) for key in record_keys]
        self._box = MultiFernet([Fernet(base64.urlsafe_b64encode(key)) for key in answer_keys])

    def seal(self, text: str, context: str) -> str:
        """Encrypt a short text (AES-256-GCM)."""
        nonce = os.urandom(NONCE)
        sealed = self._sealers[0].encrypt(nonce, text.encode(), context.encode())
        return base64.urlsafe_b64encode(nonce + sealed).decode()

    def unseal(self, sealed: str, context: str) -> str | None:
        """Decrypt a text of `seal`; None if no key fits, or the context differs."""
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
        """Decrypt a value of `encrypt`; None if no key fits."""
        try:
            return self._box.decrypt(value)
        except InvalidToken:
            return None
