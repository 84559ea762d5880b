"""uvicorn, as the broker runs it."""

import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.supervisors import Multiprocess

from app.server.protocol import GuardedHttp
from app.telemetry.metrics import forget_all_but

GRACE = 20
"""Seconds that running requests get to finish after SIGTERM."""
BACKLOG = 65535
"""Connections that may wait to be taken; the kernel has a bound of its own (`net.core.somaxconn`)."""
KEEP_ALIVE = 75
"""Seconds that an idle connection is kept; nginx' default. Load balancers keep theirs for up to 60 s, and must be the
ones to close: else they send a request into a closing connection, and answer 502."""


class Server(uvicorn.Server):
    """Ends with exit status 0 on SIGTERM and Ctrl-C: both are ways to say that the work is done."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn does, without raising the signals again afterwards."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


class Supervisor(Multiprocess):
    """Starts workers, and others for those that die; what a dead one said of itself is no metric any more."""

    def keep_subprocess_alive(self) -> None:
        """Replace dead workers; called twice a second."""
        super().keep_subprocess_alive()
        forget_all_but({process.pid for process in self.processes})


def serve_with_workers(listener: socket.socket, workers: int) -> None:
    """Run several processes on one socket; each makes the app from the environment's settings."""
    Supervisor(_config("app.main:app", workers=workers), sockets=[listener]).run()


def create_server(app: ASGIApp) -> Server:
    """A server for the app: `run(sockets=…)` it, or await `serve(sockets=…)` inside an event loop."""
    return Server(_config(app))


def _config(app: ASGIApp | str, workers: int = 1) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        workers=workers,
        # The app decides itself whose X-Forwarded-For it believes, logs requests itself, and names no server.
        proxy_headers=False,
        access_log=False,
        server_header=False,
        log_config=None,
        loop="uvloop",
        http=GuardedHttp,
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: a free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    # A client that vanished without a word frees its place within 20 s. Connections inherit these.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 9_000)):
        if hasattr(socket, option):  # Linux has them all
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return listener


def url_of(listener: socket.socket) -> str:
    """The http URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
