"""The clocks that a broker goes by, so that a simulation can run one in virtual time.

Durations that are only measured, for logs and metrics, go by `time.perf_counter`.
"""

import time
from collections.abc import Callable
from typing import NamedTuple


class Clock(NamedTuple):
    """`now`: Unix time in seconds. `monotonic`: seconds since an arbitrary moment; it never runs backwards."""

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic


SYSTEM_CLOCK = Clock()
"""The machine's clocks."""
