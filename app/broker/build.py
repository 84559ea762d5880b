"""Build a running broker from its settings, and close it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

from app.broker.context import Broker
from app.broker.deployment import Deployment
from app.broker.gauges import Gauges
from app.broker.replicas import Reporter
from app.broker.secret_reload import SecretHandler, SecretReloader
from app.broker.shutdown import Shutdown
from app.calls.cache import CallCache
from app.calls.ownership import Ownership
from app.calls.poller import CallPoller
from app.calls.refresh_queue import RefreshQueue
from app.calls.service import Calls
from app.clock import SYSTEM_CLOCK, Clock
from app.config.agents import Agents, load_agents
from app.config.loading import load_settings, read_file, secret_lines
from app.config.plans import Plans, load_plans
from app.config.settings import Settings, SettingsError, is_loopback, takes
from app.config.surroundings import surroundings_mistakes
from app.identity.addresses import ClientAddresses
from app.identity.anonymous import Anonymous
from app.identity.base import Identity
from app.identity.header import HeaderIdentity
from app.identity.keyring import Keyring
from app.limits import Allowance, KillSwitch, Limits, LiveCalls, Reconciler
from app.limits.call_attempt import ALL_CALLS
from app.limits.ledger import LEASE_GRACE, Ledger
from app.limits.restorer import Restorer
from app.limits.sweeper import end_forever, settle, settle_forever, sweep_forever
from app.oneinbox import OneInbox
from app.oneinbox.client import BESIDE_STARTS
from app.oneinbox.transport import open_transport
from app.problems import KINDS
from app.sessions.challenge import Challenge
from app.sessions.idempotency import Idempotency
from app.sessions.policy import Policy
from app.sessions.service import Sessions
from app.store import KEPT, Store, StoreUnavailable, open_store
from app.store.url import parse_store_url
from app.telemetry.metrics import Metrics
from app.telemetry.traces import Traces, open_traces

if TYPE_CHECKING:
    from app.identity.keys import Keys, VerifyingKey

LONGEST_LEASE = 86400
"""Seconds until a slot is free if calls may run without limit."""
WORKERS_WITHOUT_STORE = (
    "BROKER_STORE_URL: is memory://, where each of several workers would count for itself; "
    "takes the URL of a Valkey or Redis that they share, such as redis://localhost:6379"
)
START_SECONDS = 1
"""Seconds that a start waits for OneInbox's allowance, so that the first session is refused too if it is used up, and
for the issuer's keys, so that the first login need not."""


def load_checked_settings() -> Settings:
    """Return the settings of the environment and `.env`. Raises SettingsError, with a line for each mistake."""
    return load_settings(further=mistakes)


def check(settings: Settings) -> None:
    """Raise SettingsError if there are `mistakes`."""
    if lines := mistakes(settings):
        raise SettingsError(lines)


def mistakes(settings: Settings) -> list[str]:
    """Return what only the parts can tell: of agents and plans files, keys, the store's URL, the surroundings."""
    lines = surroundings_mistakes()
    for look_at in (load_agents, load_plans, _keys, _check_store_url, _check_livekit_client):
        try:
            look_at(settings)
        except SettingsError as error:
            lines += error.lines
    return list(dict.fromkeys(lines))


def _check_store_url(settings: Settings) -> None:
    try:
        if (url := settings.store_url.get_secret_value()) != "memory://":
            parse_store_url(url)
    except ValueError as error:
        raise SettingsError([f"BROKER_STORE_URL: {error}; takes {takes('BROKER_STORE_URL')}"]) from None


def _check_livekit_client(settings: Settings) -> None:
    name = "BROKER_LIVEKIT_CLIENT"
    if settings.client and settings.livekit_client is not None:
        read_file(name, settings.livekit_client, takes(name))


def refuse_foreign_store(settings: Settings) -> None:
    """Raise SettingsError if the shared store is in use by another deployment; nothing while it does not answer."""
    url = settings.store_url.get_secret_value()
    if url == "memory://":
        return
    # Importing redis-py takes 6 MB and 75 ms; only a shared store needs it.
    from app.store.valkey import ValkeyStore  # noqa: PLC0415

    async def claim() -> None:
        async with ValkeyStore(url, timeout=settings.store_timeout, prefix=settings.store_prefix) as store:
            with contextlib.suppress(StoreUnavailable):
                await Deployment(store, load_agents(settings), lambda: settings).claim()

    with ThreadPoolExecutor(1) as pool:  # uvicorn imports the app inside its event loop
        pool.submit(asyncio.run, claim()).result()


@asynccontextmanager
async def open_broker(
    settings: Settings,
    transport: httpx.AsyncBaseTransport | None = None,
    *,
    store_factory: Callable[[], Store] | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> AsyncIterator[Broker]:
    """Run a broker inside the running event loop.

    `transport` replaces the connections to OneInbox and to the challenge service. `store_factory` returns the
    store to use instead of BROKER_STORE_URL's.
    """
    agents, plans, keys = load_agents(settings), load_plans(settings), _keys(settings, clock)
    identity = _identity(settings, keys, clock)
    keyring = Keyring(secret_lines(settings))
    secret_reloader = SecretReloader(settings)
    ownership = Ownership(keyring)
    metrics = Metrics(outcomes=("started", "replayed", "hung-up", *KINDS))
    async with AsyncExitStack() as stack:
        opened = store_factory() if store_factory else open_configured_store(settings, clock)
        store = await stack.enter_async_context(opened)
        traces = open_traces()
        if traces is not None:
            stack.push_async_callback(traces.aclose)
        oneinbox = open_oneinbox(
            settings,
            transport,
            reread_key=secret_reloader.reload,
            metrics=metrics,
            traces=traces,
            clock=Clock(store.now, clock.monotonic),
            warm=settings.warm_connections,
        )
        stack.push_async_callback(oneinbox.aclose)
        if store.shared:
            keyring.load_ciphers()  # each session needs them
        if keys is not None:
            stack.push_async_callback(keys.aclose)
            await keys.start()
        ledger = open_ledger(settings, plans, store)
        limits = open_limits(settings, agents, ledger, metrics=metrics, clock=clock)
        agent_ids = {agent.name: agent.agent_id for agent in agents.by_name.values()}
        live = LiveCalls(
            store,
            oneinbox,
            ledger,
            max_seconds=settings.max_call_seconds,
            join_timeout=settings.join_timeout,
            agent_ids=agent_ids,
            minutes_of=_minutes_of(settings),
            now=store.now,
            metrics=metrics,
        )
        reconciler = Reconciler(
            oneinbox,
            live,
            agent_ids=agent_ids,
            timeout=settings.oneinbox_timeout,
            now=store.now,
            metrics=metrics,
        )
        restorer = Restorer(
            store,
            oneinbox,
            live,
            keyring,
            agent_ids=agent_ids.values(),
            timeout=settings.oneinbox_timeout,
            now=store.now,
            metrics=metrics,
        )
        deployment = Deployment(store, agents, lambda: secret_reloader.settings)
        idempotency = Idempotency(store, keyring, live, timeout=settings.oneinbox_timeout, now=clock.now)
        kill_switch = KillSwitch(store, clock.monotonic)
        challenge = _challenge(settings, store, transport, stack, metrics)
        allowance = Allowance(store, oneinbox, clock=clock, metrics=metrics)
        sessions = Sessions(
            policy=Policy(agents, settings.variables_from_claims),
            allowance=allowance,
            limits=limits,
            live=live,
            reconciler=reconciler,
            oneinbox=oneinbox,
            keyring=keyring,
            idempotency=idempotency,
            challenge=challenge,
            max_waiting=settings.max_waiting,
            share_user_id=settings.share_user_id,
            metrics=metrics,
            now=store.now,
        )
        cache = CallCache(
            oneinbox=oneinbox,
            store=store,
            keyring=keyring,
            live=live,
            agent_names={agent.agent_id: agent.name for agent in agents.by_name.values()},
            expose=frozenset(settings.expose),
            clock=clock.monotonic,
            now=clock.now,
        )
        poller = CallPoller(
            cache,
            store,
            max_streams=settings.max_streams,
            max_streams_total=settings.max_streams_total,
            clock=clock.monotonic,
            now=clock.now,
            metrics=metrics,
        )
        calls = Calls(oneinbox, ownership, cache, poller, live, settings.warn_seconds, clock.now)
        refresh_queue = RefreshQueue(calls.refresh)
        stack.push_async_callback(refresh_queue.aclose)
        shutdown = Shutdown(settings.drain_seconds, poller.close)
        stack.enter_context(shutdown.on_signals())
        gauges = Gauges(
            metrics,
            store,
            kill_switch,
            limits,
            oneinbox,
            allowance,
            sessions,
            poller,
            settings.max_live_calls_total,
        )
        secret_reloader.register(secret_handlers(oneinbox, keyring, keys, challenge, store))
        await kill_switch.refresh()
        reporter = Reporter(store, kill_switch, clock)
        if store.shared:
            stack.push_async_callback(reporter.aclose)
        stack.push_async_callback(settle, live, reconciler)
        for work in (
            sweep_forever(live, reconciler),
            reconciler.run(),
            *((restorer.run(), deployment.keep(), reporter.run()) if store.shared else ()),
            settle_forever(live),
            end_forever(live),
            kill_switch.run(),
            allowance.run(),
            poller.run(),
            gauges.run(),
            secret_reloader.run(),
        ):
            stack.push_async_callback(_cancel, asyncio.create_task(work))
        await _wait_until_ready(allowance, keys)
        yield Broker(
            identity=identity,
            limits=limits,
            plans=plans,
            keyring=keyring,
            kill_switch=kill_switch,
            ownership=ownership,
            sessions=sessions,
            calls=calls,
            store=store,
            refresh_queue=refresh_queue,
            secret_reloader=secret_reloader,
            shutdown=shutdown,
            metrics=metrics,
            gauges=gauges,
            traces=traces,
        )


async def _wait_until_ready(allowance: Allowance, keys: "Keys | None") -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_SECONDS):
            await allowance.ready.wait()
            if keys is not None:
                await keys.ready()


def secret_handlers(
    oneinbox: OneInbox, keyring: Keyring, keys: "Keys | None", challenge: Challenge | None, store: Store
) -> Mapping[str, SecretHandler]:
    """Return a handler for each secret whose file may change at run time. Running requests keep the old secret."""

    def use_fixed_key(settings: Settings) -> None:
        key = _fixed_key(settings)
        if keys is not None and key is not None:
            keys.use(key)

    def use_challenge_secret(settings: Settings) -> None:
        if challenge is not None and settings.challenge_secret is not None:
            challenge.secret = settings.challenge_secret

    def use_store_url(settings: Settings) -> None:
        try:
            store.use(settings.store_url.get_secret_value())
        except ValueError as error:
            raise SettingsError([f"BROKER_STORE_URL: {error}"]) from None

    return {
        "ONEINBOX_API_KEY": lambda settings: oneinbox.use_key(settings.oneinbox_api_key),
        "BROKER_SECRET": lambda settings: keyring.use(secret_lines(settings)),
        "BROKER_JWT_SECRET": use_fixed_key,
        "BROKER_JWT_PUBLIC_KEY": use_fixed_key,
        "BROKER_CHALLENGE_SECRET": use_challenge_secret,
        # Each request reads these from the settings in force.
        "BROKER_WEBHOOK_SECRET": lambda _: None,
        "BROKER_METRICS_TOKEN": lambda _: None,
        "BROKER_STORE_URL": use_store_url,
    }


def open_configured_store(settings: Settings, clock: Clock = SYSTEM_CLOCK) -> Store:
    """Return the configured store, to be entered. Raises ValueError."""
    url = settings.store_url.get_secret_value()
    return open_store(url, clock, timeout=settings.store_timeout, prefix=settings.store_prefix)


def open_oneinbox(
    settings: Settings,
    transport: httpx.AsyncBaseTransport | None = None,
    *,
    reread_key: Callable[[], Awaitable[None]] | None = None,
    metrics: Metrics | None = None,
    traces: Traces | None = None,
    clock: Clock = SYSTEM_CLOCK,
    warm: int = 0,
) -> OneInbox:
    """Return a client of the configured account, inside the event loop. The caller closes it.

    `reread_key`: called after a 401, before the request is sent once more. `warm`: connections kept ready.
    """
    url, size = settings.oneinbox_base_url, settings.max_waiting + BESIDE_STARTS
    return OneInbox(
        settings.oneinbox_base_url,
        settings.oneinbox_api_key,
        transport or open_transport(url, pool_size=size, warm=warm, metrics=metrics),
        timeout=settings.oneinbox_timeout,
        connect_timeout=settings.oneinbox_connect_timeout,
        insecure_media=is_loopback(urlsplit(settings.oneinbox_base_url).hostname or ""),
        reread_key=reread_key,
        metrics=metrics,
        traces=traces,
        clock=clock,
    )


def open_ledger(settings: Settings, plans: Plans, store: Store, *, hangs_up: bool = True) -> Ledger:
    """Return the records of calls in a store. `hangs_up`: this process ends the calls whose records it moves."""
    lease = settings.max_call_seconds + LEASE_GRACE if settings.max_call_seconds else LONGEST_LEASE
    timed = plans.has_minutes or settings.global_talk_minutes is not None
    return Ledger(
        store,
        lease=lease,
        prefix=settings.store_prefix,
        hangs_up=hangs_up,
        listed=settings.auth != "anonymous",
        timed=timed,
        now=store.now,
    )


def _minutes_of(settings: Settings) -> Callable[[str], int | None]:
    """Return what the settings say of a set's minutes, in seconds; plans say it with each session."""

    def seconds(minutes: int | None) -> int | None:
        return None if minutes is None else minutes * 60

    def minutes_of(name: str) -> int | None:
        if settings.limits_mode == "observe":
            return None
        if name == ALL_CALLS:
            return seconds(settings.global_talk_minutes)
        return seconds(settings.talk_minutes) if settings.plans_file is None else KEPT

    return minutes_of


def open_limits(
    settings: Settings,
    agents: Agents,
    ledger: Ledger,
    metrics: Metrics | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Limits:
    """Return the configured limits on the store of a ledger."""
    return Limits(
        ledger.store,
        ledger,
        list(agents.by_name.values()),
        global_session_limits=settings.global_session_limits,
        request_limits=settings.request_limits,
        max_live_calls_total=settings.max_live_calls_total,
        talk_minutes_total=settings.global_talk_minutes,
        enforce=settings.limits_mode == "enforce",
        count_locally=settings.on_store_loss == "local",
        clock=clock.monotonic,
        metrics=metrics or Metrics(),
    )


def _identity(settings: Settings, keys: "Keys | None", clock: Clock) -> Identity:
    addresses = ClientAddresses(settings.trusted_proxies, settings.client_ip_header)
    if settings.auth == "header":
        return HeaderIdentity(addresses, settings.user_header)
    if keys is None:
        return Anonymous(addresses)
    from app.identity.jwt import JwtIdentity  # noqa: PLC0415 - as in _keys

    return JwtIdentity(
        addresses,
        keys,
        issuer=settings.jwt_issuer or "",
        audience=settings.jwt_audience or (),
        required_claims=settings.jwt_required_claims,
        user_claim=settings.jwt_user_claim,
        cookie=settings.jwt_cookie or "",
        now=clock.now,
    )


def _keys(settings: Settings, clock: Clock = SYSTEM_CLOCK) -> "Keys | None":
    """Return the keys that verify logins; None in modes without tokens."""
    if settings.auth != "jwt":
        return None
    # PyJWT and cryptography take 6 MB and 40 ms; only logins by token need them.
    from app.identity.jwks import KeySet  # noqa: PLC0415
    from app.identity.keys import FixedKey  # noqa: PLC0415

    fixed = _fixed_key(settings)
    if fixed is not None:
        return FixedKey(fixed)
    try:
        return KeySet(settings.jwt_jwks_url or "", settings.jwt_algorithms, clock=clock.monotonic)
    except ValueError as error:
        raise SettingsError([f"BROKER_JWT_JWKS_URL: {error}"]) from None


def _fixed_key(settings: Settings) -> "VerifyingKey | None":
    """Return the configured secret or public key of the issuer, if any. Raises SettingsError."""
    from app.identity.keys import public_key, secret_key  # noqa: PLC0415 - as in _keys

    for name, value, parse in (
        ("BROKER_JWT_SECRET", settings.jwt_secret, secret_key),
        ("BROKER_JWT_PUBLIC_KEY", settings.jwt_public_key, public_key),
    ):
        if value is not None:
            try:
                return parse(value.get_secret_value(), settings.jwt_algorithms)
            except ValueError as error:
                raise SettingsError([f"{name}: {error}"]) from None
    return None


def _challenge(
    settings: Settings,
    store: Store,
    transport: httpx.AsyncBaseTransport | None,
    stack: AsyncExitStack,
    metrics: Metrics,
) -> Challenge | None:
    if settings.challenge_secret is None:
        return None
    if transport is None:
        transport = open_transport(settings.challenge_verify_url, pool_size=settings.max_waiting)
        stack.push_async_callback(transport.aclose)
    sites = [site.removesuffix(":*") for site in (*settings.allowed_origins, settings.public_url) if site]
    hosts = None if "*" in sites or not sites else frozenset(urlsplit(site).hostname or "" for site in sites)
    url = httpx.URL(settings.challenge_verify_url)
    return Challenge(url, settings.challenge_secret, hosts, transport, store, metrics=metrics)


async def _cancel(task: asyncio.Task[None]) -> None:
    while not task.done():
        task.cancel()  # again, if the task lost it: a process must end
        await asyncio.wait([task], timeout=1)
    if not task.cancelled():
        task.result()
