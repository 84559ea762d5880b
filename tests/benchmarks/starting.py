"""Measure the time from start to the first answer, and the memory of an idle broker.

python -m tests.benchmarks.starting [--rounds 7] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import rig
from tests.benchmarks.rig import Missing, say
from tests.support.processes import surroundings

SETTLED = 3.0
"""Seconds after which a started broker's memory no longer grows."""


def importing() -> float:
    """Return the seconds to start Python and import the application."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import app.cli.serve"], env=surroundings({}), check=True)
    return time.monotonic() - began


def starting(core: int) -> tuple[float, float]:
    """Return the seconds to the first answer, and the MB at rest."""
    began = time.monotonic()
    with rig.broker("http://127.0.0.1:9", core=core) as broker:
        took = time.monotonic() - began
        time.sleep(SETTLED)
        return took, broker.rss


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.starting")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        core, _ = rig.pin()
        imports = [importing() for _ in range(options.rounds)]
        starts = [starting(core) for _ in range(options.rounds)]
    except Missing as error:
        sys.stderr.write(f"{error}\n")
        return 1
    report = {
        "import, s": round(statistics.median(imports), 2),
        "start to first answer, s": round(statistics.median(took for took, _ in starts), 2),
        "RSS at rest, MB": round(statistics.median(rss for _, rss in starts), 1),
    }
    say(rig.table([(f"starting, medians of {options.rounds}", ""), *report.items()]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
