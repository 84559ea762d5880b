"""The IETF's rate-limit headers; in one place, as the draft still moves."""

import math
from collections.abc import Sequence

from app.store import Rate, RateState

NAMES = {1: "second", 60: "minute", 3600: "hour", 86400: "day"}


def policy_name(prefix: str, rate: Rate) -> str:
    """A policy's name, such as `user-minute`; windows without a name of their own get their seconds."""
    return f"{prefix}-{NAMES.get(rate.seconds, f'{rate.seconds}s')}"


def rate_limit_headers(limits: Sequence[tuple[str, Rate, RateState]]) -> dict[str, str]:
    """RateLimit-Policy and RateLimit (draft-ietf-httpapi-ratelimit-headers-10) for named limits, the closest first.

    Only a user's own limits may be given: nobody learns another's or a global counter.
    """
    closest = sorted(limits, key=lambda limit: (limit[2].remaining, -limit[2].reset))
    return {
        "RateLimit-Policy": ", ".join(f'"{name}";q={rate.amount};w={rate.seconds}' for name, rate, _ in limits),
        "RateLimit": ", ".join(
            f'"{name}";r={state.remaining};t={math.ceil(state.reset)}' for name, _, state in closest
        ),
    }
