"""Claims of a token by name: a top-level claim, or a JSON pointer into the token."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any

from pydantic import AfterValidator

BAD_ESCAPE = re.compile(r"~(?![01])")
INDEX = re.compile(r"0|[1-9][0-9]{0,8}")


def check_claim_name(name: str) -> str:
    """Return a claim's name. Raises ValueError for one that begins with `/` and is no JSON pointer."""
    if not name:
        raise ValueError("is empty")
    if not name.isprintable():
        raise ValueError("has a line break, or another character that does not print")
    if name.startswith("/") and BAD_ESCAPE.search(name):
        raise ValueError("is no JSON pointer: ~ is written ~0, and / in a name ~1")
    return name


ClaimName = Annotated[str, AfterValidator(check_claim_name)]


def claim_of(claims: Mapping[str, Any], name: str) -> Any:
    """Return a claim, or None if there is none.

    A name that begins with `/` is a JSON pointer (RFC 6901): `/o/id` is `id` of the object `o`. Any other name is a
    top-level claim's, such as `https://example.com/plan`.
    """
    if not name.startswith("/"):
        return claims.get(name)
    value: Any = claims
    for token in _tokens(name):
        if isinstance(value, Mapping):
            value = value.get(token)
        elif isinstance(value, list) and INDEX.fullmatch(token) and int(token) < len(value):
            value = value[int(token)]
        else:
            return None
    return value


@lru_cache(256)
def _tokens(pointer: str) -> tuple[str, ...]:
    # In this order: `~01` is `~1` (RFC 6901, section 4).
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in pointer[1:].split("/"))
