"""One request and its answer on the wire, for those who want to spoil it."""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from starlette.types import ASGIApp, Message, Receive, Scope, Send

DROP = "emulator.drop"
"""Name of the ASGI extension under which the emulator's server offers to cut the connection."""

JSON = (b"content-type", b"application/json")


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @classmethod
    def of(cls, status: int, content: Any, headers: Iterable[tuple[bytes, bytes]] = ()) -> Self:
        """A JSON answer, without its content-length."""
        return cls(status, [JSON, *headers], json.dumps(content).encode())


class HttpExchange:
    """A request whose body has been read; as a context manager it lets go of the connection at the end."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        self._app, self._scope, self._receive, self._send, self._body = app, scope, receive, send, body
        self._gone: asyncio.Task[Message] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._gone is not None:
            self._gone.cancel()

    @property
    def on_socket(self) -> bool:
        """Whether there is a real connection under this; in process there is only a client that buffers."""
        return DROP in self._scope.get("extensions", {})

    async def run(self) -> Answer:
        """Let OneInbox do what it was asked, and keep its answer back."""
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
        """Let OneInbox answer by itself."""
        pending = [{"type": "http.request", "body": self._body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await self._receive()

        await self._app(self._scope, replay, send or self._send)

    async def answer(self, answer: Answer) -> None:
        """Send a whole answer."""
        await self.begin(answer, len(answer.body))
        await self.write(answer.body, more=False)

    async def begin(self, answer: Answer, length: int | None) -> None:
        """Send the head of `answer`; a `length` of None means chunked."""
        headers = answer.headers if length is None else [*answer.headers, (b"content-length", b"%d" % length)]
        await self._send({"type": "http.response.start", "status": answer.status, "headers": headers})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def gone_within(self, seconds: float | None) -> bool:
        """Wait so long, or until the client hangs up, or the server is shut down; whether it did."""
        if self._gone is None:
            self._gone = asyncio.create_task(self._hang_up())
        await asyncio.wait((self._gone,), timeout=seconds)
        return self._gone.done()

    async def drop(self) -> None:
        """Cut the connection."""
        self._scope["extensions"][DROP]()
        # uvicorn would answer 500 to an application that returns before it has noticed.
        await self.gone_within(None)

    async def _hang_up(self) -> Message:
        while (message := await self._receive())["type"] != "http.disconnect":
            pass
        return message
