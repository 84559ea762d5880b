"""How much a user may have: declared with slowapi, decided by the store in one go."""

from app.limits.brake import Brake
from app.limits.live import LiveCalls
from app.limits.service import Limits, Refused, Reservation

__all__ = ["Brake", "Limits", "LiveCalls", "Refused", "Reservation"]
