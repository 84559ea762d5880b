"""The garbage collector, for a process that serves."""

import gc

# Python's own are made for scripts: requests would start a collection every few of them.
THRESHOLDS = (10_000, 20, 20)


def freeze_gc() -> None:
    """Leave what was made at the start (modules, routes, models) out of every later collection.

    Looking through it all again and again would hold up all requests under way for as long, a tenth of a second and
    more.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
