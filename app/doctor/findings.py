"""The doctor's findings, one per check, as lines for people or as JSON for programs."""

import asyncio
import json
import textwrap
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]

MARKS: dict[Level, str] = {"ok": "✓", "warning": "!", "error": "✗"}
PLAIN_MARKS: dict[Level, str] = {"ok": "ok", "warning": "! ", "error": "X "}
COLOURS: dict[Level, str] = {"ok": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
RESET = "\x1b[0m"
PLAIN = str.maketrans({"…": "...", "–": "-", "→": "->", "’": "'"})

DEADLINE = 18.0
"""Seconds for all checks together."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `remedy`: what to do about it; empty if nothing. Neither text holds a secret."""

    name: str
    level: Level
    detail: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        """True unless it is an error; a warning is ok."""
        return self.level != "error"


def fine(name: str, detail: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(name, "ok", detail)


def warning(name: str, detail: str, remedy: str = "") -> Finding:
    """Return a finding that is worth a look, or of what could not be checked."""
    return Finding(name, "warning", detail, remedy)


def wrong(name: str, detail: str, remedy: str) -> Finding:
    """Return a finding that must be fixed."""
    return Finding(name, "error", detail, remedy)


def all_ok(findings: Sequence[Finding]) -> bool:
    """True if there is no error."""
    return all(finding.ok for finding in findings)


async def within(seconds: float, work: Callable[[], Awaitable[list[Finding]]], names: Sequence[str]) -> list[Finding]:
    """Return the work's findings, or an error under each name if it fails or takes longer. Never raises."""
    try:
        async with asyncio.timeout(seconds):
            return await work()
    except TimeoutError:
        return [wrong(name, f"no result within {seconds:.0f} s", "check DNS and the network") for name in names]
    except Exception as error:  # its message is left out: it may quote a secret
        remedy = "report this to the broker's authors"
        return [wrong(name, f"the check itself failed ({type(error).__name__})", remedy) for name in names]


def as_json(findings: Sequence[Finding]) -> str:
    """Return one JSON object, in ASCII."""
    checks = [{"name": finding.name, "ok": finding.ok} | asdict(finding) for finding in findings]
    return json.dumps({"ok": all_ok(findings), "checks": checks}, indent=2)


def as_text(findings: Sequence[Finding], *, encoding: str, colour: bool, width: int | None = None) -> str:
    """Return the lines of `as_lines`, and a summary line."""
    return "\n".join([*as_lines(findings, encoding=encoding, colour=colour, width=width), _summary(findings)])


def as_lines(findings: Sequence[Finding], *, encoding: str, colour: bool, width: int | None = None) -> list[str]:
    """Return one line per finding. `encoding`: of the terminal; ASCII replaces what it lacks.

    `width`: of the terminal, in columns; lines then wrap between words, and remedies start on their own line.
    """
    unicode = _can_encode(encoding, "✓✗→")
    lines: list[str] = []
    for finding in findings:
        mark = (MARKS if unicode else PLAIN_MARKS)[finding.level]
        parts = [_printable(f"{finding.name}: {finding.detail}")]
        if finding.remedy:
            parts.append(_printable(f"→ {finding.remedy}"))
        first, *rest = [" ".join(parts)] if width is None else _wrapped(parts, width - len(mark) - 1)
        shown = f"{COLOURS[finding.level]}{mark}{RESET}" if colour else mark
        lines += [f"{shown} {first}", *(" " * (len(mark) + 1) + line for line in rest)]
    return lines if unicode else [line.translate(PLAIN).encode(encoding, "replace").decode(encoding) for line in lines]


def _wrapped(parts: Sequence[str], width: int) -> list[str]:
    wrapper = textwrap.TextWrapper(max(width, 1), break_on_hyphens=False, break_long_words=False)
    return [line for part in parts for line in wrapper.wrap(part)]


def _summary(findings: Sequence[Finding]) -> str:
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    wrong = {0: "Nothing is wrong", 1: "1 thing is wrong"}.get(errors, f"{errors} things are wrong")
    return wrong + {0: ".", 1: "; 1 warning."}.get(warnings, f"; {warnings} warnings.")


def _printable(text: str) -> str:
    """Replace control characters, so that the text stays one line and cannot steer the terminal."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _can_encode(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
