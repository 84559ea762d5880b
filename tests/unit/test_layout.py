"""The house keeps its shape: who may import whom (design.md)."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import app

ROOT = Path(app.__file__).parent


def module_name(file: Path) -> str:
    """`app.calls.routes` of its file."""
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


def room(name: str) -> str:
    """A module's room; all routers together are one, above the services."""
    parts = name.split(".")
    return "routers" if parts[-1] == "routes" else parts[1] if len(parts) > 1 else "app"


def assert_no_circle(graph: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(f"a circle: {' → '.join(reversed(circle.args[1]))}")


def test_there_is_something_to_check() -> None:
    assert {"app.main", "app.sessions.routes", "app.sandbox.emulator"} <= MODULES.keys()
    assert "app.config" in IMPORTS["app.main"]


def test_the_sandbox_is_a_neighbour() -> None:
    for name, others in IMPORTS.items():
        if room(name) == "sandbox":
            assert all(room(other) == "sandbox" for other in others), f"{name} imports {others}"
        elif name != "app.cli":
            assert not any(room(other) == "sandbox" for other in others), f"{name} imports the sandbox"


def test_only_main_imports_routers() -> None:
    for name, others in IMPORTS.items():
        if name != "app.main":
            assert not [other for other in others if other.endswith(".routes")], name


def test_only_the_commands_import_main() -> None:
    importers = {name for name, others in IMPORTS.items() if "app.main" in others}

    assert importers <= {"app.cli", "app.__main__"}


def test_modules_do_not_import_in_circles() -> None:
    assert_no_circle({name: set(others) for name, others in IMPORTS.items()})


def test_rooms_do_not_import_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        graph.setdefault(room(name), set()).update(room(other) for other in others if room(other) != room(name))

    assert_no_circle(graph)


BELOW = {
    "store": {"store"},
    "keyring": {"keyring"},
    "telemetry": {"telemetry"},
    "oneinbox": {"oneinbox", "telemetry"},
}


@pytest.mark.parametrize(("name", "may"), BELOW.items(), ids=BELOW.keys())
def test_the_ground_floor_knows_nobody_above(name: str, may: set[str]) -> None:
    for module, others in IMPORTS.items():
        if room(module) == name:
            assert {room(other) for other in others} <= may | {"app"}, module


def test_only_one_room_knows_where_oneinbox_is() -> None:
    """Its paths, and the header with the key."""
    for name, file in MODULES.items():
        if room(name) not in ("oneinbox", "sandbox"):
            text = file.read_text()
            assert "/v1/" not in text, name
            assert "Bearer {" not in text, name


def test_middleware_is_pure_asgi() -> None:
    for name, file in MODULES.items():
        assert "BaseHTTPMiddleware" not in file.read_text(), name
