"""Notice when the shared store has lost what was written to it.

`generation` tells an emptied store from a full one, also to a replica that has just started: a replica that finds none
writes one, marked incomplete until the running calls have been read back. `beat:<replica>` is a number that this
replica alone counts up: a store that returns an older one than it has confirmed has lost what was written since (a
failover to a replica that lagged behind, a restored snapshot, another server).
"""

import secrets
from dataclasses import dataclass, field
from typing import Literal

from app.store.valkey import ValkeyStore

NAME = "generation"
KEPT_SECONDS = 8 * 86400
"""Longer than anything else is kept."""
INCOMPLETE, COMPLETE = ":0", ":1"

Verdict = Literal["same", "new", "emptied", "set-back"]


@dataclass(repr=False, eq=False)
class Generation:
    """One replica's view of the store's generation. `incomplete`: the running calls have yet to be read back."""

    store: ValkeyStore
    incomplete: bool = field(default=False, init=False)
    _replica: str = field(default_factory=lambda: secrets.token_hex(8), init=False)
    _known: str = field(default="", init=False)
    _sent: int = field(default=0, init=False)
    _confirmed: int = field(default=0, init=False)

    async def check(self) -> Verdict:
        """Compare the store with what this replica knows. Raises StoreUnavailable."""
        self._sent += 1
        names, candidate = (NAME, f"beat:{self._replica}"), secrets.token_hex(8) + INCOMPLETE
        kept, is_new, beat = await self.store.mark(*names, candidate, self._sent, KEPT_SECONDS)
        generation, known, confirmed = kept[:-2], self._known, self._confirmed
        self._known, self._confirmed = generation, self._sent
        self.incomplete = kept.endswith(INCOMPLETE)
        if known and generation != known:
            return "emptied"
        if is_new:
            return "new"
        if beat < confirmed:
            # All replicas are to see it, not only this one.
            await self._replace(COMPLETE, INCOMPLETE)
            self.incomplete = True
            return "set-back"
        return "same"

    async def doubt(self) -> None:
        """Note that calls may be missing: another server answers, which may lack the last moments of the one before."""
        self.incomplete = await self._replace(COMPLETE, INCOMPLETE) or self.incomplete

    async def complete(self) -> bool:
        """Note that the running calls are back; False if the store was emptied again meanwhile."""
        done = await self._replace(INCOMPLETE, COMPLETE)
        self.incomplete = self.incomplete and not done
        return done

    async def _replace(self, before: str, after: str) -> bool:
        return await self.store.replace(
            NAME, f"{self._known}{before}".encode(), f"{self._known}{after}".encode(), KEPT_SECONDS
        )
