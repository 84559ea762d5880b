"""The FastAPI application: its middleware, in order, and its routers."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypedDict
from urllib.parse import urlsplit

import httpx
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from app import __version__
from app.api import calls, health, metrics, openapi, problem_types, sessions, webhooks
from app.api.client import ClientFiles, load_client_files
from app.api.docs import routes as docs
from app.api.middleware.cors import CorsPolicy
from app.api.middleware.error_responses import ErrorResponses
from app.api.middleware.head import HeadAsGet
from app.api.middleware.request_log import RequestLog
from app.api.middleware.root_path import RootPath
from app.api.middleware.security_headers import SecurityHeaders
from app.api.middleware.tracing import TraceRequests
from app.api.routing import Routes
from app.broker.build import check, open_broker
from app.broker.context import Broker
from app.clock import SYSTEM_CLOCK, Clock
from app.config.settings import Settings, origin_of
from app.sessions.schemas import SessionRequest
from app.store import Store
from app.telemetry.metrics import Metrics
from app.telemetry.traces import Traces, traces_enabled


class State(TypedDict):
    """The lifespan's state, in every request as `request.state`."""

    broker: Broker
    metrics: Metrics
    traces: Traces | None


class Application(FastAPI):
    """FastAPI without middleware of its own: the broker's does what is needed of it, at a tenth of a session's cost."""

    def build_middleware_stack(self) -> ASGIApp:
        """Return the given middleware around the routes."""
        app: ASGIApp = Routes(self.router)
        for made, args, options in reversed(self.user_middleware):
            app = made(app, *args, **options)
        return app


def create_app(
    settings: Settings,
    transport: httpx.AsyncBaseTransport | None = None,
    *,
    store_factory: Callable[[], Store] | None = None,
    clock: Clock = SYSTEM_CLOCK,
    any_host: bool = False,
) -> FastAPI:
    """Return the broker as an ASGI application. Raises SettingsError.

    Connections open when the server starts the lifespan. `transport` replaces the connection to OneInbox,
    `store_factory` returns the store to use instead of BROKER_STORE_URL's. `any_host`: the broker's own origin is
    whatever Host a request names; for the sandbox, whose key opens nothing.
    """
    check(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with open_broker(settings, transport, store_factory=store_factory, clock=clock) as broker:
            yield {"broker": broker, "metrics": broker.metrics, "traces": broker.traces}

    app = Application(
        title="OneInbox token broker",
        version=__version__,
        summary="Starts OneInbox voice calls for browsers, keeps the API key on the server, and limits spending.",
        # FastAPI's traces would hold paths, and paths hold call keys; the broker has its own metrics and logs.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # app.api.docs serves it
        redirect_slashes=False,
        middleware=[
            *([Middleware(RootPath, prefix=settings.root_path)] if settings.root_path else []),
            Middleware(RequestLog),
            Middleware(ClientFiles, files=load_client_files(settings)),
            *([Middleware(TraceRequests)] if traces_enabled() else []),
            Middleware(SecurityHeaders),
            Middleware(
                CorsPolicy,
                allowed=settings.allowed_origins,
                own=origin_of(urlsplit(settings.public_url)) if settings.public_url else None,
                any_host=any_host,
                credentials=settings.auth == "header" or settings.jwt_cookie is not None,
                require=settings.require_origin,
                same_site_posts=settings.auth == "header",
            ),
            Middleware(ErrorResponses),
            Middleware(HeadAsGet),
        ],
    )
    openapi.install(app, SessionRequest)
    # The routes themselves: an included router would be matched twice per request.
    for router in (sessions.router, calls.router, webhooks.router):
        app.router.routes.extend(router.routes)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.include_router(problem_types.router)
    if settings.docs:
        app.include_router(docs.router)
    return app
