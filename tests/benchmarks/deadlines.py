"""Measure whether running calls end on time, and what a session's decision costs, with very many calls in the store.

python -m tests.benchmarks.deadlines [--calls 100000] [--some 20000] [--due 200] [--budget 10000] [--json FILE]

A real Valkey is filled by the store's own operations: once with no call, once with some, once with many, each under its
own prefix. Two replicas (their loops, in this process) then end what falls due, at a OneInbox that answers after
ANSWER_SECONDS. "Longest" is what the server's SLOWLOG says: the time of the operation alone, without the way there.
"""

import argparse
import asyncio
import json
import random
import secrets
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import redis.asyncio as redis
import structlog
from pydantic import SecretStr

from app.config.agents import Agent
from app.config.plans import Entitlement
from app.identity import User
from app.limits import CallAttempt, Limits, LiveCalls
from app.limits.call_attempt import ALL_CALLS
from app.limits.ledger import Ledger
from app.limits.rate_limiter import GLOBAL_MINUTES
from app.limits.sweeper import end_forever
from app.oneinbox import OneInbox
from app.store import BUDGET, Change, Member, Store, open_store
from app.store.valkey import ValkeyStore
from tests.benchmarks import rig
from tests.benchmarks.rig import say
from tests.support.brokers import running_broker_process

ANSWER_SECONDS = 0.05
"""How long OneInbox takes to stop a call."""
CALLS_OF_USER = 5
AT_ONCE = 200
"""Calls that are filled in at once."""
HOUR = 3600
ROUNDS = 12
POSTS = 20
"""Decisions of each size in one round: the issue's 20 POSTs."""
MINUTE = 60
SLOW_MICROSECONDS = 2000
"""What the server notes in its SLOWLOG."""
EXPIRY_SECONDS = 0.05
SPARE_SECONDS = 5
"""What is left of a budget, for each call, when the last of them starts."""
MANY_MINUTES = 10**6
AGENT = Agent("default", "agt_benchmark", None, frozenset())
USER_LIMITS = Entitlement("100000/minute;100000/day", 100, 10**6, HOUR)


@dataclass
class Upstream:
    """A OneInbox that stops calls. `stops`: when each was asked for, by call id."""

    stops: dict[str, list[float]] = field(default_factory=dict)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer a request."""
        call_id = request.url.path.split("/")[3]
        if request.method == "POST":
            self.stops.setdefault(call_id, []).append(time.time())
        await asyncio.sleep(ANSWER_SECONDS)  # what OneInbox takes is a part of the measurement
        return httpx.Response(200, json={"id": call_id, "status": "completed"})

    def client(self) -> OneInbox:
        """Return a client of it."""
        transport = httpx.MockTransport(self)
        return OneInbox("http://oneinbox.invalid", SecretStr("k"), transport, timeout=10, connect_timeout=1)


@dataclass
class Deployment:
    """A store with its limits."""

    store: Store
    upstream: Upstream
    started: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.store, lease=HOUR + 300, timed=True, now=self.store.now)
        self.live = LiveCalls(
            self.store,
            self.upstream.client(),
            self.ledger,
            max_seconds=HOUR,
            join_timeout=0,
            now=self.store.now,
        )
        self.allow(MANY_MINUTES)

    def allow(self, minutes: int) -> None:
        """Declare the limits, with these minutes of all users."""
        self.limits = Limits(
            self.store,
            self.ledger,
            [AGENT],
            global_session_limits="100000000/minute;1000000000/day",
            request_limits="100000000/minute",
            max_live_calls_total=None,
            talk_minutes_total=minutes,
        )

    def attempt(self, lasts: float) -> tuple[User, CallAttempt]:
        """Return the start of a user's call that lasts so many seconds."""
        user, now = User("anonymous", f"user-{self.started // CALLS_OF_USER}"), self.store.now()
        self.started += 1
        return user, CallAttempt(
            secrets.token_hex(16), int(now), "default", user.store_name, "o" * 43, ends=now + lasts
        )

    async def start(self, lasts: float) -> CallAttempt:
        """Start a call as a session does, and give it to its client."""
        user, attempt = self.attempt(lasts)
        await self.limits.reserve(user, AGENT, attempt, USER_LIMITS)
        await self.live.give(attempt, f"call_{attempt.request_id}")
        return attempt

    async def fill(self, count: int) -> None:
        """Start calls that last about an hour."""
        for at in range(0, count, AT_ONCE):
            lasts = [HOUR + random.uniform(0, HOUR) for _ in range(min(AT_ONCE, count - at))]
            await asyncio.gather(*map(self.start, lasts))

    async def decide(self) -> float:
        """Return the seconds of one decision, and undo it."""
        user, attempt = self.attempt(HOUR)
        began = time.perf_counter()
        reservation = await self.limits.reserve(user, AGENT, attempt, USER_LIMITS)
        took = time.perf_counter() - began
        await self.limits.release(reservation)
        return took


@dataclass
class Server:
    """The store's server, as it sees itself."""

    client: redis.Redis
    url: str

    async def reset(self) -> None:
        """Forget the slow operations so far."""
        await self.client.config_set("slowlog-log-slower-than", SLOW_MICROSECONDS)
        await self.client.config_set("slowlog-max-len", 10000)
        await self.client.slowlog_reset()

    async def longest(self) -> float:
        """Return the milliseconds of the longest operation since, or SLOW_MICROSECONDS."""
        entries = await self.client.slowlog_get(10000)
        return float(max([SLOW_MICROSECONDS, *(entry["duration"] for entry in entries)])) / 1000

    async def script_seconds(self) -> float:
        """Return the seconds that the server has spent in scripts."""
        stats = await self.client.info("commandstats")
        return float(stats.get("cmdstat_evalsha", {"usec": 0})["usec"]) / 1e6


@asynccontextmanager
async def replicas(server: Server, upstream: Upstream, prefix: str) -> AsyncIterator[list[Store]]:
    """Run the loops of two replicas that end what is due."""
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        stores = [await stack.enter_async_context(open_store(server.url, prefix=prefix)) for _ in range(2)]
        loops = [tasks.create_task(end_forever(Deployment(store, upstream).live)) for store in stores]
        yield stores
        for loop in loops:
            loop.cancel()


async def compare_decisions(server: Server, deployments: dict[str, Deployment]) -> dict[str, Any]:
    """Measure decisions in turns, so that other load meets all alike."""
    trips: dict[str, list[float]] = {name: [] for name in deployments}
    inside: dict[str, list[float]] = {name: [] for name in deployments}
    for _ in range(ROUNDS):
        for name, deployment in deployments.items():
            before = await server.script_seconds()
            trips[name] += [await deployment.decide() for _ in range(POSTS)]
            inside[name].append((await server.script_seconds() - before) / POSTS)
    report: dict[str, Any] = {}
    for name in deployments:
        report[f"decision with {name} running calls, µs"] = round(statistics.median(trips[name]) * 1e6)
        report[f"… and its undoing, µs in the server, with {name}"] = round(statistics.median(inside[name]) * 1e6)
    none, *others = deployments
    for name in others:
        ratio = statistics.median(trips[name]) / statistics.median(trips[none])
        report[f"decision with {name} / with {none}"] = round(ratio, 2)
    return report


async def compare_posts(url: str, prefixes: dict[str, str]) -> dict[str, Any]:
    """Measure POST /session over HTTP at brokers whose stores hold more or fewer running calls, in turns.

    `prefixes`: of the stores, by the number of their running calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in prefixes}
    async with AsyncExitStack() as stack:
        oneinbox = stack.enter_context(rig.oneinbox())
        brokers = {
            name: await stack.enter_async_context(
                running_broker_process(
                    oneinbox.url,
                    BROKER_STORE_URL=url,
                    BROKER_STORE_PREFIX=prefix,
                    BROKER_GLOBAL_TALK_MINUTES=str(MANY_MINUTES),
                    BROKER_MAX_CALL_SECONDS=str(HOUR),
                )
            )
            for name, prefix in prefixes.items()
        }
        for _ in range(ROUNDS):
            for name, broker in brokers.items():
                for _ in range(POSTS):
                    began = time.perf_counter()
                    response = await broker.client.post("/session", json={})
                    seconds[name].append(time.perf_counter() - began)
                    assert response.status_code == 201, response.text
        ready = [await broker.readiness() for broker in brokers.values()]
    none, *others = prefixes
    report: dict[str, Any] = {
        f"POST /session with {name} running calls, µs": round(statistics.median(each) * 1e6)
        for name, each in seconds.items()
    }
    for name in others:
        ratio = statistics.median(seconds[name]) / statistics.median(seconds[none])
        report[f"POST with {name} / with {none}"] = round(ratio, 2)
    return report | {"… brokers that took the store for lost": sum(status != "ok" for status in ready)}


async def read_all(server: Server, many: Deployment) -> dict[str, Any]:
    """Measure what meets every running call: a read of them all, and a decision after one of them has expired."""
    after: list[float] = []
    await server.reset()
    for _ in range(ROUNDS):
        short = Member(ALL_CALLS, many.attempt(HOUR)[1].key, EXPIRY_SECONDS, timed=True)
        await many.store.change(Change({}, joins=[short]))
        await asyncio.sleep(2 * EXPIRY_SECONDS)  # the lease ends by the server's clock
        after.append(await many.decide())
    began = time.perf_counter()
    found = len(await many.store.members(ALL_CALLS))
    return {
        f"reading {found:,} running calls, ms": round((time.perf_counter() - began) * 1000),
        "decision after one has expired, longest, ms": round(max(after) * 1000, 1),
        "… longest store operation meanwhile, ms": await server.longest(),
    }


async def end_some(server: Server, upstream: Upstream, many: Deployment, count: int) -> dict[str, Any]:
    """Let calls fall due within a minute, among many that do not; sessions start meanwhile."""
    now = many.store.now()
    lasting = [3 + random.uniform(0, MINUTE) for _ in range(count)]
    ends = {f"call_{each.request_id}": each.ends for each in [await many.start(lasts) for lasts in lasting]}
    await server.reset()
    decisions: list[float] = []
    async with replicas(server, upstream, "many") as stores:
        while time.time() < now + MINUTE + 8:
            decisions.append(await many.decide())
            await asyncio.sleep(0.05)  # the pace of sessions
        losses = sum(store.state != "ok" for store in stores)
    late = [upstream.stops[call][0] - end for call, end in ends.items() if call in upstream.stops]
    return {
        "fell due within a minute": count,
        "… stopped": len(late),
        "… stopped more than once": sum(len(upstream.stops.get(call, [])) > 1 for call in ends),
        "… latest, s after its end": round(max(late), 2),
        "… earliest, s after its end": round(min(late), 2),
        "… longest store operation meanwhile, ms": await server.longest(),
        "… replicas that took the store for lost": losses,
        "… sessions meanwhile, longest decision, ms": round(max(decisions) * 1000, 1),
    }


async def end_budget(server: Server, upstream: Upstream, deployment: Deployment, count: int) -> dict[str, Any]:
    """Let one budget of many calls run out."""
    await deployment.fill(count - 1)
    ((_, used, _),) = [each for each in await deployment.limits.usage() if each[0] == GLOBAL_MINUTES]
    deployment.allow((used + SPARE_SECONDS * count) // 60)
    await deployment.start(HOUR)
    (left,) = await deployment.store.due_in([BUDGET + ALL_CALLS])
    assert left is not None
    runs_out = time.time() + left
    await server.reset()
    upstream.stops.clear()
    lags: list[float] = []
    async with replicas(server, upstream, "budget") as stores:
        while len(upstream.stops) < count and time.time() < runs_out + 120:
            woke = time.perf_counter()
            await asyncio.sleep(0.05)  # how late it wakes is the loop's lag
            lags.append(time.perf_counter() - woke - 0.05)
        losses = sum(store.state != "ok" for store in stores)
        await asyncio.sleep(3)  # a second stop of the same call would come by now
    times = sorted(first for first, *_ in upstream.stops.values())
    late = [at - runs_out for at in times]
    return {
        "calls of one budget that ran out": count,
        "… stopped": len(times),
        "… stopped more than once": sum(len(each) > 1 for each in upstream.stops.values()),
        "… first, s after it ran out": round(late[0], 2),
        "… median": round(statistics.median(late), 2),
        "… last": round(late[-1], 2),
        "… longest store operation meanwhile, ms": await server.longest(),
        "… replicas that took the store for lost": losses,
        "… longest pause of this process, ms": round(max(lags) * 1000),
    }


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fill, measure and print."""
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(rig.valkey())
        server = Server(await stack.enter_async_context(redis.Redis.from_url(valkey.url)), valkey.url)
        upstream = Upstream()

        async def opened(prefix: str) -> Deployment:
            store = ValkeyStore(valkey.url, timeout=10, prefix=prefix)
            return Deployment(await stack.enter_async_context(store), upstream)

        none, some, many, budget = [await opened(prefix) for prefix in ("none", "some", "many", "budget")]
        began = time.monotonic()
        for deployment, count in ((none, 0), (some, options.some), (many, options.calls)):
            await deployment.fill(count)
        say(f"filled in {time.monotonic() - began:.0f} s")
        report = await compare_decisions(server, {"no": none, f"{options.some:,}": some, f"{options.calls:,}": many})
        reports = [
            report,
            await compare_posts(valkey.url, {"no": "none", f"{options.some:,}": "some"}),
            await read_all(server, many),
            await end_some(server, upstream, many, options.due),
            await end_budget(server, upstream, budget, options.budget),
        ]
        for each in reports:
            say(rig.table([("deadlines", ""), *each.items()]))
            say()
        return reports


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.deadlines")
    parser.add_argument("--calls", type=int, default=100_000, metavar="N")
    parser.add_argument("--some", type=int, default=20_000, metavar="N")
    parser.add_argument("--due", type=int, default=200, metavar="N")
    parser.add_argument("--budget", type=int, default=10_000, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    reports = asyncio.run(measure(options))
    if options.json:
        options.json.write_text(json.dumps(reports, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
