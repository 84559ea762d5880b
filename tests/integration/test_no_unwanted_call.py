"""No call that nobody wants: who hung up is noticed, what was lost is found, and what runs unwanted is stopped.

Real sockets where connections end; the event loop's own time where seconds count.
"""

import asyncio
import base64
import json
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.requests import ClientDisconnect

from app.cli.operator import operate
from app.identity import User
from app.identity.keyring import Keyring
from app.limits import CallAttempt, LiveCalls, Reconciler
from app.limits.call_attempt import ALL_CALLS
from app.limits.ledger import KEEP_SECONDS, STOP_SECONDS, Ledger
from app.limits.live_calls import COLLECT_SECONDS, SWEEP_SECONDS
from app.limits.sweeper import TICK_SECONDS, end_forever, settle_forever
from app.oneinbox import OneInbox, WebCall
from app.oneinbox.transport import open_transport
from app.problems import Problem
from app.sandbox import faults
from app.sandbox.calls import Call
from app.sandbox.emulator import Emulator, create_emulator
from app.sandbox.faults import Fault, Latency, Status
from app.sandbox.schemas import StartCall
from app.sandbox.server import RunningEmulator, running_emulator
from app.sessions.disconnect import ClientConnection
from app.sessions.handover import StartedCall
from app.sessions.idempotency import Idempotency
from app.store import Change, LimitRequest, Slot, StoreUnavailable, open_store
from app.store.memory import MemoryStore
from tests.conftest import Logs
from tests.support.brokers import (
    LONG_CALLS,
    BrokerProcess,
    asked,
    eventually,
    running_broker_process,
    served,
    settings_of,
)
from tests.support.harness import ONEINBOX
from tests.support.shapes import assert_problem, assert_session
from tests.support.simulated_time import in_simulated_time
from tests.support.valkey import Valkey

KEY = "0123456789abcdef"
NOTICED_SECONDS = 1.0
ANSWER_SECONDS = 0.4
"""OneInbox starts a call at once and says so this much later."""
SOON = 10.0
"""Seconds for what takes a moment, on a busy machine."""


class Browser:
    """One connection, and the ways to end it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, url: str) -> "Browser":
        host, _, port = url.removeprefix("http://").partition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    def post(self, key: str | None = None, *, length: int = 2, body: bytes = b"{}") -> None:
        """Ask for a session."""
        lines = [
            "POST /session HTTP/1.1",
            "Host: broker",
            "Content-Type: application/json",
            f"Content-Length: {length}",
        ]
        lines += [f"Idempotency-Key: {key}"] if key else []
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def close(self) -> None:
        """As a closed tab: FIN."""
        self.writer.close()
        await self.writer.wait_closed()

    async def reset(self) -> None:
        """As a crashed one: RST."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def half_close(self) -> None:
        """FIN, and go on reading."""
        self.writer.write_eof()

    async def pipeline(self) -> None:
        """Send the next request behind the first, and then close."""
        self.post()
        await self.writer.drain()
        await self.close()


WAYS = {
    "close": Browser.close,
    "reset": Browser.reset,
    "half-close": Browser.half_close,
    "pipelined-then-close": Browser.pipeline,
}
in_every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def running_calls(emulator: Emulator) -> list[Call]:
    return emulator.calls.running()


async def is_asked(oneinbox: RunningEmulator, count: int = 1) -> None:
    """Wait until so many calls were asked for."""

    async def holds() -> bool:
        return len(asked(oneinbox.emulator, "start")) >= count

    await eventually(holds, SOON)


async def is_quiet(oneinbox: RunningEmulator, within: float = SOON) -> float:
    """Wait until no call runs; the seconds that took."""

    async def holds() -> bool:
        return not running_calls(oneinbox.emulator)

    return await eventually(holds, within)


async def post(url: str, key: str | None = None) -> httpx.Response:
    async with httpx.AsyncClient(base_url=url, timeout=SOON) as client:
        return await client.post("/session", json={}, headers={"Idempotency-Key": key} if key else {})


# --- who hangs up while the broker waits ---


@in_every_way
async def test_the_call_of_a_caller_who_hung_up_is_stopped_right_after_oneinboxs_answer(way: Any) -> None:
    async with running_emulator(LONG_CALLS) as oneinbox:
        settings = settings_of(oneinbox.url, {"BROKER_MAX_LIVE_CALLS": "1"})
        async with served(settings) as url:
            oneinbox.emulator.faults.add(Latency(operation="start", seconds=ANSWER_SECONDS, times=1))
            browser = await Browser.connect(url)
            browser.post()
            await is_asked(oneinbox)
            assert len(running_calls(oneinbox.emulator)) == 1
            await way(browser)
            assert await is_quiet(oneinbox) < ANSWER_SECONDS + NOTICED_SECONDS
            assert len(asked(oneinbox.emulator, "start")) == 1, "not even the pipelined one"
            assert len(asked(oneinbox.emulator, "stop")) == 1
            assert_session(await post(url))  # the slot is free
            if way is Browser.half_close:
                await browser.close()


async def test_a_caller_who_stays_keeps_the_call_and_so_does_one_who_leaves_with_it() -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, served(settings_of(oneinbox.url, {})) as url:
        oneinbox.emulator.faults.add(Latency(operation="start", seconds=ANSWER_SECONDS))
        assert_session(await post(url))
        browser = await Browser.connect(url)
        browser.post()
        head = await browser.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 201 ")
        await browser.reset()
        assert_session(await post(url))
        assert not asked(oneinbox.emulator, "stop")
        assert len(running_calls(oneinbox.emulator)) == 3


async def test_a_request_pipelined_behind_it_is_answered_in_turn() -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, served(settings_of(oneinbox.url, {})) as url:
        oneinbox.emulator.faults.add(Latency(operation="start", seconds=ANSWER_SECONDS))
        browser = await Browser.connect(url)
        browser.post()
        browser.post()
        async with asyncio.timeout(SOON):
            for _ in range(2):
                head = await browser.reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 201 ")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await browser.reader.readexactly(length)
        await browser.close()
        assert len(running_calls(oneinbox.emulator)) == 2
        assert not asked(oneinbox.emulator, "stop")


@pytest.mark.process
async def test_many_who_hang_up_at_once_leave_nothing_behind() -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url) as broker,
        AsyncExitStack() as stack,
    ):
        # Long enough for all to have hung up by then: who has been answered before is given a call.
        oneinbox.emulator.faults.add(Latency(operation="start", seconds=4))
        browsers = [await Browser.connect(str(broker.client.base_url)) for _ in range(100)]
        for browser in browsers:
            stack.push_async_callback(browser.close)
            browser.post()
        await is_asked(oneinbox, 100)
        ways = list(WAYS.values())
        await asyncio.gather(*(ways[at % len(ways)](browser) for at, browser in enumerate(browsers)))
        await is_quiet(oneinbox)
        assert len(asked(oneinbox.emulator, "start")) == 100
        assert await broker.readiness() == "ok"

        async def all_are_logged_as_gone() -> bool:
            return len([entry for entry in broker.logs if entry.get("status") == 499]) == 100

        await eventually(all_are_logged_as_gone, SOON)


async def test_who_hangs_up_in_the_middle_of_the_body_asks_oneinbox_nothing() -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, served(settings_of(oneinbox.url, {})) as url:
        for way in (Browser.close, Browser.reset, Browser.half_close):
            browser = await Browser.connect(url)
            browser.post(length=100, body=b'{"variables"')
            await browser.writer.drain()
            await way(browser)
            await browser.reader.read()
            if way is Browser.half_close:
                await browser.close()
        assert_session(await post(url))
        assert len(asked(oneinbox.emulator, "start")) == 1


@asynccontextmanager
async def slow_challenges() -> AsyncIterator[tuple[str, asyncio.Event, asyncio.Event]]:
    """A challenge service; its URL, set once it was asked, and what makes it answer."""
    was_asked, answer = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        was_asked.set()
        await answer.wait()
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\nConnection: close\r\n\r\n{"success":true}')
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/verify", was_asked, answer


@in_every_way
async def test_who_hangs_up_before_the_post_is_sent_gets_no_call_and_everything_back(way: Any) -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, slow_challenges() as (verify, was_asked, answer):
        settings = settings_of(
            oneinbox.url,
            {
                "BROKER_CHALLENGE_SECRET": "a-secret",
                "BROKER_CHALLENGE_VERIFY_URL": verify,
                "BROKER_SESSION_LIMITS": "1/hour",
                "BROKER_GLOBAL_SESSION_LIMITS": "1/hour",
                "BROKER_MAX_LIVE_CALLS": "1",
            },
        )
        async with served(settings) as url:
            browser = await Browser.connect(url)
            lines = ["POST /session HTTP/1.1", "Host: broker", "X-Challenge-Token: solved", "", ""]
            browser.writer.write("\r\n".join(lines).encode())
            await asyncio.wait_for(was_asked.wait(), SOON)
            await way(browser)
            answer.set()
            async with httpx.AsyncClient(base_url=url) as client:

                async def gets_the_one_session() -> bool:
                    response = await client.post("/session", headers={"X-Challenge-Token": "solved"})
                    return response.status_code == 201

                assert await eventually(gets_the_one_session, SOON) < NOTICED_SECONDS
            assert len(asked(oneinbox.emulator, "start")) == 1
            assert not asked(oneinbox.emulator, "stop")
            if way is Browser.half_close:
                await browser.close()


@in_every_way
async def test_who_hangs_up_while_the_broker_connects_is_not_asked_for(
    way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    connects, go_on = asyncio.Event(), asyncio.Event()
    create_connection = asyncio.BaseEventLoop.create_connection

    async def slow_to_oneinbox(loop: Any, protocol: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        if oneinbox.url.endswith(f":{port}"):
            connects.set()
            await go_on.wait()
        return await create_connection(loop, protocol, host, port, **options)

    async with running_emulator(LONG_CALLS) as oneinbox:
        monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", slow_to_oneinbox)
        settings = settings_of(oneinbox.url, {"BROKER_SESSION_LIMITS": "1/hour", "BROKER_MAX_LIVE_CALLS": "1"})
        async with served(settings) as url:
            browser = await Browser.connect(url)
            browser.post()
            await asyncio.wait_for(connects.wait(), SOON)
            await way(browser)
            async with httpx.AsyncClient(base_url=url) as client:
                assert (await client.get("/readyz")).status_code == 200  # by now the broker has read the end
                go_on.set()

                async def gets_the_one_session() -> bool:
                    return (await client.post("/session")).status_code == 201

                assert await eventually(gets_the_one_session, SOON) < NOTICED_SECONDS
            assert len(asked(oneinbox.emulator, "start")) == 1
            assert not asked(oneinbox.emulator, "stop")
            assert not asked(oneinbox.emulator, "list")
            if way is Browser.half_close:
                await browser.close()


# --- answers that are lost ---

TIMEOUT = "2"
BY_SCAN: dict[str, tuple[Fault, str]] = {
    "500": (Status(operation="start", status=500, takes_effect=True), "upstream-error"),
    "503": (Status(operation="start", status=503, takes_effect=True), "upstream-error"),
    "408": (Status(operation="start", status=408, takes_effect=True), "upstream-error"),
    "redirect": (faults.Redirect(operation="start", location="https://x.example", takes_effect=True), "upstream-error"),
    "dropped": (faults.Drop(operation="start", takes_effect=True), "upstream-error"),
    "truncated": (faults.Truncated(operation="start"), "upstream-error"),
    "no-answer": (faults.Hang(operation="start", takes_effect=True), "upstream-timeout"),
    "late": (Latency(operation="start", seconds=4), "upstream-timeout"),
    "drip": (faults.Drip(operation="start", interval=1), "upstream-timeout"),
    "endless": (faults.EndlessBody(operation="start"), "upstream-invalid"),
    "not-json": (faults.BrokenJson(operation="start"), "upstream-invalid"),
    "not-utf-8": (faults.NotUtf8(operation="start"), "upstream-invalid"),
    "no-id": (faults.Fields(operation="start", remove=["id"]), "upstream-invalid"),
    "odd-id": (faults.Fields(operation="start", set={"id": "../calls"}), "upstream-invalid"),
    "packed": (faults.GzipBomb(operation="start", megabytes=1), "upstream-invalid"),
}
BY_ID: dict[str, Fault] = {
    "no-url": faults.Fields(operation="start", remove=["server_url"]),
    "http-url": faults.Fields(operation="start", set={"server_url": "http://evil.example"}),
    "no-token": faults.Fields(operation="start", remove=["participant_token"]),
    "odd-token": faults.Fields(operation="start", set={"participant_token": 7}),
}


@pytest.mark.process
@pytest.mark.parametrize("list_metadata", [True, False], ids=["listed-metadata", "fetched-metadata"])
async def test_a_call_whose_answer_was_lost_is_found_and_stopped_and_nobody_elses(list_metadata: bool) -> None:
    """All at once, as in an outage."""
    options = type(LONG_CALLS)(queued=0, initiated=0, in_progress=3600, list_metadata=list_metadata)
    async with (
        running_emulator(options) as oneinbox,
        served(settings_of(oneinbox.url, {"ONEINBOX_TIMEOUT": TIMEOUT})) as url,
    ):
        account = oneinbox.emulator
        good = assert_session(await post(url))
        metadata = dict(account.calls.running()[0].metadata)
        theirs = [
            account.calls.start(StartCall(agent_id=options.agents[0], metadata=each))
            for each in (None, {}, {"broker_user": metadata["broker_user"]}, {"broker_request_id": "0" * 32})
        ]
        for slug in ("upstream-error", "upstream-invalid", "upstream-timeout"):
            kinds = [fault for fault, expected in BY_SCAN.values() if expected == slug]
            account.faults.add(*(fault.model_copy(update={"times": 1}) for fault in kinds))
            for response in await asyncio.gather(*(post(url) for _ in kinds)):
                assert_problem(response, slug)

        async def only_wanted_ones_run() -> bool:
            return {call.id for call in account.calls.running()} == {
                good.removeprefix("/calls/").partition(".")[0],
                *(call.id for call in theirs),
            }

        await eventually(only_wanted_ones_run, 2 + 5 + SOON)
        assert len(asked(account, "stop")) == len(BY_SCAN)


@pytest.mark.parametrize("fault", BY_ID.values(), ids=BY_ID.keys())
async def test_an_invalid_answer_with_an_id_is_stopped_by_it_at_once(fault: Fault) -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, served(settings_of(oneinbox.url, {})) as url:
        oneinbox.emulator.faults.add(fault)
        assert_problem(await post(url), "upstream-invalid")
        assert not running_calls(oneinbox.emulator)
        assert not asked(oneinbox.emulator, "list")


@pytest.mark.process
async def test_who_hangs_up_on_an_answer_that_is_lost_changes_nothing() -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        served(settings_of(oneinbox.url, {"ONEINBOX_TIMEOUT": TIMEOUT})) as url,
    ):
        oneinbox.emulator.faults.add(faults.Hang(operation="start", takes_effect=True, times=1))
        browser = await Browser.connect(url)
        browser.post()
        await is_asked(oneinbox)
        await browser.close()
        await is_quiet(oneinbox, float(TIMEOUT) + 2 + SOON)


async def test_what_cannot_be_stopped_is_told_to_the_operator(valkey: Valkey, logs: Logs) -> None:
    async with running_emulator(LONG_CALLS) as oneinbox:
        settings = settings_of(oneinbox.url, {"BROKER_STORE_URL": valkey.url})
        async with served(settings) as url:
            oneinbox.emulator.faults.add(Latency(operation="start", seconds=ANSWER_SECONDS, times=1))
            oneinbox.emulator.faults.add(Status(operation="stop", status=500, times=1))
            browser = await Browser.connect(url)
            browser.post()
            await is_asked(oneinbox)
            await browser.close()
            (call,) = running_calls(oneinbox.emulator)

            async def is_told() -> bool:
                status = await operate(settings, lambda operator: operator.status())
                return status.unstopped == [call.id]

            await eventually(is_told, SOON)
            assert [entry["call"] for entry in logs if entry["event"] == "call_not_stopped"] == [call.id]


# --- a process that dies ---


@pytest.mark.process
async def test_a_process_that_is_killed_leaves_a_call_that_another_replica_finds(valkey: Valkey) -> None:
    async with AsyncExitStack() as stack:
        oneinbox = await stack.enter_async_context(running_emulator(LONG_CALLS))
        broker: BrokerProcess = await stack.enter_async_context(
            running_broker_process(oneinbox.url, BROKER_STORE_URL=valkey.url)
        )
        good = assert_session(await broker.client.post("/session", json={}))
        oneinbox.emulator.faults.add(Latency(operation="start", seconds=60, times=1))
        browser = await Browser.connect(str(broker.client.base_url))
        browser.post()
        await is_asked(oneinbox, 2)
        broker.process.kill()
        await broker.process.ended()
        await browser.close()
        assert len(running_calls(oneinbox.emulator)) == 2

        ahead = 0.0

        def now() -> float:
            return time.time() + ahead

        store = await stack.enter_async_context(open_store(valkey.url))
        transport = open_transport(oneinbox.url, pool_size=10)
        upstream = OneInbox(oneinbox.url, SecretStr(LONG_CALLS.api_key), transport, timeout=15, connect_timeout=3)
        stack.push_async_callback(upstream.aclose)
        ledger = Ledger(store, lease=3900, now=now)
        live = LiveCalls(store, upstream, ledger, max_seconds=3600, join_timeout=0, now=now)
        reconciler = Reconciler(upstream, live, agent_ids={"default": LONG_CALLS.agents[0]}, timeout=15, now=now)
        for age in (0.0, 70.0, 80.0):
            ahead = age
            with valkey.client() as client:
                client.delete("oib:r:sweep")  # Valkey's clock cannot be put forward
            reconciler.report_stale(await live.sweep())
            ahead += SWEEP_SECONDS + 2.5
            await reconciler.scan()
            if age < 75:
                assert len(running_calls(oneinbox.emulator)) == 2

        async def only_the_good_one_runs() -> bool:
            return [call.id for call in running_calls(oneinbox.emulator)] == [good.split("/")[2].partition(".")[0]]

        await eventually(only_the_good_one_runs, SOON)

        async def only_its_slot_is_taken() -> bool:
            return len(await store.members(ALL_CALLS)) == 1

        await eventually(only_its_slot_is_taken, SOON)


# --- with a key, over real sockets and replicas ---

COLLECT = 1.5


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty seconds are one and a half."""
    monkeypatch.setattr("app.limits.live_calls.COLLECT_SECONDS", COLLECT)
    monkeypatch.setattr("app.limits.sweeper.TICK_SECONDS", 0.1)


@asynccontextmanager
async def two_replicas(oneinbox: RunningEmulator, valkey: Valkey) -> AsyncIterator[list[str]]:
    # The store may be as late as a busy machine makes it.
    settings = settings_of(oneinbox.url, {"BROKER_STORE_URL": valkey.url, "BROKER_STORE_TIMEOUT": "5"})
    async with served(settings) as first, served(settings) as second:
        yield [first, second]


@pytest.mark.process
@in_every_way
@pytest.mark.usefixtures("hurried")
async def test_a_keyed_call_that_nobody_collects_is_stopped(valkey: Valkey, way: Any) -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, two_replicas(oneinbox, valkey) as (first, second):
        oneinbox.emulator.faults.add(Latency(operation="start", seconds=ANSWER_SECONDS, times=1))
        browser = await Browser.connect(first)
        browser.post(KEY)
        await is_asked(oneinbox)
        await way(browser)
        assert await is_quiet(oneinbox) > ANSWER_SECONDS + COLLECT - 0.3
        assert len(asked(oneinbox.emulator, "stop")) == 1
        again = await post(second, KEY)
        assert_session(again)
        assert "idempotency-replayed" not in again.headers
        assert len(asked(oneinbox.emulator, "start")) == 2
        if way is Browser.half_close:
            await browser.close()


@pytest.mark.process
@pytest.mark.parametrize("early", [True, False], ids=["while-it-runs", "after-the-answer"])
@pytest.mark.usefixtures("hurried")
async def test_a_keyed_call_that_is_collected_runs_on(valkey: Valkey, early: bool, logs: Logs) -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, two_replicas(oneinbox, valkey) as replicas:
        oneinbox.emulator.faults.add(Latency(operation="start", seconds=ANSWER_SECONDS, times=1))
        browser = await Browser.connect(replicas[0])
        browser.post(KEY)
        await is_asked(oneinbox)
        await browser.close()
        if not early:

            async def is_answered() -> bool:
                return any(entry["event"] == "client_disconnected" for entry in logs)

            await eventually(is_answered, SOON)
        responses = [await post(replicas[at % 2], KEY) for at in (1, 0, 1)]
        assert {response.headers["idempotency-replayed"] for response in responses} == {"true"}
        assert len({assert_session(response) for response in responses}) == 1
        with pytest.raises(AssertionError, match="not within"):
            await is_quiet(oneinbox, 2 * COLLECT)
        assert not asked(oneinbox.emulator, "stop")
        assert len(asked(oneinbox.emulator, "start")) == 1


@pytest.mark.process
@pytest.mark.usefixtures("hurried")
async def test_a_repeat_that_hangs_up_too_collects_nothing(valkey: Valkey) -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, two_replicas(oneinbox, valkey) as replicas:
        oneinbox.emulator.faults.add(Latency(operation="start", seconds=2 * ANSWER_SECONDS, times=1))
        browsers = [await Browser.connect(url) for url in replicas]
        browsers[0].post(KEY)
        await is_asked(oneinbox)
        browsers[1].post(KEY)
        await browsers[1].writer.drain()
        await asyncio.gather(*(browser.close() for browser in browsers))
        await is_quiet(oneinbox)
        assert len(asked(oneinbox.emulator, "start")) == 1


# --- with a key, by the clock ---


class CallerConnection:
    """The connection of one caller, as a server tells of it."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.client = ClientConnection(self._receive)

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


def token(**claims: Any) -> str:
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b'=').decode()}.c2ln"


class Losable(MemoryStore):
    """A shared store whose values can be away; `deaf`: it makes changes, and their answers are lost.

    `freezes`: it makes one change, whose answer is lost, and is away from then on. `before` runs before each change.
    """

    shared = True
    gone = False
    deaf = False
    freezes = False
    before: Any = None

    async def get(self, name: str) -> bytes | None:
        if self.gone:
            raise StoreUnavailable
        return await super().get(name)

    async def change(self, change: Change) -> bool:
        if self.before is not None:
            self.before()
        if self.gone:
            raise StoreUnavailable
        made = await super().change(change)
        self.gone = self.freezes
        if self.deaf or self.freezes:
            raise StoreUnavailable
        return made


@dataclass
class Replica:
    """One process' part in keyed requests."""

    house: "House"
    live: LiveCalls = field(init=False)
    idempotency: Idempotency = field(init=False)

    def __post_init__(self) -> None:
        store, now = self.house.store, self.house.now
        ledger = Ledger(store, lease=3900, now=now)
        self.live = LiveCalls(store, self.house.oneinbox, ledger, max_seconds=3600, join_timeout=0, now=now)
        self.idempotency = Idempotency(store, Keyring(["s" * 32]), self.live, timeout=15, now=now)

    async def post(
        self, line: CallerConnection | None = None, *, takes: float = 0, life: float = 900
    ) -> tuple[str, bool]:
        """A keyed request; the id of the call it gets, and whether it was replayed. `life`: of its token."""
        house = self.house
        house.posts += 1
        attempt = CallAttempt(f"post-{house.posts}", int(house.now()), "main", "ann", "owner")

        async def run() -> StartedCall:
            slots = [Slot(name, None) for name in attempt.sets]
            record = self.live.ledger.reserved(attempt)
            await house.store.decide(LimitRequest([], slots, member=attempt.key, lease=3900, record=record))
            await asyncio.sleep(takes)
            metadata = {"broker_user": attempt.owner, "broker_request_id": attempt.request_id}
            call = house.account.calls.start(StartCall(agent_id="agt_sandbox", metadata=metadata))
            return StartedCall(attempt, WebCall(call.id, "wss://voice.example", token(exp=house.now() + life)))

        caller = (line or CallerConnection()).client
        call, replayed = await self.idempotency.once(User(mode="jwt", id="ann"), KEY, {}, caller, run)
        return call.id, replayed


class House:
    """One OneInbox, one store, one clock."""

    def __init__(self) -> None:
        app = create_emulator(type(LONG_CALLS)(in_progress=1e6, now=self.now))
        self.account: Emulator = app.state.emulator
        key = SecretStr(self.account.options.api_key)
        self.oneinbox = OneInbox(ONEINBOX, key, httpx.ASGITransport(app), timeout=15, connect_timeout=1)
        self.store = Losable(asyncio.get_running_loop().time)
        self.posts = 0
        self.ahead = 0.0

    def now(self) -> float:
        return 1_800_000_000 + asyncio.get_running_loop().time() + self.ahead

    @asynccontextmanager
    async def at_work(self, *replicas: Replica) -> AsyncIterator[None]:
        works = (settle_forever, end_forever)
        tasks = [asyncio.create_task(work(each.live)) for each in replicas for work in works]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def post_and_hang_up(self, replica: Replica, *, life: float = 900) -> str:
        """Somebody asks with the key and hangs up while OneInbox is asked; the id of the call."""
        line = CallerConnection()
        asking = asyncio.create_task(replica.post(line, takes=1, life=life))
        await asyncio.sleep(0.5)
        line.gone.set()
        with pytest.raises(ClientDisconnect):
            await asking
        (call,) = self.account.calls.running()
        return call.id

    @property
    def running(self) -> list[str]:
        return [call.id for call in self.account.calls.running()]


@in_simulated_time
async def test_nobody_collects_for_thirty_seconds() -> None:
    house = House()
    first, second = Replica(house), Replica(house)
    async with house.at_work(first, second):
        call = await house.post_and_hang_up(first)
        await asyncio.sleep(COLLECT_SECONDS - 0.1)
        assert house.running == [call]
        await asyncio.sleep(TICK_SECONDS + 0.2)
        assert house.running == []
        assert sum(each.operation == "stop" for each in house.account.requests) == 1, "one replica, once"
        again, replayed = await second.post()
        assert not replayed
        assert again != call
        assert house.running == [again]
        await asyncio.sleep(100)
        assert house.running == [again]


@pytest.mark.parametrize("after", [0.0, 15.0, COLLECT_SECONDS - 0.1])
@in_simulated_time
async def test_somebody_collects_within_thirty_seconds(after: float) -> None:
    house = House()
    first, second = Replica(house), Replica(house)
    async with house.at_work(first, second):
        call = await house.post_and_hang_up(first)
        await asyncio.sleep(after)
        assert await second.post() == (call, True)
        await asyncio.sleep(120)
        assert await first.post() == (call, True)
        assert house.running == [call]


@in_simulated_time
async def test_a_call_that_was_given_is_never_uncollected() -> None:
    house = House()
    first = Replica(house)
    async with house.at_work(first):
        call, _ = await first.post()
        await asyncio.sleep(120)
        assert house.running == [call]


@in_simulated_time
async def test_it_is_stopped_later_when_the_store_is_away_just_then() -> None:
    house = House()
    first = Replica(house)
    async with house.at_work(first):
        await house.post_and_hang_up(first)
        house.store.gone = True
        await asyncio.sleep(COLLECT_SECONDS + 2 * TICK_SECONDS)
        house.store.gone = False
        assert len(house.running) == 1, "whether somebody collected it cannot be told"
        await asyncio.sleep(COLLECT_SECONDS + 2 * TICK_SECONDS)
        assert house.running == []


@in_simulated_time
async def test_it_is_stopped_although_the_store_is_lost_in_between() -> None:
    house = House()
    first = Replica(house)
    async with house.at_work(first):
        await house.post_and_hang_up(first)
        house.store.deaf = True
        await asyncio.sleep(COLLECT_SECONDS + 2 * TICK_SECONDS)
        house.store.deaf = False
        await asyncio.sleep(STOP_SECONDS + 2 * TICK_SECONDS)  # simulated: the claim ends, and is taken
        assert house.running == []


@in_simulated_time
async def test_a_call_stopped_without_the_store_is_given_to_no_one_although_another_saw_its_end_first() -> None:
    house = House()
    first, second = Replica(house), Replica(house)
    house.store.freezes = True
    with pytest.raises(Problem, match="at-capacity"):
        await first.post()
    assert house.running == []
    house.store.freezes = house.store.gone = False  # its answer is kept after all
    (call,) = house.account.calls
    await second.live.note_end("post-1", await house.oneinbox.get_call(call.id))
    await first.live.flush()
    again, replayed = await second.post()
    assert not replayed
    assert house.running == [again]


@in_simulated_time
async def test_a_collected_call_runs_on_although_its_kept_answer_has_expired() -> None:
    house = House()
    first = Replica(house)
    async with house.at_work(first):
        call = await house.post_and_hang_up(first, life=65)
        await asyncio.sleep(1)
        assert await first.post() == (call, True)
        await asyncio.sleep(60)
        assert house.running == [call]


@in_simulated_time
async def test_a_replica_that_dies_while_it_stops_leaves_it_to_another() -> None:
    house = House()
    first, second = Replica(house), Replica(house)
    await house.post_and_hang_up(first)
    await asyncio.sleep(COLLECT_SECONDS)
    honest = house.oneinbox.stop_call

    async def die(_: str) -> Any:
        await asyncio.Event().wait()

    house.oneinbox.stop_call = die  # type: ignore[assignment, method-assign]
    await first.live.take_due()
    await asyncio.sleep(1)
    dying = [task for task in asyncio.all_tasks() if task.get_name() == "stop"]
    assert len(dying) == 1
    dying[0].cancel()
    await asyncio.gather(*dying, return_exceptions=True)
    house.oneinbox.stop_call = honest  # type: ignore[method-assign]
    async with house.at_work(second):
        for _ in range(4):
            await asyncio.sleep(30)
            await second.live.sweep()
    assert house.running == []


@in_simulated_time
async def test_who_hangs_up_in_the_moment_of_collecting_has_not_collected() -> None:
    house = House()
    first = Replica(house)
    async with house.at_work(first):
        await house.post_and_hang_up(first)
        line = CallerConnection()
        house.store.before = line.gone.set
        with pytest.raises(ClientDisconnect):
            await first.post(line)
        house.store.before = None
        await asyncio.sleep(COLLECT_SECONDS + 2 * TICK_SECONDS)
        assert house.running == []


@pytest.mark.parametrize("life", [86400, 900])
@in_simulated_time
async def test_a_kept_answer_is_kept_ten_minutes_however_often_it_is_given(life: float) -> None:
    house = House()
    first = Replica(house)
    call, _ = await first.post(life=life)
    await asyncio.sleep(KEEP_SECONDS - 1)
    assert await first.post(life=life) == (call, True)
    await asyncio.sleep(2)
    again, replayed = await first.post(life=life)
    assert not replayed
    assert again != call


@in_simulated_time
async def test_a_clock_that_is_put_forward_stops_nobody() -> None:
    """The kept answer is of no more use by the date, but still there by the store's clock."""
    house = House()
    first = Replica(house)
    await first.post(life=100)
    house.ahead = 60
    looks = 0

    def look() -> float:
        nonlocal looks
        looks += 1
        if looks > 1000:
            raise AssertionError("it asks again and again without a pause: the event loop stands still")
        return 1_800_000_000 + asyncio.get_running_loop().time() + house.ahead

    first.idempotency.now = look
    async with asyncio.timeout(60):
        await first.post(life=1000)


@in_simulated_time
async def test_a_repeat_waits_for_a_slow_first() -> None:
    house = House()
    first, second = Replica(house), Replica(house)
    asking = asyncio.create_task(first.post(takes=10))
    await asyncio.sleep(0.1)
    call, replayed = await second.post()
    assert replayed
    assert await asking == (call, False)
