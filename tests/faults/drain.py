"""The drain drill: attackers try to spend the operator's money while five honest users make their calls.

    python -m tests.faults.drain [--seconds 60] [--attackers 120] [--addresses 10000] [--replicas 1] [--p99 0.25]
                                 [--setting NAME=VALUE] [--run NAME]

Three runs, each against a fresh broker behind a trusted proxy:

- isolation: 120 addresses send POST /session as fast as they can, and hang up half their calls to get more. Limits:
  10/minute and 15/hour per user, 5 calls at once. The global limits have room for all 125 users (attackers within
  their own limits count as customers; to cap them further, an operator lowers the global limit). Each honest user must
  get what its own limit allows, as if alone.
- rotation: one attacker with 10,000 addresses, so that only the global limits hold: 600/minute, 700/hour, 400 at once.
- hang-ups: an attacker with the same 10,000 addresses who disconnects right after each POST.

Billed calls are counted at OneInbox. Limits per hour must hold exactly over the whole run. Limits per minute must hold
in any 59 seconds: the broker counts a call when it sends the request and OneInbox when it arrives, and that delay
varies by less than a second.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tests.faults import rig
from tests.faults.rig import Browser, Lost, check
from tests.support.processes import PATIENCE, surroundings

HONEST = 5
TRY_SECONDS = 5.0
READ_SECONDS = 1.0
HEAD_START = 1.5
"""Seconds before the attack, in which honest users get their first call."""
SLACK_SECONDS = 1.0
SETTLE_SECONDS = 20.0
USER = {"minute": 10, "hour": 15, "live": 5}


@dataclass(frozen=True)
class Limits:
    """The global limits: sessions per minute and per hour, calls at once."""

    all_minute: int
    all_hour: int
    all_live: int | None

    def environ(self) -> dict[str, str]:
        live = {} if self.all_live is None else {"BROKER_MAX_LIVE_CALLS_TOTAL": str(self.all_live)}
        return {
            "BROKER_SESSION_LIMITS": f"{USER['minute']}/minute;{USER['hour']}/hour",
            "BROKER_MAX_LIVE_CALLS": str(USER["live"]),
            "BROKER_GLOBAL_SESSION_LIMITS": f"{self.all_minute}/minute;{self.all_hour}/hour",
            **live,
        }


RUNS = {
    "isolation": Limits(2000, 2500, None),
    "rotation": Limits(600, 700, 400),
    "hang-ups": Limits(600, 700, 400),
}


@dataclass
class Honest:
    """One honest user. `tries`: time and outcome of each request; `reads`: seconds that each read of a call took."""

    tries: list[tuple[float, str]] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)

    @property
    def got(self) -> int:
        return sum(outcome == "201" for _, outcome in self.tries)

    @property
    def allowed(self) -> int:
        """The calls that the user's own limits would have allowed, had the user been alone."""
        passed: list[float] = []
        for at, _ in self.tries:
            if sum(at - each < 60 for each in passed) < USER["minute"] and len(passed) < USER["hour"]:
                passed.append(at)
        return len(passed)


def addresses(count: int) -> Iterator[str]:
    """Cycle through `count` addresses."""
    return itertools.cycle(f"10.{number // 65536}.{number // 256 % 256}.{number % 256}" for number in range(count))


# --- the attackers: in their own process, so that their load does not slow the measurement ---


async def attack(kind: str, urls: Sequence[str], seconds: float, attackers: int, count: int) -> None:
    """Attack for `seconds`, and print the outcomes."""
    end = time.monotonic() + seconds
    outcomes: Counter[str] = Counter()
    rotating = addresses(count)

    async def hammer(number: int) -> None:
        dice = random.Random(number)
        async with Browser(urls[number % len(urls)], f"192.0.2.{number}") as browser:
            while time.monotonic() < end:
                if kind != "isolation":
                    browser.address = next(rotating)
                try:
                    answer = await browser.post()
                    outcomes[answer.outcome] += 1
                    if answer.call and dice.random() < 0.5:
                        await browser.post(f"{answer.call}/stop")
                except (Lost, OSError):
                    outcomes["lost"] += 1

    async def hang_up(number: int) -> None:
        dice = random.Random(number)
        browser = Browser(urls[number % len(urls)])
        while time.monotonic() < end:
            browser.address = next(rotating)
            try:
                await browser.send("POST", "/session")
                await asyncio.sleep(dice.choice((0, 0, 0.002, 0.01, 0.03)))  # before it hangs up
            except OSError:
                outcomes["refused"] += 1
                continue
            given = browser.hang_up(reset=dice.random() < 0.9)
            outcomes["answered before" if given else "hung up"] += 1

    each = hang_up if kind == "hang-ups" else hammer
    await asyncio.gather(*(each(number) for number in range(attackers)))
    sys.stdout.write(json.dumps(outcomes))


# --- the honest users ---


async def be_honest(url: str, number: int, seconds: float) -> Honest:
    """Start a call every few seconds, read the last one each second, hang it up when the next one starts."""
    user, path = Honest(), ""
    began = time.monotonic()
    async with Browser(url, f"203.0.113.{number}") as browser:
        await asyncio.sleep(number * HEAD_START / HONEST)
        next_try = time.monotonic()
        while time.monotonic() < began + seconds:
            if time.monotonic() >= next_try:
                next_try += TRY_SECONDS
                asked = time.monotonic()
                answer = await browser.post()
                if path and answer.call:
                    await browser.post(f"{path}/stop")
                path = answer.call or path
                user.tries.append((asked, answer.outcome))
            if path:
                read = await browser.ask("GET", path)
                check(read.status in (200, 503), f"a read was answered {read.status}")
                user.reads.append(read.seconds)
            await asyncio.sleep(READ_SECONDS)
        if path:
            await browser.post(f"{path}/stop")
    return user


# --- the count ---


@dataclass(frozen=True)
class Bill:
    """OneInbox's bill."""

    total: int
    most_a_minute: int
    most_of_one_user: int
    most_of_one_user_a_minute: int
    most_at_once: int
    most_at_once_of_one_user: int
    running: int


def most_within(moments: Sequence[float], seconds: float) -> int:
    """Return the largest number of moments in any window of `seconds`."""
    most = first = 0
    for last, at in enumerate(moments):
        while moments[first] <= at - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


def bill(calls: Sequence[Mapping[str, Any]], seen_at_once: Sequence[tuple[int, int]]) -> Bill:
    """Count OneInbox's calls. `seen_at_once`: running calls in all, and the most of one user, at each poll."""
    times: dict[str, list[float]] = {}
    for call in calls:
        at = datetime.fromisoformat(call["created_at"]).timestamp()
        times.setdefault(call["metadata"]["broker_user"], []).append(at)
    every = sorted(itertools.chain.from_iterable(times.values()))
    window = 60 - SLACK_SECONDS
    return Bill(
        total=len(every),
        most_a_minute=most_within(every, window),
        most_of_one_user=max(map(len, times.values()), default=0),
        most_of_one_user_a_minute=max((most_within(sorted(each), window) for each in times.values()), default=0),
        most_at_once=max((in_all for in_all, _ in seen_at_once), default=0),
        most_at_once_of_one_user=max((of_one for _, of_one in seen_at_once), default=0),
        running=sum(call["running"] for call in calls),
    )


async def watch(oneinbox: rig.OneInbox, seen: list[tuple[int, int]]) -> None:
    """Poll the running calls."""
    while True:
        running = Counter(call["metadata"]["broker_user"] for call in await oneinbox.calls() if call["running"])
        seen.append((running.total(), max(running.values(), default=0)))
        await asyncio.sleep(5)


async def drill(
    kind: str,
    *,
    seconds: float,
    attackers: int,
    count: int,
    replicas: int,
    p99: float,
    more: Sequence[str] = (),
) -> None:
    """Do one run. `more`: settings, NAME=VALUE. Raises Failure."""
    limits = RUNS[kind]
    seen: list[tuple[int, int]] = []
    async with rig.workshop() as folder, rig.oneinbox(folder) as oneinbox, rig.valkey(folder) as valkey:
        await oneinbox.faults([{"kind": "latency", "operation": "start", "seconds": 0.03}])
        shared = {"BROKER_STORE_URL": valkey.url} if replicas > 1 else {}
        environ = rig.broker_environ(
            oneinbox.url, {**limits.environ(), **shared, **dict(each.split("=", 1) for each in more)}
        )
        async with rig.brokers(folder, replicas, environ) as running:
            urls = [process.url for process in running]
            plan = json.dumps({"kind": kind, "urls": urls, "seconds": seconds, "attackers": attackers, "count": count})
            being_honest = asyncio.gather(
                *(be_honest(urls[number % replicas], number, seconds + HEAD_START) for number in range(HONEST))
            )
            await asyncio.sleep(HEAD_START)
            attacking = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.faults.drain", "--attack", plan),
                stdout=asyncio.subprocess.PIPE,
                env=surroundings({}),
            )
            watching = asyncio.create_task(watch(oneinbox, seen))
            try:
                honest = await being_honest
                printed, _ = await asyncio.wait_for(attacking.communicate(), seconds + PATIENCE)
            finally:
                being_honest.cancel()
                watching.cancel()
                if attacking.returncode is None:
                    attacking.kill()
                    await attacking.wait()
            outcomes = Counter(json.loads(printed))
            unwanted = await settle(oneinbox) if kind == "hang-ups" else None
            result = bill(await oneinbox.calls(), seen)
            codes = [await process.stop() for process in running]
        report(kind, limits, outcomes, honest, result)
        judge(kind, limits, honest, result)
        reads = [each for user in honest for each in user.reads]
        check(not reads or rig.percentile(reads, 99) < p99, "reads were slow")
        check(codes == [0] * replicas, f"the brokers ended with {codes}")
        if unwanted is not None:
            check(unwanted <= outcomes["answered before"], f"{unwanted} calls run without a user")


async def settle(oneinbox: rig.OneInbox) -> int:
    """Wait until no call runs, at most SETTLE_SECONDS; return how many still run."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        running = len([call for call in await oneinbox.calls() if call["running"]])
        if not running or time.monotonic() > end:
            return running
        await asyncio.sleep(0.5)


def report(kind: str, limits: Limits, outcomes: Counter[str], honest: Sequence[Honest], result: Bill) -> None:
    """Print the results."""
    reads = [seconds for user in honest for seconds in user.reads]
    said = ", ".join(f"{count:,} {name}" for name, count in outcomes.most_common())
    rows: list[tuple[object, object, object]] = [
        ("what", "measured", "allowed"),
        ("attack", f"{outcomes.total():,} tries: {said}", ""),
        ("calls billed, per hour", result.total, limits.all_hour),
        ("  in any 59 s", result.most_a_minute, limits.all_minute),
        ("  of one user, per hour", result.most_of_one_user, USER["hour"]),
        ("  of one user, in any 59 s", result.most_of_one_user_a_minute, USER["minute"]),
        ("calls at once", result.most_at_once, limits.all_live or "any"),
        ("  of one user", result.most_at_once_of_one_user, USER["live"]),
        ("calls still running", result.running, ""),
        ("honest users' sessions", " ".join(f"{user.got}/{user.allowed}" for user in honest), "95%"),
        ("load of the machine", f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", ""),
        ("honest users' reads", len(reads), ""),
        ("  p50, p99, worst", " ".join(f"{each * 1000:.0f}" for each in _spread(reads)) + " ms", "p99 250 ms"),
    ]
    rig.table(f"drain: {kind}", rows)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return rig.percentile(values, 50), rig.percentile(values, 99), max(values, default=0.0)


def judge(kind: str, limits: Limits, honest: Sequence[Honest], result: Bill) -> None:
    """Raise Failure if a promise is broken."""
    check(result.total > 0, "no call was started")
    check(result.total <= limits.all_hour, "billed calls exceed the global limit per hour")
    check(result.most_a_minute <= limits.all_minute, "billed calls exceed the global limit per minute")
    check(result.most_of_one_user <= USER["hour"], "billed calls exceed a user's limit per hour")
    check(result.most_of_one_user_a_minute <= USER["minute"], "billed calls exceed a user's limit per minute")
    check(result.most_at_once <= (limits.all_live or result.most_at_once), "calls at once exceed the global limit")
    check(result.most_at_once_of_one_user <= USER["live"], "calls at once exceed a user's limit")
    if kind == "isolation":
        for number, user in enumerate(honest):
            check(user.got >= 0.95 * user.allowed, f"honest user {number} got {user.got} of {user.allowed}")
            check(user.allowed > 0, f"honest user {number} sent no request")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.drain", description="Attackers and five honest users."
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--attackers", type=int, default=120)
    parser.add_argument("--addresses", type=int, default=10_000)
    parser.add_argument("--replicas", type=int, default=1, help="if more than 1, on one Valkey")
    parser.add_argument("--p99", type=float, default=0.25, help="limit of the honest users' reads, in seconds")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="setting of the brokers")
    parser.add_argument("--run", choices=RUNS, action="append")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.attack:
        asyncio.run(attack(**json.loads(given.attack)))
        return
    failures = 0
    for kind in given.run or RUNS:
        try:
            rig.run(
                drill(
                    kind,
                    seconds=given.seconds,
                    attackers=given.attackers,
                    count=given.addresses,
                    replicas=given.replicas,
                    p99=given.p99,
                    more=given.setting,
                )
            )
        except rig.Failure as failure:
            failures += 1
            sys.stdout.write(f"FAILED: {kind}: {failure}\n")
    sys.exit(failures)


if __name__ == "__main__":
    main()
