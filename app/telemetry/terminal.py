"""What a stream's reader can bear."""

import os
from typing import TextIO

WIDEST = 120
"""Columns; longer lines are hard to read."""


def has_colour(stream: TextIO) -> bool:
    """Whether to write in colour: on a terminal, unless NO_COLOR (https://no-color.org) is set, or it is a dumb one."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width_of(stream: TextIO) -> int | None:
    """Columns of the terminal behind a stream, WIDEST at most; None: it is none, or does not say."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return None
    return min(columns, WIDEST) or None
