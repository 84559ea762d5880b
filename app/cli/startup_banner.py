"""What `serve` says at its start."""

import sys

import structlog

from app.config.settings import Settings
from app.doctor.findings import as_lines
from app.doctor.settings_review import settings_warnings
from app.telemetry.terminal import has_colour, width_of

log = structlog.get_logger(__name__)


def announce(settings: Settings, host: str, *, url: str, workers: int) -> None:
    """Say where the broker listens, in which mode and with which limits, and what of that deserves a second thought.

    In words on a terminal; as records of the log elsewhere, and where BROKER_LOG_FORMAT names a format.
    """
    if settings.log_format is None and sys.stderr.isatty():
        sys.stderr.write(_in_words(settings, host, url=url, workers=workers))
        return
    log.info(
        "listening",
        url=url,
        workers=workers,
        auth=settings.auth,
        limits=settings.session_limits,
        global_limits=settings.global_session_limits,
        live_calls=settings.max_live_calls,
    )
    for caution in settings_warnings(settings, host):
        log.warning("settings_warning", about=caution.name, meaning=caution.detail, remedy=caution.remedy)


USERS = {
    "anonymous": "anonymous, told apart by address",
    "jwt": "signed in, by their token",
    "header": "signed in, by what the proxy says",
}


def _in_words(settings: Settings, host: str, *, url: str, workers: int) -> str:
    by = f"with {workers} workers" if workers > 1 else "as one process"
    lines = [
        f"The broker listens on {url}, {by}. Ctrl-C ends it.",
        "",
        f"Users:     {USERS[settings.auth]} (BROKER_AUTH={settings.auth})",
        f"Sessions:  {settings.session_limits} per user, {settings.global_session_limits} of all users together",
        f"At once:   {settings.max_live_calls} calls per user, {settings.max_live_calls_total or 'any number'} in all",
    ]
    minutes = ((settings.talk_minutes, "per user"), (settings.global_talk_minutes, "of all users together"))
    if told := [f"{number} minutes in 24 h {whose}" for number, whose in minutes if number]:
        lines += [f"Talk:      {', '.join(told)}"]
    lines += [""]
    if warnings := settings_warnings(settings, host):
        encoding, colour = sys.stderr.encoding, has_colour(sys.stderr)
        lines += [*as_lines(warnings, encoding=encoding, colour=colour, width=width_of(sys.stderr)), ""]
    return "\n".join(lines) + "\n"
