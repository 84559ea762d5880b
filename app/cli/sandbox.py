"""`sandbox` and `emulator`: the simulated OneInbox, with a broker in front of it or alone."""

import asyncio
import ipaddress
import logging
import math
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import app.telemetry.plain_structlog  # noqa: F401 - before anything imports structlog
from app import sandbox
from app.api.app import create_app
from app.cli.process import checked, listen, refuse, say
from app.config.loading import load_settings
from app.sandbox.demo import DemoPage
from app.sandbox.livekit_server import KEY, SECRET, LiveKitError, running_livekit
from app.sandbox.options import EmulatorOptions
from app.sandbox.server import emulator_server, running_emulator
from app.server.server import Server, create_server, url_to_open
from app.telemetry.logging import configure_logging

STAND_IN = Path(sandbox.__file__).with_name("livekit-client.js")
"""Served as livekit-client where there is no LiveKit server: it speaks the emulator's script."""
LOOPBACK_ORIGINS = "http://localhost:*,http://127.0.0.1:*,http://[::1]:*"
NO_AGENT = (
    "No agent talks in the room: that needs the extra `voice`. In a clone of the repository:\n"
    "  pip install '.[voice]'\n"
)


def run_sandbox(
    host: str, port: int, livekit_url: str | None, key: str | None, secret: str | None, *, start_livekit: bool
) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    configure_logging("info")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the emulator's requests to LiveKit's server
    if not (start_livekit or livekit_url or key or secret):
        asyncio.run(_run(host, port, EmulatorOptions()))
    elif start_livekit:
        if livekit_url or key or secret:
            refuse("--livekit: starts a server of its own; takes no --livekit-url, --livekit-key, --livekit-secret")
        _run_with_livekit(host, port)
    elif livekit_url and key and secret:
        asyncio.run(_run(host, port, _talking(livekit_url, key, secret)))
    else:
        refuse("--livekit-url, --livekit-key, --livekit-secret: set all three or none")


def _run_with_livekit(host: str, port: int) -> None:
    program = shutil.which("livekit-server")
    if program is None:
        refuse(
            "--livekit: there is no livekit-server on the PATH. Get it from "
            "https://github.com/livekit/livekit/releases, or name a running one with --livekit-url."
        )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # so that the server ends too
    try:
        with running_livekit(program) as server:
            asyncio.run(_run(host, port, _talking(server.url, KEY, SECRET), end=server.process.terminate))
    except LiveKitError as error:
        refuse(f"--livekit: livekit-server did not start: {error}", status=1)


def _talking(url: str, key: str, secret: str) -> EmulatorOptions:
    """Return options for calls on a LiveKit server: with an agent if its SDK is installed."""
    try:
        has_sdk = find_spec("livekit.rtc") is not None
    except ModuleNotFoundError:  # not even the namespace, which LiveKit's other packages share
        has_sdk = False
    voice: Literal["agent", "rooms"] = "agent" if has_sdk else "rooms"
    return EmulatorOptions(server_url=url, livekit_key=key, livekit_secret=secret, voice=voice, in_progress=math.inf)


async def _run(host: str, port: int, options: EmulatorOptions, end: Callable[[], object] = lambda: None) -> None:
    """Serve. `end`: called when a signal ends the process before the server is up."""

    def exit_now(status: int) -> None:  # the loop is running, and would log any exception that ends it
        end()
        os._exit(status)

    livekit_url = None if options.voice == "none" else options.server_url
    livekit = os.environ.get("BROKER_LIVEKIT_CLIENT", "") if livekit_url else str(STAND_IN)
    listener = listen(host, port, end=exit_now)
    async with running_emulator(options) as emulator:
        settings = load_settings(
            {
                "ONEINBOX_API_KEY": options.api_key,
                "ONEINBOX_BASE_URL": emulator.url,
                "ONEINBOX_AGENT_ID": options.agents[0],
                "BROKER_ALLOWED_ORIGINS": LOOPBACK_ORIGINS,
                # Enough to play with, quick to use up, and quick to come back.
                "BROKER_SESSION_LIMITS": "10/30 seconds",
                "BROKER_MAX_LIVE_CALLS": "20",
                "BROKER_EXPOSE": "transcript,messages,summary,outcome",
                "BROKER_LIVEKIT_CLIENT": livekit,
            },
            env_file=None,
        )
        network = network_url(listener)
        broker = checked(lambda: create_app(settings, any_host=True))
        broker.state.home = "/"  # the explorer's way back
        try:
            app = DemoPage(broker, livekit_url, network, agent=options.voice == "agent", serves_livekit=bool(livekit))
        except ValueError as error:
            refuse(f"--livekit-url: {error}")
        url = url_to_open(listener)
        say(
            f"Open {url}/ and talk.\n\n"
            + (f"On the network:   {network}\n" if network else "")
            + f"Explore the API:  {url}/docs\n"
            f"Start a call:     curl -i -X POST {url}/session\n"
            f"Follow the call:  curl -N {url}LOCATION/events   (LOCATION: from the answer's headers)\n\n"
            f"No key or network needed: the sandbox includes a simulated OneInbox on {emulator.url}. Ctrl-C stops both."
        )
        if options.voice == "agent":
            say(f"\nAn agent answers on {livekit_url}: it greets, and repeats what it hears one second later.")
        elif options.voice == "rooms":
            say(f"\n{NO_AGENT}")
        await create_server(app).serve(sockets=[listener])


def network_url(listener: socket.socket) -> str | None:
    """Return the listener's URL for other devices on the network; None if it listens on loopback or has no network."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host.split("%")[0])
    if address.is_unspecified:
        try:
            with socket.socket(listener.family, socket.SOCK_DGRAM) as probe:
                # Sends nothing: the system only chooses the address it would send from. TEST-NET-1, RFC 5737.
                probe.connect(("192.0.2.1", 9) if address.version == 4 else ("2001:db8::1", 9))
                address = ipaddress.ip_address(probe.getsockname()[0])
        except OSError:
            return None
    if address.is_loopback:
        return None
    return f"http://{address}:{port}/" if address.version == 4 else f"http://[{address}]:{port}/"


def run_emulator(host: str, port: int, api_key: str) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    configure_logging("info")
    options = EmulatorOptions(api_key=api_key)
    listener = listen(host, port)
    url = url_to_open(listener)
    say(
        f"The emulated OneInbox listens on {url}; key {api_key}, agent {options.agents[0]}.\n\n"
        f"ONEINBOX_BASE_URL={url} ONEINBOX_API_KEY={api_key} ONEINBOX_AGENT_ID={options.agents[0]} "
        "oneinbox-broker serve"
    )
    # The broker's kind of server: to be stopped is no failure.
    Server(emulator_server(options).config).run(sockets=[listener])
