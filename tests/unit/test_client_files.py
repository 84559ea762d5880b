"""The browser's side as files: what is served and packed. tests/e2e/test_client_package.py compares a fresh build."""

import gzip
import json
import re

import pytest

from app import __version__
from app.sandbox.calls import Call, _messages
from app.sandbox.options import EmulatorOptions
from tests.documents import ROOT, blocks

CLIENT = ROOT / "app/client"
PACKAGE = json.loads((CLIENT / "package.json").read_text(encoding="utf-8"))
KILO = 1024
SIZES = {"client.js": (14 * KILO, 5.5 * KILO), "element.js": (11 * KILO, None), "react.js": (2 * KILO, None)}
"""The most bytes of a file, and of it in gzip."""


@pytest.mark.parametrize(("name", "most", "zipped"), [(name, *most) for name, most in SIZES.items()], ids=SIZES)
def test_sizes(name: str, most: int, zipped: float | None, capsys: pytest.CaptureFixture[str]) -> None:
    content = (CLIENT / name).read_bytes()
    packed = len(gzip.compress(content))

    with capsys.disabled():
        print(f"\n{name}: {len(content):,} bytes, {packed:,} in gzip")  # noqa: T201
    assert len(content) <= most
    assert zipped is None or packed <= zipped


def test_the_package_has_the_brokers_version_and_licence() -> None:
    assert PACKAGE["version"] == __version__
    assert (CLIENT / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert all(f" {__version__}, " in (CLIENT / name).read_text().partition("\n")[0] for name in SIZES)


def test_every_file_of_the_package_is_there() -> None:
    exported = {
        path
        for target in PACKAGE["exports"].values()
        for path in ([target] if isinstance(target, str) else target.values())
    }

    assert [name for name in PACKAGE["files"] if not (CLIENT / name).is_file()] == []
    assert {path.removeprefix("./") for path in exported} <= {*PACKAGE["files"], "package.json"}
    assert "dependencies" not in PACKAGE


def test_the_build_tools_are_those_of_the_tests() -> None:
    """So the test of a fresh build needs no packages of its own."""
    tests = json.loads((ROOT / "tests/e2e/package.json").read_text(encoding="utf-8"))

    assert PACKAGE["devDependencies"].items() <= {**tests["dependencies"], **tests["overrides"]}.items()


def test_the_stand_in_for_livekit_client_speaks_the_emulators_script() -> None:
    script = (ROOT / "app/sandbox/livekit-client.js").read_text(encoding="utf-8")
    call = Call(1, "call_1", "agt", "room", 0.0, {}, {}, {})
    spoken = [
        (each["role"], each["content"])
        for each in _messages(call, EmulatorOptions())
        if each["role"] in ("agent", "user")
    ]

    assert re.findall(r'^  \["(agent|user)", "(.*)"\],$', script, re.MULTILINE) == spoken


@pytest.mark.parametrize("name", ["plain.html", "Talk.jsx", "Talk.vue", "Talk.svelte"])
def test_the_document_shows_the_examples_as_they_run(name: str) -> None:
    """They run in tests/e2e/test_client_package.py."""
    document = (CLIENT / "README.md").read_text(encoding="utf-8")

    assert blocks(document, name.partition(".")[2]) == [(CLIENT / "examples" / name).read_text(encoding="utf-8")]
