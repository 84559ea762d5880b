"""Programs and packages beyond Python: without them a test is skipped with a reason, and fails in CI."""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

NODE_MODULES = Path(__file__).parents[1] / "e2e" / "node_modules"


def cannot(reason: str) -> NoReturn:
    """End the test: CI installs everything, so nothing may be missing there."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def program(name: str, package: str) -> str:
    """The path of a program of the system, which Debian has in `package`."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))
    return path or cannot(f"there is no {name}: apt-get install {package}")


def node(*packages: str) -> str:
    """The path of Node.js, with these npm packages installed for the tests."""
    path = program("node", "nodejs")
    for name in packages:
        if not (NODE_MODULES / name).is_dir():
            cannot(f"{name} is not installed: npm install --prefix tests/e2e")
    return path
