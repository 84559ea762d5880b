"""The leaves of an agent's configuration that `overrides` may replace, as OneInbox's documentation types them."""

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
    """Whether a value is of the type that OVERRIDE_LEAVES gives for a leaf: `float` takes any finite number."""
    if leaf is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and -sys.float_info.max <= value <= sys.float_info.max
    return isinstance(value, leaf)
