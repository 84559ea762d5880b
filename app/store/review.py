"""Weaknesses of a store's set-up: what its server says about itself, for `doctor` and for the log."""

from collections.abc import Mapping
from typing import NamedTuple

FULL = 0.8
"""The share of maxmemory from which a store counts as nearly full."""


class Weakness(NamedTuple):
    """A fact that may lose counters or calls, and what to do about it."""

    detail: str
    remedy: str


def weaknesses(about: Mapping[str, str]) -> list[Weakness]:
    """Return what is weak. `about`: INFO's answer, with `save` from CONFIG if that could be read; empty if neither."""
    if not about:
        return [Weakness("does not allow INFO", "allow the store's user the command: +info")]
    found: list[Weakness] = []
    policy = about.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        detail = f"drops keys when its memory is full ({policy}), and limits are forgotten"
        found.append(Weakness(detail, "set its maxmemory-policy to noeviction"))
    # A server that does not tell its save points may have them.
    if about.get("aof_enabled") == "0" and about.get("save") == "":
        detail = "keeps nothing on disk: after a restart it is empty, and limits are forgotten"
        found.append(Weakness(detail, "set its appendonly to yes"))
    most, used = (_number(about.get(name)) for name in ("maxmemory", "used_memory"))
    if most and used >= FULL * most:
        found.append(Weakness(f"uses {used / most:.0%} of its maxmemory", "give it more memory"))
    return found


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
