"""The process around a command: its streams, its exit, its listening socket."""

import errno
import io
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import typer

T = TypeVar("T")


def open_standard_streams() -> None:
    """Open closed standard streams on the null device; make stdout print a question mark for what it cannot encode."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes this number, the lowest free one, before a socket does
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def say(text: str) -> None:
    """Print and flush. Exit quietly when the reader has gone."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        raise  # typer turns it into exit status 1
    except OSError as error:  # a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise the interpreter tries again when it exits
        refuse(f"stdout: cannot be written ({error.strerror})", status=1)


def refuse(*lines: str, status: int = 2) -> NoReturn:
    """Print these lines on stderr, and exit."""
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    raise SystemExit(status)


def checked(make: Callable[[], T]) -> T:
    """Return what `make` returns; refuse with the lines of a SettingsError."""
    from app.config.settings import SettingsError

    try:
        return make()
    except SettingsError as error:
        refuse(*error.lines)


def listen(host: str, port: int, end: Callable[[int], object] = os._exit) -> socket.socket:
    """Return a listening socket, or refuse. `end`: called on SIGTERM and Ctrl-C until the server handles them.

    Not `sys.exit`: its exception is lost where a signal interrupts a destructor, as in a garbage collection.
    """
    from app.server import server

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end(0))
    try:
        return server.listen(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            refuse(f"Port {port} is in use. Try `--port 0`.", status=1)
        refuse(f"--port {port}: cannot listen on {host} ({error.strerror})", status=1)
