"""Writes the parts of the documentation that the code already says: `python -m tests.documents`.

In README.md they stand between `<!-- name -->` and `<!-- /name -->`; `.env.example` and `deploy/openapi.json` are
written as a whole.
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from typer.main import get_group

from app.api.app import create_app
from app.cli.commands import cli
from app.config.loading import load_settings
from app.config.settings import FIELDS, SECRETS, SettingsError
from app.problems import KINDS

ROOT = Path(__file__).parent.parent
COMMAND = "python -m tests.documents"


def commands_table() -> str:
    """Every command and what its help says first."""
    return _table(["Command", "Does"], _commands(get_group(cli)))


def routes_table() -> str:
    """Every route of the OpenAPI document."""
    paths = document()["paths"]
    rows = [
        [f"`{method.upper()} {path}`", operation["summary"]]
        for path, operations in paths.items()
        for method, operation in operations.items()
    ]
    return _table(["Route", "Does"], rows)


def settings_table() -> str:
    """Every setting."""
    rows = [[f"`{name}`", field.description or "", takes(field), _default(name)] for name, field in FIELDS.items()]
    return _table(["Variable", "Meaning", "Takes", "Default"], rows)


def errors_table() -> str:
    """Every error, by status."""
    kinds = sorted(KINDS.items(), key=lambda kind: kind[1].status)
    rows = [[str(kind.status), f"`{slug}`", kind.meaning, kind.remedy] for slug, kind in kinds]
    return _table(["Status", "Slug", "Meaning", "What to do"], rows)


def env_example() -> str:
    """Every setting, with its default; all but the required ones commented out."""
    needed = required()
    lines = [
        "# Settings of the broker. Copy to .env and fill in; the environment wins over .env.",
        f"# Written from app/config/settings.py by {COMMAND}.",
    ]
    others = [name for name in FIELDS if name not in needed]
    groups = {
        "Required": [name for name in FIELDS if name in needed],
        "OneInbox": [name for name in others if name.startswith("ONEINBOX_")],
        "The broker": [name for name in others if name.startswith("BROKER_")],
    }
    for title, chosen in groups.items():
        lines += ["", f"# {f' {title} ':-^78}"]
        for name in chosen:
            about = f"{FIELDS[name].description}. Takes {takes(FIELDS[name])}."
            if name in SECRETS:
                about += f" Or {name}_FILE: the path of a file that holds it."
            comment = textwrap.wrap(about, 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
            lines += ["", *comment, f"{'' if name in needed else '#'}{name}={default_text(FIELDS[name])}"]
    return "\n".join(lines) + "\n"


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document."""
    settings = load_settings({"ONEINBOX_API_KEY": "oi_sk_none", "ONEINBOX_AGENT_ID": "none"}, env_file=None)
    return create_app(settings).openapi()


@cache
def required() -> frozenset[str]:
    """The settings without which the broker does not start."""
    try:
        load_settings({}, env_file=None)
    except SettingsError as error:
        return frozenset(line.partition(":")[0] for line in error.lines)
    return frozenset()


def takes(field: FieldInfo) -> str:
    """What a setting takes, in words."""
    extra = field.json_schema_extra
    return str(extra["takes"]) if isinstance(extra, dict) else ""


def default_text(field: FieldInfo) -> str:
    """A default as one would write it into the environment; empty where there is none."""
    value: Any = None if field.is_required() else field.get_default()
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, dict):
        return ",".join(f"{name}={each}" for name, each in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands_table,
    "routes": routes_table,
    "settings": settings_table,
    "errors": errors_table,
}


def readme(text: str) -> str:
    """README.md with its generated parts written anew."""
    for name, part in PARTS.items():
        between = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        text, found = between.subn(lambda _, part=part: part(), text)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"README.md has {found} places between <!-- {name} --> and <!-- /{name} -->, not one")
    return text


def documents() -> dict[Path, str]:
    """Every file with generated parts, and what it should hold."""
    path = ROOT / "README.md"
    return {
        path: readme(path.read_text(encoding="utf-8")),
        ROOT / ".env.example": env_example(),
        ROOT / "deploy" / "openapi.json": json.dumps(document(), indent=2, ensure_ascii=False) + "\n",
    }


def _commands(group: Any, prefix: str = "") -> Iterator[list[str]]:
    """A row for each command of a group of commands, and of the groups in it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield [f"`{prefix}{name}`", command.get_short_help_str(200)]


def _default(name: str) -> str:
    if name in required():
        return "required"
    text = default_text(FIELDS[name])
    return f"`{text}`" if text else "–"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """Text as Markdown shows it word for word in a table, but for its `code`."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<>\[\]])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts).replace("|", r"\|").replace("\n", " ")


def main() -> None:
    """Write what differs, and say so."""
    for path, text in documents().items():
        changed = not path.is_file() or path.read_text(encoding="utf-8") != text
        if changed:
            path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {'written' if changed else 'as it should be'}")  # noqa: T201


if __name__ == "__main__":
    main()
