"""Write the parts of the documentation that the code already says: `python -m tests.documents`.

A table stands between `<!-- name -->` and `<!-- /name -->` in one of the Markdown documents. `deploy/settings.md`,
`.env.example` and `deploy/openapi.json` are written as a whole.
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from typer.main import get_group

from app.api.app import create_app
from app.cli.commands import cli
from app.config.loading import EMPTY_MEANS_NONE, load_settings
from app.config.settings import ANY_TEXT, FIELDS, SECRETS, SettingsError
from app.limits.record import MOVES
from app.problems import KINDS
from app.telemetry.metrics import Metrics

ROOT = Path(__file__).parent.parent
COMMAND = "python -m tests.documents"


def commands_table() -> str:
    """Every command and the first sentence of its help."""
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


def errors_table() -> str:
    """Every error, by status."""
    kinds = sorted(KINDS.items(), key=lambda kind: kind[1].status)
    rows = [[str(kind.status), f"`{slug}`", kind.meaning, kind.remedy] for slug, kind in kinds]
    return _table(["Status", "Slug", "Meaning", "What to do"], rows)


def metrics_table() -> str:
    """The broker's own metrics, without those of the Python process."""
    families = text_string_to_metric_families(Metrics().text("")[0].decode())
    ours = [family for family in families if family.name.startswith(("broker_", "http_"))]
    names = [family.name + ("_total" if family.type == "counter" else "") for family in ours]
    rows = [[f"`{name}`", family.documentation] for name, family in zip(names, ours, strict=True)]
    return _table(["Metric", "Meaning"], sorted(rows))


GROUPS = {
    "ONEINBOX_API_KEY": "OneInbox and agents",
    "BROKER_AUTH": "Who is calling",
    "BROKER_ALLOWED_ORIGINS": "Which pages may call",
    "BROKER_SESSION_LIMITS": "Limits",
    "BROKER_STORE_URL": "The store",
    "BROKER_EXPOSE": "What a page may set and see",
    "BROKER_SECRET": "Secrets and privacy",
    "BROKER_CLIENT": "The browser's side",
    "BROKER_DRAIN_SECONDS": "Running it",
}
"""The chapters of deploy/settings.md, each by the setting that begins it."""


def moves_table() -> str:
    """Every move of a call's record between states."""
    rows = [[f"{move.before or 'none'} → {move.after}", move.who, move.evidence, move.follows] for move in MOVES]
    return _table(["Move", "By", "On what evidence", "What follows"], rows)


def settings_document() -> str:
    """Every setting, in chapters."""
    chapters: dict[str, list[list[str]]] = {}
    for name, field in FIELDS.items():
        if name in GROUPS:
            rows = chapters.setdefault(GROUPS[name], [])
        rows.append([f"`{name}`", field.description or "", takes(field), _default(name)])
    lines = [
        f"<!-- Generated from app/config/settings.py by {COMMAND}. -->",
        "# Settings",
        "",
        "Settings come from the environment, or from `.env` in the working directory; the environment wins.",
        "[.env.example](../.env.example) is a template. An empty variable counts as unset, except "
        f"{' and '.join(f'`{name}`' for name in sorted(EMPTY_MEANS_NONE))}: empty allows none.",
        "An unknown `BROKER_…` or `ONEINBOX_…` variable is an error, and so is a setting of another `BROKER_AUTH`.",
        "",
        "In `.env` each line is `NAME=value`, a comment or blank; anything else is an error. `${NAME}` stands for",
        "another variable. White space, line breaks, a byte order mark and quotes around a value do not count,",
        "in a variable as in a file. "
        f"Only {' and '.join(f'`{name}`' for name in sorted(ANY_TEXT))}, which may hold quotes, are refused in quotes.",
        "",
        "A secret may also come from a file: append `_FILE` to its name and give the path. The secrets are "
        f"{', '.join(f'`{name}`' for name in FIELDS if name in SECRETS)}.",
    ]
    for title, rows in chapters.items():
        lines += ["", f"## {title}", "", _table(["Variable", "Meaning", "Takes", "Default"], rows).rstrip()]
    return "\n".join(lines) + "\n"


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
    """The values a setting takes, in words."""
    extra = field.json_schema_extra
    return str(extra["takes"]) if isinstance(extra, dict) else ""


def default_text(field: FieldInfo) -> str:
    """A default as written in the environment; empty if there is none."""
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


TABLES: dict[str, Callable[[], str]] = {
    "commands": commands_table,
    "routes": routes_table,
    "errors": errors_table,
    "metrics": metrics_table,
    "moves": moves_table,
}


def markdown() -> dict[Path, str]:
    """Every Markdown document of the repository, and its text."""
    folders = (".github", "app", "deploy", "tests")
    paths = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))]
    return {path: path.read_text(encoding="utf-8") for path in sorted(paths) if "node_modules" not in path.parts}


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of one language in a Markdown document."""
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


def shell_lines(text: str) -> list[str]:
    """The lines that a Markdown document asks its reader to type."""
    return [line for block in blocks(text, "sh") for line in block.splitlines()]


def documents() -> dict[Path, str]:
    """Every file with generated parts, and what it should hold. Raises ValueError unless each table has one place."""
    written: dict[Path, str] = {}
    places: list[str] = []
    for path, text in markdown().items():
        for name in re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE):
            between = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
            written[path] = between.sub(lambda _, name=name: TABLES[name](), written.get(path, text))  # type: ignore[misc]
            places.append(name)
    if sorted(places) != sorted(TABLES):
        raise ValueError(f"the documents have places for {sorted(places)}, not one for each of {sorted(TABLES)}")
    return {
        **written,
        ROOT / "deploy" / "settings.md": settings_document(),
        ROOT / ".env.example": env_example(),
        ROOT / "deploy" / "openapi.json": json.dumps(document(), indent=2, ensure_ascii=False) + "\n",
    }


def _commands(group: Any, prefix: str = "") -> Iterator[list[str]]:
    """A row for each command of a group, and of the groups in it."""
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
    """Escape text for a table cell, except its `code`."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<>\[\]])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts).replace("|", r"\|").replace("\n", " ")


def main() -> None:
    """Write the files that differ, and print them."""
    for path, text in documents().items():
        changed = not path.is_file() or path.read_text(encoding="utf-8") != text
        if changed:
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'written' if changed else 'unchanged'}")  # noqa: T201


if __name__ == "__main__":
    main()
