"""The IETF's rate-limit headers, in one place because the draft still changes."""

import math
from collections.abc import Sequence

from app.store import Rate, RateState

NAMES = {1: "second", 60: "minute", 3600: "hour", 86400: "day"}


def policy_name(prefix: str, rate: Rate) -> str:
    """Return a policy's name, such as `user-minute`, or `user-90s` for a window without a name."""
    return f"{prefix}-{NAMES.get(rate.seconds, f'{rate.seconds}s')}"


def policy_header(limits: Sequence[tuple[str, Rate]]) -> str:
    """Return RateLimit-Policy (draft-ietf-httpapi-ratelimit-headers-10): the same for every user with these limits."""
    return ", ".join(f'"{name}";q={rate.amount};w={rate.seconds}' for name, rate in limits)


def rate_limit_headers(policy: str, limits: Sequence[tuple[str, RateState]]) -> dict[str, str]:
    """Return RateLimit-Policy, which is `policy`, and RateLimit (same draft), the closest limit first.

    Pass only a user's own limits: other users' and global counters are private.
    """
    closest = sorted(limits, key=lambda limit: (limit[1].remaining, -limit[1].reset))
    left = ", ".join(f'"{name}";r={state.remaining};t={math.ceil(state.reset)}' for name, state in closest)
    return {"RateLimit-Policy": policy, "RateLimit": left}
