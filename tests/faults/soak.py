"""The soak: mixed load for a long time, in which the broker's memory, files and tasks must not grow.

    python -m tests.faults.soak [--seconds 1800] [--browsers 20] [--pace 5] [--seed 1]

The load: sessions with and without keys, repeats, reads, streams read to their end and streams left early, hang-ups at
every stage, stops, and invalid requests. OneInbox fails now and then, and calls end by themselves. Once warm, memory
may grow only by what the broker stores of each call for a day. After the load, open files and tasks must be as before.
"""

import argparse
import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.faults import rig
from tests.faults.rig import Browser, Lost, check
from tests.support.processes import Process

BYTES_A_CALL = 8 * 1024
"""Memory that a call may take: four keys in the store and a snapshot in the cache."""
ELBOW_MIB = 12.0
"""Memory that the allocator may keep, which matters in short runs."""
QUIET_SECONDS = 30.0
POOLED = 12
"""Idle connections to OneInbox that may be left in the pool."""
NONSENSE: tuple[tuple[str, str, bytes, dict[str, str]], ...] = (
    ("POST", "/session", b"{", {}),
    ("POST", "/session", b"[]", {}),
    ("POST", "/session", b'{"agent": "nobody"}', {}),
    ("POST", "/session", b"x" * 20_000, {}),
    ("POST", "/session", b"", {"Idempotency-Key": "short"}),
    ("POST", "/session", b"", {"Origin": "https://evil.example"}),
    ("GET", "/calls/none.none", b"", {}),
    ("GET", "/nowhere", b"", {}),
    ("DELETE", "/session", b"", {}),
    ("GET", "/problems/rate-limited", b"", {}),
    ("GET", "/openapi.json", b"", {}),
)


@dataclass(frozen=True)
class Sample:
    """The broker's resources at one moment. `calls`: those started so far."""

    at: float
    rss: float
    descriptors: int
    tasks: int
    objects: int
    calls: int


@dataclass
class Soak:
    """The load."""

    broker: Process
    end: float
    seed: int
    pace: float
    outcomes: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    async def browse(self, number: int) -> None:
        """Run one browser: one action after the other."""
        dice = random.Random(f"{self.seed}/{number}")
        while time.monotonic() < self.end:
            address = f"10.1.{dice.randrange(256)}.{dice.randrange(256)}"
            what = dice.choices(
                (self.talk, self.follow, self.leave, self.hang_up, self.nonsense), weights=(4, 2, 2, 2, 4)
            )[0]
            async with Browser(self.broker.url, address) as browser:
                with contextlib.suppress(Lost, OSError):
                    await what(browser, dice)
            self.outcomes[what.__name__] += 1
            await asyncio.sleep(dice.expovariate(self.pace))

    async def talk(self, browser: Browser, dice: random.Random) -> None:
        """Start a session, twice if it has a key; read it, and stop it half the time."""
        key = f"soak-{dice.getrandbits(64):016x}" if dice.random() < 0.5 else ""
        for _ in range(2 if key else 1):
            path = self.note((await browser.post(key=key)).call)
        if path:
            etag = (await browser.ask("GET", path)).headers.get("etag", "")
            await browser.ask("GET", path, b"", {"If-None-Match": etag})
            if dice.random() < 0.5:
                await browser.post(f"{path}/stop")

    async def follow(self, browser: Browser, _: random.Random) -> None:
        """Read a stream to its end."""
        path = self.note((await browser.post()).call)
        if path:
            await browser.send("GET", f"{path}/events")
            await browser.rest(10)

    async def leave(self, browser: Browser, dice: random.Random) -> None:
        """Leave a stream early."""
        path = self.note((await browser.post()).call)
        if path:
            await browser.send("GET", f"{path}/events")
            await asyncio.sleep(dice.choice((0, 0.01, 0.5)))
            browser.hang_up(reset=dice.random() < 0.5)

    async def hang_up(self, browser: Browser, dice: random.Random) -> None:
        """Hang up before the answer."""
        await browser.send("POST", "/session")
        await asyncio.sleep(dice.choice((0, 0.002, 0.02)))
        browser.hang_up(reset=dice.random() < 0.5)
        self.note("hung up")

    async def nonsense(self, browser: Browser, dice: random.Random) -> None:
        """Send another request, mostly an invalid one."""
        method, path, body, headers = dice.choice(NONSENSE)
        answer = await browser.ask(method, path, body, headers)
        if answer.status >= 500:
            self.failed.append(f"{method} {path}: {answer.status}")

    def note(self, path: str) -> str:
        """Count a started call."""
        self.outcomes["calls"] += bool(path)
        return path


async def sample(broker: Process, port: int, began: float, calls: int) -> Sample:
    """Read the broker's resources."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    inside = json.loads(await reader.readline())
    writer.close()
    await writer.wait_closed()
    return Sample(
        time.monotonic() - began,
        broker.memory() / 1024 / 1024,
        broker.descriptors,
        inside["tasks"],
        inside["objects"],
        calls,
    )


async def drill(seconds: float, browsers: int, pace: float, seed: int) -> None:
    """Run the drill. Raises Failure."""
    async with rig.workshop() as folder, rig.oneinbox(folder, in_progress=2, transcript_delay=0.2) as oneinbox:
        await oneinbox.faults(
            [
                {"kind": "latency", "operation": "start", "seconds": 0.01, "probability": 0.5},
                {"kind": "status", "status": 500, "operation": "start", "probability": 0.02, "takes_effect": True},
                {"kind": "drop", "operation": "get", "probability": 0.02},
            ]
        )
        environ = rig.broker_environ(oneinbox.url, {**rig.ROOMY, "BROKER_EXPOSE": "transcript"})
        broker = await rig.start("tests.faults.broker", environ=environ, log=folder / "broker-1.log")
        try:
            (port,) = [entry["report"] for entry in broker.records if "report" in entry]
            began = time.monotonic()
            soak = Soak(broker, began + seconds, seed, pace)
            samples = [await sample(broker, port, began, 0)]
            load = asyncio.gather(*(soak.browse(number) for number in range(browsers)))
            while not load.done():
                await asyncio.wait([load], timeout=seconds / 24)
                samples.append(await sample(broker, port, began, soak.outcomes["calls"]))
            load.result()
            after = samples[-1]
            quiet = time.monotonic() + QUIET_SECONDS
            while time.monotonic() < quiet:
                after = await sample(broker, port, began, soak.outcomes["calls"])
                if (after.tasks, after.descriptors) <= (samples[0].tasks, samples[0].descriptors + POOLED):
                    break
                await asyncio.sleep(0.5)
            samples.append(after)
        finally:
            code = await broker.stop()
        report(soak, samples)
        judge(soak, samples)
        check(code == 0, f"the broker ended with {code}")
        check(not any("Traceback" in line for line in broker.err), "there is a traceback in the log")


def report(soak: Soak, samples: list[Sample]) -> None:
    """Print the results."""
    head = ("second", "MiB", "open files", "tasks", "objects", "calls so far")
    rows = [
        (f"{each.at:.0f}", f"{each.rss:.1f}", each.descriptors, each.tasks, f"{each.objects:,}", f"{each.calls:,}")
        for each in [*samples[:-1:3], samples[-1]]
    ]
    rig.table("soak: " + ", ".join(f"{count:,} {name}" for name, count in soak.outcomes.most_common()), [head, *rows])


def judge(soak: Soak, samples: list[Sample]) -> None:
    """Raise Failure if something grew."""
    first, last = samples[0], samples[-1]
    warm = samples[len(samples) // 3]
    grown = (last.rss - warm.rss) * 1024 * 1024
    calls = last.calls - warm.calls
    rig.table(
        "what grew",
        [
            ("what", "before", "after", "allowed"),
            ("open files", first.descriptors, last.descriptors, first.descriptors + POOLED),
            ("tasks", first.tasks, last.tasks, first.tasks),
            ("memory since warm, MiB", f"{warm.rss:.1f}", f"{last.rss:.1f}", f"{warm.rss + allowed(calls):.1f}"),
            ("  per call", "", f"{grown / max(calls, 1):,.0f} bytes", f"{BYTES_A_CALL:,} bytes"),
        ],
    )
    check(not soak.failed, f"answered with a 5xx: {soak.failed[:5]}")
    check(last.descriptors <= first.descriptors + POOLED, "files stay open")
    check(last.tasks <= first.tasks, "tasks stay")
    check(last.rss <= warm.rss + allowed(calls), "memory grows")


def allowed(calls: int) -> float:
    """Return the MiB that this many calls may take."""
    return ELBOW_MIB + calls * BYTES_A_CALL / 1024 / 1024


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description="Mixed load for a long time.")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--browsers", type=int, default=20)
    parser.add_argument("--pace", type=float, default=5, help="actions per second and browser, if none took time")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    rig.run(drill(given.seconds, given.browsers, given.pace, given.seed))


if __name__ == "__main__":
    main()
