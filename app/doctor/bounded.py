"""A check that always comes to an end, and never fails itself."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from app.doctor.findings import Finding, wrong

DEADLINE = 18.0
"""Seconds for all checks together."""


async def within(seconds: float, work: Callable[[], Awaitable[list[Finding]]], names: Sequence[str]) -> list[Finding]:
    """What the work finds; findings under these names when it does not come to an end. Never raises."""
    try:
        async with asyncio.timeout(seconds):
            return await work()
    except TimeoutError:
        return [wrong(name, f"no result within {seconds:.0f} s", "look at DNS and the network") for name in names]
    except Exception as error:  # a doctor does not faint; whose words the message repeats, nobody knows: maybe a secret
        remedy = "tell the broker's authors"
        return [wrong(name, f"the check itself failed ({type(error).__name__})", remedy) for name in names]
