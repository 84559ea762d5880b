"""Measure what a replica keeps of each user: bytes per new user, as tracemalloc counts them, while they talk and after.

    python -m tests.benchmarks.memory [--users 2000] [--most BYTES]

Each figure is of a process of its own: the broker in process, with its default limits per user, users that a proxy
signs in (the most is kept of users who may list their calls), and a canned OneInbox. The first users fill what is
bounded, such as caches; the next ones are measured. The allocator's rounding adds some 5% to what is counted. Exit
status 1: above `--most`.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from app.api.app import create_app
from app.broker.context import Broker
from app.config.loading import load_settings
from app.limits import record
from app.telemetry.logging import configure_logging
from tests.benchmarks import rig
from tests.benchmarks.counting import Canned, Client
from tests.benchmarks.rig import say

FIRST = 1000
"""Users before the measurement begins."""
STATES = ("talks", "has talked")
PER_USER = ("BROKER_SESSION_LIMITS", "BROKER_REQUEST_LIMITS", "BROKER_MAX_LIVE_CALLS")


def kept() -> int:
    """Return the bytes that this process keeps."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def start(client: Client, broker: Broker, user: int, *, ends: bool) -> None:
    """Have a user start a call, and end it if it `ends`."""
    client.more = ((b"sec-fetch-site", b"same-origin"), (b"x-forwarded-user", f"user-{user}".encode()))
    await client.ask("POST", "/session", b"{}", 201)
    if ends:
        call = client.headers[b"location"].decode().rpartition("/")[2].partition(".")[0]
        ledger = broker.sessions.live.ledger
        request_id = await ledger.request_id(call)
        assert request_id is not None
        await ledger.move(request_id, record.end(60))


async def measure(environ: Mapping[str, str], users: int, *, ends: bool) -> float:
    """Return the bytes per user."""
    tracemalloc.start()
    async with AsyncExitStack() as stack:
        app = create_app(load_settings(environ, env_file=None), Canned())
        state = await stack.enter_async_context(app.router.lifespan_context(app)) or {}
        client = Client(app, state)
        for user in range(FIRST):
            await start(client, state["broker"], user, ends=ends)
        before = kept()
        for user in range(FIRST, FIRST + users):
            await start(client, state["broker"], user, ends=ends)
        return (kept() - before) / users


def measured_alone(store: str, users: int, *, ends: bool) -> float:
    """Return the bytes per user, measured by a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--users", str(users), "--one", store]
    done = subprocess.run([*command, *(["--ends"] if ends else [])], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory")
    parser.add_argument("--users", type=int, default=2000, metavar="N")
    parser.add_argument("--most", type=float, metavar="BYTES")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--ends", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        environ = {name: value for name, value in rig.BROKER.items() if name not in PER_USER}
        with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
            configure_logging("info", "json")
            environ |= {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "127.0.0.1"}
            environ |= {"BROKER_STORE_URL": options.one, "BROKER_STORE_TIMEOUT": "5"}
            say(str(asyncio.run(measure(environ, options.users, ends=options.ends))))
        return 0
    with rig.valkey() as valkey:
        figures = {
            f"{name}, each user {state}": measured_alone(store, options.users, ends=state == STATES[1])
            for name, store in (("memory://", "memory://"), ("Valkey", valkey.url))
            for state in STATES
        }
    rows = [(name, f"{figure:,.0f}") for name, figure in figures.items()]
    say(rig.table([("bytes per user", ""), *rows]))
    return int(options.most is not None and max(figures.values()) > options.most)


if __name__ == "__main__":
    sys.exit(main())
