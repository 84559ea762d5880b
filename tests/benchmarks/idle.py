"""Measure how long a session takes after nobody called for a while, with OneInbox behind TLS and far away.

    python -m tests.benchmarks.idle [--rtt 100] [--idle 20,75,300] [--keeps 60] [--rounds 3] [--json FILE]

All contenders run at once and are idle together, so one run compares them; each is asked in turn. A relay delays every
byte by half of `--rtt` (ms). It passes a connection's first bytes on one `--rtt` later still: the kernel here accepts a
connection at once, a far one takes a round trip. nginx closes connections idle for `--keeps` seconds.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from tests.benchmarks import rig
from tests.benchmarks.rig import ANY, Missing, Server, say
from tests.support.certificates import Authority

SETTLED = 3.0
"""Seconds from a contender's start to its first session."""
WARM = 9
"""Sessions back to back; their median is what a warm connection takes."""
ONEINBOX = """
server {
    listen 127.0.0.1:$port ssl backlog=4096 reuseport;
    ssl_certificate $certificate;
    ssl_certificate_key $key;
    keepalive_timeout ${keeps}s;
    client_header_timeout ${keeps}s;
    default_type application/json;
    location = /v1/calls/web {
        return 201 '{"id":"call_$request_id","server_url":"wss://voice.oneinbox.ai","participant_token":"$token"}';
    }
    location / { return 200 '{"items":[],"total":0,"limit":20,"offset":0}'; }
}
"""

Start = Callable[[str, Mapping[str, str]], AbstractContextManager[Server]]
CONTENDERS: Mapping[str, Start] = {
    "the broker": lambda url, trust: rig.broker(url, core=ANY, environ=trust),
    "Express + fetch": lambda url, trust: rig.node("express", url, core=ANY, environ=trust),
    "FastAPI + httpx": lambda url, trust: rig.fastapi("shared", url, core=ANY, environ=trust),
}


async def _relay(listener: socket.socket, port: int, rtt: float) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_pass_on(reader, far_writer, rtt / 2, held=rtt), _pass_on(far_reader, writer, rtt / 2))

    async with await asyncio.start_server(accept, sock=listener) as server:
        await server.serve_forever()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float, held: float = 0) -> None:
    """Write all that is read, `delay` seconds later, and nothing for the first `held` seconds."""
    loop = asyncio.get_running_loop()
    opened, due = loop.time() + held, 0.0
    while True:
        try:
            piece = await reader.read(65536)
        except ConnectionError:
            piece = b""
        due = max(due + 1e-6, max(loop.time(), opened) + delay)  # timers of one moment may run in any order
        if not piece:
            loop.call_at(due, writer.close)
            return
        loop.call_at(due, writer.write, piece)


def _serve_relay(listener: socket.socket, port: int, rtt: float) -> None:
    asyncio.run(_relay(listener, port, rtt))


@contextmanager
def far_oneinbox(folder: Path, rtt: float, keeps: int) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Run OneInbox behind TLS, `rtt` seconds away. Yield its URL, and the variables that make contenders trust it."""
    authority = Authority(folder)
    trust = {name: str(authority.certificate) for name in ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")}
    server = rig.nginx(ONEINBOX, certificate=authority.certificate, key=authority.key, keeps=keeps, token=rig.TOKEN)
    with server as near, socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(near.url.rpartition(":")[2])
        relay = multiprocessing.get_context("fork").Process(target=_serve_relay, args=(listener, port, rtt))
        relay.start()
        try:
            yield f"https://127.0.0.1:{listener.getsockname()[1]}", trust
        finally:
            relay.terminate()
            relay.join()


def session(server: Server) -> float:
    """Start a session; return the ms it took. Raises AssertionError if it was not started."""
    began = time.perf_counter()
    answer = rig.ask(f"{server.url}/session", "POST")
    assert answer is not None
    assert answer.status == 201, answer.status
    answer.read()
    return (time.perf_counter() - began) * 1000


def handshakes(broker: Server) -> float:
    """Return how many connections a broker has begun."""
    text = rig.ask(f"{broker.url}/metrics", headers={"Authorization": f"Bearer {rig.BROKER['BROKER_METRICS_TOKEN']}"})
    found = re.search(r"^broker_oneinbox_handshakes_total ([0-9.]+)", text.read().decode(), re.MULTILINE)
    return float(found[1]) if found else float("nan")


def one_round(url: str, trust: Mapping[str, str], idle: Sequence[float]) -> tuple[dict[str, dict[str, float]], float]:
    """Return each contender's ms by what came before the session, and handshakes per hour of a broker without any."""
    took: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, start in CONTENDERS.items():
            try:
                servers[name] = stack.enter_context(start(url, trust))
            except Missing as error:
                say(f"no {name}: {error}")
        began = time.monotonic()
        uncalled = stack.enter_context(CONTENDERS["the broker"](url, trust))
        time.sleep(SETTLED)  # until start-up work is over
        for name, server in servers.items():
            took[name] = {"first after start": session(server)}
            took[name]["back to back"] = statistics.median(session(server) for _ in range(WARM))
        for seconds in idle:
            time.sleep(seconds)  # the idle time is what is measured
            for name, server in servers.items():
                took[name][f"after {seconds:g} s"] = session(server)
        return took, handshakes(uncalled) / (time.monotonic() - began) * 3600


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.idle")
    parser.add_argument("--rtt", type=float, default=100.0, metavar="MS")
    parser.add_argument("--idle", default="20,75,300", metavar="SECONDS")
    parser.add_argument("--keeps", type=int, default=60, metavar="SECONDS")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    idle = [float(each) for each in options.idle.split(",")]
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            os.chmod(folder, 0o755)  # nginx's worker may be another user
            with far_oneinbox(Path(folder), options.rtt / 1000, options.keeps) as (url, trust):
                rounds = [one_round(url, trust, idle) for _ in range(options.rounds)]
    except Missing as error:
        sys.stderr.write(f"{error}\n")
        return 1
    names, cases = list(rounds[0][0]), list(rounds[0][0]["the broker"])
    took = {
        name: {case: round(statistics.median(found[name][case] for found, _ in rounds), 1) for case in cases}
        for name in names
    }
    beyond = {
        name: {case: round((ms - each["back to back"]) / options.rtt, 2) for case, ms in each.items()}
        for name, each in took.items()
    }
    per_hour = round(statistics.median(found for _, found in rounds))
    say(f"ms until a session's answer, medians of {options.rounds}; in brackets: round trips beyond back to back")
    say(rig.table([["", *cases], *([n, *(f"{took[n][c]} ({beyond[n][c]:+})" for c in cases)] for n in names)]))
    say(f"handshakes per hour of a broker that nobody calls, the start's included: {per_hour}")
    if options.json:
        report = {"rtt, ms": options.rtt, "took, ms": took, "round trips beyond": beyond, "handshakes/h": per_hour}
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
