"""Count what a request costs: function calls and garbage, the same on every machine, and CPU beside an empty route.

    python -m tests.benchmarks.counting

The broker runs in process, without a server and with a canned OneInbox, so that only its own work counts.
"""

import asyncio
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from starlette.types import ASGIApp, Message

from app.api.app import create_app
from app.config.loading import load_settings
from app.oneinbox.transport import Answer, Outgoing, PooledTransport
from app.server.gc import freeze_gc
from app.telemetry.logging import configure_logging
from tests.benchmarks import rig
from tests.benchmarks.peers import plain

WARM_UP = 300
COUNTED = 50
TIMED = 300
ROUNDS = 7

Ask = Callable[[], Awaitable[None]]


class Canned(PooledTransport):
    """A OneInbox that answers at once."""

    def __init__(self) -> None:
        self._calls = 0

    async def exchange(self, request: Outgoing, limit: int) -> Answer:
        """Start a call or return one."""
        request.encode()
        if request.method == "POST":
            self._calls += 1
            call = {
                "id": f"call_{self._calls}",
                "server_url": "wss://voice.oneinbox.ai",
                "participant_token": rig.TOKEN,
            }
            return Answer(201, [], json.dumps(call).encode())
        call = {"id": request.target.rpartition("/")[2], "agent_id": "agt_benchmark", "status": "in_progress"}
        return Answer(200, [], json.dumps(call).encode())

    async def aclose(self) -> None:
        """Nothing is open."""


@dataclass
class Client:
    """Calls an ASGI application as a server would, with `more` headers. `headers`: of the last answer."""

    app: ASGIApp
    state: Mapping[str, Any]
    headers: dict[bytes, bytes] = field(default_factory=dict)
    more: tuple[tuple[bytes, bytes], ...] = ()

    async def ask(self, method: str, path: str, body: bytes, expect: int) -> None:
        """Send one request. Raises AssertionError if the status is not `expect`."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "server": ("127.0.0.1", 8000),
            "client": ("127.0.0.1", 50000),
            "scheme": "http",
            "method": method,
            "root_path": "",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [
                (b"host", b"127.0.0.1:8000"),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *self.more,
            ],
            "state": dict(self.state),
        }
        arrived = False
        status = 0

        async def receive() -> Message:
            nonlocal arrived
            if arrived:
                await asyncio.Event().wait()  # the client stays connected
            arrived = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.headers = dict(message["headers"])

        await self.app(scope, receive, send)
        assert status == expect, f"{method} {path} should answer {expect}: {status}"


async def count_calls(ask: Ask) -> int:
    """Count the function calls of one request, Python's and C's: the fewest of several requests."""
    fewest = sys.maxsize
    for _ in range(COUNTED):
        calls = 0

        def profile(frame: FrameType, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            await ask()
        finally:
            sys.setprofile(None)
        fewest = min(fewest, calls)
    return fewest


async def count_garbage(ask: Ask) -> float:
    """Count the objects that a request leaves to the garbage collector, because they refer to each other."""
    gc.collect()
    gc.disable()
    for _ in range(COUNTED):
        await ask()
    found = gc.collect()
    gc.enable()
    return found / COUNTED


async def time_cpu(asks: Mapping[str, Ask]) -> dict[str, float]:
    """Measure microseconds of CPU per request: the least of several rounds, each through all requests in turn."""
    least = dict.fromkeys(asks, float("inf"))
    for _ in range(ROUNDS):
        for name, ask in asks.items():
            before = time.process_time()
            for _ in range(TIMED):
                await ask()
            least[name] = min(least[name], (time.process_time() - before) / TIMED * 1e6)
    return least


async def count() -> dict[str, dict[str, float]]:
    """Return function calls, garbage and CPU of a session, of a read of a cached call, and of an empty route."""
    app = create_app(load_settings({**rig.BROKER}, env_file=None), Canned())
    async with AsyncExitStack() as stack:
        state = await stack.enter_async_context(app.router.lifespan_context(app))
        broker, empty = Client(app, state or {}), Client(plain.empty, {})
        await broker.ask("POST", "/session", b"{}", 201)
        path = broker.headers[b"location"].decode()
        asks: dict[str, Ask] = {
            "session": lambda: broker.ask("POST", "/session", b"{}", 201),
            "read": lambda: broker.ask("GET", path, b"", 200),
            "empty": lambda: empty.ask("POST", "/session", b"{}", 201),
        }
        for ask in asks.values():
            for _ in range(WARM_UP):
                await ask()
        freeze_gc()
        calls = {name: await count_calls(ask) for name, ask in asks.items()}
        garbage = {name: await count_garbage(ask) for name, ask in asks.items()}
        cpu = await time_cpu(asks)
    return {name: {"calls": calls[name], "garbage": garbage[name], "cpu": round(cpu[name], 1)} for name in asks}


def main() -> None:
    """Count, and print as JSON."""
    # Logging is part of the cost, so the log is written, to /dev/null.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        configure_logging("info", "json")
        found = asyncio.run(count())
    rig.say(json.dumps(found))


if __name__ == "__main__":
    main()
