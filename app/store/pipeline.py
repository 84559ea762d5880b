"""One connection to Valkey for all commands: concurrent ones are sent together, as a pipeline.

With a connection for each command, writing it and reading its reply is most of the cost; here a busy process pays that
once for many. Valkey answers one command after the other anyway.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from hiredis import pack_command
from redis.asyncio.connection import Connection
from redis.exceptions import RedisError, ResponseError

from app.store.replies import Elsewhere, elsewhere

Command = tuple[str | bytes | int, ...]
RETIRED_SECONDS = 5
"""A retired connection closes after this long at the latest."""


class PipelinedConnection:
    """Send commands over one connection, opened with the first one. When it breaks, all pending commands fail.

    `heard`: when the server last sent something, by the event loop's clock. Replies are matched to commands by their
    order, also those that no caller waits for. A refusal that means "the wrong server" raises `Elsewhere`, and ends the
    connection; what was not sent yet raises it too.
    """

    def __init__(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._retired = False
        self._loop = asyncio.get_running_loop()
        self._pending: list[tuple[Command, asyncio.Future[Any]]] = []
        self._added = asyncio.Event()
        self._task = self._loop.create_task(self._run(), name="store-pipeline")
        self.heard = 0.0

    @property
    def is_broken(self) -> bool:
        """True when it can send no more commands."""
        return self._task.done() or self._task.cancelling() > 0

    async def send(self, *command: str | bytes | int) -> Any:
        """Return the server's reply. Raises RedisError and OSError; has no timeout."""
        reply = self._loop.create_future()
        self._pending.append((command, reply))
        self._added.set()
        return await reply

    async def aclose(self) -> None:
        """Close the connection; pending commands raise ConnectionError."""
        self.abort()
        await asyncio.gather(self._task, return_exceptions=True)

    def abort(self) -> None:
        """Start `aclose` without waiting for it."""
        self._task.cancel()

    def retire(self) -> None:
        """Close it once all pending commands have their replies. Send no more."""
        self._retired = True
        self._added.set()
        self._loop.call_later(RETIRED_SECONDS, self.abort)

    async def _run(self) -> None:
        sent: list[tuple[Command, asyncio.Future[Any]]] = []
        failure: Exception = ConnectionError()
        try:
            while not self._retired or self._pending:
                await self._added.wait()
                self._added.clear()
                if not self._pending:
                    continue
                if self._connection is None:
                    self._connection = await self._connect()
                sent, self._pending = self._pending, []
                await self._exchange(self._connection, sent)
        except (RedisError, OSError) as error:
            failure = elsewhere(error) or error
        finally:
            for _, reply in (*sent, *self._pending):
                if not reply.done():
                    reply.set_exception(failure)
            if self._connection is not None:
                await self._connection.disconnect(nowait=True)

    async def _exchange(self, connection: Connection, commands: list[tuple[Command, asyncio.Future[Any]]]) -> None:
        wrong_server: Elsewhere | None = None
        if connection.is_connected and await connection.can_read():
            await connection.disconnect(nowait=True)  # the server closed it while it was idle
        await connection.send_packed_command([_pack(command) for command, _ in commands])
        for _, reply in commands:
            error: RedisError | None
            try:
                value, error = await connection.read_response(), None
            except ResponseError as refusal:
                value, error = None, refusal
                if moved := elsewhere(refusal):
                    error = wrong_server = moved
            self.heard = self._loop.time()
            if reply.done():  # cancelled
                continue
            if error is None:
                reply.set_result(value)
            else:
                reply.set_exception(error)
        if wrong_server is not None:
            raise wrong_server


def _pack(command: Command) -> bytes:
    """Return a command as it goes over the wire; redis-py does the same in Python, at several times the cost."""
    # The stub of pack_command knows tuples of one element only.
    packed: bytes
    try:
        packed = pack_command(command)  # type: ignore[arg-type]
    except UnicodeEncodeError:  # half a surrogate pair: a name may be any str
        parts = (part.encode(errors="surrogatepass") if isinstance(part, str) else part for part in command)
        packed = pack_command(tuple(parts))  # type: ignore[arg-type]
    return packed
