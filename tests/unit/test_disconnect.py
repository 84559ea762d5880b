"""Whether whoever asked is still there: known at once, and by this very moment."""

import asyncio
import gc
from typing import Any

from app.sessions.disconnect import ClientConnection

GONE = {"type": "http.disconnect"}
MORE = {"type": "http.request", "body": b"", "more_body": False}


class Server:
    """The server's end of a request, as uvicorn has it: `receive` waits for news; the end is said again and again."""

    def __init__(self) -> None:
        self.gone = False
        self.messages: list[dict[str, Any]] = []
        self.waiting = 0
        self._news = asyncio.Event()

    def hang_up(self) -> None:
        self.gone = True
        self._news.set()

    def say(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self._news.set()

    async def receive(self) -> dict[str, Any]:
        self.waiting += 1
        try:
            while not self.messages and not self.gone:
                await self._news.wait()
                self._news.clear()
            if self.messages:
                return self.messages.pop(0)
            return GONE
        finally:
            self.waiting -= 1


async def turn() -> None:
    """Let every task that can do something do it."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_caller_who_stays_is_there() -> None:
    caller = ClientConnection(Server().receive)

    assert not caller.has_gone()
    assert not await caller.has_left()


async def test_a_hang_up_is_known_by_this_moment_and_not_by_the_last_turn() -> None:
    server = Server()
    caller = ClientConnection(server.receive)
    await turn()

    server.hang_up()

    assert caller.has_gone(), "no task has had a turn since"


async def test_a_hang_up_that_the_loop_has_yet_to_see_is_known_before_an_answer() -> None:
    server = Server()
    asyncio.get_running_loop().call_soon(server.hang_up)

    assert await ClientConnection(server.receive).has_left()


async def test_who_has_gone_stays_gone() -> None:
    server = Server()
    caller = ClientConnection(server.receive)
    server.hang_up()
    assert caller.has_gone()

    server.gone = False

    assert caller.has_gone()


async def test_what_is_left_of_a_body_is_no_hang_up() -> None:
    server = Server()
    caller = ClientConnection(server.receive)
    server.say(MORE)
    server.say(MORE)

    assert not caller.has_gone()
    assert server.messages == []

    server.say(MORE)
    server.hang_up()

    assert caller.has_gone()


async def test_asking_often_leaves_nobody_waiting() -> None:
    server = Server()
    caller = ClientConnection(server.receive)

    for _ in range(100):
        assert not caller.has_gone()

    assert server.waiting == 0


async def test_nothing_is_left_to_complain_about() -> None:
    """No coroutine that was never awaited: warnings are errors."""
    caller = ClientConnection(Server().receive)
    caller.has_gone()
    await turn()
    del caller
    gc.collect()
