"""How much a user may have: declared with slowapi, decided by the store in one go."""

from app.limits.service import Limits, Reservation

__all__ = ["Limits", "Reservation"]
