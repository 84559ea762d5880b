"""Ports for servers that must know theirs before they listen."""

import itertools
import os
import socket

SHARE = 2000
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Below those that the system hands out (from 32,768), and a share for each worker of pytest-xdist.
_PORTS = (10_000 + _WORKER * SHARE + count % SHARE for count in itertools.count(os.getpid()))


def free_port() -> int:
    """A port on loopback that stays free: no other test takes it, and no connection."""
    while True:
        port = next(_PORTS)
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
