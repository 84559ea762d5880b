"""Disconnected clients are noticed at once."""

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


async def test_a_connected_client_is_not_gone() -> None:
    caller = ClientConnection(Server().receive)

    assert not caller.is_closed()
    assert not await caller.poll_is_closed()


async def test_a_disconnect_is_known_at_once_and_not_a_turn_later() -> None:
    server = Server()
    caller = ClientConnection(server.receive)
    await turn()

    server.hang_up()

    assert caller.is_closed(), "no task has had a turn since"


async def test_a_disconnect_that_the_loop_has_yet_to_read_is_known_before_a_response() -> None:
    server = Server()
    asyncio.get_running_loop().call_soon(server.hang_up)

    assert await ClientConnection(server.receive).poll_is_closed()


async def test_a_server_that_can_be_asked_is_asked() -> None:
    server = Server()
    caller = ClientConnection(server.receive, lambda: server.gone)
    assert not caller.is_closed()
    asyncio.get_running_loop().call_soon(server.hang_up)

    assert await caller.poll_is_closed()


async def test_a_client_that_is_gone_stays_gone() -> None:
    server = Server()
    caller = ClientConnection(server.receive)
    server.hang_up()
    assert caller.is_closed()

    server.gone = False

    assert caller.is_closed()


async def test_the_rest_of_a_body_is_no_disconnect() -> None:
    server = Server()
    caller = ClientConnection(server.receive)
    server.say(MORE)
    server.say(MORE)

    assert not caller.is_closed()
    assert server.messages == []

    server.say(MORE)
    server.hang_up()

    assert caller.is_closed()


async def test_checking_often_leaves_nothing_waiting() -> None:
    server = Server()
    caller = ClientConnection(server.receive)

    for _ in range(100):
        assert not caller.is_closed()

    assert server.waiting == 0


async def test_no_warning_is_left_behind() -> None:
    """No coroutine that was never awaited: warnings are errors."""
    caller = ClientConnection(Server().receive)
    caller.is_closed()
    await turn()
    del caller
    gc.collect()
