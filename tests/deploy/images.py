"""The container image, built by buildah and run by runc, where no container engine is. Needs root and Linux.

    with built_image() as image, image.running(ONEINBOX_API_KEY=…) as container:
        container.execute("oneinbox-broker", "--version")

The Dockerfile's base is stood in for by a Debian made on the spot, whose Python is Debian's. A container has a network
of its own with nothing but a loopback interface, so that the image's own port is always free.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.documents import ROOT

PATIENCE = 300
"""Seconds for a step of a build; downloads are among them."""
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap", "runc": "runc", "nsenter": "util-linux"}
"""Programs needed, and where Debian has them."""


def _run(*command: str | Path, environ: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    # A build is minutes of work: it gives way to the tests that run beside it, some of which measure time.
    nice = ("nice", "-n", "5", *command)
    done = subprocess.run(nice, env=environ, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, (
        f"{command[0]} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    )
    return done.stdout


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return int(_run("du", "--summarize", "--bytes", "--one-file-system", folder).split()[0])


@dataclass(frozen=True)
class Container:
    """A container that runs; it sees nothing but itself."""

    name: str
    process: subprocess.Popen[str]
    state: Path
    """runc's own records."""

    @property
    def pid(self) -> int:
        """Process 1 of the container, as this machine numbers it."""
        return int(json.loads(_run("runc", "--root", self.state, "state", self.name))["pid"])

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as its user."""
        return subprocess.run(
            ["runc", "--root", self.state, "exec", self.name, *command],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def beside(self, *command: str) -> subprocess.Popen[str]:
        """Start a command of this machine in the container's network, and in nothing else of it."""
        return subprocess.Popen(
            ["nsenter", "--target", str(self.pid), "--net", *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def signal(self, name: str) -> None:
        """A signal to process 1: an engine's stop sends TERM."""
        _run("runc", "--root", self.state, "kill", self.name, name)


@dataclass(frozen=True)
class Image:
    """A built image, unpacked."""

    config: dict[str, Any]
    """What the Dockerfile set, as Docker's image format has it."""
    root: Path
    """Its file system."""
    size: int
    base_size: int
    work: Path

    @contextmanager
    def running(self, *arguments: str, **environ: str) -> Iterator[Container]:
        """The image's command, or its entry point with these arguments: read-only, without capabilities or network."""
        name = f"broker-{uuid.uuid4().hex[:12]}"
        bundle, state = self.work / name, self.work / "runc"
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(self._bundle(arguments, environ)))
        process = subprocess.Popen(
            ["runc", "--root", state, "run", "--bundle", bundle, name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        container = Container(name, process, state)
        try:
            while not (state / name / "state.json").exists() and process.poll() is None:
                time.sleep(0.02)
            yield container
        finally:
            if process.poll() is None:
                container.signal("KILL")
            process.communicate(timeout=PATIENCE)

    def _bundle(self, arguments: tuple[str, ...], environ: dict[str, str]) -> dict[str, Any]:
        """What `--read-only --cap-drop ALL --security-opt no-new-privileges` gives, for an OCI runtime."""
        uid, _, gid = self.config["User"].partition(":")
        return {
            "ociVersion": "1.0.2",
            "root": {"path": str(self.root), "readonly": True},
            "process": {
                "args": [*self.config["Entrypoint"], *(arguments or self.config["Cmd"])],
                "env": [*self.config["Env"], *(f"{name}={value}" for name, value in environ.items())],
                "cwd": self.config["WorkingDir"],
                "user": {"uid": int(uid), "gid": int(gid)},
                "noNewPrivileges": True,
                "capabilities": {},
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            ],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]},
        }


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder that no disk is waited for: Debian's installer alone asks for a thousand flushes."""
    with tempfile.TemporaryDirectory(prefix="image-") as folder:
        _run("mount", "-t", "tmpfs", "-o", "size=6g,mode=755", "tmpfs", folder)
        try:
            yield Path(folder)
        finally:
            _run("umount", "--recursive", folder)


@contextmanager
def built_image(**arguments: str) -> Iterator[Image]:
    """The Dockerfile's image with these build arguments, until the block ends."""
    with in_memory() as work:
        environ = {**os.environ, "BUILDAH_ISOLATION": "chroot"}

        def buildah(*command: str | Path) -> str:
            stores = ("--root", work / "storage", "--runroot", work / "run")
            return _run("buildah", *stores, *command, environ=environ, cwd=ROOT)

        _make_base(work / "base")
        base = buildah("from", "scratch").strip()
        buildah("copy", "--quiet", base, work / "base", "/")
        if CERTIFICATES.is_file():
            # A company's proxy may be what the build's downloads go through.
            buildah("copy", "--quiet", base, CERTIFICATES, CERTIFICATES)
            buildah("config", "--env", f"PIP_CERT={CERTIFICATES}", base)
        for name in _bases():
            buildah("commit", "--quiet", base, f"docker.io/library/{name}")
        given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        buildah("bud", "--pull-never", "--network", "host", "--format", "docker", *given, "--tag", "broker", ".")
        container = buildah("from", "--pull-never", "localhost/broker").strip()
        config = json.loads(buildah("inspect", "--type", "image", "localhost/broker"))["Docker"]["config"]
        root = Path(buildah("mount", container).strip())
        try:
            yield Image(config, root, size_of(root), size_of(work / "base"), work)
        finally:
            buildah("umount", container)


def _make_base(folder: Path) -> None:
    """The release that this machine runs, with Python where the Dockerfile looks for it."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    packages = "python3,python3-venv,python3-pip,ca-certificates"
    components = "main,universe" if release["ID"] == "ubuntu" else "main"
    options = ("--variant=minbase", f"--components={components}", f"--include={packages}")
    _run("debootstrap", *options, release["VERSION_CODENAME"], folder)
    (folder / "usr/bin/python").symlink_to("python3")
    for mark in folder.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        mark.unlink()
    shutil.rmtree(folder / "var/cache/apt")


def _bases() -> set[str]:
    """The images that the Dockerfile starts from."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return {line.split()[1] for line in lines if line.startswith("FROM ")}
