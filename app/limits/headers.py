"""The IETF's rate-limit headers, in one place because the draft still changes."""

import math
from collections.abc import Sequence

from app.store import Rate, RateState

NAMES = {1: "second", 60: "minute", 3600: "hour", 86400: "day"}


def policy_name(prefix: str, rate: Rate) -> str:
    """Return a policy's name, such as `user-minute`, or `user-90s` for a window without a name."""
    return f"{prefix}-{NAMES.get(rate.seconds, f'{rate.seconds}s')}"


def rate_limit_headers(limits: Sequence[tuple[str, Rate, RateState]]) -> dict[str, str]:
    """Return RateLimit-Policy and RateLimit (draft-ietf-httpapi-ratelimit-headers-10), the closest limit first.

    Pass only a user's own limits: other users' and global counters are private.
    """
    closest = sorted(limits, key=lambda limit: (limit[2].remaining, -limit[2].reset))
    return {
        "RateLimit-Policy": ", ".join(f'"{name}";q={rate.amount};w={rate.seconds}' for name, rate, _ in limits),
        "RateLimit": ", ".join(
            f'"{name}";r={state.remaining};t={math.ceil(state.reset)}' for name, _, state in closest
        ),
    }
