"""Limits and running calls: declared with slowapi, decided by the store in one request."""

from app.limits.allowance import Allowance
from app.limits.call_attempt import CallAttempt
from app.limits.kill_switch import KillSwitch
from app.limits.live_calls import Bounds, LiveCalls
from app.limits.rate_limiter import Limits, Refused, Reservation
from app.limits.reconciler import Reconciler

__all__ = [
    "Allowance",
    "Bounds",
    "CallAttempt",
    "KillSwitch",
    "Limits",
    "LiveCalls",
    "Reconciler",
    "Refused",
    "Reservation",
]
