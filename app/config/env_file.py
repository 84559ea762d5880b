"""`.env`. Each line is a setting, a comment or blank: a typo must not switch a limit off."""

import io
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from dotenv.parser import Binding, parse_stream
from dotenv.variables import Atom, Literal, Variable, parse_variables

from app.config.settings import PREFIXES, SettingsError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OURS = re.compile(rf"(?<![A-Za-z0-9_])({'|'.join(PREFIXES)})[A-Za-z0-9_]+[ \t]*=", re.IGNORECASE)
ANOTHER = re.compile(r"(?<![,\s])\s+(export\s+)?[A-Za-z_][A-Za-z0-9_]*=")
"""A second setting on the line; after a comma it is the next pair of a list."""


def read_env_file(path: Path, environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return a file's variables, and a line for each of its mistakes, with its number. No file: neither.

    `environ`: for `${NAME}` in a value, besides the file's own variables. Raises SettingsError if it cannot be read.
    """
    values: dict[str, str] = {}
    mistakes = []
    for binding in parse_stream(io.StringIO(_text_of(path).replace("\r\n", "\n"))):
        if binding.key is None and not binding.error:
            continue  # a comment, or the end
        wrong = _wrong(binding)
        if not wrong:
            assert binding.key is not None  # noqa: S101 - `_wrong` wants a name and a value
            assert binding.value is not None  # noqa: S101
            # In single quotes `${` means itself, as in a shell.
            parts = [Literal(binding.value)] if _quote(binding) == "'" else list(parse_variables(binding.value))
            known = {**environ, **values}
            values[binding.key] = "".join(part.resolve(known) for part in parts)
            if binding.key.upper().startswith(PREFIXES) and any(_is_missing(part, known) for part in parts):
                wrong = "uses ${…} of a variable that is not set"
        if wrong:
            mistakes.append(f"{path}: line {_line_of(binding)} {wrong}; takes one NAME=value a line")
    return values, mistakes


def _text_of(path: Path) -> str:
    """Return the file's text; empty if there is none."""
    reason: str | None = "it is a pipe"  # which would block until something writes to it
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and not status.st_size):
            return ""  # `.env` is also a usual name for a virtual environment
        if not stat.S_ISFIFO(status.st_mode):
            return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if not path.is_symlink():
            return ""
        reason = error.strerror
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    raise SettingsError([f"{path}: cannot be read ({reason})"])


def _wrong(binding: Binding) -> str:
    """Return what is wrong with a line; empty if nothing is."""
    if binding.error or binding.value is None or binding.key is None or not NAME.fullmatch(binding.key):
        return "is not a setting, a comment or blank"
    is_ours = binding.key.upper().startswith(PREFIXES)
    if OURS.search(binding.value) or (is_ours and not _quote(binding) and ANOTHER.search(binding.value)):
        return "holds two settings, or a quote that does not close"
    return ""


def _quote(binding: Binding) -> str:
    """Return the quote in which the value stands; empty if it stands in none."""
    first = binding.original.string.partition("=")[2].lstrip(" \t")[:1]
    return first if first in ("'", '"') else ""


def _is_missing(part: Atom, known: Mapping[str, str]) -> bool:
    return isinstance(part, Variable) and part.default is None and part.name not in known


def _line_of(binding: Binding) -> int:
    """Return the line's number; the parser counts blank lines before it to the setting."""
    text = binding.original.string
    return binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
