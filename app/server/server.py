"""uvicorn's server and supervisor, as the broker runs them."""

import multiprocessing
import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.supervisors import Multiprocess

from app.server.protocol import GuardedHttp
from app.telemetry.metrics import drop_dead_gauges

GRACE = 20
"""Seconds that running requests get to finish after SIGTERM."""
BACKLOG = 65535
"""Connections that may wait to be accepted; the kernel has its own bound (`net.core.somaxconn`)."""
KEEP_ALIVE = 75
"""Seconds that an idle connection is kept; nginx's default. Load balancers keep theirs for up to 60 s and must close
first: otherwise they send a request into a closing connection and answer 502."""


class Server(uvicorn.Server):
    """A server that exits with status 0 on SIGTERM and Ctrl-C: both are normal ways to stop it."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Do as uvicorn does, without raising the signals again afterwards."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


class Supervisor(Multiprocess):
    """Start workers, replace those that die, and drop their gauges."""

    def keep_subprocess_alive(self) -> None:
        """Replace dead workers; called twice a second."""
        super().keep_subprocess_alive()
        drop_dead_gauges({process.pid for process in self.processes})


def workers_of_uvicorn() -> int:
    """Return how many workers uvicorn runs, this process among them: `--workers` or WEB_CONCURRENCY. 1: none besides.

    Only the parent has read both; it hands its configuration to each worker.
    """
    config = getattr(multiprocessing.current_process(), "_kwargs", {}).get("config")
    return config.workers if isinstance(config, uvicorn.Config) and not config.reload else 1


def serve_with_workers(listener: socket.socket, workers: int) -> None:
    """Run several processes on one socket; each builds the app from the environment's settings."""
    Supervisor(_config("app.main:app", workers=workers), sockets=[listener]).run()


def create_server(app: ASGIApp) -> Server:
    """Return a server for the app: `run(sockets=…)` it, or await `serve(sockets=…)` in an event loop."""
    return Server(_config(app))


def _config(app: ASGIApp | str, workers: int = 1) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        workers=workers,
        # The app itself decides whose X-Forwarded-For to trust, logs requests, and sends no Server header.
        proxy_headers=False,
        access_log=False,
        server_header=False,
        log_config=None,
        loop="auto",  # uvloop where it is installed
        http=GuardedHttp,
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
    )


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0: a free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    # A client that vanished without closing is noticed within 20 s. Connections inherit these.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 9_000)):
        if hasattr(socket, option):  # Linux has them all
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the http URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def url_to_open(listener: socket.socket) -> str:
    """Return the http URL by which this machine reaches a listening socket: 0.0.0.0 and :: are no addresses to open."""
    return url_of(listener).replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
