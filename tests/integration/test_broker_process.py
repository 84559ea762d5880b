"""The broker process in front of the emulated OneInbox, over real sockets."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from app import __version__
from app.sandbox.emulator import EmulatorOptions
from app.sandbox.server import RunningEmulator, running_emulator
from tests.support.harness import JSON, ROOMY
from tests.support.processes import PATIENCE, ROOT, Process, exchange, run, running, serving
from tests.support.shapes import assert_problem, assert_session
from tests.support.valkey import running_valkey

KEY = "oi_sk_integration_77c1d0"


class Clock:
    """The emulated OneInbox' clock, which the tests put forward."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead

    def forward(self, seconds: float) -> None:
        """Let time pass for calls."""
        self.ahead += seconds


CLOCK = Clock()
OPTIONS = EmulatorOptions(api_key=KEY, now=CLOCK)

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def emulator() -> AsyncIterator[RunningEmulator]:
    async with running_emulator(OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def environ(emulator: RunningEmulator) -> dict[str, str]:
    """Settings for a broker in front of the emulator."""
    return {
        "ONEINBOX_API_KEY": KEY,
        "ONEINBOX_BASE_URL": emulator.url,
        "ONEINBOX_AGENT_ID": OPTIONS.agents[0],
        "BROKER_SESSION_LIMITS": "1000/minute",
        "BROKER_GLOBAL_SESSION_LIMITS": "1000/minute",
        "BROKER_EXPOSE": "transcript",
        **ROOMY,
    }


@pytest.fixture(scope="module")
def broker(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    with serving(tmp_path_factory.mktemp("broker"), environ) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="module")
async def client(broker: tuple[Process, str]) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=broker[1], timeout=10) as connected:
        yield connected


async def test_a_call_from_its_start_to_its_end(client: httpx.AsyncClient, emulator: RunningEmulator) -> None:
    response = await client.post("/session", json={"variables": {"customer_name": "Ada"}})
    later = assert_session(await client.post("/session"))

    path = assert_session(response)
    assert response.json()["server_url"] == OPTIONS.server_url
    [call] = [call for call in emulator.emulator.calls if path.startswith(f"/calls/{call.id}.")]
    assert call.variables == {"customer_name": "Ada"}
    young = (await client.get(path)).json()
    assert (young["status"], young["agent"], young["ended_at"]) == ("queued", "default", None)

    CLOCK.forward(60)
    ended = (await client.get(later)).json()
    assert (ended["status"], ended["duration_seconds"]) == ("completed", OPTIONS.in_progress)
    assert ended["ended_at"] is not None
    assert ended["transcript"]


async def test_a_chunked_body_that_is_too_large(client: httpx.AsyncClient, emulator: RunningEmulator) -> None:
    emulator.emulator.requests.clear()

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield b" " * 1024

    response = await client.post("/session", content=chunks(), headers=JSON)

    assert_problem(response, "body-too-large")
    assert not [request for request in emulator.emulator.requests if request.operation == "start"]


async def test_an_endless_body_ends(broker: tuple[Process, str]) -> None:
    head = b"POST /session HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"

    answer = await asyncio.to_thread(exchange, broker[1], head + chunk * 17)

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"/problems/body-too-large" in answer


PATHS = [
    "/calls/../agents",
    "/calls/../v1/calls",
    "/calls/./",
    "/calls/..%2f..%2fagents",
    "/calls/%2e%2e/agents",
    "/calls/%2e%2e%2fagents",
    "/calls/a%00b",
    "/calls/%ff",
    "/calls/" + "a" * 129,
    "//calls/a.b",
    "/calls/a.b/../c",
]


@pytest.mark.parametrize("path", PATHS)
async def test_a_path_as_it_is_written_leads_nowhere(
    path: str, broker: tuple[Process, str], emulator: RunningEmulator
) -> None:
    emulator.emulator.requests.clear()
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()

    answer = await asyncio.to_thread(exchange, broker[1], request)

    assert answer.startswith(b"HTTP/1.1 404 "), answer
    assert b'/problems/not-found"' in answer
    assert not [request for request in emulator.emulator.requests if "agents" in request.path or "%" in request.path]


SMUGGLED = {
    "two-lengths": b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    "length-and-chunks": b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "negative-length": b"Content-Length: -1\r\n\r\n{}",
    "odd-length": b"Content-Length: +2\r\n\r\n{}",
}


@pytest.mark.parametrize("rest", SMUGGLED.values(), ids=SMUGGLED.keys())
async def test_an_ambiguous_length_starts_no_call(
    rest: bytes, broker: tuple[Process, str], emulator: RunningEmulator
) -> None:
    emulator.emulator.requests.clear()
    head = b"POST /session HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

    answer = await asyncio.to_thread(exchange, broker[1], head + rest)

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert not emulator.emulator.requests


async def test_no_server_is_named_and_no_date_is_missing(client: httpx.AsyncClient) -> None:
    response = await client.get("/healthz")

    assert response.status_code == 200
    assert "server" not in response.headers
    assert "date" in response.headers


async def test_limits_hold_for_requests_at_once(environ: dict[str, str], tmp_path: Path) -> None:
    with serving(tmp_path, {**environ, "BROKER_SESSION_LIMITS": "5/minute"}) as (process, url):
        async with httpx.AsyncClient(base_url=url) as client:
            responses = await asyncio.gather(*(client.post("/session") for _ in range(20)))
            forged = await client.post("/session", headers={"X-Forwarded-For": "198.51.100.1"})
        assert sorted(response.status_code for response in responses) == [201] * 5 + [429] * 15
        # uvicorn would believe any header that comes from loopback.
        assert forged.status_code == 429
        assert process.terminate() == 0
        records = process.records

    # Each line is JSON, one per request, and the server adds none of its own.
    assert [record["event"] for record in records].count("request") == 21
    assert not [record for record in records if "HTTP/1.1" in json.dumps(record)]
    assert not [record for record in records if record["level"] == "error"]
    assert process.out == []


async def test_uvicorn_serves_the_same_app(environ: dict[str, str], tmp_path: Path) -> None:
    line = ("--no-proxy-headers", "--no-access-log", "--timeout-graceful-shutdown", "20")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        arguments = ("app.main:app", "--fd", str(listener.fileno()), *line)
        with running(*arguments, module="uvicorn", cwd=tmp_path, fds=(listener.fileno(),), environ=environ) as process:
            async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                path = assert_session_over_uvicorn(await client.post("/session"))
                assert (await client.get(path)).status_code == 200
            # uvicorn's own command ends with the signal that it got.
            assert process.terminate() in (0, -signal.SIGTERM)

    assert process.out == []
    assert path.rpartition(".")[2] not in "\n".join(process.err)
    assert "POST /session" not in "\n".join(process.err)


@pytest.mark.parametrize(
    ("arguments", "variable"), [((), "3"), (("--workers", "2"), ""), (("--workers=2",), "1")], ids=str
)
async def test_uvicorns_workers_cannot_count_each_for_itself(
    arguments: tuple[str, ...], variable: str, environ: dict[str, str], tmp_path: Path
) -> None:
    environ |= {"WEB_CONCURRENCY": variable} if variable else {}
    # On a busy machine uvicorn would kill workers that still import.
    arguments = ("app.main:app", "--port", "0", "--timeout-worker-healthcheck", "60", *arguments)
    done = await asyncio.to_thread(run, *arguments, module="uvicorn", cwd=tmp_path, environ=environ)

    assert done.code != 0
    said = [line for line in done.err.splitlines() if not line.startswith("INFO:")]
    assert {line.partition(",")[0] for line in said} == {"BROKER_STORE_URL: is memory://"}


async def test_serve_is_one_process_whatever_others_say(environ: dict[str, str], tmp_path: Path) -> None:
    """Heroku sets WEB_CONCURRENCY by itself."""
    with serving(tmp_path, {**environ, "WEB_CONCURRENCY": "3"}) as (process, url):
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            assert (await client.get("/readyz")).status_code == 200
        assert process.terminate() == 0


async def test_serve_listens_where_a_platform_says(environ: dict[str, str], tmp_path: Path) -> None:
    with running("serve", cwd=tmp_path, environ={**environ, "PORT": "0"}) as process:
        assert process.wait_for_url().startswith("http://0.0.0.0:")
        assert process.terminate() == 0


async def test_serve_without_what_only_unix_has(environ: dict[str, str], tmp_path: Path) -> None:
    """As on Windows: neither uvloop nor `resource`."""
    (tmp_path / "elsewhere.py").write_text(
        "import sys\n"
        "sys.modules.update({'uvloop': None, 'resource': None})\n"
        "from app.cli.commands import main\n"
        "main()\n"
    )
    with running("serve", "--port", "0", module="elsewhere", cwd=tmp_path, environ=environ) as process:
        url = process.wait_for_url()
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            assert_session(await client.post("/session"))
        assert process.terminate() == 0


async def test_uvicorns_access_log_is_silent_even_when_it_is_on(environ: dict[str, str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        arguments = ("app.main:app", "--fd", str(listener.fileno()))
        with running(*arguments, module="uvicorn", cwd=tmp_path, fds=(listener.fileno(),), environ=environ) as process:
            async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                path = assert_session_over_uvicorn(await client.post("/session"))
                await client.get(path)
            process.terminate()

    printed = "\n".join(process.out + process.err)
    assert path.rpartition(".")[2] not in printed
    assert "HTTP/1.1" not in printed


def assert_session_over_uvicorn(response: httpx.Response) -> str:
    """A session; uvicorn itself names the server here, unless told not to."""
    assert response.status_code == 201, response.text
    assert response.json().keys() == {"server_url", "participant_token"}
    path: str = response.headers["location"]
    return path


async def test_sandbox_prints_what_to_do_and_it_works(tmp_path: Path) -> None:
    with running("sandbox", "--port", "0", cwd=tmp_path, environ={}) as process:
        curl = process.wait_for("curl -i -X POST")
        process.wait_for("Ctrl-C")
        [url] = re.findall(r"http://127\.0\.0\.1:\d+", curl)
        assert any(f"{url}/docs" in line for line in process.out)
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            path = assert_session(await client.post("/session", headers={"Origin": "http://localhost:5173"}))
            assert (await client.get(path)).json()["status"] in ("queued", "initiated", "in_progress")
            assert (await client.get("/docs")).status_code == 200
            assert_problem(await client.post("/session", headers={"Origin": "https://a.example"}), "forbidden-origin")
        assert process.terminate() == 0


@pytest.mark.parametrize("command", ["serve", "sandbox", "emulator"])
async def test_a_signal_may_come_as_soon_as_the_port_is_open(
    command: str, environ: dict[str, str], tmp_path: Path, unused_tcp_port: int
) -> None:
    settings = environ if command == "serve" else {}
    with running(command, "--port", str(unused_tcp_port), cwd=tmp_path, environ=settings) as process:
        async with asyncio.timeout(PATIENCE):
            while not await is_open(unused_tcp_port):
                await asyncio.sleep(0.001)
        assert process.terminate() == 0
    assert "Traceback" not in "".join(process.err)


async def is_open(port: int) -> bool:
    """Whether anybody listens there."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


NO_IDLE = {"BROKER_WARM_CONNECTIONS": "0"}
"""For the servers below, which wait for a request on every connection."""


async def test_a_running_request_is_finished_after_sigterm(environ: dict[str, str], tmp_path: Path) -> None:
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def slow_oneinbox(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readuntil(b"\r\n\r\n")).startswith(b"POST"):
            arrived.set()
        await go_on.wait()
        body = b'{"id": "call_1", "server_url": "wss://voice.example", "participant_token": "abc"}'
        writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    upstream = await asyncio.start_server(slow_oneinbox, "127.0.0.1", 0)
    port = upstream.sockets[0].getsockname()[1]
    with serving(tmp_path, {**environ, **NO_IDLE, "ONEINBOX_BASE_URL": f"http://127.0.0.1:{port}"}) as (process, url):
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            asking = asyncio.create_task(client.post("/session"))
            await arrived.wait()
            async with idle_connection(url) as idle:
                process.send_signal(signal.SIGTERM)
                # Connections that wait for nothing are closed: that is how the end begins, seen from outside.
                assert await asyncio.wait_for(idle.read(), 3) == b""
            go_on.set()
            assert (await asking).status_code == 201
        assert await asyncio.to_thread(process.end) == 0
    upstream.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_right_after_the_first_line_is_obeyed(
    environ: dict[str, str], number: signal.Signals, tmp_path: Path
) -> None:
    """A shared store's library has destructors, in which the exception of a signal's handler would be lost."""
    with running_valkey() as valkey:
        shared = {**environ, "BROKER_STORE_URL": valkey.url, "BROKER_SECRET": "s" * 32}
        with running("serve", "--port", "0", cwd=tmp_path, environ=shared) as process:
            process.wait_for("http://127.0.0.1:")
            process.send_signal(number)
            assert await asyncio.to_thread(process.end) == 0
        assert "Exception ignored" not in "\n".join(process.err)


async def test_a_request_that_never_finishes_does_not_hold_the_end_up(environ: dict[str, str], tmp_path: Path) -> None:
    arrived, over = asyncio.Event(), asyncio.Event()

    async def silent_oneinbox(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readuntil(b"\r\n\r\n")).startswith(b"POST"):
            arrived.set()
        await over.wait()
        writer.close()
        await writer.wait_closed()

    upstream = await asyncio.start_server(silent_oneinbox, "127.0.0.1", 0)
    port = upstream.sockets[0].getsockname()[1]
    slow = {**environ, **NO_IDLE, "ONEINBOX_BASE_URL": f"http://127.0.0.1:{port}", "ONEINBOX_TIMEOUT": "60"}
    hasty = running("serve", "--port", "0", cwd=tmp_path, environ=slow, module="tests.support.hasty")
    with hasty as process:
        url = process.wait_for_url()
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            asking = asyncio.create_task(client.post("/session"))
            await arrived.wait()
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.end) == 0
            assert_problem(await asking, "at-capacity")
        assert not [record for record in process.records if "exception" in record]
    over.set()
    upstream.close()
    await asyncio.sleep(0)


@asynccontextmanager
async def idle_connection(url: str) -> AsyncIterator[asyncio.StreamReader]:
    """A connection that has been served and is kept."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(re.findall(rb"content-length: (\d+)", head)[0]))
    yield reader
    writer.close()
    await writer.wait_closed()


async def test_version(tmp_path: Path) -> None:
    done = await asyncio.to_thread(lambda: run("--version", cwd=tmp_path, environ={}))

    assert (done.code, done.out.strip(), done.err) == (0, __version__, "")


async def test_the_document_needs_no_key(tmp_path: Path) -> None:
    done = await asyncio.to_thread(lambda: run("openapi", cwd=tmp_path, environ={}))

    assert (done.code, done.err) == (0, "")
    assert done.out == (ROOT / "deploy" / "openapi.json").read_text(encoding="utf-8")
    document = json.loads(done.out)
    assert document["openapi"].startswith("3.")
    assert document["info"]["version"] == __version__
    assert {"/session", "/calls/{call}"} <= document["paths"].keys()
    for reference in set(re.findall(r'"\$ref": "#/components/schemas/([^"]*)"', done.out)):
        assert reference in document["components"]["schemas"], reference


async def test_a_port_in_use_is_said_in_words(
    broker: tuple[Process, str], environ: dict[str, str], tmp_path: Path
) -> None:
    port = broker[1].rpartition(":")[2]

    done = await asyncio.to_thread(lambda: run("serve", "--port", port, cwd=tmp_path, environ=environ))

    assert (done.code, done.out) == (1, "")
    assert done.err == f"Port {port} is in use. Try `--port 0`.\n"


WRONG = {
    "ONEINBOX_API_KEY": "oi_pk_planted_9d1c",
    "BROKER_SECRET": "planted-short",
    "BROKER_SESSION_LIMIT": "planted-unknown",
    "ONEINBOX_TIMEOUT": "planted-soon",
}


@pytest.mark.parametrize("command", ["serve", "uvicorn"])
async def test_wrong_settings_end_at_once_in_words(command: str, tmp_path: Path) -> None:
    if command == "serve":
        done = await asyncio.to_thread(lambda: run("serve", "--port", "0", cwd=tmp_path, environ=WRONG))
        assert done.code == 2
    else:
        done = await asyncio.to_thread(lambda: run("app.main:app", module="uvicorn", cwd=tmp_path, environ=WRONG))
        assert done.code != 0

    assert {line.partition(":")[0] for line in done.err.splitlines()} == {*WRONG, "ONEINBOX_AGENT_ID"}
    assert done.err.count("\n") == 5
    assert "BROKER_SESSION_LIMITS" in done.err
    assert "planted" not in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert done.seconds < 2


async def test_more_workers_need_a_shared_store(environ: dict[str, str], tmp_path: Path) -> None:
    done = await asyncio.to_thread(lambda: run("serve", "--workers", "2", cwd=tmp_path, environ=environ))

    assert done.code == 2
    assert done.err.startswith("BROKER_STORE_URL: is memory://")
    assert "memory://" not in done.err.partition("; takes ")[2]
    assert "Traceback" not in done.err
