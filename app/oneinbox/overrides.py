"""The leaves of an agent's configuration that `overrides` may replace, as OneInbox's documentation types them."""

from collections.abc import Mapping

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
