"""Rules that settings, the agents file and requests have in common."""

import math
import re
from typing import Annotated

from limits import parse_many
from pydantic import AfterValidator, StringConstraints
from pydantic_core import PydanticCustomError, to_json

MAX_VARIABLES = 32
MAX_VARIABLE = 1000

# `{{…}}` would be interpolated into the agent's prompt a second time; control characters could fake its structure.
UNSAFE_TEXT = re.compile(r"\{\{|\}\}|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def check_variable_value(value: str | float | bool) -> str | float | bool:
    """A variable's value as it may enter a prompt; ValueError otherwise."""
    if isinstance(value, str) and UNSAFE_TEXT.search(value):
        raise PydanticCustomError(
            "unsafe_text",
            "Text must not hold {open}, {close} or control characters",
            {"open": "{{", "close": "}}"},
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("not_a_number", "A number is finite")
    if len(value if isinstance(value, str) else to_json(value)) > MAX_VARIABLE:
        raise PydanticCustomError("too_long", "A value has at most 1,000 characters")
    return value


VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
VariableText = Annotated[str, AfterValidator(check_variable_value)]
VariableValue = Annotated[bool | int | float | str, AfterValidator(check_variable_value)]


def check_limits(text: str) -> str:
    """Limits such as `5/minute;50/day`, each at least 1; ValueError otherwise."""
    try:
        items = parse_many(text)
    except ValueError:
        items = []
    if not items or any(item.amount < 1 for item in items):
        raise ValueError("is not a list of limits")
    if len({item.get_expiry() for item in items}) < len(items):
        raise ValueError("has two limits of one period")  # which would be counted as one
    return text
