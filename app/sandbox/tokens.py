"""Participant tokens, as LiveKit's server SDKs make them."""

import secrets
import warnings

import jwt

from app.sandbox.options import EmulatorOptions


def participant_token(options: EmulatorOptions, room: str, now: float) -> str:
    """Return a JWT that lets one new participant join `room` (docs.livekit.io/home/get-started/authentication/)."""
    claims = {
        "iss": options.livekit_key,
        "sub": f"user-{secrets.token_hex(6)}",
        "name": "Sandbox user",
        "jti": secrets.token_hex(16),
        "nbf": int(now),
        "exp": int(now + options.token_ttl),
        "video": {"room": room, "roomJoin": True, "canPublish": True, "canSubscribe": True},
    }
    with warnings.catch_warnings():
        # PyJWT warns about HS256 secrets under 32 bytes; the one of `livekit-server --dev` is fixed and has 6.
        warnings.simplefilter("ignore", jwt.InsecureKeyLengthWarning)
        return jwt.encode(claims, options.livekit_secret, algorithm="HS256")
