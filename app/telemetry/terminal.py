"""Colours and width of the terminal behind a stream."""

import os
from typing import TextIO

WIDEST = 120
"""Columns; longer lines are hard to read."""


def has_colour(stream: TextIO) -> bool:
    """True on a terminal, unless NO_COLOR (https://no-color.org) is set or TERM is `dumb`."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width_of(stream: TextIO) -> int | None:
    """Return the terminal's columns, WIDEST at most; None off a terminal, or if it does not say."""
    try:
        return min(os.get_terminal_size(stream.fileno()).columns, WIDEST) or None
    except (OSError, ValueError):
        return None
