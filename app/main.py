"""The ASGI app for `uvicorn app.main:app`."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from app.telemetry import plain_structlog  # noqa: F401 - before anything imports structlog; `import app.…` would bind `app`

# isort: split
from app.api.app import create_app
from app.broker.build import WORKERS_WITHOUT_STORE, load_checked_settings, refuse_foreign_store
from app.config.settings import SettingsError
from app.server.gc import freeze_gc
from app.server.server import workers_of_uvicorn
from app.telemetry.logging import configure_logging


def __getattr__(name: str) -> Any:
    """Build `app` from the environment's settings, on access."""
    if name != "app":
        raise AttributeError(name)
    try:
        settings = load_checked_settings()
        made = create_app(settings)
        refuse_foreign_store(settings)
    except SettingsError as error:
        _refuse(error.lines)
    if settings.store_url.get_secret_value() == "memory://" and workers_of_uvicorn() > 1:
        _refuse([WORKERS_WITHOUT_STORE], with_parent=True)
    configure_logging(settings.log_level, settings.log_format)
    freeze_gc()
    return made


def _refuse(lines: Sequence[str], *, with_parent: bool = False) -> NoReturn:
    """Print these lines, and exit. `with_parent`: end the parent, too, which would start workers forever."""
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()
    parent = multiprocessing.parent_process()
    if with_parent and parent is not None and parent.pid is not None:
        # It handles every other signal, and would exit with status 0.
        os.kill(parent.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    raise SystemExit(2)
