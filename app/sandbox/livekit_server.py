"""A LiveKit server for the sandbox, on loopback only, which needs no network."""

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

import httpx

KEY, SECRET = "devkey", "secret"
"""Of `livekit-server --dev`."""
HTTP_PORT, MEDIA_PORT = 7880, 7882
"""LiveKit's own; others are taken where these are in use."""
PATIENCE = 20.0
"""Seconds for the server to answer."""

_STOPPING = 5
"""Seconds for it to end."""


class LiveKitError(Exception):
    """The server did not start. The text says why, on one line."""


@dataclass(frozen=True, slots=True)
class LiveKitServer:
    """A running server."""

    url: str
    process: "subprocess.Popen[bytes]"


@contextmanager
def running_livekit(program: str) -> Iterator[LiveKitServer]:
    """Run the server at this path until the context ends. Raises LiveKitError."""
    http, media = _free(HTTP_PORT, socket.SOCK_STREAM), _free(MEDIA_PORT, socket.SOCK_DGRAM)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 - the program that --livekit asks for
            [program, "--dev", "--config-body", json.dumps(config(http, media))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the sandbox, which then ends the server
        )
        try:
            _wait_for_answer(process, http, log)
            yield LiveKitServer(f"ws://127.0.0.1:{http}", process)
        finally:
            process.terminate()
            try:
                process.wait(_STOPPING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def config(http_port: int, media_port: int) -> dict[str, Any]:
    """Return the server's configuration (config-sample.yaml of livekit/livekit): loopback, and nothing from a network.

    A token makes no room: the emulator makes each call's room, so that the token of an ended call is refused.
    """
    return {
        "port": http_port,
        "bind_addresses": ["127.0.0.1"],
        "rtc": {
            "udp_port": media_port,
            "tcp_port": 0,  # it would listen on every address
            "use_external_ip": False,
            "node_ip": "127.0.0.1",
            "enable_loopback_candidate": True,  # without it nothing listens on 127.0.0.1
            "interfaces": {"includes": ["lo"]},
            "ips": {"includes": ["127.0.0.1/32"]},
            "stun_servers": ["127.0.0.1:3478"],  # none there; without one clients ask servers on the internet
        },
        "room": {"auto_create": False},
        "logging": {"level": "error"},  # warnings may hold tokens
    }


def _free(port: int, kind: socket.SocketKind) -> int:
    """Return this loopback port if nothing listens there, else a free one."""
    for wanted in (port, 0):
        with socket.socket(type=kind) as trial, suppress(OSError):
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
            trial.bind(("127.0.0.1", wanted))
            return int(trial.getsockname()[1])
    raise LiveKitError("no port is free")


def _wait_for_answer(process: "subprocess.Popen[bytes]", port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            raise LiveKitError(f"it ended at once: {lines[-1] if lines else 'it said nothing'}")
        with suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/", trust_env=False, timeout=1).is_success:
                return
        time.sleep(0.05)
    raise LiveKitError(f"it does not answer after {PATIENCE:.0f} s")
