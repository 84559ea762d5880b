"""The structure of app/: which room may import which."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import app

ROOT = Path(app.__file__).parent


def module_name(file: Path) -> str:
    """`app.api.calls` of its file."""
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}


def imported(name: str) -> Iterator[str]:
    """The modules of ours that a module imports, anywhere in its text."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "app")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            if node.module and node.module.partition(".")[0] == "app":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in MODULES else node.module


IMPORTS = {name: sorted(set(imported(name)) - {name}) for name in MODULES}


FLOORS = [
    {"__main__"},
    {"cli", "main"},
    {"api", "doctor"},
    {"broker"},
    {"sessions", "calls"},
    {"limits"},
    {"oneinbox", "identity", "server"},
    {"store", "config", "telemetry", "problems"},
    {"clock"},
]
"""The rooms, from the top floor down. A room imports from lower floors only, never from its own floor or above."""

FLOOR_OF = {room: -number for number, rooms in enumerate(FLOORS) for room in rooms}
NEIGHBOUR = "sandbox"
"""A simulated OneInbox: it imports nothing of the broker's, and only the commands import it."""


def room_of(module: str) -> str:
    """The folder or file directly in app/ that a module lies in; `app` for the package itself."""
    return (module.split(".")[1:2] or ["app"])[0]


def crossings() -> Iterator[tuple[str, str]]:
    """Each import from one room into another: module and imported module."""
    for module, others in IMPORTS.items():
        yield from ((module, other) for other in others if room_of(other) not in (room_of(module), "app"))


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in MODULES} - {"app"} == FLOOR_OF.keys() | {NEIGHBOUR}


def test_no_import_runs_upward() -> None:
    upward = [
        f"{module} imports {other}"
        for module, other in crossings()
        if NEIGHBOUR not in (room_of(module), room_of(other)) and FLOOR_OF[room_of(other)] >= FLOOR_OF[room_of(module)]
    ]

    assert upward == []


def test_the_sandbox_is_a_neighbour() -> None:
    assert [module for module, _ in crossings() if room_of(module) == NEIGHBOUR] == []
    assert {room_of(module) for module, other in crossings() if room_of(other) == NEIGHBOUR} == {"cli"}


def test_modules_do_not_import_in_circles() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as circle:
        pytest.fail(f"a circle: {' → '.join(reversed(circle.args[1]))}")


def test_only_the_commands_and_main_make_the_app() -> None:
    importers = {room_of(module) for module, other in crossings() if other == "app.api.app"}

    assert importers == {"cli", "main"}


def test_only_one_room_knows_where_oneinbox_is() -> None:
    """Its paths, and the header with the key."""
    for name, file in MODULES.items():
        if room_of(name) not in ("oneinbox", NEIGHBOUR):
            text = file.read_text()
            assert "/v1/" not in text, name
            assert "Bearer {" not in text, name


def test_middleware_is_pure_asgi() -> None:
    for name, file in MODULES.items():
        assert "BaseHTTPMiddleware" not in file.read_text(), name
