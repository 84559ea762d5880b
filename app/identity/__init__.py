"""Identify the user of a request."""

from app.identity.anonymous import Anonymous
from app.identity.base import Identity
from app.identity.header import HeaderIdentity
from app.identity.jwks import KeySet
from app.identity.jwt import JwtIdentity
from app.identity.keys import FixedKey, public_key, secret_key
from app.identity.user import User

__all__ = [
    "Anonymous",
    "FixedKey",
    "HeaderIdentity",
    "Identity",
    "JwtIdentity",
    "KeySet",
    "User",
    "public_key",
    "secret_key",
]
