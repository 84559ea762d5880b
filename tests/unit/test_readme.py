"""The documents print only commands, names and links that exist."""

import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any
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
from tests.documents import ROOT, blocks, markdown, shell_lines

DOCUMENTS = markdown()
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
README = DOCUMENTS[ROOT / "README.md"]
SHELL = [line for text in DOCUMENTS.values() for line in shell_lines(text)]
SETTINGS = load_settings({"ONEINBOX_API_KEY": "oi_sk_none", "ONEINBOX_AGENT_ID": "none"}, env_file=None)
CURLS = [
    match
    for line in SHELL
    if "//127.0.0.1:8000" in line
    for match in re.findall(r"curl (?:'[^']*'|\"[^\"]*\"|[^|)'\"])+", line)
]
PRINTED = [*SHELL, *(code for text in DOCUMENTS.values() for code in re.findall(r"`([^`\n]+)`", text))]
"""Commands in shell blocks, and all inline code."""
PROGRAMS = {"bash", "cd", "chmod", "curl", "docker", "install", "kubectl", "npm", "openssl", "printf", "python3", "uv"}
RECIPES = sorted((ROOT / "app/client/recipes").iterdir())


def test_there_is_one_command_to_try_it_and_one_to_test_it() -> None:
    venv = "python3 -m venv .venv && .venv/bin/pip install"
    assert [line for line in shell_lines(README) if ".venv/bin/pip" in line] == [
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
    assert len(CURLS) >= 7


def test_recipes_are_files_that_find_each_other_and_are_documented() -> None:
    """They run in tests/e2e/test_recipes.py."""
    names = {path.name for path in RECIPES}
    assert len(names) >= 8
    source = "".join(path.read_text(encoding="utf-8") for path in RECIPES)
    assert set(re.findall(r'from "\./([^"]+)"', source)) <= names
    document = DOCUMENTS[ROOT / "app/client/README.md"]
    assert {name for name in names if f"](recipes/{name})" not in document} == set()


@pytest.mark.parametrize("name", ["plain.html", "Talk.jsx", "Talk.vue", "Talk.svelte"])
def test_examples_are_printed_as_they_are(name: str) -> None:
    """They run in tests/e2e/test_client_package.py."""
    [printed] = blocks(DOCUMENTS[ROOT / "app/client/README.md"], name.partition(".")[2])
    assert printed == (ROOT / "app/client/examples" / name).read_text(encoding="utf-8")


def test_the_page_of_the_readme_has_fifteen_lines() -> None:
    """It runs in tests/e2e/test_recipes.py."""
    [script] = blocks(README, "js")
    assert len(script.splitlines()) == 15


@pytest.mark.parametrize("name", NAMES)
def test_every_variable_named_exists(name: str) -> None:
    text = DOCUMENTS[ROOT / name].replace("\\_", "_")
    assert set(re.findall(r"\b(?:BROKER|ONEINBOX)_[A-Z_]+[A-Z]\b", text)) <= KNOWN


@pytest.mark.parametrize("name", NAMES)
def test_every_command_named_exists(name: str) -> None:
    named = re.findall(r"oneinbox-broker ([a-z]+)\b", DOCUMENTS[ROOT / name])
    assert set(named) <= set(get_group(cli).commands)


def arguments_of(program: str) -> list[str]:
    """The arguments of a program wherever a document prints it with some."""
    pattern = re.compile(rf"(?:^|[ /]){program}((?: (?![&|>.])\S+)+)")
    return sorted({found.strip() for line in PRINTED for found in pattern.findall(line)} - {"COMMAND"})


@pytest.mark.parametrize("arguments", arguments_of("oneinbox-broker"))
def test_every_command_printed_takes_its_options(arguments: str) -> None:
    command: Any = get_group(cli)
    words = shlex.split(arguments)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words)  # raises UsageError


@pytest.mark.parametrize("arguments", arguments_of("python"))
def test_every_module_printed_exists(arguments: str) -> None:
    option, module, *_ = shlex.split(arguments)
    assert option == "-m"
    assert importlib.util.find_spec(module) is not None


def test_every_script_printed_exists() -> None:
    scripts = [words.split()[0] for words in arguments_of("bash")]
    folders = re.findall(r"--prefix (\S+)", " ".join(arguments_of("npm")))
    assert scripts
    assert folders
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    assert [folder for folder in folders if not (ROOT / folder / "package.json").is_file()] == []


def test_every_program_in_a_shell_block_is_known() -> None:
    """A venv's programs are installed here too; the others are common ones."""
    for line in SHELL:
        for command in re.sub(r"^(\w+=[^ $]\S* )+", "", line).split(" && "):
            program = command.split()[0]
            if program.startswith(".venv/bin/"):
                assert (Path(sys.executable).parent / program.removeprefix(".venv/bin/")).is_file(), line
            else:
                assert program in PROGRAMS | {"oneinbox-broker"} or program.startswith("call=$("), line


@pytest.mark.parametrize("name", NAMES)
def test_every_file_named_exists(name: str) -> None:
    """Of app/ and tests/; deploy/README.md names its own, which tests/deploy checks."""
    named = set(re.findall(r"\b(?:app|tests|deploy)/[\w./-]*\w", re.sub(r"\]\([^)]*\)", "", DOCUMENTS[ROOT / name])))
    assert {path for path in named if not (ROOT / path).exists()} == set()


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to a document's headings."""
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_inside_the_repository_leads_somewhere(name: str) -> None:
    path = ROOT / name
    for link in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[path]):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_document_is_reached_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^):]+)\)", README)}
    assert [name for name in NAMES if ROOT / name not in linked | {ROOT / "README.md"}] == []


def test_python_version_is_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in README
