"""One HTTP request and its answer, which a fault may change."""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from starlette.types import ASGIApp, Message, Receive, Scope, Send

DROP = "emulator.drop"
"""ASGI extension of the emulator's server: a function that cuts the connection."""

JSON = (b"content-type", b"application/json")


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @classmethod
    def of(cls, status: int, content: Any, headers: Iterable[tuple[bytes, bytes]] = ()) -> Self:
        """Return a JSON answer, without content-length."""
        return cls(status, [JSON, *headers], json.dumps(content).encode())


@dataclass(slots=True)
class HttpExchange:
    """A request whose body has been read, and the way to answer it. Close it at the end."""

    app: ASGIApp
    scope: Scope
    receive: Receive
    send: Send
    body: bytes
    _disconnected: asyncio.Task[None] | None = field(default=None, init=False)

    def close(self) -> None:
        """Stop listening for the disconnect."""
        if self._disconnected is not None:
            self._disconnected.cancel()

    @property
    def on_socket(self) -> bool:
        """True on a real connection; an in-process client has none."""
        return DROP in self.scope.get("extensions", {})

    async def run(self) -> Answer:
        """Let OneInbox handle the request; return its answer without sending it."""
        status, headers, parts = 0, list[tuple[bytes, bytes]](), list[bytes]()

        async def keep(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], message["headers"]
            else:
                parts.append(message.get("body", b""))

        await self.forward(keep)
        return Answer(status, [header for header in headers if header[0] != b"content-length"], b"".join(parts))

    async def forward(self, send: Send | None = None) -> None:
        """Let OneInbox handle the request and answer it."""
        pending = [{"type": "http.request", "body": self.body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await self.receive()

        await self.app(self.scope, replay, send or self.send)

    async def answer(self, answer: Answer) -> None:
        """Send a complete answer."""
        await self.begin(answer, len(answer.body))
        await self.write(answer.body, more=False)

    async def begin(self, answer: Answer, length: int | None) -> None:
        """Send the head of `answer`; chunked if `length` is None."""
        headers = answer.headers if length is None else [*answer.headers, (b"content-length", b"%d" % length)]
        await self.send({"type": "http.response.start", "status": answer.status, "headers": headers})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece of the body."""
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def disconnected_within(self, seconds: float | None) -> bool:
        """Wait up to `seconds` for the client to disconnect or the server to stop; return whether either did."""
        if self._disconnected is None:
            self._disconnected = asyncio.create_task(self._wait_for_disconnect())
        await asyncio.wait((self._disconnected,), timeout=seconds)
        return self._disconnected.done()

    async def drop(self) -> None:
        """Cut the connection."""
        self.scope["extensions"][DROP]()
        # uvicorn answers 500 if the application returns before uvicorn has noticed the cut.
        await self.disconnected_within(None)

    async def _wait_for_disconnect(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
