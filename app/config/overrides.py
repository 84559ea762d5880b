"""The leaves of an agent's configuration that `overrides` may replace, with their types in OneInbox's documentation."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator

from app.config.validation import nearest

OVERRIDE_LEAVES: Mapping[str, type] = {
    "llm.provider": str,
    "llm.model": str,
    "llm.temperature": float,
    "llm.system_prompt": str,
    "transcriber.model": str,
    "transcriber.language": str,
    "tts.provider": str,
    "tts.voice_id": str,
    "tts.model": str,
    "tts.speed": float,
    "tts.stability": float,
    "first_message": str,
}
"""Dotted path to type; `float` takes any JSON number."""


def is_leaf_value(leaf: type, value: Any) -> bool:
    """Return whether a value is of the type that OVERRIDE_LEAVES gives for a leaf: `float` takes any finite number."""
    if leaf is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and -sys.float_info.max <= value <= sys.float_info.max
    return isinstance(value, leaf)


def no_leaf(path: str) -> str:
    """Say that a dotted path is none of OVERRIDE_LEAVES."""
    return f"is not a single leaf{nearest(path, OVERRIDE_LEAVES)}"


def _override_path(path: str) -> str:
    if path not in OVERRIDE_LEAVES:
        raise ValueError(no_leaf(path))
    return path


OverridePath = Annotated[str, AfterValidator(_override_path)]


def leaves_of(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping's values by dotted path."""
    leaves: dict[str, Any] = {}
    for key, each in nested.items():
        if isinstance(each, Mapping):
            leaves.update(leaves_of(each, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = each
    return leaves
