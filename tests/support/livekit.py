"""A real LiveKit server, built from its Go module, once per machine.

`python -m tests.support.livekit` builds it if it is not there, and prints its path.
"""

import asyncio
import fcntl
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import jwt

from app.sandbox.emulator import EmulatorOptions
from app.sandbox.livekit_server import KEY, SECRET, running_livekit
from app.sandbox.server import running_emulator
from tests.support.needs import cannot, program

VERSION = "1.13.5"
"""Without a `replace` line in its go.mod, which `go install` would refuse; the main branch has some."""

MODULE = f"github.com/livekit/livekit-server/cmd/server@v{VERSION}"
BUILD_TIMEOUT = 1800
"""Seconds; minutes on two busy cores."""


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder where builds are kept: in the user's cache, or without one among temporary files."""
    if base := environ.get("XDG_CACHE_HOME"):
        return Path(base) / "oneinbox-broker"
    if home := environ.get("HOME"):
        return Path(home) / ".cache" / "oneinbox-broker"
    return Path(tempfile.gettempdir()) / f"oneinbox-broker-{os.getuid()}"


def livekit_server() -> Path:
    """Return LiveKit's server, building it first if no one has. Without Go the test is skipped, or fails in CI."""
    folder = cache_folder()
    built = folder / f"livekit-server-v{VERSION}"
    if _is_right(built):
        return built
    go = program("go", "golang")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _one_at_a_time(folder / "livekit-server.lock"):
        if not _is_right(built):
            _build(go, built)
    return built


def _is_right(built: Path) -> bool:
    """Return whether this is our build of the version: a folder among temporary files may be somebody else's."""
    if not built.is_file() or built.stat().st_uid != os.getuid():
        return False
    said = subprocess.run([built, "--version"], capture_output=True, text=True, timeout=30, check=False)
    return VERSION in said.stdout


def _build(go: str, built: Path) -> None:
    environ = {**os.environ, "CGO_ENABLED": "0"}
    if not environ.get("HOME"):  # Go's own caches need a place then
        environ |= {"GOPATH": str(built.parent / "go"), "GOCACHE": str(built.parent / "go-build")}
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        done = subprocess.run(
            [go, "install", MODULE],
            env=environ | {"GOBIN": folder},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT,
            check=False,
        )
        if done.returncode:
            cannot(f"LiveKit's server could not be built: {done.stderr.strip()[-2000:]}")
        (Path(folder) / "server").rename(built)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class LiveKit:
    """A running server."""

    url: str

    def options(self, **changes: Any) -> EmulatorOptions:
        """Options of an emulator whose agent answers here."""
        return EmulatorOptions(
            **{"server_url": self.url, "livekit_key": KEY, "livekit_secret": SECRET, "voice": "agent", **changes}
        )

    def participants(self, room: str) -> list[str] | None:
        """The names of those who are in a room now, agents included; None if there is no such room."""
        # ListParticipants alone does not tell: of a room that is gone it may say that no one is in it.
        if not self._ask("ListRooms", {"names": [room]}, roomList=True).json().get("rooms"):
            return None
        answer = self._ask("ListParticipants", {"room": room}, roomAdmin=True, room=room)
        if answer.status_code == 404:
            return None
        return [each["name"] for each in answer.raise_for_status().json()["participants"]]

    def _ask(self, method: str, body: Mapping[str, Any], **grants: Any) -> httpx.Response:
        now = int(time.time())
        token = signed({"iss": KEY, "nbf": now - 5, "exp": now + 60, "video": grants})
        return httpx.post(
            f"{self.url.replace('ws', 'http', 1)}/twirp/livekit.RoomService/{method}",
            json=body,
            headers={"Authorization": f"Bearer {token}"},
            trust_env=False,
        )


def signed(claims: Mapping[str, Any], secret: str = SECRET) -> str:
    """Return a token for this server."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jwt.InsecureKeyLengthWarning)
        return jwt.encode(dict(claims), secret, algorithm="HS256")


@contextmanager
def running_server() -> Iterator[LiveKit]:
    """Run a server on loopback. Skips the test without Go, or without the extra `voice`."""
    if find_spec("livekit") is None:
        cannot("livekit is not installed: pip install -e '.[voice]'")
    with running_livekit(str(livekit_server())) as server:
        yield LiveKit(server.url)


@contextmanager
def running_oneinbox(options: EmulatorOptions) -> Iterator[str]:
    """Run an emulator in a thread of its own, for tests without an event loop; yield its URL."""
    over = asyncio.Event()
    url: Future[tuple[str, asyncio.AbstractEventLoop]] = Future()

    async def run() -> None:
        async with running_emulator(options) as emulator:
            url.set_result((emulator.url, asyncio.get_running_loop()))
            await over.wait()

    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(asyncio.run, run())

        def failed(done: Future[None]) -> None:
            if not url.done():
                url.set_exception(done.exception() or RuntimeError("ended"))

        ended.add_done_callback(failed)
        address, loop = url.result()
        try:
            yield address
        finally:
            loop.call_soon_threadsafe(over.set)
            ended.result()


if __name__ == "__main__":
    sys.stdout.write(f"{livekit_server()}\n")
