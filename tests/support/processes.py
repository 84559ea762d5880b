"""The broker as its users run it: a process over real sockets. Tests start `python -m …` here and nowhere else."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import app

ROOT = Path(app.__file__).parents[1]
PATIENCE = 30.0
"""Seconds for a process to start, to print, to answer or to end; ample on a busy machine."""


def surroundings(environ: Mapping[str, str]) -> dict[str, str]:
    """This process' environment without the broker's settings, then with these; the code under test comes first."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("BROKER_", "ONEINBOX_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environ}


@dataclass
class Finished:
    """The result of a command. `seconds`: of processor time, which a busy machine does not stretch."""

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


class Output:
    """A stream of a process, taken by a file (None: without a name), so the process never waits for a reader."""

    def __init__(self, path: Path | None = None) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile() if path is None else path.open("w+b")  # noqa: SIM115 - `close`
        self._read = b""
        self._passed = 0

    @property
    def lines(self) -> list[str]:
        """The whole lines so far."""
        if not self.file.closed:
            descriptor = self.file.fileno()
            # The process writes where the file stands: read without moving that.
            self._read += os.pread(descriptor, os.fstat(descriptor).st_size - len(self._read), len(self._read))
        return self._read[: self._read.rfind(b"\n") + 1].decode(errors="replace").splitlines()

    def find(self, text: str) -> str | None:
        """The first line with this text that no call has passed yet, if it has come."""
        lines = self.lines
        for number, line in enumerate(lines[self._passed :], start=self._passed + 1):
            if text in line:
                self._passed = number
                return line
        self._passed = len(lines)
        return None

    def close(self) -> None:
        """Keep what came, without the file."""
        assert self.lines is not None
        self.file.close()


@dataclass
class Process:
    """A running command. Waiting blocks: an event loop uses `asyncio.to_thread`, or `listens`, `ended` and `stop`."""

    popen: subprocess.Popen[bytes]
    stdout: Output
    stderr: Output
    url: str = ""
    """Where it listens, once that is known."""

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def out(self) -> list[str]:
        """The lines it printed so far."""
        return self.stdout.lines

    @property
    def err(self) -> list[str]:
        """The lines on stderr so far."""
        return self.stderr.lines

    @property
    def records(self) -> list[dict[str, Any]]:
        """Its log."""
        return [json.loads(line) for line in self.err]

    def wait_for(self, text: str) -> str:
        """The next line with this text. Raises AssertionError when none comes."""
        deadline = time.monotonic() + PATIENCE
        while True:
            over = self.popen.poll() is not None or time.monotonic() > deadline
            if line := self.stdout.find(text) or self.stderr.find(text):
                return line
            assert not over, f"never printed {text!r}: {self.out} {self.err}"
            time.sleep(0.01)

    def wait_for_url(self) -> str:
        """The URL that a broker logs once it listens."""
        self.url = json.loads(self.wait_for('"listening"'))["url"]
        return self.url

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, and do not wait."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL, and do not wait."""
        self.popen.kill()

    def terminate(self) -> int:
        """Send SIGTERM; the exit status."""
        self.popen.terminate()
        return self.end()

    def end(self) -> int:
        """Wait for the end; the exit status. Kills what does not end in time, and raises TimeoutExpired."""
        try:
            return self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise
        finally:
            for output in (self.stdout, self.stderr):
                output.close()

    async def listens(self) -> str:
        """The same as `wait_for_url`, for an event loop."""
        return await asyncio.to_thread(self.wait_for_url)

    async def ended(self) -> int:
        """The same as `end`, for an event loop."""
        return await asyncio.to_thread(self.end)

    async def stop(self) -> int:
        """The same as `terminate`, for an event loop."""
        return await asyncio.to_thread(self.terminate)

    def memory(self, field: str = "VmRSS") -> int:
        """Bytes of memory that it uses, or with `VmHWM` has used at most."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) * 1024

    @property
    def descriptors(self) -> int:
        """Open files and connections."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @contextmanager
    def bounded_memory(self, *, peak: int, growth: int | None = None) -> Iterator[None]:
        """Check that it never uses `peak` bytes more than now, nor `growth` more at the end of the block."""
        before = self.memory()
        Path(f"/proc/{self.pid}/clear_refs").write_text("5", encoding="ascii")  # the peak is now
        yield
        assert self.memory("VmHWM") - before < peak
        assert growth is None or self.memory() - before < growth


def launch(
    *arguments: str,
    cwd: Path,
    environ: Mapping[str, str],
    module: str = "app",
    fds: tuple[int, ...] = (),
    log: Path | None = None,
) -> Process:
    """Start `python -m app …`. With `log`, both streams go to that file."""
    out = Output(log)
    err = out if log else Output()
    popen = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=surroundings(environ),
        stdout=out.file,
        stderr=err.file,
        pass_fds=fds,
    )
    return Process(popen, out, err)


@contextmanager
def running(
    *arguments: str, cwd: Path, environ: Mapping[str, str], module: str = "app", fds: tuple[int, ...] = ()
) -> Iterator[Process]:
    """A command that runs for as long as the context lasts."""
    process = launch(*arguments, cwd=cwd, environ=environ, module=module, fds=fds)
    try:
        yield process
    finally:
        process.kill()
        process.end()


@contextmanager
def serving(cwd: Path, environ: Mapping[str, str]) -> Iterator[tuple[Process, str]]:
    """A broker on a free port, once it listens, and its URL."""
    with running("serve", "--port", "0", cwd=cwd, environ=environ) as process:
        yield process, process.wait_for_url()


def exchange(url: str, request: bytes) -> bytes:
    """Send bytes as they are, and read to the end of the connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))
