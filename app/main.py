"""The ASGI app for `uvicorn app.main:app`."""

import sys
from typing import Any

import app.telemetry.plain_structlog  # noqa: F401 - before anything imports structlog
from app.api.app import create_app
from app.broker.build import refuse_foreign_store
from app.config.loading import load_settings
from app.config.settings import SettingsError
from app.server.gc import freeze_gc
from app.telemetry.logging import configure_logging


def __getattr__(name: str) -> Any:
    """Build `app` from the environment's settings, on access."""
    if name != "app":
        raise AttributeError(name)
    try:
        settings = load_settings()
        made = create_app(settings)
        refuse_foreign_store(settings)
    except SettingsError as error:
        sys.stderr.write("".join(f"{line}\n" for line in error.lines))
        raise SystemExit(2) from None
    configure_logging(settings.log_level, settings.log_format)
    freeze_gc()
    return made
