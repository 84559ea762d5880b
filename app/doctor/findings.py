"""What the doctor says: one finding per check, as lines for people or as JSON for programs."""

import asyncio
import json
import textwrap
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
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
    """What one check found. `remedy`: what to do about it; empty: nothing. Neither text holds a secret."""

    name: str
    level: Level
    detail: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; a warning is not wrong."""
        return self.level != "error"


def fine(name: str, detail: str) -> Finding:
    """Nothing to do."""
    return Finding(name, "ok", detail)


def warning(name: str, detail: str, remedy: str = "") -> Finding:
    """Worth a look, or something that could not be found out."""
    return Finding(name, "warning", detail, remedy)


def wrong(name: str, detail: str, remedy: str) -> Finding:
    """Must be mended."""
    return Finding(name, "error", detail, remedy)


def all_ok(findings: Sequence[Finding]) -> bool:
    """Whether nothing is wrong."""
    return all(finding.ok for finding in findings)


async def within(seconds: float, work: Callable[[], Awaitable[list[Finding]]], names: Sequence[str]) -> list[Finding]:
    """What the work finds; findings under these names when it does not come to an end. Never raises."""
    try:
        async with asyncio.timeout(seconds):
            return await work()
    except TimeoutError:
        return [wrong(name, f"no result within {seconds:.0f} s", "look at DNS and the network") for name in names]
    except Exception as error:  # a doctor does not faint; whose words the message repeats, nobody knows: maybe a secret
        remedy = "tell the broker's authors"
        return [wrong(name, f"the check itself failed ({type(error).__name__})", remedy) for name in names]


def as_json(findings: Sequence[Finding]) -> str:
    """One JSON object, in ASCII."""
    checks = [
        {
            "name": finding.name,
            "ok": finding.ok,
            "level": finding.level,
            "detail": finding.detail,
            "remedy": finding.remedy,
        }
        for finding in findings
    ]
    return json.dumps({"ok": all_ok(findings), "checks": checks}, indent=2)


def as_text(findings: Sequence[Finding], *, encoding: str, colour: bool, width: int | None = None) -> str:
    """The lines of `as_lines`, and one that sums up."""
    return "\n".join([*as_lines(findings, encoding=encoding, colour=colour, width=width), _summary(findings)])


def as_lines(findings: Sequence[Finding], *, encoding: str, colour: bool, width: int | None = None) -> list[str]:
    """A line for each finding. `encoding`: of the terminal; what it lacks is written in ASCII.

    `width`: of the terminal, in columns; the lines are broken between words, and what to do has one of its own.
    """
    rich = _has(encoding, "".join(MARKS.values()) + "→")
    lines: list[str] = []
    for finding in findings:
        mark = (MARKS if rich else PLAIN_MARKS)[finding.level]
        found, remedy = _printable(f"{finding.name}: {finding.detail}"), _printable(finding.remedy)
        if width is None:
            parts = [f"{found} → {remedy}" if remedy else found]
        else:
            indent = " " * (len(mark) + 1)
            parts = _broken(found, width, indent, indent)
            parts += _broken(remedy, width, f"{indent}→ ", f"{indent}  ") if remedy else []
            parts[0] = parts[0].removeprefix(indent)
        parts[0] = f"{COLOURS[finding.level]}{mark}{RESET} {parts[0]}" if colour else f"{mark} {parts[0]}"
        lines += parts
    return lines if rich else [line.translate(PLAIN).encode(encoding, "replace").decode(encoding) for line in lines]


def _broken(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )


def _summary(findings: Sequence[Finding]) -> str:
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    noted = f"{warnings} {'warning' if warnings == 1 else 'warnings'}" if warnings else ""
    if not errors:
        return f"Nothing is wrong; {noted}." if noted else "Nothing is wrong."
    found = "1 thing is wrong" if errors == 1 else f"{errors} things are wrong"
    return f"{found}; {noted}." if noted else f"{found}."


def _printable(text: str) -> str:
    """A line that stays one, whatever names and messages it repeats: no control character reaches the terminal."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _has(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
