"""A broker that reports on itself: `python -m tests.faults.broker`, like `serve` with a second port.

A connection to that port gets one line of JSON, the number of tasks in the event loop and of objects known to the
garbage collector, and is closed.
"""

import asyncio
import gc
import json
import sys

from app.api.app import create_app
from app.config.loading import load_settings
from app.server.server import create_server, listen, url_of
from app.telemetry.logging import configure_logging


async def report(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one connection."""
    gc.collect()
    inside = {"tasks": len(asyncio.all_tasks()) - 1, "objects": len(gc.get_objects())}
    writer.write(json.dumps(inside).encode() + b"\n")
    await writer.drain()
    writer.close()


async def serve() -> None:
    """Serve until stopped."""
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    with listen("127.0.0.1", 0) as listener:
        reporting = await asyncio.start_server(report, "127.0.0.1", 0)
        port = reporting.sockets[0].getsockname()[1]
        async with reporting:
            record = {"event": "listening", "url": url_of(listener), "report": port}
            sys.stdout.write(json.dumps(record) + "\n")
            sys.stdout.flush()
            await create_server(create_app(settings)).serve(sockets=[listener])


if __name__ == "__main__":
    asyncio.run(serve())
