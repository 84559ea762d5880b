"""A TCP relay in a process of its own, so that a busy drill does not slow it down. Open connections keep their target.

python -m tests.faults.relay TARGET: prints its port; each line of stdin is a new target's port.
"""

import asyncio
import contextlib
import sys


class Relay:
    """Passes bytes on to the target that is current when a connection opens."""

    def __init__(self, target: int) -> None:
        self.target = target

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection."""
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            await asyncio.gather(_pass_on(reader, far_writer), _pass_on(far_reader, writer))
        writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def main(target: int) -> None:
    """Relay until stdin ends."""
    relay = Relay(target)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        relay.target = int(line)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
