"""HTTP requests as uvicorn serves them: the browser and the server are a network apart."""

import asyncio
from collections.abc import Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from tests.simulation.world import World

if TYPE_CHECKING:
    from tests.simulation.invariants import Invariants
    from tests.simulation.replicas import Replica

Message = MutableMapping[str, Any]
Answer = tuple[int, dict[str, str], bytes]


class Gone(Exception):
    """The connection broke, or was refused. The message says how."""


class Connection:
    """One request of a browser.

    `user`: who sends it, as the world knows. `key`: its Idempotency-Key with the user. `chunks`: receives each part of
    the body, for a stream.
    """

    def __init__(
        self,
        world: World,
        invariants: "Invariants",
        name: str,
        replica: "Replica",
        *,
        method: str,
        path: str,
        headers: Sequence[tuple[bytes, bytes]] = (),
        body: bytes = b"",
        peer: str = "203.0.113.7",
        user: str = "",
        key: str | None = None,
        chunks: Callable[[bytes], object] | None = None,
    ) -> None:
        self.world, self.invariants, self.name, self.replica = world, invariants, name, replica
        self.method, self.path, self.peer, self.user = method, path, peer, user
        self.key = (user, key) if key is not None else None
        self.headers = [(b"host", b"broker.example"), *headers]
        self.body, self.chunks = body, chunks
        self.answer: asyncio.Future[Answer] = world.loop.create_future()
        self.arrived: float | None = None
        self.hung_up: float | None = None
        self.noticed: float | None = None
        """When the server knew that the browser was gone."""
        self.complete = False
        """The last byte of the answer was sent while the connection was open."""
        self.finished: float | None = None
        self.status = 0
        self.sent_headers: dict[str, str] = {}
        self.task: asyncio.Task[None] | None = None
        self._sent = b""
        self._read = False
        self._closed = False
        self._event = asyncio.Event()

    def __str__(self) -> str:
        return self.name

    @property
    def shown(self) -> str:
        """The path without call keys."""
        path = "/".join(part.partition(".")[0] for part in self.path.split("/") if len(part) != 24)
        return path + (f" key {self.key[1][-2:]}" if self.key else "")

    @property
    def call_id(self) -> str:
        """The call that a 201 names."""
        return self.sent_headers.get("location", "").rpartition("/")[2].partition(".")[0]

    async def receive(self) -> Message:
        """Return the body, then wait for the browser's end. A coroutine function: hang-up checks step it."""
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        if not self._closed and not self.complete:
            await self._event.wait()
            self._event.clear()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Send a part of the answer."""
        if self._closed:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.sent_headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
            return
        part = message.get("body", b"")
        self._sent += part
        if self.chunks is not None and part:
            self.world.later(0.02, self.chunks, part)
        if not message.get("more_body"):
            self.complete = True
            self._event.set()
            self.invariants.answered(self)
            network = self.world.between(f"net:{self.name}", 0.001, 0.05)
            self.world.later(network + (0.02 if self.chunks is not None else 0), self._receive_answer)

    def _receive_answer(self) -> None:
        if self.hung_up is None and not self.answer.done():
            self.answer.set_result((self.status, self.sent_headers, self._sent))
            self.invariants.received(self)

    def hang_up(self) -> None:
        """The browser goes; the server notices a little later."""
        if self.hung_up is not None or self.answer.done():
            return
        self.hung_up = self.world.now
        self.world.note(self.name, "hangs up")
        after = self.world.between(f"fin:{self.name}", 0.0005, 0.05)
        if self.world.fault("late-fin", self.name):
            after += self.world.length("late-fin", self.name, 0.2, 4)
        self.world.later(after, self._notice)
        self.break_off("hung up")

    def _notice(self) -> None:
        if not self.complete:
            self._closed = True
            self.noticed = self.world.now
            self._event.set()

    def break_off(self, why: str) -> None:
        """The browser gets no answer."""
        if not self.answer.done():
            self.answer.set_exception(Gone(why))
            self.answer.exception()  # marks it as seen

    async def serve(self) -> None:
        """Run the request in its replica."""
        path, _, query = self.path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": self.headers,
            "client": (self.peer, 50000),
            "server": ("10.0.0.1", 8000),
            "state": dict(self.replica.state),
        }
        try:
            await self.replica.app(scope, self.receive, self.send)
        except asyncio.CancelledError:
            self.world.note(self.replica.name, f"{self} is cancelled")
        except Exception as error:
            self.world.violate("X-exception", f"{self}: {type(error).__name__}: {error}")
        finally:
            self.finished = self.world.now
            self.replica.connections.pop(self, None)
            if not self.complete and not self.answer.done():
                self.world.later(0.01, self.break_off, "reset")
