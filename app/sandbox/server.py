"""Run the emulator on a real socket, with a server that can cut connections."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.sandbox.emulator import Emulator, EmulatorOptions, create_emulator
from app.sandbox.http_exchange import DROP


class _CuttingProtocol(HttpToolsProtocol):
    """Let the application cut the connection, which ASGI cannot express."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast("dict[str, Any]", self.scope)["extensions"] = {DROP: self.transport.abort}

    def shutdown(self) -> None:
        # A fault that hangs, drips or never ends must not delay the shutdown.
        self.transport.abort()


@dataclass(frozen=True, slots=True)
class RunningEmulator:
    """A running emulator."""

    url: str
    """Base URL, without a trailing slash."""
    emulator: Emulator


def emulator_server(
    options: EmulatorOptions = EmulatorOptions(),  # noqa: B008 - frozen
    host: str = "127.0.0.1",
    port: int = 9000,
) -> uvicorn.Server:
    """Return the emulator as a server, to be `run()`."""
    return uvicorn.Server(_config(create_emulator(options), host, port))


@asynccontextmanager
async def running_emulator(
    options: EmulatorOptions = EmulatorOptions(),  # noqa: B008 - frozen
) -> AsyncIterator[RunningEmulator]:
    """Run an emulator in this event loop, on a free loopback port, until the context ends."""
    app = create_emulator(options)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = _config(app, *listener.getsockname())
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        # Not `serve`: it takes the host's signals, and a fifth of a second to end.
        await server.startup([listener])
        ticking = asyncio.create_task(server.main_loop())  # keeps the Date header right
        try:
            yield RunningEmulator(f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.emulator)
        finally:
            ticking.cancel()
            for each in server.servers:
                each.close()
            for connection in list(server.server_state.connections):
                connection.shutdown()
            await asyncio.gather(*server.server_state.tasks, ticking, return_exceptions=True)
            for _ in range(3):  # aborted connections close their sockets in the loop's next iterations
                await asyncio.sleep(0)
            await server.lifespan.shutdown()


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
        # Longer than clients keep idle connections, so that none is closed just as it is reused.
        timeout_keep_alive=75,
    )
