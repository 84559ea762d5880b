"""The commands."""

import asyncio
import io
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from app import __version__
from app.api.app import create_app
from app.cli.operator import Operator, WebhookOperator, operate, operate_webhooks
from app.cli.startup_banner import announce
from app.config.loading import load_settings
from app.config.settings import Settings, SettingsError, split_url, takes
from app.doctor.findings import Finding, all_ok, as_json, as_text
from app.limits.kill_switch import IN_FORCE_SECONDS
from app.oneinbox.errors import OneInboxError
from app.server.gc import freeze_gc
from app.server.server import Server, create_server, listen, serve_with_workers, url_of
from app.store import StoreUnavailable
from app.telemetry.logging import configure_logging
from app.telemetry.metrics import count_together
from app.telemetry.terminal import has_colour, width_of

SANDBOX_KEY = "oi_sk_sandbox"
LIVEKIT_CALL = 600
"""Seconds that the sandbox's calls last when there is a room to talk in."""
LOOPBACK_ORIGINS = "http://localhost:*,http://127.0.0.1:*,http://[::1]:*"

EXIT_STATUS = "Exit status: 0 fine, 1 something is wrong, 2 wrong usage or settings."


def ending(*examples: str) -> str:
    """The end of a command's help."""
    lines = "".join(f"\n  oneinbox-broker {example}" for example in examples)
    return f"\b\n{'Example' if len(examples) == 1 else 'Examples'}:{lines}\n\n{EXIT_STATUS}"


cli = typer.Typer(
    name="oneinbox-broker",
    help="Token broker between a browser and the OneInbox voice API.",
    epilog=ending("sandbox"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text, on a terminal and off
)

T = TypeVar("T")
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0: a free one.", min=0, max=65535)]


def main() -> None:
    """Entry point of the console script."""
    _mend_standard_streams()
    cli()


def _mend_standard_streams() -> None:
    """A stream that whoever started us has closed leads nowhere; what stdout cannot write becomes a question mark."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets this number, the lowest that is free, before a socket does
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _say(text: str) -> None:
    """Print, at once. A reader that has gone ends the command without a word."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        raise  # typer makes it a quiet exit 1
    except OSError as error:  # a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or else the interpreter tries once more at its end
        _refuse(f"stdout: cannot be written ({error.strerror})", status=1)


def _print_version(wanted: bool) -> None:
    if wanted:
        _say(__version__)
        raise typer.Exit


@cli.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Token broker between a browser and the OneInbox voice API."""


@cli.command(epilog=ending("serve --host 0.0.0.0 --port 8000"))
def serve(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    workers: Annotated[int, typer.Option(help="Processes; more than one needs a shared store.", min=1)] = 1,
) -> None:
    """Run the broker with the settings of the environment and .env."""
    settings = _settings()
    app = _checked(lambda: create_app(settings))
    shared = settings.store_url.get_secret_value() != "memory://"
    if workers > 1 and not shared:
        _refuse(
            "BROKER_STORE_URL: is memory://, where each of several workers would count for itself; "
            f"takes {takes('BROKER_STORE_URL')}"
        )
    configure_logging(settings.log_level, settings.log_format)
    listener = _listen(host, port)
    announce(settings, host, url=url_of(listener), workers=workers)
    freeze_gc()
    if workers > 1:
        with nullcontext() if settings.metrics_token is None else _count_together():
            serve_with_workers(listener, workers)
    else:
        create_server(app).run(sockets=[listener])


@cli.command(epilog=ending("sandbox --port 0", "sandbox --livekit-url ws://127.0.0.1:7880 --livekit-key devkey"))
def sandbox(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    livekit_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Hand out tokens for this LiveKit server; the demo page offers to join."),
    ] = None,
    livekit_key: Annotated[str | None, typer.Option(metavar="KEY", help="Its API key.")] = None,
    livekit_secret: Annotated[
        str | None,
        typer.Option(
            metavar="SECRET",
            envvar="LIVEKIT_API_SECRET",
            help="Its API secret; better in the environment, since everybody on this machine can read arguments.",
        ),
    ] = None,
) -> None:
    """Try it: a broker, a demo page and an offline OneInbox; no key."""
    livekit: dict[str, Any] = {}
    if livekit_url or livekit_key:
        if not (livekit_url and livekit_key and livekit_secret):
            _refuse("--livekit-url, --livekit-key, --livekit-secret: belong together; takes all three or none")
        livekit = {"server_url": livekit_url, "livekit_key": livekit_key, "livekit_secret": livekit_secret}
        livekit["in_progress"] = LIVEKIT_CALL
    configure_logging("info")
    asyncio.run(_sandbox(host, port, livekit))


async def _sandbox(host: str, port: int, livekit: dict[str, Any]) -> None:
    from app.sandbox.demo import DemoPage  # noqa: PLC0415 - the broker itself never loads its neighbour
    from app.sandbox.emulator import EmulatorOptions  # noqa: PLC0415
    from app.sandbox.server import running_emulator  # noqa: PLC0415

    options = EmulatorOptions(api_key=SANDBOX_KEY, **livekit)
    listener = _listen(host, port, end=os._exit)  # the loop runs, and would log whatever it is ended by
    async with running_emulator(options) as emulator:
        settings = load_settings(
            {
                "ONEINBOX_API_KEY": SANDBOX_KEY,
                "ONEINBOX_BASE_URL": emulator.url,
                "ONEINBOX_AGENT_ID": options.agents[0],
                "BROKER_ALLOWED_ORIGINS": LOOPBACK_ORIGINS,
                # Enough to play with, soon used up when one wants to see that, and soon there again.
                "BROKER_SESSION_LIMITS": "10/30 seconds",
                "BROKER_MAX_LIVE_CALLS": "20",
                "BROKER_EXPOSE": "transcript,messages,summary,outcome",
            },
            env_file=None,
        )
        try:
            app = DemoPage(create_app(settings), livekit.get("server_url"))
        except ValueError as error:
            _refuse(f"--livekit-url: {error}")
        url = url_of(listener)
        _say(
            f"Open {url}/ and talk.\n\n"
            f"Explore the API:  {url}/docs\n"
            f"Start a call:     curl -i -X POST {url}/session\n"
            f"Follow the call:  curl -N {url}LOCATION/events   (LOCATION: as the answer says)\n\n"
            f"No key, no network: OneInbox is emulated, on {emulator.url}. Ctrl-C ends both."
        )
        await create_server(app).serve(sockets=[listener])


@cli.command(epilog=ending("emulator --api-key oi_sk_of_my_tests"))
def emulator(
    host: Host = "127.0.0.1",
    port: Port = 9000,
    api_key: Annotated[str, typer.Option(help="The key it takes.")] = SANDBOX_KEY,
) -> None:
    """Run the offline OneInbox alone, for anybody's tests."""
    from app.sandbox.emulator import EmulatorOptions  # noqa: PLC0415 - the broker itself never loads its neighbour
    from app.sandbox.server import emulator_server  # noqa: PLC0415

    configure_logging("info")
    options = EmulatorOptions(api_key=api_key)
    listener = _listen(host, port)
    url = url_of(listener)
    _say(
        f"The emulated OneInbox listens on {url}; key {api_key}, agent {options.agents[0]}.\n\n"
        f"ONEINBOX_BASE_URL={url} ONEINBOX_API_KEY={api_key} ONEINBOX_AGENT_ID={options.agents[0]} "
        "oneinbox-broker serve"
    )
    # The broker's kind of server: to be stopped is no failure.
    Server(emulator_server(options).config).run(sockets=[listener])


@cli.command(epilog=ending("doctor", "doctor --probe https://voice.example.com"))
def doctor(
    as_json_object: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    probe_url: Annotated[
        str | None,
        typer.Option(
            "--probe",
            metavar="URL",
            help="Instead, ask the broker at this URL for what it must refuse; no settings needed.",
        ),
    ] = None,
) -> None:
    """Check settings, OneInbox, key and store, and say what to do.

    Looks at agents, clock, logins, origins, proxies and limits, too. Starts no call, and prints no secret.
    """
    configure_logging("error")
    if probe_url is not None:
        _check_probe_url(probe_url)

    async def run() -> bool:
        # What only the doctor needs no server has to load.
        from app.doctor.checks import diagnose  # noqa: PLC0415
        from app.doctor.probe import probe  # noqa: PLC0415

        findings = await (diagnose() if probe_url is None else probe(probe_url))
        # Here, and not after the loop: a name that does not resolve holds the loop's end up, for its thread.
        _say(as_json(findings) if as_json_object else _told(findings))
        return all_ok(findings)

    raise typer.Exit(0 if asyncio.run(run()) else 1)


def _told(findings: list[Finding]) -> str:
    """For whoever reads stdout."""
    out = sys.stdout
    return as_text(findings, encoding=out.encoding, colour=has_colour(out), width=width_of(out))


def _check_probe_url(url: str) -> None:
    try:
        parts = split_url(url)
        wrong = "has a query or fragment" if parts.query or parts.fragment else ""
    except ValueError as error:
        wrong = str(error)
    if wrong:
        _refuse(f"--probe: {wrong}; takes a broker's public URL, such as https://voice.example.com")


@cli.command(epilog=ending("openapi > openapi.json"))
def openapi() -> None:
    """Print the OpenAPI document; needs no key."""
    settings = load_settings({"ONEINBOX_API_KEY": "oi_sk_none", "ONEINBOX_AGENT_ID": "none"}, env_file=None)
    _say(json.dumps(create_app(settings).openapi(), indent=2, ensure_ascii=False))


@cli.command(epilog=ending("pause --for 30m"))
def pause(
    duration: Annotated[str, typer.Option("--for", help="How long: 90s, 30m, 1h, 1d.")] = "1h",
) -> None:
    """Give out no sessions, on all replicas, for a time."""
    seconds = _seconds(duration)

    async def run(operator: Operator) -> str:
        await operator.kill_switch.pause(seconds)
        return f"Paused for {duration}: no sessions on any replica until then, or until `oneinbox-broker resume`."

    _operate(run, until_in_force=True)


@cli.command(epilog=ending("resume"))
def resume() -> None:
    """End a pause."""

    async def run(operator: Operator) -> str:
        return "Sessions are given again." if await operator.kill_switch.resume() else "There was no pause."

    _operate(run, until_in_force=True)


@cli.command(epilog=ending("block 203.0.113.7 --for 1d"))
def block(
    user: Annotated[str, typer.Argument(metavar="USER", help="The user's id; in anonymous mode an address.")],
    duration: Annotated[str, typer.Option("--for", help="How long: 90s, 30m, 1h, 1d.")] = "1d",
) -> None:
    """Give a user no more sessions, on all replicas."""
    seconds = _seconds(duration)

    async def run(operator: Operator) -> str:
        await operator.kill_switch.block(operator.user(user), seconds)
        return f"Blocked for {duration}."

    _operate(run, until_in_force=True)


@cli.command(epilog=ending("unblock 203.0.113.7"))
def unblock(
    user: Annotated[str, typer.Argument(metavar="USER", help="The user's id; in anonymous mode an address.")],
) -> None:
    """End a user's block."""

    async def run(operator: Operator) -> str:
        return "Unblocked." if await operator.kill_switch.unblock(operator.user(user)) else "There was no block."

    _operate(run, until_in_force=True)


@cli.command(epilog=ending("status"))
def status() -> None:
    """Say how much of the global limits is used, and what is stopped."""
    _operate(lambda operator: operator.status())


webhook = typer.Typer(
    help="OneInbox's webhook for this broker, out of its settings.\n\n"
    "These are BROKER_PUBLIC_URL and BROKER_WEBHOOK_SECRET.",
    epilog=ending("webhook register"),
)
cli.add_typer(webhook, name="webhook", no_args_is_help=True)


@webhook.command("register", epilog=ending("webhook register"))
def register_webhook() -> None:
    """Have OneInbox deliver its events to this broker."""
    _operate_webhooks(lambda operator: operator.register())


@webhook.command("list", epilog=ending("webhook list"))
def list_webhooks() -> None:
    """List the account's webhooks."""
    _operate_webhooks(lambda operator: operator.list())


@webhook.command("remove", epilog=ending("webhook remove wh_abc123"))
def remove_webhook(
    webhook_id: Annotated[str, typer.Argument(metavar="ID", help="As `webhook list` shows it.")],
) -> None:
    """Remove a webhook."""
    _operate_webhooks(lambda operator: operator.remove(webhook_id))


def _operate_webhooks(work: Callable[[WebhookOperator], Awaitable[str]]) -> None:
    settings = _settings()
    configure_logging("error", settings.log_format)
    try:
        _say(asyncio.run(operate_webhooks(settings, work)))
    except SettingsError as error:
        _refuse(*error.lines)
    except OneInboxError as error:
        _refuse(f"OneInbox {error.reason}", status=1)


def _operate(work: Callable[[Operator], Awaitable[str]], *, until_in_force: bool = False) -> None:
    """Run an operator's command on the shared store, and print what it says: once all replicas obey, if told so."""
    settings = _settings()
    configure_logging("error", settings.log_format)
    try:
        said = asyncio.run(operate(settings, work))
        if until_in_force:
            time.sleep(IN_FORCE_SECONDS)
        _say(said)
    except SettingsError as error:
        _refuse(*error.lines)
    except StoreUnavailable:
        _refuse("BROKER_STORE_URL: the store does not answer; nothing was changed", status=1)


def _seconds(duration: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,6})([smhd])", duration)
    if match is None:
        _refuse(f"--for {duration!r}: is no duration; takes a number and s, m, h or d: 90s, 30m, 1h, 1d")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _settings() -> Settings:
    return _checked(load_settings)


def _checked(make: Callable[[], T]) -> T:
    try:
        return make()
    except SettingsError as error:
        _refuse(*error.lines)


def _count_together() -> AbstractContextManager[str]:
    try:
        return count_together()
    except OSError as error:
        _refuse(
            f"BROKER_METRICS_TOKEN: several workers need a directory for temporary files ({error.strerror})", status=1
        )


def _listen(host: str, port: int, end: Callable[[int], object] = sys.exit) -> socket.socket:
    """A listening socket. `end`: what SIGTERM and Ctrl-C do until the server minds them itself."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end(0))
    try:
        return listen(host, port)
    except OSError as error:
        _refuse(f"--port {port}: cannot listen on {host} ({error.strerror})", status=1)


def _refuse(*lines: str, status: int = 2) -> NoReturn:
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    raise SystemExit(status)
