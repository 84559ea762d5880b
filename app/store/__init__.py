"""Small, expiring state, shared by all replicas if BROKER_STORE_URL names a server."""

from app.clock import SYSTEM_CLOCK, Clock
from app.store.memory import MemoryStore
from app.store.protocol import (
    BUDGET,
    KEPT,
    PAGE,
    Budget,
    BudgetState,
    Change,
    Decision,
    Due,
    Leave,
    LimitRequest,
    ListEntry,
    Member,
    Rate,
    RateState,
    Slot,
    Store,
    StoreUnavailable,
    Value,
)

__all__ = [
    "BUDGET",
    "KEPT",
    "PAGE",
    "Budget",
    "BudgetState",
    "Change",
    "Decision",
    "Due",
    "Leave",
    "LimitRequest",
    "ListEntry",
    "Member",
    "Rate",
    "RateState",
    "Slot",
    "Store",
    "StoreUnavailable",
    "Value",
    "open_store",
]


def open_store(url: str, clock: Clock = SYSTEM_CLOCK, *, timeout: float = 0.25, prefix: str = "oib") -> Store:
    """Return the store of a URL: `memory://`, or one of url.py's.

    It connects when it is entered (`async with`). `timeout`: seconds for one operation; `prefix`: of all names, in a
    shared store. Raises ValueError, without the URL in it, for any other URL.
    """
    if url == "memory://":
        return MemoryStore(clock.monotonic, epoch=clock.now() - clock.monotonic())
    # Importing redis-py takes 6 MB and 75 ms; only a shared store needs it.
    from app.store.failover import FailoverStore  # noqa: PLC0415
    from app.store.valkey import ValkeyStore  # noqa: PLC0415

    shared = ValkeyStore(url, timeout=timeout, prefix=prefix, clock=clock)
    local = MemoryStore(clock.monotonic, epoch=clock.now() - clock.monotonic(), plans=False)
    return FailoverStore(shared, local, clock.monotonic)
