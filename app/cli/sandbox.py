"""`sandbox` and `emulator`: the simulated OneInbox, with a broker in front of it or alone."""

import asyncio
import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

import app.telemetry.plain_structlog  # noqa: F401 - before anything imports structlog
from app import sandbox
from app.api.app import create_app
from app.cli.process import checked, listen, refuse, say
from app.config.loading import load_settings
from app.sandbox.demo import DemoPage
from app.sandbox.options import EmulatorOptions
from app.sandbox.server import emulator_server, running_emulator
from app.server.server import Server, create_server, url_to_open
from app.telemetry.logging import configure_logging

LIVEKIT_CALL = 600
"""Seconds that the sandbox's calls last when there is a room to talk in."""
STAND_IN = Path(sandbox.__file__).with_name("livekit-client.js")
"""Served as livekit-client where there is no LiveKit server: it speaks the emulator's script."""
LOOPBACK_ORIGINS = "http://localhost:*,http://127.0.0.1:*,http://[::1]:*"


def run_sandbox(host: str, port: int, livekit_url: str | None, key: str | None, secret: str | None) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    livekit: dict[str, Any] = {}
    if livekit_url or key:
        if not (livekit_url and key and secret):
            refuse("--livekit-url, --livekit-key, --livekit-secret: set all three or none")
        livekit = {"server_url": livekit_url, "livekit_key": key, "livekit_secret": secret, "in_progress": LIVEKIT_CALL}
    configure_logging("info")
    asyncio.run(_run(host, port, EmulatorOptions(**livekit), livekit_url if livekit else None))


async def _run(host: str, port: int, options: EmulatorOptions, livekit_url: str | None) -> None:
    listener = listen(host, port, end=os._exit)  # the loop is running, and would log any exception that ends it
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
                **({} if livekit_url else {"BROKER_LIVEKIT_CLIENT": str(STAND_IN)}),
            },
            env_file=None,
        )
        network = network_url(listener)
        try:
            broker = checked(lambda: create_app(settings, any_host=True))
            broker.state.home = "/"  # the explorer's way back
            app = DemoPage(broker, livekit_url, network)
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
