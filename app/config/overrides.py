"""The leaves of an agent's configuration that `overrides` may replace, with their types in OneInbox's documentation."""

import sys
from collections.abc import Mapping
from typing import Any

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


def leaves_of(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping's values by dotted path."""
    leaves: dict[str, Any] = {}
    for key, each in nested.items():
        if isinstance(each, Mapping):
            leaves.update(leaves_of(each, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = each
    return leaves
