"""Running calls end on time: brokers as processes, a real Valkey, and the clock of the wall."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pytest

from app.sandbox.server import RunningEmulator, running_emulator
from tests.support.brokers import (
    LONG_CALLS,
    BrokerProcess,
    asked,
    environ_of,
    eventually,
    outcomes,
    post_many,
    running_broker_processes,
)
from tests.support.commands import invoke
from tests.support.followers import Follower
from tests.support.processes import Finished
from tests.support.valkey import running_valkey

pytestmark = pytest.mark.process

MAX_SECONDS = 6
LATE = 2.0
"""Seconds after its end by which a call must have been hung up."""
LET_GO = 1.5
"""Seconds after its stop in which no second one may come: longer than a replica's round."""
MINUTE = 60.0
MINUTE_OFF = 6.0
OPERATOR_SECONDS = 3.0
ANN, BEN = ({"X-Forwarded-User": name, "Sec-Fetch-Site": "same-origin"} for name in ("ann", "ben"))
NAMED = {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "127.0.0.0/8"}


@dataclass(frozen=True)
class Started:
    """A call that a user was given. `sent`: Unix time of the POST."""

    id: str
    location: str
    sent: float
    user: Mapping[str, str]


@dataclass(frozen=True)
class Deployment:
    """Brokers in front of one OneInbox."""

    oneinbox: RunningEmulator
    brokers: list[BrokerProcess]
    environ: dict[str, str]
    followers: list[Follower] = field(default_factory=list)

    async def start(self, broker: BrokerProcess, user: Mapping[str, str] | None = None) -> Started:
        """Start a call on one of the brokers."""
        user, sent = user or {}, time.time()
        response = await broker.client.post("/session", json={}, headers=user)
        assert response.status_code == 201
        location = response.headers["location"]
        return Started(location.removeprefix("/calls/").partition(".")[0], location, sent, user)

    async def read(self, call: Started, broker: BrokerProcess) -> dict[str, Any]:
        """The call as its user sees it."""
        response = await broker.client.get(call.location, headers=call.user)
        assert response.status_code == 200
        body: dict[str, Any] = response.json()
        return body

    async def follow(self, call: Started, broker: BrokerProcess) -> Follower:
        """Follow a call."""
        follower = await Follower.open(broker.process.url, call.location, call.user)
        self.followers.append(follower)
        return follower

    def stops(self, call: Started) -> list[float]:
        """When OneInbox was asked to stop the call."""
        return [each.at for each in asked(self.oneinbox.emulator, "stop") if f"/{call.id}/" in each.path]

    async def stopped(self, calls: Sequence[Started], within: float) -> list[float]:
        """When each was stopped, which is once."""

        async def are_stopped() -> bool:
            return all(self.stops(call) for call in calls)

        await eventually(are_stopped, within)
        await asyncio.sleep(LET_GO)  # so long a second stop could come, from the other replica
        times = [self.stops(call) for call in calls]
        assert [len(each) for each in times] == [1] * len(calls)
        return [each for (each,) in times]

    async def command(self, *arguments: str) -> Finished:
        """Run a command of the operator."""
        return await asyncio.to_thread(invoke, *arguments, environ=self.environ)


@asynccontextmanager
async def deployment(replicas: int = 2, **changes: str) -> AsyncIterator[Deployment]:
    """Replicas on one Valkey; a single one keeps everything in memory."""
    async with AsyncExitStack() as stack:
        if replicas > 1:
            changes["BROKER_STORE_URL"] = stack.enter_context(running_valkey()).url
        oneinbox = await stack.enter_async_context(running_emulator(LONG_CALLS))
        brokers = await stack.enter_async_context(running_broker_processes(replicas, oneinbox.url, **changes))
        there = Deployment(oneinbox, brokers, environ_of(oneinbox.url, changes))
        yield there
        for follower in there.followers:
            await follower.hang_up()


def announced(follower: Follower) -> list[dict[str, Any]]:
    """The data of the events `ending`."""
    return [data for _, name, _, data in follower.events if name == "ending"]


def unix(time_text: str) -> float:
    """The Unix time of an RFC 3339 text."""
    return datetime.fromisoformat(time_text).timestamp()


# --- BROKER_MAX_CALL_SECONDS ---

LONGEST = {"BROKER_MAX_CALL_SECONDS": str(MAX_SECONDS), "BROKER_WARN_SECONDS": "3"}


async def ends_on_time(replicas: int, starter_is_killed: bool) -> None:
    async with deployment(replicas, **LONGEST) as there:
        first, last = there.brokers[0], there.brokers[-1]
        calls = [await there.start(first), *await asyncio.gather(*(there.start(first) for _ in range(3)))]
        if starter_is_killed:
            first.process.kill()
        else:
            calls.append(await there.start(last))
        follower = await there.follow(calls[0], last)
        before = await there.read(calls[0], last)
        assert before["stopped_because"] is None
        assert -1 <= unix(before["ends_at"]) - (calls[0].sent + MAX_SECONDS) <= LATE

        stopped = await there.stopped(calls, MAX_SECONDS + 10)

        late = [at - call.sent - MAX_SECONDS for at, call in zip(stopped, calls, strict=True)]
        assert all(0 <= each <= LATE for each in late), late
        for call in calls:
            after = await there.read(call, last)
            assert (after["status"], after["stopped_because"], after["ends_at"]) == (
                "completed",
                "max-call-seconds",
                None,
            )
        await follower.has("completed")
        (notice,) = announced(follower)
        assert (notice["reason"], notice["ends_at"]) == ("max-call-seconds", before["ends_at"])
        assert 1 <= notice["seconds_left"] <= 3


async def test_a_call_is_hung_up_at_its_end_by_one_replica_once() -> None:
    """In memory, on two replicas, and when the replica that started it was killed: all three at the same time."""
    await asyncio.gather(ends_on_time(1, False), ends_on_time(2, False), ends_on_time(2, True))


# --- POST /calls/{call}/stop?after= ---

AFTER = 3


async def page_goes(replicas: int, taker_is_killed: bool) -> None:
    """Of four calls whose pages go, one is read again, one followed, one stopped later, and one not at all."""
    async with deployment(replicas) as there:
        first, last = there.brokers[0], there.brokers[-1]
        calls = await asyncio.gather(*(there.start(first) for _ in range(4)))
        gone, read, followed, later = calls
        went = time.time()
        for call in calls:
            response = await first.client.post(f"{call.location}/stop?after={15 if call is later else AFTER}")
            assert (response.status_code, response.json()["ended_at"]) == (200, None)
        if taker_is_killed:
            first.process.kill()
        await there.read(read, last)
        await there.follow(followed, last)

        [stopped] = await there.stopped([gone], AFTER + 10)

        assert AFTER - 0.1 <= stopped - went <= AFTER + LATE
        assert (await there.read(gone, last))["stopped_because"] == "caller-gone"
        assert [there.stops(call) for call in (read, followed, later)] == [[], [], []]


async def test_a_call_whose_page_has_gone_is_hung_up_by_one_replica_once() -> None:
    """In memory, on two replicas, and when the replica that was told was killed."""
    await asyncio.gather(page_goes(1, False), page_goes(2, False), page_goes(2, True))


# --- minutes ---


async def users_minutes_are_kept() -> None:
    async with deployment(2, BROKER_TALK_MINUTES="1", BROKER_WARN_SECONDS="3", **NAMED) as there:
        first, last = there.brokers
        own = await asyncio.gather(there.start(first, ANN), there.start(last, ANN))
        other = await there.start(first, BEN)
        before = await there.read(own[0], last)
        assert abs(unix(before["ends_at"]) - own[0].sent - MINUTE / 2) <= MINUTE_OFF / 2
        follower = await there.follow(own[0], last)

        stopped = await there.stopped(own, MINUTE)

        talked = sum(at - call.sent for at, call in zip(stopped, own, strict=True))
        assert abs(talked - MINUTE) <= MINUTE_OFF
        assert there.stops(other) == []
        assert (await there.read(other, last))["status"] == "in_progress"
        for call in own:
            after = await there.read(call, last)
            assert (after["status"], after["stopped_because"]) == ("completed", "talk-minutes")
        assert outcomes(await post_many(there.brokers, 2, ANN)) == {"talk-time-used-up": 2}
        assert outcomes(await post_many(there.brokers, 2, BEN)) == {"201": 2}
        await follower.has("completed")
        assert [each["reason"] for each in announced(follower)] == ["talk-minutes"]


async def everyones_minutes_are_kept() -> None:
    async with deployment(2, BROKER_GLOBAL_TALK_MINUTES="1", **NAMED) as there:
        first, last = there.brokers
        calls = await asyncio.gather(there.start(first, ANN), there.start(last, ANN), there.start(last, BEN))

        stopped = await there.stopped(calls, MINUTE)

        talked = sum(at - call.sent for at, call in zip(stopped, calls, strict=True))
        assert abs(talked - MINUTE) <= MINUTE_OFF
        for call in calls:
            assert (await there.read(call, last))["stopped_because"] == "talk-minutes"
        assert outcomes(await post_many(there.brokers, 2, BEN)) == {"at-capacity": 2}


async def test_calls_are_hung_up_when_they_have_talked_their_minutes_together() -> None:
    """A user's minutes and everyone's, each on two replicas of their own, at the same time."""
    await asyncio.gather(users_minutes_are_kept(), everyones_minutes_are_kept())


# --- the operator ---

Chosen = Callable[[Sequence[Started]], tuple[list[str], Sequence[Started]]]
COMMANDS: dict[str, Chosen] = {
    "one": lambda calls: (["calls", "stop", calls[0].id], calls[:1]),
    "all": lambda calls: (["calls", "stop", "--all", "--yes"], calls),
    "pause": lambda calls: (["pause", "--hang-up"], calls),
}


@pytest.mark.parametrize("chosen", COMMANDS.values(), ids=COMMANDS.keys())
async def test_an_operators_word_ends_calls_on_all_replicas(chosen: Chosen) -> None:
    async with deployment() as there:
        calls = [await there.start(broker) for broker in there.brokers for _ in range(3)]
        arguments, ended = chosen(calls)

        began = time.time()
        said, stopped = await asyncio.gather(there.command(*arguments), there.stopped(ended, 10))

        assert said.code == 0, said.out
        assert max(stopped) - began <= OPERATOR_SECONDS
        for call in calls:
            expected = ("completed", "operator") if call in ended else ("in_progress", None)
            body = await there.read(call, there.brokers[0])
            assert (body["status"], body["stopped_because"]) == expected
        now = {"at-capacity": 2} if arguments[0] == "pause" else {"201": 2}
        assert outcomes(await post_many(there.brokers, 2)) == now
