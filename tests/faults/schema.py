"""The schema drill: valid and invalid requests generated from the OpenAPI document, against a real broker.

    python -m tests.faults.schema [--examples 1000] [--seed 1]

schemathesis sends `--examples` requests to every route in each of its phases, with all its checks: no undocumented 5xx;
statuses, content types, headers and bodies as documented; invalid requests refused, valid ones accepted; unknown
methods answered with 405 and Allow. A second round uses a call that exists.
"""

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import rig
from tests.faults.rig import Browser, check
from tests.support.processes import surroundings

WEBHOOK = "a-webhook-secret-of-the-drill"
METRICS = "a-metrics-token-of-the-drill"
CONFIG = f"""
[auth.openapi.metrics]
bearer = "{METRICS}"

[checks]
# What a schema cannot express: templates in variables, an agent that is not configured, another user's call.
positive_data_acceptance.expected-statuses = ["2xx", "304", "400", "403", "404", "415", "422"]
"""


@dataclass(frozen=True)
class Round:
    """One run of schemathesis. `parameters`: path parameters not to generate; `only`: options that select routes."""

    name: str
    parameters: Mapping[str, str]
    only: Sequence[str] = ()


async def drill(examples: int, seed: int, seconds: float) -> None:
    """Run the drill. Raises Failure."""
    async with rig.workshop() as folder, rig.oneinbox(folder, in_progress=0.2, transcript_delay=0.1) as oneinbox:
        environ = rig.broker_environ(
            oneinbox.url,
            {
                **rig.ROOMY,
                "BROKER_WEBHOOK_SECRET": WEBHOOK,
                "BROKER_METRICS_TOKEN": METRICS,
                "BROKER_EXPOSE": "transcript,summary",
            },
        )
        async with rig.brokers(folder, 1, environ) as (broker,), Browser(broker.url) as browser:
            call = (await browser.post()).call.rpartition("/")[2]
            rounds = [
                Round("all generated", {}),
                Round(
                    "a real call", {"call": call, "secret": WEBHOOK}, ("--include-path-regex", "^/(calls/|webhooks)")
                ),
            ]
            results = [
                await play(each, folder, broker.url, examples=examples, seed=seed, seconds=seconds) for each in rounds
            ]
            code = await broker.stop()
        statuses = answers(broker.records)
        rig.table("schema: routes", [("route", "answers"), *sorted(statuses.items())])
        rows = [(each.name, result.cases, result.failures) for each, result in zip(rounds, results, strict=True)]
        rig.table("schema", [("round", "cases", "failures"), *rows])
        check(not any(result.failures for result in results), "schemathesis found something")
        check(code == 0, f"the broker ended with {code}")
        check(not any("Traceback" in line for line in broker.err), "there is a traceback in the log")
        for text in ("GET /calls/{call}", "POST /calls/{call}/stop"):
            check("× 200" in statuses[text], f"{text} was never answered")


@dataclass(frozen=True)
class Result:
    """The result of a round."""

    cases: int
    failures: int


async def play(each: Round, folder: Path, url: str, *, examples: int, seed: int, seconds: float) -> Result:
    """Run schemathesis once, and print its output if it found a failure."""
    given = "".join(f'"path.{name}" = {json.dumps(value)}\n' for name, value in each.parameters.items())
    (folder / "schemathesis.toml").write_text(f"{CONFIG}\n[parameters]\n{given}" if given else CONFIG)
    testing = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *each.only),
        *("--checks", "all", "--max-examples", str(examples), "--seed", str(seed), "--continue-on-failure"),
        *("--request-timeout", "20", "--generation-database", "none", "--no-color", "--warnings", "off"),
        cwd=folder,
        env=surroundings({}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        printed, _ = await asyncio.wait_for(testing.communicate(), seconds)
    finally:
        if testing.returncode is None:
            testing.kill()
            await testing.wait()
    said = printed.decode(errors="replace")
    if testing.returncode:
        sys.stdout.write(said)
    cases = re.search(r"([0-9,]+) generated(?:, ([0-9,]+) found)?", said)
    check(cases is not None, f"schemathesis did nothing: {said[-2000:]}")
    assert cases is not None
    failures = int((cases[2] or "0").replace(",", ""))
    check(testing.returncode == 0 or failures > 0, f"schemathesis ended with {testing.returncode}: {said[-2000:]}")
    return Result(int(cases[1].replace(",", "")), failures)


def answers(log: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return how often each route answered with which status, from the broker's log."""
    counts: dict[str, dict[int, int]] = {}
    for entry in log:
        if entry["event"] == "request":
            route = counts.setdefault(f"{entry['method']} {entry['route']}", {})
            route[entry["status"]] = route.get(entry["status"], 0) + 1
    return {
        route: ", ".join(f"{count:,} × {status}" for status, count in sorted(each.items()))
        for route, each in counts.items()
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.schema", description="Requests generated from the OpenAPI document."
    )
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1800)
    given = parser.parse_args()
    rig.run(drill(given.examples, given.seed, given.seconds))


if __name__ == "__main__":
    main()
