"""The commands. Each imports what it needs when it runs, so that `--help` is quick."""

import json
import re
from typing import Annotated

import typer

from app import __version__
from app.cli.process import checked, open_standard_streams, refuse, say

EXIT_STATUS = "Exit status: 0 fine, 1 something is wrong, 2 wrong usage or settings."


def ending(*examples: str) -> str:
    """Return the end of a command's help."""
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

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0: a free one.", min=0, max=65535)]
Duration = Annotated[str, typer.Option("--for", help="How long: 90s, 30m, 1h, 1d.")]
WHO = (
    "The user's id, in anonymous mode an address; or the pseudonym that logs show, which changes when the first line "
    "of BROKER_SECRET does."
)
UserName = Annotated[str, typer.Argument(metavar="USER", help=WHO)]
OfUser = Annotated[str, typer.Option("--user", metavar="USER", help=f"Only this user's. {WHO}")]
OfAgent = Annotated[str, typer.Option("--agent", metavar="AGENT", help="Only this agent's, by its name.")]
MAY_BEGIN_WITH_A_DASH = {"ignore_unknown_options": True}
"""As one pseudonym in 64 does."""
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why, for `status` and the log; at most 200 characters.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Entry point of the console script."""
    open_standard_streams()
    cli()


def _print_version(wanted: bool) -> None:
    if wanted:
        say(__version__)
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
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1; with PORT set 0.0.0.0]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0: a free one. [default: PORT or 8000]", min=0, max=65535)
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes; more than one needs a shared store.", min=1)] = 1,
) -> None:
    """Run the broker with settings from the environment and .env."""
    from app.cli.serve import run_broker, where_to_listen

    run_broker(*where_to_listen(host, port), workers)


@cli.command(epilog=ending("sandbox --port 0", "sandbox --livekit"))
def sandbox(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    *,
    livekit: Annotated[
        bool,
        typer.Option("--livekit", help="Start livekit-server, which must be on the PATH, and talk there."),
    ] = False,
    livekit_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Talk on this LiveKit server; with the extra `voice` an agent answers."),
    ] = None,
    livekit_key: Annotated[str | None, typer.Option(metavar="KEY", help="The LiveKit server's API key.")] = None,
    livekit_secret: Annotated[
        str | None,
        typer.Option(
            metavar="SECRET",
            envvar="LIVEKIT_API_SECRET",
            help="The LiveKit server's API secret. Safer in the environment: every user of this machine "
            "can read arguments.",
        ),
    ] = None,
) -> None:
    """Try it without a key: broker, demo page, simulated OneInbox."""
    from app.cli.sandbox import run_sandbox

    run_sandbox(host, port, livekit_url, livekit_key, livekit_secret, start_livekit=livekit)


@cli.command(epilog=ending("emulator --api-key oi_sk_of_my_tests"))
def emulator(
    host: Host = "127.0.0.1",
    port: Port = 9000,
    api_key: Annotated[str, typer.Option(help="The key it accepts.")] = "oi_sk_sandbox",
) -> None:
    """Run the simulated OneInbox alone, for tests of any kind."""
    from app.cli.sandbox import run_emulator

    run_emulator(host, port, api_key)


@cli.command(epilog=ending("doctor", "doctor --probe https://voice.example.com"))
def doctor(
    as_json_object: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    probe_url: Annotated[
        str | None,
        typer.Option(
            "--probe",
            metavar="URL",
            help="Instead, check that the broker at this URL refuses what it must; needs no settings.",
        ),
    ] = None,
) -> None:
    """Check settings, OneInbox, key and store, and say what to do.

    Also checks agents, clock, logins, origins, proxies and limits. Starts no call and prints no secret.
    """
    from app.cli.doctor import run_doctor

    raise typer.Exit(0 if run_doctor(probe_url, as_json_object=as_json_object) else 1)


@cli.command(epilog=ending("openapi > openapi.json"))
def openapi() -> None:
    """Print the OpenAPI document; needs no key."""
    from app.api.app import create_app
    from app.config.loading import load_settings

    settings = load_settings({"ONEINBOX_API_KEY": "oi_sk_none", "ONEINBOX_AGENT_ID": "none"}, env_file=None)
    app = checked(lambda: create_app(settings))
    say(json.dumps(app.openapi(), indent=2, ensure_ascii=False))


@cli.command(epilog=ending("pause --for 30m --reason 'invoice in dispute'", "pause --hang-up"))
def pause(
    duration: Duration = "1h",
    reason: Reason = "",
    hang_up: Annotated[bool, typer.Option("--hang-up", help="Also end every running call.")] = False,
) -> None:
    """Start no new sessions on any replica, for a time."""
    from app.cli.calls import hang_up_all
    from app.cli.operator import run_control

    seconds = _seconds(duration)
    _check_reason(reason)
    run_control(
        lambda operator: operator.pause(seconds, reason),
        f"Paused for {duration}: no replica starts sessions until then, or until `oneinbox-broker resume`.",
        then=hang_up_all if hang_up else None,
    )


@cli.command(epilog=ending("resume"))
def resume() -> None:
    """End a pause."""
    from app.cli.operator import run_control

    run_control(lambda operator: operator.resume(), "Sessions can start again.", otherwise="There was no pause.")


@cli.command(
    context_settings=MAY_BEGIN_WITH_A_DASH,
    epilog=ending("block 203.0.113.7 --for 1d --reason 'fifty calls a minute'", "block kq3VZt0aLr9xW2mD"),
)
def block(user: UserName, duration: Duration = "1d", reason: Reason = "") -> None:
    """Start no new sessions for a user on any replica."""
    from app.cli.operator import run_control

    seconds = _seconds(duration)
    _check_reason(reason)
    run_control(lambda operator: operator.block(user, seconds, reason), f"Blocked for {duration}.")


@cli.command(context_settings=MAY_BEGIN_WITH_A_DASH, epilog=ending("unblock 203.0.113.7"))
def unblock(user: UserName) -> None:
    """End a user's block."""
    from app.cli.operator import run_control

    run_control(lambda operator: operator.unblock(user), "Unblocked.", otherwise="There was no block.")


LONGEST_DAYS = 3650


def _seconds(duration: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,6})([smhd])", duration)
    if match is None:
        refuse(f"--for {duration!r}: is not a duration; takes a number and s, m, h or d: 90s, 30m, 1h, 1d")
    seconds = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    if seconds > LONGEST_DAYS * 86400:
        refuse(f"--for {duration!r}: takes at most {LONGEST_DAYS}d")
    return seconds


def _check_reason(reason: str) -> None:
    from app.limits.kill_switch import LONGEST_REASON

    if len(reason) > LONGEST_REASON or not reason.isprintable():
        refuse(f"--reason: takes at most {LONGEST_REASON} characters on one line, without control characters")


@cli.command(epilog=ending("status", "status --json"))
def status(as_json: AsJson = False) -> None:
    """Show the global limits' use, replicas, pauses and blocks."""
    from app.cli.operator import run_status

    run_status(as_json=as_json)


calls = typer.Typer(help="List running calls, and end them.\n\nThese need a shared store.", epilog=ending("calls list"))
cli.add_typer(calls, name="calls", no_args_is_help=True)


@calls.command("list", epilog=ending("calls list", "calls list --agent support --json"))
def list_calls(user: OfUser = "", agent: OfAgent = "", as_json: AsJson = False) -> None:
    """List the running calls, oldest first, as this deployment knows them."""
    from app.cli.calls import run_list

    run_list(user, agent, as_json=as_json)


@calls.command("stop", epilog=ending("calls stop call_abc123", "calls stop --user 203.0.113.7", "calls stop --all"))
def stop_calls(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="CALL", help="OneInbox's ids, as logs show them.")
    ] = None,
    user: OfUser = "",
    agent: OfAgent = "",
    everything: Annotated[bool, typer.Option("--all", help="Every running call.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask first.")] = False,
) -> None:
    """End running calls now, and say what became of each.

    On a terminal, more than one call asks first. Exits with status 1 if a call has not ended within 30 seconds.
    """
    from app.cli.calls import run_stop

    if sum(map(bool, (names, user, agent, everything))) != 1:
        refuse("calls stop: takes one of CALL…, --user, --agent and --all")
    run_stop(names or [], user, agent, yes=yes)


@calls.command("forget", epilog=ending("calls forget call_abc123"))
def forget_call(
    name: Annotated[str, typer.Argument(metavar="CALL", help="Its id, or its request's id, as `calls list` shows it.")],
) -> None:
    """Drop a call that could not be stopped or found, once you know that it has ended; frees its slots."""
    from app.cli.calls import forget
    from app.cli.operator import run_operator

    run_operator(lambda operator: forget(operator, name))


webhook = typer.Typer(
    help="Manage OneInbox's webhook for this broker.\n\n"
    "The settings BROKER_PUBLIC_URL and BROKER_WEBHOOK_SECRET give its URL.",
    epilog=ending("webhook register"),
)
cli.add_typer(webhook, name="webhook", no_args_is_help=True)


@webhook.command("register", epilog=ending("webhook register"))
def register_webhook() -> None:
    """Have OneInbox deliver its events to this broker."""
    from app.cli.operator import run_webhooks

    run_webhooks(lambda operator: operator.register())


@webhook.command("list", epilog=ending("webhook list"))
def list_webhooks() -> None:
    """List the account's webhooks."""
    from app.cli.operator import run_webhooks

    run_webhooks(lambda operator: operator.list())


@webhook.command("remove", epilog=ending("webhook remove wh_abc123"))
def remove_webhook(
    webhook_id: Annotated[str, typer.Argument(metavar="ID", help="As `webhook list` shows it.")],
) -> None:
    """Remove a webhook."""
    from app.cli.operator import run_webhooks

    run_webhooks(lambda operator: operator.remove(webhook_id))
