"""What README.md tells people to type is there."""

import json
import re
import shlex
import tomllib
from urllib.parse import urlsplit

import pytest
from typer.main import get_group
from uvicorn.main import main as uvicorn

from app.api.app import create_app
from app.cli.commands import cli
from app.config.loading import load_settings
from app.config.settings import KNOWN
from app.server.server import GRACE
from app.sessions.schemas import SessionRequest
from tests.documents import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHELL = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
SETTINGS = load_settings({"ONEINBOX_API_KEY": "oi_sk_none", "ONEINBOX_AGENT_ID": "none"}, env_file=None)
CURLS = [match for line in SHELL for match in re.findall(r"curl (?:'[^']*'|\"[^\"]*\"|[^|)'\"])+", line)]


def test_there_is_one_command_to_try_it_and_one_to_test_it() -> None:
    venv = "python3 -m venv .venv && .venv/bin/pip install"
    assert [line for line in SHELL if ".venv/bin/pip" in line] == [
        f"{venv} . && .venv/bin/oneinbox-broker sandbox",
        f"{venv} -e '.[test]' && .venv/bin/pytest",
    ]


def test_uvicorn_line_has_what_keeps_addresses_and_call_keys_safe() -> None:
    (line,) = [line for line in SHELL if "uvicorn" in line]
    context = uvicorn.make_context("uvicorn", shlex.split(line)[1:])
    assert context.params["app"] == "app.main:app"
    assert context.params["proxy_headers"] is False
    assert context.params["access_log"] is False
    assert context.params["timeout_graceful_shutdown"] == GRACE


@pytest.mark.parametrize("curl", CURLS)
def test_curl_examples_name_routes_and_send_what_they_take(curl: str) -> None:
    words = shlex.split(curl)
    method = words[words.index("-X") + 1] if "-X" in words else "GET"
    path = urlsplit(next(word for word in words if word.startswith("http")).replace("$call", "/calls/{call}")).path
    assert method.lower() in create_app(SETTINGS).openapi()["paths"][path]
    if "-d" in words:
        SessionRequest.model_validate(json.loads(words[words.index("-d") + 1]))


def test_there_are_curl_examples() -> None:
    assert len(CURLS) >= 3


def test_recipes_are_files_that_find_each_other() -> None:
    """They run in tests/e2e/test_recipes.py."""
    scripts = [block for language, block in BLOCKS if language in ("js", "jsx", "ts")]
    names = [block.partition("\n")[0].removeprefix("// ") for block in scripts]
    assert len(set(names)) == len(names) >= 8
    assert all(re.fullmatch(r"[\w-]+\.(js|jsx|ts)", name) for name in names)
    assert set(re.findall(r'from "\./([^"]+)"', "".join(scripts))) <= set(names)


def test_every_variable_named_exists() -> None:
    assert set(re.findall(r"\b(?:BROKER|ONEINBOX)_[A-Z_]+[A-Z]\b", README.replace("\\_", "_"))) <= KNOWN


def test_every_command_named_exists() -> None:
    assert set(re.findall(r"oneinbox-broker ([a-z]+)\b", README)) <= set(get_group(cli).commands)


def test_every_link_inside_the_repository_leads_somewhere() -> None:
    titles = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    headings = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert [link for link in links if link not in headings and not (ROOT / link).is_file()] == []


def test_python_version_is_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in README
