"""Keys derived from BROKER_SECRET, one per purpose. The first secret signs, every secret verifies: that is rotation."""

import base64
import hashlib
import hmac
from collections.abc import Sequence
from typing import Literal

Purpose = Literal["call-key", "pseudonym"]


class Keyring:
    """Signs and verifies short texts. Keys are HMAC-SHA256 of the purpose under each secret (RFC 5869's idea)."""

    def __init__(self, secrets: Sequence[str]) -> None:
        """`secrets`: newest first, at least one."""
        self._secrets = [secret.encode() for secret in secrets]
        self._keys: dict[Purpose, list[bytes]] = {
            "call-key": self._derive("call-key"),
            "pseudonym": self._derive("pseudonym"),
        }

    def _derive(self, purpose: str) -> list[bytes]:
        return [hmac.digest(secret, b"oneinbox-broker " + purpose.encode(), hashlib.sha256) for secret in self._secrets]

    def sign(self, purpose: Purpose, message: bytes) -> str:
        """A URL-safe MAC of 43 characters under the newest secret."""
        return _mac(self._keys[purpose][0], message)

    def verify(self, purpose: Purpose, message: bytes, mac: str) -> bool:
        """Whether any secret made this MAC; in constant time for each."""
        given = mac.encode("utf-8", "surrogatepass")
        # No early end: all are compared.
        return any(hmac.compare_digest(_mac(key, message).encode(), given) for key in self._keys[purpose])


def _mac(key: bytes, message: bytes) -> str:
    return base64.urlsafe_b64encode(hmac.digest(key, message, hashlib.sha256)).rstrip(b"=").decode()
