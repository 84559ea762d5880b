"""`serve`: the broker with the settings of its environment."""

import os
from contextlib import AbstractContextManager, nullcontext

import app.telemetry.plain_structlog  # noqa: F401 - before anything imports structlog
from app.api.app import create_app
from app.broker.build import WORKERS_WITHOUT_STORE, load_checked_settings, refuse_foreign_store
from app.cli.process import checked, listen, refuse
from app.cli.startup_banner import announce
from app.config.validation import unquoted
from app.server.gc import freeze_gc
from app.server.server import create_server, serve_with_workers, url_of
from app.telemetry.logging import configure_logging
from app.telemetry.metrics import use_shared_directory


def where_to_listen(host: str | None, port: int | None) -> tuple[str, int]:
    """Return host and port: as given, else as PORT says, else 127.0.0.1:8000.

    Platforms that set PORT (Cloud Run, Render, Heroku) connect from outside, so it also means all addresses.
    """
    text = unquoted(os.environ.get("PORT", ""))
    if port is None and text and not (text.isascii() and text.isdecimal() and int(text[:9]) < 65536):
        refuse("PORT: is not a port; takes a whole number, 0 to 65535")
    return host or ("0.0.0.0" if text else "127.0.0.1"), port if port is not None else int(text or 8000)  # noqa: S104


def run_broker(host: str, port: int, workers: int) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    settings = checked(load_checked_settings)
    app = checked(lambda: create_app(settings))
    if workers > 1 and settings.store_url.get_secret_value() == "memory://":
        refuse(WORKERS_WITHOUT_STORE)
    configure_logging(settings.log_level, settings.log_format)
    checked(lambda: refuse_foreign_store(settings))
    listener = listen(host, port)
    announce(settings, host, url=url_of(listener), workers=workers)
    freeze_gc()
    if workers > 1:
        with nullcontext() if settings.metrics_token is None else _use_shared_directory():
            serve_with_workers(listener, workers)
    else:
        create_server(app).run(sockets=[listener])


def _use_shared_directory() -> AbstractContextManager[str]:
    try:
        return use_shared_directory()
    except OSError as error:
        refuse(
            f"BROKER_METRICS_TOKEN: several workers need a directory for temporary files ({error.strerror})", status=1
        )
