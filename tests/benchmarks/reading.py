"""Compare reads of a cached call with an empty FastAPI route, and send one call's events to many watchers.

python -m tests.benchmarks.reading [--rounds 3] [--seconds 3] [--watchers 1000] [--json FILE]
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvloop

from tests.benchmarks import rig
from tests.benchmarks.rig import Load, Missing, Server, say

CONNECTIONS = 32


def read(broker: Server, empty: Server, seconds: int) -> dict[str, Load]:
    """Measure reads answered with 200 and 304, and the empty route."""
    path = rig.ask(f"{broker.url}/session", "POST").headers["Location"]
    etag = rig.ask(broker.url + path).headers["ETag"]
    common: dict[str, Any] = {"method": "GET", "connections": CONNECTIONS, "seconds": seconds}
    rig.load(broker, path, expect=200, **common)
    rig.load(empty, "/session", expect=200, **common)
    return {
        "200": rig.load(broker, path, expect=200, **common),
        "304": rig.load(broker, path, expect=304, headers={"If-None-Match": etag}, **common),
        "empty": rig.load(empty, "/session", expect=200, **common),
    }


@dataclass(eq=False)
class Watcher(asyncio.Protocol):
    """Follows a call and counts its events."""

    request: bytes
    events: int = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        cast("asyncio.Transport", transport).write(self.request)

    def data_received(self, data: bytes) -> None:
        """Count events; each is small and arrives in one piece."""
        self.events += data.count(b"event: call\n")


async def fan_out(broker: Server, watchers: int, seconds: float) -> dict[str, float]:
    """Measure what a call's watchers cost while OneInbox reports a change at each poll."""
    path = rig.ask(f"{broker.url}/session", "POST").headers["Location"]
    rest = broker.rss
    request = f"GET {path}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    host, _, port = broker.url.removeprefix("http://").partition(":")
    opened = [
        await asyncio.get_running_loop().create_connection(lambda: Watcher(request), host, int(port))
        for _ in range(watchers)
    ]
    all_watchers = [watcher for _, watcher in opened]
    deadline = time.monotonic() + rig.PATIENCE
    while any(not watcher.events for watcher in all_watchers):
        if time.monotonic() > deadline:
            raise AssertionError(f"{sum(not watcher.events for watcher in all_watchers)} watchers got no event")
        await asyncio.sleep(0.05)
    seen, cpu = sum(watcher.events for watcher in all_watchers), broker.cpu
    await asyncio.sleep(seconds)
    events, spent = sum(watcher.events for watcher in all_watchers) - seen, broker.cpu - cpu
    memory = broker.rss - rest
    for transport, _ in opened:
        transport.close()
    return {"events": events, "CPU per event, µs": spent / events * 1e6, "KB per watcher": memory * 1e3 / watchers}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.reading")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--seconds", type=int, default=3, metavar="N")
    parser.add_argument("--watchers", type=int, default=1000, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        core, _ = rig.pin()
        with (
            rig.oneinbox() as upstream,
            rig.broker(upstream.url, core=core) as broker,
            rig.fastapi("empty", upstream.url, core=core) as empty,
        ):
            rounds = [read(broker, empty, options.seconds) for _ in range(options.rounds)]
        many = {"BROKER_MAX_STREAMS": str(options.watchers), "BROKER_MAX_STREAMS_TOTAL": str(options.watchers)}
        with rig.oneinbox(changing=True) as upstream, rig.broker(upstream.url, core=core, environ=many) as broker:
            streams = uvloop.run(fan_out(broker, options.watchers, 3 * options.seconds))
    except (Missing, AssertionError) as error:
        sys.stderr.write(f"{error}\n")
        return 1

    def median(name: str, figure: str) -> float:
        return float(statistics.median(getattr(each[name], figure) for each in rounds))

    report: dict[str, float] = {}
    for name, words in (("200", "reads/s, 200"), ("304", "reads/s, 304"), ("empty", "empty route/s")):
        report[words] = round(median(name, "per_second"))
    for name in ("200", "304"):
        report[f"{name} ÷ empty route, answers/s"] = round(
            median(name, "per_second") / median("empty", "per_second"), 2
        )
        report[f"{name} ÷ empty route, answers per second of CPU"] = round(
            median("empty", "cpu") / median(name, "cpu"), 2
        )
    report |= {f"{options.watchers} watchers: {words}": round(value, 1) for words, value in streams.items()}
    say(rig.table([(f"reading, medians of {options.rounds}", ""), *report.items()]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
