"""The broker as its users run it: a process of its own, over real sockets."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

import app

ROOT = Path(app.__file__).parents[1]
PATIENCE = 20.0


def surroundings(environ: Mapping[str, str]) -> dict[str, str]:
    """This process' environment without anybody's settings, and with these; the code under test first."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("BROKER_", "ONEINBOX_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environ}


@dataclass
class Finished:
    """What a command left behind. `seconds`: of processor time, which no busy machine stretches."""

    code: int
    out: str
    err: str
    seconds: float


def run(*arguments: str, cwd: Path, environ: Mapping[str, str], module: str = "app") -> Finished:
    """Run `python -m app …` to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=surroundings(environ),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Finished(done.returncode, done.stdout, done.stderr, seconds)


@dataclass
class Process:
    """A running command. `out` and `err`: what it printed so far, line by line."""

    popen: subprocess.Popen[str]
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    _lines: Queue[str] = field(default_factory=Queue)
    _readers: list[threading.Thread] = field(default_factory=list)

    def read(self) -> None:
        """Begin to read what it prints."""
        for stream, lines in ((self.popen.stdout, self.out), (self.popen.stderr, self.err)):
            assert stream is not None
            reader = threading.Thread(target=self._follow, args=(stream, lines))
            reader.start()
            self._readers.append(reader)

    def _follow(self, stream: IO[str], lines: list[str]) -> None:
        with stream:
            for line in stream:
                lines.append(line.rstrip("\n"))
                self._lines.put(line)

    def wait_for(self, text: str) -> str:
        """The first new line with this text."""
        while True:
            try:
                line = self._lines.get(timeout=PATIENCE)
            except Empty:
                raise AssertionError(f"never printed {text!r}: {self.out} {self.err}") from None
            if text in line:
                return line

    def terminate(self) -> int:
        """Send SIGTERM; the exit status."""
        self.popen.send_signal(signal.SIGTERM)
        return self.end()

    def end(self) -> int:
        """Wait for the end; the exit status."""
        code = self.popen.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        return code

    @property
    def records(self) -> list[dict[str, Any]]:
        """Its log."""
        return [json.loads(line) for line in self.err]


def _mind_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(
    *arguments: str, cwd: Path, environ: Mapping[str, str], module: str = "app", fds: tuple[int, ...] = ()
) -> Iterator[Process]:
    """A command that runs for as long as the context lasts."""
    popen = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=surroundings(environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=fds,
        # Ctrl-C means something, even where the tests run in a shell's background, which ignores it.
        preexec_fn=_mind_interrupts,  # noqa: PLW1509 - it takes no lock
    )
    process = Process(popen)
    process.read()
    try:
        yield process
    finally:
        if popen.poll() is None:
            popen.kill()
        process.end()


@contextmanager
def serving(cwd: Path, environ: Mapping[str, str]) -> Iterator[tuple[Process, str]]:
    """A broker on a free port, once it listens, and its URL."""
    with running("serve", "--port", "0", cwd=cwd, environ=environ) as process:
        listening = json.loads(process.wait_for('"listening"'))
        yield process, listening["url"]


def exchange(url: str, request: bytes) -> bytes:
    """Send bytes as they are, and read to the end of the connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))
