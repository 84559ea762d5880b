"""Claims of a token by name: a top-level claim, or a JSON pointer into the token."""

import json
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Annotated, Any

from pydantic import AfterValidator

from app.config.validation import one_line, unquoted

BAD_ESCAPE = re.compile(r"~(?![01])")
INDEX = re.compile(r"0|[1-9][0-9]{0,8}")


def check_claim_name(name: str) -> str:
    """Return a claim's name. Raises ValueError for one that begins with `/` and is no JSON pointer."""
    if not name:
        raise ValueError("is empty")
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


def read_required_claims(pairs: list[str]) -> dict[str, tuple[str, ...]]:
    """Read pairs such as `azp=https://a.example|https://b.example`. Raises ValueError."""
    required: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        name, equals, texts = map(unquoted, pair.partition("="))
        accepted = tuple(unquoted(text) for text in texts.split("|"))
        if not equals or not all(accepted):
            raise ValueError("is not a list of claim=value")
        if check_claim_name(name) in required:
            raise ValueError("names a claim twice")
        required[name] = tuple(map(one_line, accepted))
    return required


def is_accepted(claim: Any, accepted: Collection[str]) -> bool:
    """Return whether a claim is one of these texts; of a list, one item is enough.

    Numbers and booleans are compared as JSON writes them: `true`, `42`.
    """
    given = claim if isinstance(claim, list) else [claim]
    texts = [json.dumps(one) if isinstance(one, int | float) else one for one in given]
    return any(isinstance(text, str) and text in accepted for text in texts)


@lru_cache(256)
def _tokens(pointer: str) -> tuple[str, ...]:
    # In this order: `~01` is `~1` (RFC 6901, section 4).
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in pointer[1:].split("/"))
