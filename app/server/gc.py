"""Garbage collector settings for a server process."""

import gc

# Python's defaults suit scripts: here they would start a collection every few requests.
THRESHOLDS = (10_000, 20, 20)


def freeze_gc() -> None:
    """Exclude startup objects from later collections: modules, routes, models.

    Each full collection would otherwise block all requests for a tenth of a second or more.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
