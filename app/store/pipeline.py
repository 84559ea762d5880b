"""One connection to Valkey that carries everybody's questions: those of one moment leave together, as a pipeline.

With a connection for each question, writing it and reading its answer is most of what it costs; here a busy process
pays that once for many. Valkey answers one question after the other anyway.
"""

import asyncio
from typing import Any

from hiredis import pack_command
from redis.asyncio.connection import Connection
from redis.exceptions import RedisError, ResponseError

Command = tuple[str | bytes | int, ...]


class PipelinedConnection:
    """Asks over one connection until it breaks; then all that wait are told, and it is of no more use.

    `heard`: when the server last said something, by the event loop's clock. Answers are matched to questions by their
    order, so that one whose asker has gone meets nobody else. Nothing connects before the first question.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._asked: list[tuple[Command, asyncio.Future[Any]]] = []
        self._news = asyncio.Event()
        self._task = self._loop.create_task(self._carry(), name="store-line")
        self.heard = 0.0

    @property
    def is_broken(self) -> bool:
        """Whether it can be asked no more."""
        return self._task.done() or self._task.cancelling() > 0

    async def ask(self, *command: str | bytes | int) -> Any:
        """The server's answer. Raises RedisError and OSError; waits without a bound."""
        answer = self._loop.create_future()
        self._asked.append((command, answer))
        self._news.set()
        return await answer

    async def aclose(self) -> None:
        """End it; whoever waits is told that the connection is closed."""
        self.hang_up()
        await asyncio.gather(self._task, return_exceptions=True)

    def hang_up(self) -> None:
        """As `aclose`, without waiting for it."""
        self._task.cancel()

    async def _carry(self) -> None:
        asked: list[tuple[Command, asyncio.Future[Any]]] = []
        failure: type[Exception] = ConnectionError
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                asked, self._asked = self._asked, []
                await self._exchange(asked)
        except (RedisError, OSError) as error:
            failure = type(error)
        finally:
            for _, answer in (*asked, *self._asked):
                if not answer.done():
                    answer.set_exception(failure())
            await self._connection.disconnect(nowait=True)

    async def _exchange(self, asked: list[tuple[Command, asyncio.Future[Any]]]) -> None:
        connection = self._connection
        if connection.is_connected and await connection.can_read():
            await connection.disconnect(nowait=True)  # the server closed it while it was idle
        await connection.send_packed_command([_pack(command) for command, _ in asked])
        for _, answer in asked:
            try:
                said, refused = await connection.read_response(), None
            except ResponseError as error:
                said, refused = None, error
            self.heard = self._loop.time()
            if answer.done():  # cancelled
                continue
            if refused is None:
                answer.set_result(said)
            else:
                answer.set_exception(refused)


def _pack(command: Command) -> bytes:
    """A command as it goes over the wire; redis-py's own connection does it in Python, at several times the cost."""
    # Its stub knows tuples of one element only.
    packed: bytes
    try:
        packed = pack_command(command)  # type: ignore[arg-type]
    except UnicodeEncodeError:  # half a surrogate pair: any text is a name
        parts = (part.encode(errors="surrogatepass") if isinstance(part, str) else part for part in command)
        packed = pack_command(tuple(parts))  # type: ignore[arg-type]
    return packed
