"""Runs the emulator on a real socket, with a server that can cut connections."""

import asyncio
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.sandbox.emulator import Emulator, EmulatorOptions, create_emulator
from app.sandbox.http_exchange import DROP


class _CuttingProtocol(HttpToolsProtocol):
    """Offers the application to cut the connection, which ASGI has no word for."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast("dict[str, Any]", self.scope)["extensions"] = {DROP: self.transport.abort}

    def shutdown(self) -> None:
        # An answer that hangs, drips or never ends on purpose must not hold the server up.
        self.transport.abort()


class _GuestServer(uvicorn.Server):
    """A server in somebody else's event loop: signals are the host's, and it can tell when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@dataclass(frozen=True, slots=True)
class RunningEmulator:
    """An emulator that listens."""

    url: str
    """Base URL, without a slash at the end."""
    emulator: Emulator


def emulator_server(
    options: EmulatorOptions = EmulatorOptions(),  # noqa: B008 - frozen
    host: str = "127.0.0.1",
    port: int = 9000,
) -> uvicorn.Server:
    """The emulator as a server of its own; `run()` it."""
    return uvicorn.Server(_config(create_emulator(options), host, port))


@asynccontextmanager
async def running_emulator(
    options: EmulatorOptions = EmulatorOptions(),  # noqa: B008 - frozen
    port: int = 0,
) -> AsyncIterator[RunningEmulator]:
    """An emulator in this event loop, on a loopback port (0: a free one), for as long as the context lasts."""
    app = create_emulator(options)
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = _GuestServer(_config(app, *listener.getsockname()))
        serving = asyncio.create_task(server.serve([listener]))
        await server.up.wait()
        try:
            yield RunningEmulator(f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.emulator)
        finally:
            server.should_exit = True
            await serving
            for _ in range(3):  # connections that were cut close their sockets in the loop's next turns
                await asyncio.sleep(0)


def _config(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_CuttingProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        # Longer than clients keep idle connections: a server that closes one just as it is used again is a fault
        # nobody asked for.
        timeout_keep_alive=75,
    )
