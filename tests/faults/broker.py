"""A broker that can be looked into: `python -m tests.faults.broker`, `serve` with a count of its tasks beside it.

Whoever connects to the second port gets one line of JSON and is gone: tasks of the event loop, objects the garbage
collector knows.
"""

import asyncio
import gc
import json
import sys

from app.api.app import create_app
from app.config.loading import load_settings
from app.server.server import create_server, listen, url_of
from app.telemetry.logging import configure_logging


async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One look."""
    gc.collect()
    inside = {"tasks": len(asyncio.all_tasks()) - 1, "objects": len(gc.get_objects())}
    writer.write(json.dumps(inside).encode() + b"\n")
    await writer.drain()
    writer.close()


async def serve() -> None:
    """Serve until ended."""
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    with listen("127.0.0.1", 0) as listener:
        looking = await asyncio.start_server(tell, "127.0.0.1", 0)
        port = looking.sockets[0].getsockname()[1]
        async with looking:
            said = {"event": "listening", "url": url_of(listener), "look": port}
            sys.stdout.write(json.dumps(said) + "\n")
            sys.stdout.flush()
            await create_server(create_app(settings)).serve(sockets=[listener])


if __name__ == "__main__":
    asyncio.run(serve())
