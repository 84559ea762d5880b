"""The fault drill: whatever fails, no call runs without a browser that was given it, and no key gives two calls.

    python -m tests.faults.faults [--sessions 10000] [--browsers 100] [--faulty 0.33] [--patience 240] [--seed 1]
                                  [--moves]

Two replicas share one Valkey (with its data on disk), in front of a OneInbox that spoils a third of all answers.
Browsers start sessions, half of them with a key, some of those twice at once or again. Some hang up while they wait,
and some of those come back with their key. A browser without an answer tries again, on any replica. After a quarter and
after three quarters of the sessions, Valkey is killed and comes back three seconds later (with --moves its replica
takes over, and the address follows three seconds later); half-way, a replica is killed and another one started.

A call counts as given if its answer had reached the browser's machine before it hung up. Calls whose answers died with
the killed replica look like given ones in the store. The drill counts them separately; there may be no more of them
than requests in progress on that replica (BROKER_JOIN_TIMEOUT ends such calls; the drill runs without it).
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from app.limits.live_calls import COLLECT_SECONDS
from app.limits.record import GIVEN, StartRecord
from tests.faults import rig
from tests.faults.rig import Browser, Lost, call_id, call_key, check
from tests.support.processes import Process

TIMEOUT = 2.0
ANSWER_SECONDS = TIMEOUT + 5
WITH_KEY, HANGS_UP, COMES_BACK, REPEATS, STOPS = 0.5, 0.15, 0.5, 0.2, 0.85
TRIES = 4
TOO_LATE = 0.01
"""Share of hang-ups that may cross with the answer; one may in any case, or a short form would have to be lucky."""
OPERATIONS = ("start", "get", "stop", "list")


def spoiled(share: float, seed: int, operations: Sequence[str]) -> list[dict[str, Any]]:
    """Return rules that spoil this share of all answers, each kind about equally often."""
    kinds: list[dict[str, Any]] = [
        {"kind": "status", "status": 500, "takes_effect": True},
        {"kind": "status", "status": 503},
        {"kind": "status", "status": 408, "takes_effect": True},
        {"kind": "drop", "takes_effect": True},
        {"kind": "drop"},
        {"kind": "truncated"},
        {"kind": "broken_json"},
        {"kind": "not_utf8"},
        {"kind": "fields", "remove": ["id", "items"]},
        {"kind": "fields", "set": {"server_url": "http://evil.example", "status": 7}},
        {"kind": "latency", "seconds": TIMEOUT / 2},
        {"kind": "hang", "takes_effect": True},
    ]
    each = 1 - (1 - share) ** (1 / len(kinds))
    return [
        {**kind, "operation": operation, "probability": each, "seed": seed * 1000 + number * 10 + at}
        for at, operation in enumerate(operations)
        for number, kind in enumerate(kinds)
    ]


@dataclass
class Book:
    """The browsers' record.

    `given`: paths by OneInbox's id. `of_key`: ids by key. `waits`: seconds to each answer. `under_way`: requests in
    progress, by replica.
    """

    given: dict[str, str] = field(default_factory=dict)
    of_key: dict[str, set[str]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    begun: int = 0
    under_way: Counter[str] = field(default_factory=Counter)

    def note(self, path: str, key: str) -> None:
        """Note a call that a browser was given."""
        self.given[call_id(path)] = path
        if key:
            self.of_key.setdefault(key, set()).add(call_id(path))


@dataclass
class Drill:
    """The load."""

    replicas: list[Process]
    sessions: int
    seed: int
    short: bool
    book: Book = field(default_factory=Book)

    async def browse(self, number: int) -> None:
        """Start session after session, until `sessions` have begun."""
        dice = random.Random(f"{self.seed}/{number}")
        while self.book.begun < self.sessions:
            self.book.begun += 1
            name = self.book.begun
            key = f"key-{self.seed}-{name:08}-of-the-drill" if dice.random() < WITH_KEY else ""
            address = f"10.{name // 65536}.{name // 256 % 256}.{name % 256}"
            await self._session(dice, address, key)

    async def _session(self, dice: random.Random, address: str, key: str) -> None:
        leaves = dice.random() < HANGS_UP and not (key and self.short)
        path = await self._hang_up(dice, address, key) if leaves else ""
        if leaves and not path and not (key and dice.random() < COMES_BACK):
            return
        for _ in range(TRIES if not path else 0):
            asking = [self._ask(dice, address, key) for _ in range(2 if key and dice.random() < REPEATS else 1)]
            path = max(await asyncio.gather(*asking))  # a double click
            if path:
                break
            await asyncio.sleep(dice.uniform(0.1, 1.0))
        if path and key and dice.random() < REPEATS:
            await self._ask(dice, address, key)
        if path and dice.random() < STOPS:
            await self._stop(dice, address, path)

    async def _ask(self, dice: random.Random, address: str, key: str) -> str:
        """Send one POST; return the path of its call."""
        url = dice.choice(self.replicas).url
        began = time.monotonic()
        path = ""
        async with Browser(url, address) as browser:
            self.book.under_way[url] += 1
            try:
                answer = await asyncio.wait_for(browser.post(key=key), 10 * ANSWER_SECONDS)
                path = answer.call
                self.book.outcomes[answer.outcome] += 1
                replayed = "idempotency-replayed" in answer.headers
                self.book.outcomes["(replayed)"] += replayed
            except Lost as lost:
                path = lost.call
                self.book.outcomes["connection lost"] += 1
            except OSError:
                self.book.outcomes["no connection"] += 1
            finally:
                self.book.under_way[url] -= 1
        self.book.waits.append(time.monotonic() - began)
        if path:
            self.book.note(path, key)
        return path

    async def _hang_up(self, dice: random.Random, address: str, key: str) -> str:
        """Send one POST and hang up; return the path of its call if the answer came first."""
        browser = Browser(dice.choice(self.replicas).url, address)
        self.book.outcomes["hung up"] += 1
        try:
            await browser.send("POST", "/session", b"", {"Idempotency-Key": key} if key else {})
            await asyncio.sleep(dice.choice((0.0, 0.005, 0.02, 0.1, 0.5, 1.5)))
        except OSError:
            return ""
        path = browser.hang_up(reset=dice.random() < 0.5)
        if path:
            self.book.note(path, key)
        return path

    async def _stop(self, dice: random.Random, address: str, path: str) -> None:
        for _ in range(TRIES):
            async with Browser(dice.choice(self.replicas).url, address) as browser:
                with contextlib.suppress(Lost, OSError):
                    if (await browser.post(f"{path}/stop")).status == 200:
                        return
            await asyncio.sleep(dice.uniform(0.1, 1.0))

    async def progress(self, share: float) -> None:
        """Wait until this share of the sessions has begun."""
        while self.book.begun < share * self.sessions:
            await asyncio.sleep(0.05)


async def accidents(drill: Drill, valkey: rig.AnyValkey, start_another: Callable[[], Awaitable[Process]] | None) -> int:
    """Kill or move Valkey, and kill a replica; return how many requests were in progress on that replica."""
    await drill.progress(0.25)
    await valkey.mishap()
    if start_another is None:
        return 0
    await drill.progress(0.5)
    victim = drill.replicas.pop(0)
    under_way = drill.book.under_way[victim.url]
    victim.kill()
    await victim.ended()
    drill.replicas.append(await start_another())
    await drill.progress(0.75)
    await valkey.mishap()
    return under_way


@dataclass
class Settled:
    """The time after the load. `seconds`: until no unwanted call ran; `history`: how many ran, by the second."""

    seconds: float = 0.0
    history: list[tuple[int, int]] = field(default_factory=list)


async def drill(
    *,
    sessions: int,
    browsers: int,
    faulty: float,
    patience: float,
    seed: int,
    operations: Sequence[str] = OPERATIONS,
    short: bool = False,
    moves: bool = False,
) -> None:
    """Run the drill. `operations`: those whose answers are spoiled. `moves`: Valkey fails over. Raises Failure.

    `short`: leave out what takes half a minute or more to recover: no replica is killed, and no browser with a key
    hangs up.
    """
    began = time.monotonic()
    async with rig.workshop() as folder, rig.oneinbox(folder) as oneinbox, rig.valkey(folder, moves=moves) as valkey:
        environ = rig.broker_environ(
            oneinbox.url,
            {**rig.ROOMY, "BROKER_STORE_URL": valkey.url, "ONEINBOX_TIMEOUT": str(TIMEOUT)},
        )
        async with rig.brokers(folder, 2, environ) as running:
            load = Drill(list(running), sessions, seed, short)
            await oneinbox.faults(spoiled(faulty, seed, operations))

            async def start_another() -> Process:
                running.append(await rig.start_broker(folder, environ))
                return running[-1]

            mishaps = asyncio.create_task(accidents(load, valkey, None if short else start_another))
            await asyncio.gather(*(load.browse(number) for number in range(browsers)))
            under_way = await mishaps
            loaded = time.monotonic() - began
            settled = await settle(oneinbox, load.book, valkey, patience)
            calls = await oneinbox.calls()
            codes = [await process.stop() for process in running[not short :]]
            in_hand, unwanted = without_browser(calls, load.book, valkey)
        answered = rig.answered(folder)
        too_late = [each for each in in_hand if each in answered]
        rows: list[tuple[object, object]] = [
            ("  given according to the store", len(in_hand)),
            ("    answered just after the hang-up", len(too_late)),
            ("requests in progress on the killed replica", under_way),
            ("seconds of load", f"{loaded:.0f}"),
        ]
        report(load.book, calls, settled, rows)
        found = rig.leaks(folder, {*map(call_key, load.book.given.values()), *load.book.of_key})
        twice = [key for key, ids in load.book.of_key.items() if len(ids) > 1]
        tracebacks = sum(log.read_text(errors="replace").count("Traceback") for log in folder.glob("broker-*.log"))
        rig.table(
            "promises",
            [
                ("promise", "broken"),
                ("no call runs without a browser, except for the killed replica's", len(unwanted)),
                ("no key gives two calls", len(twice)),
                (f"every answer within {ANSWER_SECONDS:.0f} s", sum(each > ANSWER_SECONDS for each in load.book.waits)),
                ("no secret in any log", len(found)),
                ("no traceback in any log", tracebacks),
            ],
        )
        check(not unwanted, f"running without a browser: {unwanted[:5]}")
        dead = len(in_hand) - len(too_late)
        check(dead <= under_way, f"more calls lost than the killed replica had requests: {in_hand[:5]}")
        crossed = max(1, TOO_LATE * load.book.outcomes["hung up"])
        check(len(too_late) <= crossed, f"hang-ups went unnoticed: {too_late[:5]}")
        check(not twice, f"two calls for one key: {twice[:5]}")
        check(max(load.book.waits) <= ANSWER_SECONDS, f"an answer took {max(load.book.waits):.1f} s")
        check(not found, f"in a log: {found[:5]}")
        check(codes == [0, 0], f"the brokers ended with {codes}")
        check(not tracebacks, "there is a traceback in a log")


def without_browser(
    calls: Sequence[Mapping[str, Any]], book: Book, valkey: rig.AnyValkey
) -> tuple[list[str], list[str]]:
    """Return the running calls without a browser: those that the store counts as given, and the others."""
    running = [call for call in calls if call["running"] and call["id"] not in book.given]
    with redis.Redis(port=valkey.port) as client:
        kept = [client.get(f"oib:v:call:{call['metadata']['broker_request_id']}") for call in running]
    records = [StartRecord.from_bytes(value) if value is not None else None for value in kept]
    as_given = {
        call["id"]
        for call, record in zip(running, records, strict=True)
        if record is not None and record.state == GIVEN
    }
    return sorted(as_given), [call["id"] for call in running if call["id"] not in as_given]


async def settle(oneinbox: rig.OneInbox, book: Book, valkey: rig.AnyValkey, patience: float) -> Settled:
    """Wait until no unwanted call runs, except those of a dead replica."""
    began = time.monotonic()
    settled = Settled()
    while True:
        in_hand, unwanted = without_browser(await oneinbox.calls(), book, valkey)
        settled.seconds = time.monotonic() - began
        settled.history.append((round(settled.seconds), len(in_hand) + len(unwanted)))
        with redis.Redis(port=valkey.port) as client:
            soon = time.time() + 2 * COLLECT_SECONDS  # given calls are due much later
            waits_for_collection = client.zcount("oib:s:due", "-inf", soon * 1e6)
        if (not unwanted and not waits_for_collection) or settled.seconds > patience:
            return settled
        await asyncio.sleep(2)


def report(
    book: Book, calls: Sequence[Mapping[str, Any]], settled: Settled, more: Sequence[tuple[object, object]]
) -> None:
    """Print the results."""
    pairs = itertools.pairwise(settled.history)
    falling = [settled.history[0], *(later for before, later in pairs if before[1] != later[1])]
    step = max(1, len(falling) // 12)
    rows: list[tuple[object, object]] = [
        ("what", "measured"),
        ("sessions asked for, browsers' answers", f"{book.begun:,}, {len(book.waits):,}"),
        *((f"  {outcome}", f"{count:,}") for outcome, count in book.outcomes.most_common()),
        ("answers: p50, p99, worst", " ".join(f"{each:.2f}" for each in _spread(book.waits)) + " s"),
        ("calls at OneInbox", f"{len(calls):,}"),
        ("  given to a browser", f"{len(book.given):,}"),
        ("  running", f"{sum(call['running'] for call in calls):,}"),
        ("  running without a browser", sum(call["running"] and call["id"] not in book.given for call in calls)),
        *more,
        ("seconds until no unwanted call ran", f"{settled.seconds:.0f}"),
        ("running without a browser, by second", " ".join(f"{at}:{count}" for at, count in falling[::step])),
    ]
    rig.table("faults", rows)


def _spread(values: list[float]) -> tuple[float, float, float]:
    return rig.percentile(values, 50), rig.percentile(values, 99), max(values, default=0.0)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.faults", description="Failures of OneInbox, Valkey and a replica."
    )
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--browsers", type=int, default=100)
    parser.add_argument("--faulty", type=float, default=0.33)
    parser.add_argument("--patience", type=float, default=240)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--moves", action="store_true")
    given = parser.parse_args()
    rig.run(drill(**vars(given)))


if __name__ == "__main__":
    main()
