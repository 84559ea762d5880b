"""The broker's commands in this process: quicker than starting one, and measured by coverage."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import structlog
from typer.testing import CliRunner

from app.cli.commands import cli
from tests.support.processes import Finished

NAMES = ("", "uvicorn", "uvicorn.error", "uvicorn.access")


@contextmanager
def logging_restored() -> Iterator[None]:
    """Restore the configuration of logging afterwards."""
    was = structlog.get_config()
    loggers = [logging.getLogger(name) for name in NAMES]
    states = [(logger.handlers, logger.level, logger.propagate, logger.disabled) for logger in loggers]
    try:
        yield
    finally:
        structlog.configure(**was)
        for logger, (handlers, level, propagate, disabled) in zip(loggers, states, strict=True):
            logger.handlers, logger.propagate, logger.disabled = handlers, propagate, disabled
            logger.setLevel(level)


def invoke(*arguments: str, environ: Mapping[str, str]) -> Finished:
    """Run a command that ends by itself. An event loop calls this with `asyncio.to_thread`."""
    with logging_restored():
        result = CliRunner().invoke(cli, arguments, env=environ, catch_exceptions=False)
    return Finished(result.exit_code, result.stdout, result.stderr, seconds=0)
