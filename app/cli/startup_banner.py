"""The text that `serve` prints when it starts."""

import sys

import structlog

from app.config.settings import Settings
from app.doctor.findings import as_lines
from app.doctor.settings_review import settings_warnings
from app.telemetry.terminal import has_colour, width_of

log = structlog.get_logger(__name__)

USERS = {
    "anonymous": "anonymous, told apart by address",
    "jwt": "signed in, identified by their token",
    "header": "signed in, identified by the proxy's header",
}


def announce(settings: Settings, host: str, *, url: str, workers: int) -> None:
    """Print where the broker listens, its mode and limits, and warnings about its settings.

    In words on a terminal; as log records elsewhere, and where BROKER_LOG_FORMAT is set.
    """
    warnings = settings_warnings(settings, host)
    if settings.log_format is None and sys.stderr.isatty():
        lines = _in_words(settings, url=url, workers=workers)
        if warnings:
            encoding, colour = sys.stderr.encoding, has_colour(sys.stderr)
            lines += [*as_lines(warnings, encoding=encoding, colour=colour, width=width_of(sys.stderr)), ""]
        sys.stderr.write("\n".join(lines) + "\n")
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
    for each in warnings:
        log.warning("settings_warning", about=each.name, meaning=each.detail, remedy=each.remedy)


def _in_words(settings: Settings, *, url: str, workers: int) -> list[str]:
    by = f"with {workers} workers" if workers > 1 else "as one process"
    lines = [
        f"The broker listens on {url}, {by}. Ctrl-C stops it.",
        "",
        f"Users:     {USERS[settings.auth]} (BROKER_AUTH={settings.auth})",
        f"Sessions:  {settings.session_limits} per user, {settings.global_session_limits} for all users together",
        f"At once:   {settings.max_live_calls} calls per user, {settings.max_live_calls_total or 'any number'} in all",
    ]
    minutes = ((settings.talk_minutes, "per user"), (settings.global_talk_minutes, "for all users together"))
    if bounds := [f"{number} minutes in 24 h {scope}" for number, scope in minutes if number]:
        lines.append(f"Talk:      {', '.join(bounds)}")
    return [*lines, ""]
