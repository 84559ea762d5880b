"""The broker's memory: small, expiring, and shared by all replicas where BROKER_STORE_URL says so."""

from app.store.memory import MemoryStore
from app.store.protocol import Decision, LimitRequest, Rate, RateState, Slot, Store, StoreUnavailable, Value

__all__ = ["Decision", "LimitRequest", "Rate", "RateState", "Slot", "Store", "StoreUnavailable", "Value", "open_store"]


def open_store(url: str) -> Store:
    """The store behind a URL: `memory://`, or `redis://`, `rediss://`, `valkey://`, `valkeys://`.

    Nothing connects before it is entered (`async with`). Raises ValueError, without the URL in it, for any other URL.
    """
    if url == "memory://":
        return MemoryStore()
    # redis-py takes 6 MB and 75 ms, which a broker without a shared store does not need.
    from app.store.failover import FailoverStore  # noqa: PLC0415
    from app.store.valkey import ValkeyStore  # noqa: PLC0415

    return FailoverStore(ValkeyStore(url), MemoryStore())
