"""The parts of one running broker, built and closed together, handed to routes as one typed value."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

import httpx
from fastapi import Depends, Request

from app.calls.ownership import Ownership
from app.calls.service import Calls
from app.config import Settings, is_loopback
from app.identity import Identity
from app.identity.anonymous import Anonymous
from app.keyring import Keyring
from app.limits import Limits
from app.oneinbox import OneInbox
from app.oneinbox.transport import open_transport
from app.sessions.policy import Agent, Policy
from app.sessions.service import Sessions
from app.store import Store, open_store


@dataclass(frozen=True, slots=True)
class Broker:
    """Everything a route may need.

    `identity`: who is asking. `ownership`: names calls and knows whose they are. `sessions`: starts calls. `calls`:
    reads them. `store`: the shared memory, for the readiness check. `root_path`: prefix of every path it hands out.
    """

    identity: Identity
    ownership: Ownership
    sessions: Sessions
    calls: Calls
    store: Store
    root_path: str


@asynccontextmanager
async def open_broker(settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> AsyncIterator[Broker]:
    """Build a broker inside the running event loop; `transport` replaces the connection to OneInbox."""
    keyring = Keyring(secret_lines(settings))
    ownership = Ownership(keyring)
    agents = _agents(settings)
    if transport is None:
        transport = open_transport(settings.oneinbox_base_url, pool_size=settings.max_waiting)
    oneinbox = OneInbox(
        settings.oneinbox_base_url,
        settings.oneinbox_api_key,
        transport,
        timeout=settings.oneinbox_timeout,
        connect_timeout=settings.oneinbox_connect_timeout,
        insecure_media=is_loopback(urlsplit(settings.oneinbox_base_url).hostname or ""),
    )
    store = open_store("memory://")
    try:
        yield Broker(
            identity=Anonymous(settings.trusted_proxies),
            ownership=ownership,
            sessions=Sessions(
                policy=Policy(agents, default="default"),
                limits=Limits(store, session_limits=settings.session_limits),
                oneinbox=oneinbox,
                ownership=ownership,
            ),
            calls=Calls(
                oneinbox=oneinbox,
                ownership=ownership,
                agent_names={agent.agent_id: agent.name for agent in agents.values()},
                expose=frozenset(settings.expose),
            ),
            store=store,
            root_path=settings.root_path,
        )
    finally:
        await store.aclose()
        await oneinbox.aclose()


def secret_lines(settings: Settings) -> list[str]:
    """The secrets that keys are derived from, newest first."""
    if settings.secret is None:
        return [settings.oneinbox_api_key.get_secret_value()]
    return [line for line in settings.secret.get_secret_value().splitlines() if line.strip()]


def _agents(settings: Settings) -> dict[str, Agent]:
    assert settings.oneinbox_agent_id is not None  # noqa: S101 - load_settings requires it
    agent = Agent(
        name="default",
        agent_id=settings.oneinbox_agent_id,
        variables=None if "*" in settings.allowed_variables else frozenset(settings.allowed_variables),
        overrides=frozenset(settings.allowed_overrides),
    )
    return {agent.name: agent}


async def _broker(request: Request) -> Broker:
    broker: Broker = request.state.broker
    return broker


BrokerDep = Annotated[Broker, Depends(_broker)]
