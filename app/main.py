"""The application: settings in, FastAPI app out. Middleware order and routers, nothing else."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypedDict
from urllib.parse import urlsplit

import httpx
from fastapi import FastAPI
from slowapi.errors import RateLimitExceeded
from starlette.middleware import Middleware

from app import __version__, health, metrics_page, openapi, problem_pages, problems
from app.broker import Broker, check, open_broker
from app.calls import routes as calls
from app.config import Settings, SettingsError, load_settings, origin_of
from app.docs import routes as docs
from app.limits.service import on_refused
from app.middleware.origins import Origins
from app.middleware.response_headers import ResponseHeaders
from app.middleware.root_path import RootPath
from app.sessions import routes as sessions
from app.sessions.schemas import SessionRequest
from app.telemetry.logging import configure_logging
from app.telemetry.memory import settle_memory
from app.telemetry.metrics import Metrics
from app.telemetry.requests import RequestLog
from app.telemetry.traces import TraceRequests, Traces, are_wanted


class State(TypedDict):
    """What the lifespan hands to every request as `request.state`."""

    broker: Broker
    metrics: Metrics
    traces: Traces | None


def create_app(settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> FastAPI:
    """The broker as an ASGI application.

    Connections are opened when the server starts its lifespan. `transport` replaces the connection to OneInbox.
    Raises SettingsError.
    """

    check(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with open_broker(settings, transport) as broker:
            yield {"broker": broker, "metrics": broker.metrics, "traces": broker.traces}

    app = FastAPI(
        title="OneInbox token broker",
        version=__version__,
        summary="Starts OneInbox voice calls for browsers, keeps the API key on the server, and bounds the spending.",
        # Its traces would hold paths, and paths hold call keys; the metrics and logs here are the broker's own.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # served beside the explorer
        redirect_slashes=False,
        middleware=[
            Middleware(RootPath, prefix=settings.root_path),
            Middleware(RequestLog),
            *([Middleware(TraceRequests)] if are_wanted() else []),
            Middleware(ResponseHeaders),
            Middleware(
                Origins,
                allowed=settings.allowed_origins,
                own=origin_of(urlsplit(settings.public_url)) if settings.public_url else None,
                credentials=settings.auth == "header" or settings.jwt_cookie is not None,
                require=settings.require_origin,
                same_site_posts=settings.auth == "header",
            ),
            Middleware(problems.UnhandledErrors),
        ],
    )
    problems.install(app)
    app.add_exception_handler(RateLimitExceeded, on_refused)
    openapi.install(app, SessionRequest)
    # The routes themselves: an included router would be matched twice for each request.
    for router in (sessions.router, calls.router, calls.webhooks):
        app.router.routes.extend(router.routes)
    app.include_router(health.router)
    app.include_router(metrics_page.router)
    app.include_router(problem_pages.router)
    if settings.docs:
        app.include_router(docs.router)
    return app


def __getattr__(name: str) -> Any:
    """`uvicorn app.main:app`: the application from the environment's settings, made when it is asked for."""
    if name != "app":
        raise AttributeError(name)
    try:
        settings = load_settings()
        made = create_app(settings)
    except SettingsError as error:
        sys.stderr.write("".join(f"{line}\n" for line in error.lines))
        raise SystemExit(2) from None
    configure_logging(settings.log_level, settings.log_format)
    settle_memory()
    return made
