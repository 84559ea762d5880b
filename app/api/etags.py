"""Conditional requests."""


def matches(if_none_match: str, etag: str) -> bool:
    """Return whether the header is `*` or lists the ETag, compared weakly (RFC 9110, section 13.1.2)."""
    return any(each.strip().removeprefix("W/") in (etag, "*") for each in if_none_match.split(","))
