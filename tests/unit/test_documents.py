"""The documentation says what the code says."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app.config.loading import load_settings
from app.config.settings import FIELDS
from app.problems import KINDS
from tests.documents import COMMAND, ROOT, blocks, documents, markdown, required
from tests.unit.test_layout import FLOORS

PIN = re.compile(r"^([a-z0-9-]+)==([^ ]+)", re.MULTILINE)


HOUSE = (
    "README.md",
    "CHANGELOG.md",
    "app/README.md",
    "app/client/README.md",
    "deploy/README.md",
    "deploy/settings.md",
    "deploy/runbooks.md",
    "tests/README.md",
    "tests/benchmarks/README.md",
    ".github/SECURITY.md",
    ".github/CONTRIBUTING.md",
)
MOST_BYTES = 16_000
"""Of README.md, which is for two minutes."""


@pytest.mark.parametrize(
    "name", ["app/client/README.md", "deploy/README.md", "deploy/settings.md", ".env.example", "deploy/openapi.json"]
)
def test_generated_parts_are_what_the_code_says(name: str) -> None:
    path = ROOT / name
    assert path.read_text(encoding="utf-8") == documents()[path], f"{name} is out of date; update it with: {COMMAND}"


def test_the_documents_are_those_of_the_house() -> None:
    assert [path.relative_to(ROOT).as_posix() for path in markdown()] == sorted(HOUSE)


def test_readme_takes_two_minutes() -> None:
    assert (ROOT / "README.md").stat().st_size <= MOST_BYTES


def test_every_setting_and_every_error_is_documented() -> None:
    settings = (ROOT / "deploy/settings.md").read_text(encoding="utf-8")
    errors = (ROOT / "app/client/README.md").read_text(encoding="utf-8")
    assert [name for name in FIELDS if f"\n| `{name}` |" not in settings] == []
    assert [slug for slug in KINDS if f"| `{slug}` |" not in errors] == []


def test_every_alert_has_its_runbook() -> None:
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "deploy/monitoring/alerts.yaml").read_text(encoding="utf-8"))
    runbooks = (ROOT / "deploy/runbooks.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)$", runbooks, re.MULTILINE) == alerts


def test_runbooks_name_log_events_that_there_are() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "app").rglob("*.py"))
    events = re.findall(r"`([a-z]+(?:_[a-z]+)+)`", (ROOT / "deploy/runbooks.md").read_text(encoding="utf-8"))
    ours = {event for event in events if not event.startswith(("broker_", "http_"))}
    assert len(ours) > 5
    assert {event for event in ours if f'"{event}"' not in source} == set()


def test_the_picture_of_the_rooms_has_the_floors_of_the_layout() -> None:
    [picture] = blocks((ROOT / "app/README.md").read_text(encoding="utf-8"), "text")
    floors = [set(line.partition("  ")[0].split(", ")) for line in picture.splitlines()]
    assert floors == FLOORS


def test_every_setting_says_what_it_means_and_takes() -> None:
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert {name for name in FIELDS if not re.search(rf"\n# .+\n#?{name}=", example)} == set()


def test_env_example_needs_the_required_settings_only(tmp_path: Path) -> None:
    assert load_settings({}, _filled_in(tmp_path, "")) == _defaults()


def test_env_example_shows_the_defaults(tmp_path: Path) -> None:
    assert load_settings({}, _filled_in(tmp_path, "#")) == _defaults()


@pytest.mark.parametrize(
    ("lock", "place"),
    [
        ("deploy/requirements.lock", "project.dependencies"),
        ("deploy/requirements.lock", "project.optional-dependencies.otel"),
        ("deploy/build.lock", "build-system.requires"),
        (".ci/test.lock", "project.dependencies"),
        (".ci/test.lock", "project.optional-dependencies.test"),
        (".ci/test.lock", "project.optional-dependencies.bench"),
        (".ci/test.lock", "build-system.requires"),
    ],
)
def test_lock_pins_what_pyproject_asks_for(lock: str, place: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    pins: dict[str, set[str]] = {}
    for name, version in PIN.findall(text):
        pins.setdefault(name, set()).add(version)
    asked: Any = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for name in place.split("."):
        asked = asked[name]
    assert {
        str(each)
        for each in map(Requirement, asked)
        if each.name != "oneinbox-broker"
        and not any(each.specifier.contains(version) for version in pins.get(canonicalize_name(each.name), ()))
    } == set(), f"{lock} is out of date; update it with: bash deploy/lock.sh"
    assert "--hash=sha256:" in text
    assert "://" not in text


def _filled_in(directory: Path, comment: str) -> Path:
    """.env.example with the required settings, and the lines uncommented that start with `comment`.

    Those of other modes of BROKER_AUTH stay comments: they would be refused.
    """
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    for name in required():
        text = text.replace(f"\n{name}=\n", f"\n{name}=oi_sk_filled_in\n")
    path = directory / ".env"
    path.write_text(
        re.sub(rf"^{comment}(?=[A-Z_]+=)(?!BROKER_JWT_|BROKER_USER_HEADER)", "", text, flags=re.MULTILINE),
        encoding="utf-8",
    )
    return path


def _defaults() -> object:
    return load_settings(dict.fromkeys(required(), "oi_sk_filled_in"), env_file=None)
