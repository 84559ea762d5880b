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
from tests.documents import COMMAND, ROOT, documents, required

PIN = re.compile(r"^([a-z0-9-]+)==([^ ]+)", re.MULTILINE)


@pytest.mark.parametrize("name", ["README.md", ".env.example", "deploy/openapi.json"])
def test_generated_parts_are_what_the_code_says(name: str) -> None:
    path = ROOT / name
    assert path.read_text(encoding="utf-8") == documents()[path], f"{name} is out of date; mend it with: {COMMAND}"


def test_readme_lists_every_setting_and_every_error() -> None:
    rows = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in FIELDS if f"\n| `{name}` |" not in rows] == []
    assert [slug for slug in KINDS if f"| `{slug}` |" not in rows] == []


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
        ("requirements.lock", "project.dependencies"),
        ("requirements.lock", "project.optional-dependencies.otel"),
        ("build.lock", "build-system.requires"),
    ],
)
def test_lock_pins_what_pyproject_asks_for(lock: str, place: str) -> None:
    text = (ROOT / "deploy" / lock).read_text(encoding="utf-8")
    pins: dict[str, set[str]] = {}
    for name, version in PIN.findall(text):
        pins.setdefault(name, set()).add(version)
    asked: Any = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for name in place.split("."):
        asked = asked[name]
    assert {
        str(each)
        for each in map(Requirement, asked)
        if not any(each.specifier.contains(version) for version in pins.get(canonicalize_name(each.name), ()))
    } == set(), f"deploy/{lock} is out of date; mend it with: bash deploy/lock.sh"
    assert "--hash=sha256:" in text
    assert "://" not in text


def _filled_in(directory: Path, comment: str) -> Path:
    """.env.example with the required settings, and the lines uncommented that start with `comment`."""
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    for name in required():
        text = text.replace(f"\n{name}=\n", f"\n{name}=oi_sk_filled_in\n")
    path = directory / ".env"
    path.write_text(re.sub(rf"^{comment}(?=[A-Z_]+=)", "", text, flags=re.MULTILINE), encoding="utf-8")
    return path


def _defaults() -> object:
    return load_settings(dict.fromkeys(required(), "oi_sk_filled_in"), env_file=None)
