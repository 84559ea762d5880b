"""Let ten thousand browsers wait for OneInbox at once, on one worker.

    python -m tests.benchmarks.waiting [--browsers 10000] [--seconds 2] [--json FILE]

OneInbox takes `--seconds` for each call. Starting all sessions takes longer than the default, so the first are answered
before the last are requested; with more seconds all of them wait at once. The broker has a core to itself. It needs two
open files per browser, so fewer browsers wait if this machine allows fewer files.
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import httptools
import uvloop

from tests.benchmarks import rig
from tests.benchmarks.rig import Missing, say

FILES = 32768
SPARE_FILES = 100
"""Files that a server opens besides connections."""
CONNECTING = 200
"""Browsers that connect at the same time; the kernel's queue is limited."""
PATIENCE = 60.0
SESSION = b"POST /session HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


@dataclass
class Seen:
    """The slow OneInbox's figures: calls started, waiting now, most waiting at once, and time of the last answer."""

    calls: int = 0
    waiting: int = 0
    most: int = 0
    last: float = 0.0


class SlowOneInbox(asyncio.Protocol):
    """Answers every POST after `seconds`."""

    def __init__(self, seen: Seen, seconds: float) -> None:
        self._seen, self._seconds = seen, seconds
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's class is no subclass of it

    def data_received(self, data: bytes) -> None:
        """Parse bytes."""
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Answer a request, later if it is a POST."""
        if self._parser.get_method() != b"POST":
            self._write(b"200 OK", b'{"items":[]}')
            return
        self._seen.calls += 1
        self._seen.waiting += 1
        self._seen.most = max(self._seen.most, self._seen.waiting)
        call = {
            "id": f"call_{self._seen.calls}",
            "server_url": "wss://voice.oneinbox.ai",
            "participant_token": rig.TOKEN,
        }
        asyncio.get_running_loop().call_later(self._seconds, self._answer, json.dumps(call).encode())

    def _answer(self, body: bytes) -> None:
        self._seen.waiting -= 1
        self._seen.last = time.monotonic()
        self._write(b"201 Created", body)

    def _write(self, status: bytes, body: bytes) -> None:
        assert self._transport is not None
        head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
        self._transport.write(head + body)


def _serve_slowly(listener: socket.socket, seconds: float, pipe: Connection) -> None:
    async def serve() -> None:
        seen = Seen()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: SlowOneInbox(seen, seconds), sock=listener, backlog=4096)
        async with server:
            while not pipe.poll():
                await asyncio.sleep(0.05)
        pipe.send(seen)

    uvloop.run(serve())


@contextmanager
def slow_oneinbox(seconds: float) -> Iterator[tuple[str, Connection]]:
    """Run a slow OneInbox in its own process. Yield its URL and a pipe: send anything to end it; it sends Seen back."""
    ours, theirs = multiprocessing.Pipe()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("fork").Process(target=_serve_slowly, args=(listener, seconds, theirs))
        process.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", ours
        finally:
            process.terminate()
            process.join()


@dataclass(eq=False)
class Browser(asyncio.Protocol):
    """Sends one request and waits."""

    answers: "Answers"
    read: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        cast("asyncio.Transport", transport).write(SESSION)

    def data_received(self, data: bytes) -> None:
        """Read until the answer is complete."""
        self.read += data
        head, end, body = self.read.partition(b"\r\n\r\n")
        if end and body.endswith(b"}"):
            self.answers.take(head.split(b" ", 2)[1].decode())

    def connection_lost(self, exc: Exception | None) -> None:
        """Note it if the broker hung up without an answer."""
        if not self.read:
            self.answers.take("hung up")


@dataclass
class Answers:
    """The browsers' answers. `last`: the time of the last one."""

    expected: int
    done: asyncio.Event
    by_status: dict[str, int] = field(default_factory=dict)
    last: float = 0.0

    def take(self, status: str) -> None:
        """Count one answer."""
        self.by_status[status] = self.by_status.get(status, 0) + 1
        self.last = time.monotonic()
        if sum(self.by_status.values()) == self.expected:
            self.done.set()


async def browse(url: str, browsers: int) -> Answers:
    """Run all browsers at once, until each has its answer or PATIENCE seconds have passed."""
    loop = asyncio.get_running_loop()
    answers = Answers(browsers, asyncio.Event())
    host, _, port = url.removeprefix("http://").partition(":")
    connecting = asyncio.Semaphore(CONNECTING)

    async def open_one() -> asyncio.BaseTransport:
        async with connecting:
            transport, _ = await loop.create_connection(lambda: Browser(answers), host, int(port))
            return transport

    transports = await asyncio.gather(*(open_one() for _ in range(browsers)))
    try:
        await asyncio.wait_for(answers.done.wait(), PATIENCE)
    except TimeoutError:
        answers.by_status["no answer"] = browsers - sum(answers.by_status.values())
    for transport in transports:
        transport.close()
    return answers


def allow_files() -> int:
    """Raise the limit of open files to FILES or to what the machine allows; return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, max(FILES, hard)))
    except (ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Return the exit status: 1 if a session was not started."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.waiting")
    parser.add_argument("--browsers", type=int, default=10_000, metavar="N")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="N", help="seconds OneInbox takes for a call")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        core, _ = rig.pin()
    except Missing as error:
        sys.stderr.write(f"{error}\n")
        return 1
    files = allow_files()
    browsers = min(options.browsers, (files - SPARE_FILES) // 2)
    waiting = {"BROKER_MAX_WAITING": str(browsers), "ONEINBOX_TIMEOUT": "60"}
    with slow_oneinbox(options.seconds) as (url, pipe), rig.broker(url, core=core, environ=waiting) as broker:
        at_rest, cpu, began = broker.rss, broker.cpu, time.monotonic()
        answers = uvloop.run(browse(broker.url, browsers))
        pipe.send(None)
        seen: Seen = pipe.recv()
        report = {
            "browsers": browsers,
            "open files allowed": files,
            "OneInbox takes, s": options.seconds,
            "answers": answers.by_status,
            "waiting for OneInbox at once, at most": seen.most,
            "from the first connection to the last answer, s": round(answers.last - began, 2),
            "from OneInbox's last answer to the last answer, s": round(answers.last - seen.last, 2),
            "CPU per session, µs": round((broker.cpu - cpu) / browsers * 1e6),
            "RSS at rest, MB": round(at_rest),
            "RSS at most, MB": round(broker.peak_rss),
        }
    say(rig.table([("waiting", ""), *report.items()]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return 0 if answers.by_status == {"201": browsers} else 1


if __name__ == "__main__":
    sys.exit(main())
