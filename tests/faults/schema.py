"""The schema drill: requests made from the OpenAPI document, right and wrong ones, against a real broker.

    python -m tests.faults.schema [--examples 1000] [--seed 1]

schemathesis asks every route, so many times each and phase, with all its checks on: no 5xx that is not documented, statuses,
content types, headers and bodies as documented, wrong requests refused, right ones not, unknown methods 405 with Allow.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from tests.faults import rig
from tests.faults.rig import check

WEBHOOK = "a-webhook-secret-of-the-drill"
CONFIG = """
[checks]
# What a schema cannot say: templates in variables, an agent that is not configured, a call that is somebody else's.
positive_data_acceptance.expected-statuses = ["2xx", "304", "400", "403", "404", "415", "422"]
"""


async def drill(examples: int, seed: int, seconds: float) -> None:
    """The whole. Raises Failure."""
    async with rig.workshop() as folder, rig.oneinbox(folder, in_progress=0.2, transcript_delay=0.1) as oneinbox:
        environ = rig.broker_environ(
            oneinbox.url, {**rig.ROOMY, "BROKER_WEBHOOK_SECRET": WEBHOOK, "BROKER_EXPOSE": "transcript,summary"}
        )
        async with rig.brokers(folder, 1, environ) as (broker,):
            (folder / "schemathesis.toml").write_text(CONFIG)
            testing = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{broker.url}/openapi.json"),
                *("--checks", "all", "--max-examples", str(examples), "--seed", str(seed), "--continue-on-failure"),
                *("--request-timeout", "20", "--report", "json", "--report-json-path", "report.json"),
                *("--generation-database", "none", "--no-color"),
                cwd=folder,
                env=rig.surroundings({}),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            try:
                printed, _ = await asyncio.wait_for(testing.communicate(), seconds)
            finally:
                if testing.returncode is None:
                    testing.kill()
                    await testing.wait()
            code = await broker.end()
        said = printed.decode(errors="replace")
        (folder / "schemathesis.txt").write_text(said)
        sys.stdout.write(said[said.find("= FAILURES =") :] if testing.returncode else said[-1500:])
        statuses = answers(broker.log)
        rig.table("schema", [("route", "answers"), *sorted(statuses.items())])
        check(testing.returncode == 0, f"schemathesis: {testing.returncode}")
        check(code == 0, f"the broker ended with {code}")
        check("Traceback" not in broker.log.read_text(), "there is a traceback in the log")


def answers(log: Path) -> dict[str, str]:
    """How often each route answered what, by the broker's own log."""
    counts: dict[str, dict[int, int]] = {}
    for line in log.read_text().splitlines():
        entry: dict[str, Any] = json.loads(line)
        if entry["event"] == "request":
            route = counts.setdefault(f"{entry['method']} {entry['route']}", {})
            route[entry["status"]] = route.get(entry["status"], 0) + 1
    return {
        route: ", ".join(f"{count:,} × {status}" for status, count in sorted(each.items()))
        for route, each in counts.items()
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.schema", description="Requests made from the document.")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1800)
    given = parser.parse_args()
    asyncio.run(drill(given.examples, given.seed, given.seconds))


if __name__ == "__main__":
    main()
