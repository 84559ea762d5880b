"""Request bodies: limited in size, parsed as strict JSON (RFC 8259)."""

import math
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from app.problems import Problem

MAX_DEPTH = 32
ENCODINGS = {"Accept-Encoding": "identity"}


def check_declared(request: Request, limit: int) -> None:
    """Check the headers.

    Raises 413 for a declared size over `limit` bytes, 415 for a type that is not JSON, and for any content coding.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise Problem("body-too-large")
    if not all(_is_json(content_type) for content_type in request.headers.getlist("content-type")):
        raise Problem("unsupported-media-type")
    if any(coding.strip() for coding in request.headers.getlist("content-encoding")):
        # RFC 9110, section 12.5.3: says that a coding was refused, not the type.
        raise Problem("unsupported-media-type", "Send the body without Content-Encoding.", ENCODINGS)


def _is_json(content_type: str) -> bool:
    essence = content_type.partition(";")[0].strip().lower()
    return essence == "application/json" or (essence.startswith("application/") and essence.endswith("+json"))


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body, chunked or not. Raises 413 once it exceeds `limit` bytes."""
    raw = bytearray()
    while True:  # Request.stream() does the same at ten times the cost
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        raw += message.get("body", b"")
        if len(raw) > limit:
            raise Problem("body-too-large")
        if not message.get("more_body", False):
            return bytes(raw)


async def read_json(request: Request, limit: int) -> Any:
    """Return the JSON value of a body of at most `limit` bytes, `{}` for an empty one.

    Raises 413; 400 if it is not strict JSON of at most 32 levels; 415 for a body without a Content-Type; 422 for NUL
    characters.
    """
    raw = await read_body(request, limit)
    if not raw:
        return {}
    if "content-type" not in request.headers:
        raise Problem("unsupported-media-type")
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError:
        raise Problem("malformed-json") from None
    _check(value, MAX_DEPTH)
    return value


def _check(value: Any, levels: int) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise Problem("invalid-request", "The body contains a NUL character.")
    elif isinstance(value, float):
        if not math.isfinite(value):  # 1e999
            raise Problem("malformed-json")
    elif isinstance(value, (dict, list)):
        if not levels:
            raise Problem("malformed-json")
        for each in value:
            _check(each, levels - 1)
        if isinstance(value, dict):
            for each in value.values():
                _check(each, levels - 1)
