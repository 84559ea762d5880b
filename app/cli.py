"""The commands."""

import asyncio
import json
import re
import resource
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, NoReturn, TypeVar

import structlog
import typer

from app import __version__
from app.config import Settings, SettingsError, load_settings, takes
from app.main import create_app
from app.oneinbox.errors import OneInboxError
from app.operator import Operator, WebhookOperator, operate, operate_webhooks
from app.server import create_server, listen, serve_with_workers, url_of
from app.store import StoreUnavailable
from app.telemetry.logging import configure_logging

log = structlog.get_logger(__name__)

SANDBOX_KEY = "oi_sk_sandbox"
LOOPBACK_ORIGINS = "http://localhost:*,http://127.0.0.1:*,http://[::1]:*"

cli = typer.Typer(
    name="oneinbox-broker",
    help="Token broker between a browser and the OneInbox voice API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

T = TypeVar("T")
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0: a free one.", min=0, max=65535)]


def main() -> None:
    """Entry point of the console script."""
    cli()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@cli.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Token broker between a browser and the OneInbox voice API."""


@cli.command()
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
    log.info("listening", url=url_of(listener), workers=workers, auth=settings.auth, limits=settings.session_limits)
    if not shared:
        log.warning("limits_in_memory", meaning="a restart forgets what was counted")
    _warn_about_files(settings)
    if "*" in settings.allowed_variables:
        log.warning("any_variable_allowed", meaning="browsers may put text of their own into the agent's prompt")
    if workers > 1:
        serve_with_workers(listener, workers)
    else:
        create_server(app).run(sockets=[listener])


@cli.command()
def sandbox(host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Run a broker in front of an offline OneInbox: no key, no network."""
    configure_logging("info")
    asyncio.run(_sandbox(host, port))


async def _sandbox(host: str, port: int) -> None:
    from app.sandbox.emulator import EmulatorOptions  # noqa: PLC0415 - the broker itself never loads its neighbour
    from app.sandbox.server import running_emulator  # noqa: PLC0415

    listener = _listen(host, port)
    options = EmulatorOptions(api_key=SANDBOX_KEY)
    async with running_emulator(options) as emulator:
        settings = load_settings(
            {
                "ONEINBOX_API_KEY": SANDBOX_KEY,
                "ONEINBOX_BASE_URL": emulator.url,
                "ONEINBOX_AGENT_ID": options.agents[0],
                "BROKER_ALLOWED_ORIGINS": LOOPBACK_ORIGINS,
                # Enough to play with, and soon used up when one wants to see that.
                "BROKER_SESSION_LIMITS": "20/minute",
                "BROKER_MAX_LIVE_CALLS": "20",
                "BROKER_EXPOSE": "transcript,messages,summary,outcome",
            },
            env_file=None,
        )
        url = url_of(listener)
        typer.echo(
            f"The broker listens on {url}, in front of an emulated OneInbox on {emulator.url}.\n\n"
            f"Explore it:       {url}/docs\n"
            f"Start a call:     curl -i -X POST {url}/session\n"
            f"Follow the call:  curl -N {url}LOCATION/events   (LOCATION: as the answer says)\n\n"
            "Ctrl-C ends both."
        )
        sys.stdout.flush()
        await create_server(create_app(settings)).serve(sockets=[listener])


@cli.command()
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
    typer.echo(
        f"The emulated OneInbox listens on {url}; key {api_key}, agent {options.agents[0]}.\n\n"
        f"ONEINBOX_BASE_URL={url} ONEINBOX_API_KEY={api_key} ONEINBOX_AGENT_ID={options.agents[0]} "
        "oneinbox-broker serve"
    )
    sys.stdout.flush()
    emulator_server(options).run(sockets=[listener])


@cli.command()
def openapi() -> None:
    """Print the OpenAPI document; needs no key."""
    settings = load_settings({"ONEINBOX_API_KEY": "oi_sk_none", "ONEINBOX_AGENT_ID": "none"}, env_file=None)
    typer.echo(json.dumps(create_app(settings).openapi(), indent=2, ensure_ascii=False))


@cli.command()
def pause(
    duration: Annotated[str, typer.Option("--for", help="How long: 90s, 30m, 1h, 1d.")] = "1h",
) -> None:
    """Stop giving out sessions, on all replicas, until it ends or `resume`."""
    seconds = _seconds(duration)

    async def run(operator: Operator) -> str:
        await operator.brake.pause(seconds)
        return f"Paused for {duration}: no sessions on any replica until then, or until `oneinbox-broker resume`."

    _operate(run)


@cli.command()
def resume() -> None:
    """End a pause."""

    async def run(operator: Operator) -> str:
        return "Sessions are given again." if await operator.brake.resume() else "There was no pause."

    _operate(run)


@cli.command()
def block(
    user: Annotated[str, typer.Argument(help="The user's id; in anonymous mode an address.")],
    duration: Annotated[str, typer.Option("--for", help="How long: 90s, 30m, 1h, 1d.")] = "1d",
) -> None:
    """Give a user no more sessions, on all replicas."""
    seconds = _seconds(duration)

    async def run(operator: Operator) -> str:
        await operator.brake.block(operator.user(user), seconds)
        return f"Blocked for {duration}."

    _operate(run)


@cli.command()
def unblock(user: Annotated[str, typer.Argument(help="The user's id; in anonymous mode an address.")]) -> None:
    """End a user's block."""

    async def run(operator: Operator) -> str:
        return "Unblocked." if await operator.brake.unblock(operator.user(user)) else "There was no block."

    _operate(run)


@cli.command()
def status() -> None:
    """Say how much of the global limits is used, and what is stopped."""
    _operate(lambda operator: operator.status())


webhook = typer.Typer(help="OneInbox's webhook for this broker, from BROKER_PUBLIC_URL and BROKER_WEBHOOK_SECRET.")
cli.add_typer(webhook, name="webhook", no_args_is_help=True)


@webhook.command("register")
def register_webhook() -> None:
    """Have OneInbox deliver its events to this broker."""
    _operate_webhooks(lambda operator: operator.register())


@webhook.command("list")
def list_webhooks() -> None:
    """List the account's webhooks."""
    _operate_webhooks(lambda operator: operator.list())


@webhook.command("remove")
def remove_webhook(
    webhook_id: Annotated[str, typer.Argument(metavar="ID", help="As `webhook list` shows it.")],
) -> None:
    """Remove a webhook."""
    _operate_webhooks(lambda operator: operator.remove(webhook_id))


def _operate_webhooks(work: Callable[[WebhookOperator], Awaitable[str]]) -> None:
    settings = _settings()
    configure_logging("error", settings.log_format)
    try:
        typer.echo(asyncio.run(operate_webhooks(settings, work)))
    except SettingsError as error:
        _refuse(*error.lines)
    except OneInboxError as error:
        _refuse(f"OneInbox {error.reason}", status=1)


def _operate(work: Callable[[Operator], Awaitable[str]]) -> None:
    """Run an operator's command on the shared store, and print what it says."""
    settings = _settings()
    configure_logging("error", settings.log_format)
    try:
        typer.echo(asyncio.run(operate(settings, work)))
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


def _warn_about_files(settings: Settings) -> None:
    """Each waiting session takes two connections, each stream one."""
    wanted = 2 * settings.max_waiting + settings.max_streams_total + 100
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < wanted:
        log.warning("too_few_open_files", ulimit=allowed, wanted=wanted, remedy=f"ulimit -n {wanted}")


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        _refuse(f"--port {port}: cannot listen on {host} ({error.strerror})", status=1)


def _refuse(*lines: str, status: int = 2) -> NoReturn:
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    raise SystemExit(status)
