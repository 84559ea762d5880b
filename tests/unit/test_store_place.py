"""Where the writable server is, by what guides say and a write proves."""

import asyncio
import gc
from collections.abc import Sequence
from typing import Any, cast

import pytest
from redis.asyncio.connection import Connection
from redis.exceptions import MovedError, ReadOnlyError, RedisError

from app.store.place import FoundPlace, Nowhere, ask_node, ask_sentinel
from app.store.url import Address

ONE, TWO, THREE = ("one", 1), ("two", 2), ("three", 3)
ANSWER = "an answer"


class Server:
    """A connection to an address: `answer` is what the proof gets."""

    def __init__(self, address: Address, answer: Any) -> None:
        self.address, self.answer = address, answer
        self.closed = False

    async def send_command(self, *_: Any) -> None:
        if isinstance(self.answer, OSError):
            raise self.answer

    async def read_response(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is None:
            await asyncio.Event().wait()
        return self.answer

    async def disconnect(self, *, nowait: bool) -> None:
        self.closed = nowait


class Net:
    """Guides and servers. `named`: what each guide says, or its error, or None: nothing. `answers`: of the servers."""

    def __init__(self, named: dict[Address, Any], answers: dict[Address, Any]) -> None:
        self.named, self.answers = named, answers
        self.asked: list[Address] = []
        self.servers: list[Server] = []
        self.place = FoundPlace(list(named), self.ask, self.connect, ("SET", "x", "1"), 0.05)

    async def ask(self, guide: Address) -> Sequence[Address]:
        self.asked.append(guide)
        answer = self.named[guide]
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return cast("Sequence[Address]", answer)

    def connect(self, address: Address) -> Connection:
        server = Server(address, self.answers.get(address, OSError()))
        self.servers.append(server)
        return cast("Connection", server)

    async def find(self) -> Address:
        """The address that a connection leads to."""
        return cast("Server", await self.place.connection()).address


async def test_the_named_server_is_proved_and_remembered() -> None:
    net = Net({ONE: [TWO]}, {TWO: ANSWER})
    assert await net.find() == TWO
    assert await net.find() == TWO
    assert net.asked == [ONE], "one look-up"
    net.place.leave()
    assert await net.find() == TWO
    assert net.asked == [ONE, ONE]
    assert [server.closed for server in net.servers] == [True, False, False, True, False], "the proofs' connections"


async def test_a_majority_is_enough() -> None:
    net = Net({ONE: [TWO], TWO: [TWO], THREE: None}, {TWO: ANSWER})
    assert await net.find() == TWO
    await net.place.aclose()


async def test_a_minority_is_waited_for_half_a_timeout() -> None:
    net = Net({ONE: [TWO], TWO: None, THREE: None}, {TWO: ANSWER})
    assert await net.find() == TWO
    await net.place.aclose()


async def test_guides_that_disagree_are_tried_by_their_votes() -> None:
    net = Net({ONE: [TWO], TWO: [THREE], THREE: [TWO]}, {TWO: ReadOnlyError("READONLY"), THREE: ANSWER})
    net.place.guides = [ONE, TWO]
    assert await net.find() == THREE


async def test_a_server_that_names_another_is_followed() -> None:
    net = Net({ONE: [TWO]}, {TWO: MovedError("1 three:3"), THREE: ANSWER})
    assert await net.find() == THREE


async def test_the_last_server_is_tried_when_no_guide_answers() -> None:
    net = Net({ONE: [TWO]}, {TWO: ANSWER})
    await net.find()
    net.named[ONE] = RedisError("is down")
    net.place.leave()
    assert await net.find() == TWO


@pytest.mark.parametrize("answer", [OSError(), ReadOnlyError("READONLY"), None])
async def test_nowhere_says_why_and_is_looked_for_again(answer: Any) -> None:
    net = Net({ONE: [TWO]}, {TWO: answer})
    with pytest.raises(Nowhere):
        await net.find()
    net.answers[TWO] = ANSWER
    assert await net.find() == TWO


async def test_no_guide_answers() -> None:
    with pytest.raises(Nowhere):
        await Net({ONE: RedisError("NOAUTH"), TWO: OSError()}, {}).find()


async def test_a_fresh_connection_asks_again() -> None:
    net = Net({ONE: [TWO]}, {TWO: ANSWER, THREE: ANSWER})
    await net.find()
    net.named[ONE] = [THREE]
    assert cast("Server", await net.place.fresh()).address == THREE


async def test_a_look_up_outlives_who_asked_and_ends_with_the_place() -> None:
    net = Net({ONE: None}, {})
    asking = asyncio.create_task(net.find())
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    before = asyncio.all_tasks()
    await net.place.aclose()
    assert len(asyncio.all_tasks()) < len(before)


SLOTS = [
    [0, 9000, [b"10.0.0.1", 7000, b"id", [b"hostname", b"a.example"]], [b"10.0.0.2", 7001]],
    [9001, 16383, [b"", 7002], [b"?", 7003]],
]


async def test_a_cluster_node_names_the_owner_of_the_slot_and_other_nodes() -> None:
    nodes = [ONE]
    ask = ask_node("{oib}", lambda address: cast("Connection", Server(address, SLOTS)), nodes)
    owners = await ask(ONE)
    assert owners[-1] == ONE, "the node itself, under a name that is known here"
    assert owners[0] in {("10.0.0.1", 7000), ("one", 7002)}
    assert {("10.0.0.1", 7000), ("a.example", 7000), ("10.0.0.2", 7001), ("one", 7002)} <= set(nodes)
    assert all(host != "?" for host, _ in nodes)


MASTER = {"name": "voice", "ip": "two", "port": "2", "flags": "master", "num-other-sentinels": "2"}
MASTERS = f"*1\r\n*{2 * len(MASTER)}\r\n" + "".join(
    f"${len(part)}\r\n{part}\r\n" for pair in MASTER.items() for part in pair
)


async def test_a_question_to_a_sentinel_closes_its_connection_whenever_it_is_cancelled() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(MASTERS.encode() if b"MASTERS" in data.upper() else b"+OK\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        ask = ask_sentinel("voice", [{"protocol": 2}])
        turns, answered = 0, False
        while not answered:
            question = asyncio.ensure_future(ask(server.sockets[0].getsockname()[:2]))
            for _ in range(turns):
                await asyncio.sleep(0)  # one turn of the event loop, no time
            answered = question.done()
            question.cancel()
            question.cancel()
            await asyncio.wait([question])
            gc.collect()  # a connection that was not closed complains here
            turns += 1
    assert question.result() == [("two", 2)], "the last one was not cancelled in time"
