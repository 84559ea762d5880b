"""`doctor`: run the checks, and print what they find."""

import asyncio
import sys

from app.cli.process import refuse, say
from app.config.settings import split_url
from app.doctor.checks import diagnose
from app.doctor.findings import all_ok, as_json, as_text
from app.doctor.probe import probe
from app.telemetry.logging import configure_logging
from app.telemetry.terminal import has_colour, width_of


def run_doctor(probe_url: str | None, *, as_json_object: bool) -> bool:
    """Check these settings, or the broker at `probe_url`. Return whether all is well."""
    configure_logging("error")
    if probe_url is not None:
        _check_probe_url(probe_url)
    return asyncio.run(_run(probe_url, as_json_object))


async def _run(probe_url: str | None, as_json_object: bool) -> bool:
    findings = await (diagnose() if probe_url is None else probe(probe_url))
    # Printed before the loop ends: the thread of a name that does not resolve delays that.
    out = sys.stdout
    say(
        as_json(findings)
        if as_json_object
        else as_text(findings, encoding=out.encoding, colour=has_colour(out), width=width_of(out))
    )
    return all_ok(findings)


def _check_probe_url(url: str) -> None:
    try:
        parts = split_url(url)
        wrong = "has a query or fragment" if parts.query or parts.fragment else ""
    except ValueError as error:
        wrong = str(error)
    if wrong:
        refuse(f"--probe: {wrong}; takes a broker's public URL, such as https://voice.example.com")
