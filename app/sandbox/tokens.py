"""LiveKit tokens, as its server SDKs make them (docs.livekit.io/home/get-started/authentication/)."""

import secrets
import warnings
from typing import Any

import jwt

from app.sandbox.options import EmulatorOptions

_LEEWAY = 5
"""Seconds that the clocks of emulator and LiveKit server may differ, for tokens used right away."""
_AT_ONCE = 60
"""Seconds that such a token is valid."""


def participant_token(options: EmulatorOptions, room: str, now: float) -> str:
    """Return a JWT that lets one new participant join `room`."""
    return _signed(
        options,
        sub=f"user-{secrets.token_hex(6)}",
        name="Sandbox user",
        jti=secrets.token_hex(16),
        nbf=int(now),
        exp=int(now + options.token_ttl),
        video={"room": room, "roomJoin": True, "canPublish": True, "canSubscribe": True},
    )


def agent_token(options: EmulatorOptions, room: str, now: float) -> str:
    """Return a JWT to join `room` as an agent: frontends look for this kind of participant, and for its state."""
    grants = {
        "roomJoin": True,
        "canPublish": True,
        "canPublishData": True,
        "canSubscribe": True,
        "canUpdateOwnMetadata": True,
    }
    return _signed(
        options,
        sub=f"agent-{secrets.token_hex(6)}",
        name="Sandbox agent",
        kind="agent",
        attributes={"lk.agent.state": "initializing"},
        nbf=int(now) - _LEEWAY,
        exp=int(now) + _AT_ONCE,
        video={"room": room, **grants},
    )


def server_token(options: EmulatorOptions, now: float) -> str:
    """Return a JWT for LiveKit's server API, to make and delete rooms."""
    return _signed(options, nbf=int(now) - _LEEWAY, exp=int(now) + _AT_ONCE, video={"roomCreate": True})


def _signed(options: EmulatorOptions, **claims: Any) -> str:
    with warnings.catch_warnings():
        # PyJWT warns about HS256 secrets under 32 bytes; the one of `livekit-server --dev` is fixed and has 6.
        warnings.simplefilter("ignore", jwt.InsecureKeyLengthWarning)
        return jwt.encode({"iss": options.livekit_key, **claims}, options.livekit_secret, algorithm="HS256")
