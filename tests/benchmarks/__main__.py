"""Compare the broker with what a user would use instead.

    python -m tests.benchmarks [--all | --quick] [--rounds 3] [--seconds 2] [--json FILE] [--chart FILE]

Measures the contenders in turn, each alone on one core, for several rounds, and prints medians. Exits with status 1 if
an answer is unexpected or a required program is missing.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tests.benchmarks import rig
from tests.benchmarks.rig import Load, Missing, Server, say

MANY = 32
"""Connections when measuring throughput."""
BUSY = 0.9
"""Share of its core that a server uses if nothing else slows it down."""
PROXY = """
upstream oneinbox { server $upstream; keepalive 64; }
server {
    listen 127.0.0.1:$port backlog=4096;
    location = /session {
        proxy_pass http://oneinbox/v1/calls/web;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Authorization "Bearer oi_sk_benchmark";
    }
}
"""


@dataclass(frozen=True)
class Contender:
    """A server to measure. `open(upstream, core)` starts it; it answers a POST to `path` with 201."""

    name: str
    open: Callable[[Server, int], AbstractContextManager[Server]]
    path: str = "/session"


@contextmanager
def _with_valkey(upstream: Server, core: int) -> Iterator[Server]:
    with rig.valkey() as store, rig.broker(upstream.url, core=core, environ={"BROKER_STORE_URL": store.url}) as server:
        yield server


def _proxy(upstream: Server, core: int) -> AbstractContextManager[Server]:
    return rig.nginx(PROXY, core=core, upstream=upstream.url.removeprefix("http://"))


CONTENDERS: Mapping[str, Contender] = {
    "broker": Contender("the broker", lambda upstream, core: rig.broker(upstream.url, core=core)),
    "valkey": Contender("the broker with Valkey", _with_valkey),
    "express": Contender("Express + fetch", lambda upstream, core: rig.node("express", upstream.url, core=core)),
    "httpx": Contender("FastAPI + httpx", lambda upstream, core: rig.fastapi("shared", upstream.url, core=core)),
    "empty": Contender("FastAPI, empty route", lambda upstream, core: rig.fastapi("empty", upstream.url, core=core)),
    "direct": Contender("OneInbox itself (canned)", lambda _, core: rig.oneinbox(core=core), "/v1/calls/web"),
    "fastify": Contender("Fastify + undici", lambda upstream, core: rig.node("fastify", upstream.url, core=core)),
    "nginx": Contender("nginx as proxy", _proxy),
}
QUICK = ("broker", "express", "empty")
USUAL = ("broker", "valkey", "express", "httpx", "empty", "direct")


@dataclass(frozen=True)
class Result:
    """A contender's figures in one round, or their medians: at many connections, and at one."""

    many: Load
    one: Load


def measure(contender: Contender, upstream: Server, core: int, *, seconds: int) -> Result:
    """Start, warm up and measure a contender."""
    with contender.open(upstream, core) as server:
        rig.load(server, contender.path, connections=MANY, seconds=seconds)
        return Result(
            many=rig.load(server, contender.path, connections=MANY, seconds=seconds),
            one=rig.load(server, contender.path, connections=1, seconds=seconds),
        )


def median(loads: Sequence[Load]) -> Load:
    """Return each figure's median."""
    return Load(*(statistics.median(getattr(each, field.name) for each in loads) for field in fields(Load)))


def contest(names: Sequence[str], *, rounds: int, seconds: int) -> tuple[dict[str, Result], list[str]]:
    """Return each contender's medians, and for each missing contender the reason."""
    rig.program("wrk", "wrk")
    core, _ = rig.pin()
    found: dict[str, list[Result]] = {}
    missing: dict[str, str] = {}
    with rig.oneinbox() as upstream:
        for turn in range(rounds):
            for name in names:
                if name in missing:
                    continue
                try:
                    result = measure(CONTENDERS[name], upstream, core, seconds=seconds)
                except Missing as reason:
                    missing[name] = f"{CONTENDERS[name].name}: {reason}"
                    continue
                found.setdefault(name, []).append(result)
                if sys.stderr.isatty():
                    sys.stderr.write(f"round {turn + 1}: {CONTENDERS[name].name}: {result.many.per_second:.0f}/s\n")
    medians = {
        name: Result(median([each.many for each in results]), median([each.one for each in results]))
        for name, results in found.items()
    }
    return medians, list(missing.values())


def ratios(results: Mapping[str, Result]) -> dict[str, float]:
    """Return ratios, which depend little on the machine, where both sides were measured.

    CPU time is the steadiest: other load on the machine costs sessions, but not the server's CPU time.
    """
    found: dict[str, float] = {}
    if "broker" not in results:
        return found
    broker = results["broker"]
    for name, words in (("express", "Express + fetch"), ("httpx", "FastAPI + httpx"), ("empty", "an empty route")):
        if name in results:
            found[f"sessions/s, broker ÷ {words}"] = broker.many.per_second / results[name].many.per_second
            found[f"sessions per second of CPU, broker ÷ {words}"] = results[name].many.cpu / broker.many.cpu
    if "direct" in results:
        found["p50 at 1 connection, broker − OneInbox, ms"] = broker.one.p50 - results["direct"].one.p50
    found["p99 at 1 connection, broker ÷ own p50"] = broker.one.p99 / broker.one.p50
    if "express" in results:
        found["p99 at 1 connection, broker ÷ Express + fetch"] = broker.one.p99 / results["express"].one.p99
    if "valkey" in results:
        found["CPU per session, with Valkey ÷ with memory"] = results["valkey"].many.cpu / broker.many.cpu
    return found


def as_table(results: Mapping[str, Result]) -> str:
    """Return a table, one line per contender."""
    head = ("", "sessions/s", "p50", "p99", "p50, 1 conn.", "p99, 1 conn.", "CPU/session", "RSS")
    rows = [
        (
            CONTENDERS[name].name,
            f"{result.many.per_second:,.0f}",
            f"{result.many.p50:.2f} ms",
            f"{result.many.p99:.2f} ms",
            f"{result.one.p50:.3f} ms",
            f"{result.one.p99:.3f} ms",
            f"{result.many.cpu:.0f} µs",
            f"{result.many.rss:.0f} MB",
        )
        for name, result in results.items()
    ]
    return rig.table([head, *rows])


def machine() -> dict[str, Any]:
    """Describe this machine."""
    return {
        "processor": rig.processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write. Return the exit status."""
    options = _options(arguments)
    names = QUICK if options.quick else tuple(CONTENDERS) if options.all else USUAL
    rounds, seconds = options.rounds or (1 if options.quick else 3), options.seconds or 2
    try:
        results, missing = contest(names, rounds=rounds, seconds=seconds)
    except (Missing, AssertionError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    say(f"{MANY} connections, one core for the server; medians of {rounds} round(s) of {seconds} s each")
    say(as_table(results))
    say()
    say(rig.table([("ratio", ""), *((words, f"{value:.2f}") for words, value in ratios(results).items())]))
    for name, result in results.items():
        if result.many.busy < BUSY:
            say(f"{CONTENDERS[name].name}: used {result.many.busy:.0%} of its core; something else slowed it down")
    for line in missing:
        say(f"left out: {line}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine(),
        "rounds": rounds,
        "seconds": seconds,
        "contenders": {name: {"name": CONTENDERS[name].name, **asdict(result)} for name, result in results.items()},
        "ratios": ratios(results),
    }
    options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    say(f"written: {options.json}")
    try:
        from tests.benchmarks.chart import draw
    except ModuleNotFoundError as error:
        say(f"no chart, without {error.name}: pip install -e '.[bench]'")
        return 0
    options.chart.parent.mkdir(parents=True, exist_ok=True)
    brokers = {name: result for name, result in results.items() if name != "direct"}
    draw({CONTENDERS[name].name: result.many.per_second for name, result in brokers.items()}, options.chart)
    say(f"written: {options.chart}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="also Fastify + undici, and nginx as a reverse proxy")
    which.add_argument("--quick", action="store_true", help=f"one round, and only {', '.join(QUICK)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds per contender")
    parser.add_argument("--seconds", type=int, metavar="N", help="seconds per measurement")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/results.json"), metavar="FILE")
    parser.add_argument("--chart", type=Path, default=Path("build/benchmarks/chart.png"), metavar="FILE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
