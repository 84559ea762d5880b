"""Clients that follow calls over raw sockets, cheap enough for a thousand of them.

follower = await Follower.open(url, path)
await follower.has("completed")
await follower.over()
"""

import asyncio
import json
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

TIMEOUT = 30


@dataclass
class Follower:
    """One open event stream. `events`: when each came, its name, its id and its data. `clean`: the last chunk came."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    events: list[tuple[float, str, str, Any]] = field(default_factory=list)
    comments: int = 0
    clean: bool = False
    over_at: float = 0.0
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _task: "asyncio.Task[None] | None" = None

    @classmethod
    async def open(cls, url: str, path: str, headers: Mapping[str, str] | None = None) -> Self:
        """Connect and read the head of the answer; a stream is then read in the background."""
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        lines = [f"GET {path}/events HTTP/1.1", "Host: x", *(f"{n}: {v}" for n, v in (headers or {}).items())]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        follower = cls(reader, writer)
        async with asyncio.timeout(TIMEOUT):
            first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        follower.status = int(first.split()[1])
        follower.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
        if follower.status == 200:
            follower._task = asyncio.create_task(follower._read())
        return follower

    @property
    def statuses(self) -> list[str]:
        """The states, in order."""
        return [data["status"] for _, name, _, data in self.events if name == "call"]

    @property
    def ended(self) -> bool:
        """Whether the last event was `end`."""
        return bool(self.events) and self.events[-1][1] == "end"

    @property
    def last_id(self) -> str:
        """The id that an EventSource sends when it reconnects."""
        return self.events[-1][2]

    async def has(self, status: str, within: float = TIMEOUT) -> float:
        """Wait for a state; return when it came."""
        async with asyncio.timeout(within):
            while True:
                for at, name, _, data in self.events:
                    if name == "call" and data["status"] == status:
                        return at
                await self._news.wait()

    async def over(self, within: float = TIMEOUT) -> None:
        """Wait for the end of the stream."""
        assert self._task is not None
        async with asyncio.timeout(within):
            await self._task

    async def hang_up(self) -> None:
        """Close the connection."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.writer.close()

    async def _read(self) -> None:
        try:
            while size := int(await self.reader.readline() or b"-1", 16):
                if size < 0:
                    break
                self._take((await self.reader.readexactly(size + 2))[:-2])
                self._news.set()
                self._news = asyncio.Event()
            else:
                self.clean = await self.reader.readexactly(2) == b"\r\n"
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.over_at = asyncio.get_running_loop().time()
            self.writer.close()

    def _take(self, chunk: bytes) -> None:
        if chunk.startswith(b":"):
            assert chunk == b": keep-alive\n\n"
            self.comments += 1
            return
        *head, data, blank, end = chunk.decode().split("\n")
        assert (blank, end) == ("", ""), chunk
        name, event_id = head if len(head) > 1 else (*head, "id: ")  # `ending` has none
        now = asyncio.get_running_loop().time()
        self.events.append(
            (now, name.removeprefix("event: "), event_id.removeprefix("id: "), json.loads(data.removeprefix("data: ")))
        )


async def open_many(url: str, path: str, count: int, at_once: int = 50) -> list[Follower]:
    """Open several streams of one call."""
    places = asyncio.Semaphore(at_once)

    async def one() -> Follower:
        async with places:
            return await Follower.open(url, path)

    return await asyncio.gather(*(one() for _ in range(count)))


def room_for_sockets() -> None:
    """Allow the file descriptors of a thousand connections, also for processes started later."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 8192:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))


def figure(name: str, value: float) -> None:
    """Print a measurement; `pytest -s` shows it."""
    sys.stdout.write(f"\n{name}: {value:g}\n")
