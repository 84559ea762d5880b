"""Rules that settings, configuration files and requests share, and error lines for the first two."""

import difflib
import json
import math
import re
import string
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

from limits import parse_many
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError, to_json

AGENT_ID = r"^[A-Za-z0-9_-]{1,128}$"
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")

BLANKS = f"{string.whitespace}\u00a0\ufeff\u200b"
"""White space, and a file's byte order mark."""

MAX_CALL_SECONDS = 604800
"""The longest bound on a call: a week."""

MOST, LONGEST = 1_000_000_000, 10 * 366 * 86400
"""Highest number of a limit, and its longest period in seconds."""

MAX_VARIABLES = 32
MAX_VARIABLE = 1000

# `{{…}}` would be interpolated into the agent's prompt a second time; control characters could fake its structure. Lone
# surrogates, such as half an emoji, cannot be sent: they are no UTF-8.
UNSAFE_TEXT = re.compile(r"\{\{|\}\}|[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def check_variable_value(value: str | float | bool) -> str | float | bool:
    """Return a variable's value if it may enter a prompt; ValueError otherwise."""
    if isinstance(value, str) and UNSAFE_TEXT.search(value):
        raise PydanticCustomError(
            "unsafe_text", "Text must not hold {open}, {close} or control characters", {"open": "{{", "close": "}}"}
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("not_a_number", "A number is finite")
    if len(value if isinstance(value, str) else to_json(value)) > MAX_VARIABLE:
        raise PydanticCustomError("too_long", "A value has at most 1,000 characters")
    return value


def check_variable_type(value: Any) -> Any:
    """Return a value of a variable's type; raise one error for any other, not one per type."""
    if not isinstance(value, (bool, int, float, str)):
        raise PydanticCustomError("variable_type", "A value is a string, a number, true or false")
    return value


VariableName = Annotated[str, StringConstraints(pattern=rf"^{VARIABLE}$")]
AllowedVariable = Annotated[str, StringConstraints(pattern=rf"^({VARIABLE}|\*)$")]
"""A variable's name, or `*` for any."""
VariableText = Annotated[str, AfterValidator(check_variable_value)]
VariableValue = Annotated[
    bool | int | float | str, AfterValidator(check_variable_value), BeforeValidator(check_variable_type)
]


def check_limits(text: str) -> str:
    """Return limits such as `5/minute;50/day`, each from 1 to MOST within LONGEST seconds; ValueError otherwise."""
    try:
        items = parse_many(text)
    except ValueError:
        items = []
    if not items or any(item.amount < 1 for item in items):
        raise ValueError("is not a list of limits")
    if any(item.amount > MOST or item.get_expiry() > LONGEST for item in items):
        raise ValueError("has a number that is too large")  # for the store's arithmetic
    if len({item.get_expiry() for item in items}) < len(items):
        raise ValueError("has two limits for one period")  # which would be counted as one
    return text


def unquoted(text: str) -> str:
    """Return a text without white space, byte order mark and one pair of quotes around it."""
    text = text.strip(BLANKS)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        return text[1:-1].strip(BLANKS)
    return text


def one_line(text: str) -> str:
    """Return a text if it is one line, and neither empty nor half in quotes; ValueError otherwise."""
    if not text.isprintable():
        raise ValueError("has a line break, or another character that does not print")
    if not text or text[0] in "\"'" or text[-1] in "\"'":
        raise ValueError("is empty, or has a quote at one end")
    return text


class Table(BaseModel):
    """A table of a configuration file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def taking(takes: str, default: Any = ..., **rest: Any) -> Any:
    """Return a model's field, with what it takes in words, for the error line."""
    return Field(default, json_schema_extra={"takes": takes}, **rest)


def takes_of(field: FieldInfo) -> str:
    """Return what a field takes, in words."""
    return str(field.json_schema_extra["takes"]) if isinstance(field.json_schema_extra, dict) else ""


def what_is_wrong(error: ErrorDetails) -> str:
    """Say it in our validators' words; pydantic's own are longer and may repeat the value."""
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if error["loc"][-1] == "[key]":
        return "is not a valid name"
    return {"missing": "is required", "too_short": "is empty"}.get(error["type"], "is not valid")


def file_mistakes(error: ValidationError, model: type[Table]) -> list[str]:
    """Describe each wrong value of a configuration file in one line: dotted path, what is wrong, what it takes."""
    lines: dict[str, None] = {}  # ordered, without repeats: a wrong union has an error for each of its types
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        kind: Any = model
        path: list[str] = []
        takes, wrong, index = "", what_is_wrong(each), ""
        for key in each["loc"]:
            if isinstance(key, int):
                index = f"[{key}]"
                break
            if get_origin(kind) is dict:
                kind = get_args(kind)[1]
            elif key in (fields := getattr(kind, "model_fields", {})):
                kind, takes = fields[key].annotation, takes_of(fields[key])
                if isinstance(kind, UnionType):  # perhaps of a table and None
                    kind = next((each for each in get_args(kind) if hasattr(each, "model_fields")), kind)
            elif each["type"] == "extra_forbidden":
                wrong, takes = f"is not a known key{nearest(key, fields)}", ", ".join(fields)
            elif kind is not Any:
                break  # a type of a union
            path.append(key)
        lines[f"{dotted(path)}{index}: {wrong}; takes {takes}"] = None
    return list(lines)


def dotted(path: Iterable[str]) -> str:
    """Write a path as TOML does."""
    return ".".join(key if BARE_KEY.fullmatch(key) else quoted(key) for key in path)


def quoted(text: str) -> str:
    """Quote a text from a file: one line, of bounded length."""
    return json.dumps(text[:64], ensure_ascii=not text.isprintable())


def nearest(name: str, known: Iterable[str]) -> str:
    """Name the known name most like `name`; empty when none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; the nearest is {close[0]}" if close else ""
