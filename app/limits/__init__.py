"""How much a user may have: declared with slowapi, decided by the store in one go."""

from app.limits.brake import Brake
from app.limits.live import LiveCalls
from app.limits.reconciler import Reconciler
from app.limits.service import Limits, Refused, Reservation
from app.limits.starts import Start
from app.limits.talk import TalkTime

__all__ = ["Brake", "Limits", "LiveCalls", "Reconciler", "Refused", "Reservation", "Start", "TalkTime"]
