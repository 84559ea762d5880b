"""Compare two workers with one, on a Valkey: what a session costs, and how many replicas one Valkey carries.

    python -m tests.benchmarks.scaling [--rounds 3] [--seconds 3] [--json FILE]

Each worker gets the same load, and all processes may use all cores; the figure compared is CPU per session. On a shared
core, two workers would interrupt each other every few events, at the cost of an event loop iteration each time.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import rig
from tests.benchmarks.rig import Missing, say

CONNECTIONS = 32
"""Connections per worker."""
FULL = 0.7
"""Share of a core that a Valkey or a replica may use while answers stay quick."""


def measure(upstream: str, workers: int, seconds: int) -> tuple[float, float]:
    """Return microseconds of CPU per session: the broker's and Valkey's."""
    with (
        rig.valkey() as store,
        rig.broker(upstream, core=rig.ANY, workers=workers, environ={"BROKER_STORE_URL": store.url}) as broker,
    ):
        rig.load(broker, connections=CONNECTIONS * workers, seconds=seconds)
        before = store.cpu
        found = rig.load(broker, connections=CONNECTIONS * workers, seconds=seconds)
        return found.cpu, (store.cpu - before) / found.requests * 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scaling")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--seconds", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        rig.pin()
        found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        with rig.oneinbox() as upstream:
            for _ in range(options.rounds):
                for workers, costs in found.items():
                    costs.append(measure(upstream.url, workers, options.seconds))
    except (Missing, AssertionError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    one, two = (statistics.median(broker for broker, _ in found[workers]) for workers in found)
    store = statistics.median(store for costs in found.values() for _, store in costs)
    replica, carried = FULL * 1e6 / one, FULL * 1e6 / store
    report = {
        "CPU per session, 1 worker, µs": round(one),
        "CPU per session, 2 workers, µs": round(two),
        "2 workers ÷ 1": round(two / one, 2),
        "Valkey's CPU per session, µs": round(store),
        f"on paper: sessions/s of one replica, a core {FULL:.0%} full": round(replica),
        f"on paper: sessions/s of one Valkey, a core {FULL:.0%} full": round(carried),
        "on paper: replicas until Valkey is full": int(carried / replica),
    }
    say(rig.table([(f"scaling, medians of {options.rounds}", ""), *report.items()]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
