"""Is this broker set up right? Reads the settings, asks OneInbox, the store and the identity provider.

Starts no call, and writes nothing but throw-away names into the store.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from app.broker.build import check, open_oneinbox
from app.config.agents import Agents, load_agents
from app.config.loading import load_settings
from app.config.settings import Settings, SettingsError
from app.doctor import settings_review
from app.doctor.findings import DEADLINE, Finding, fine, warning, within, wrong
from app.identity.jwks import FETCH_SECONDS, KeySet, KeySetError
from app.identity.keys import VerifyingKey
from app.oneinbox import OneInbox
from app.oneinbox.errors import Busy, OneInboxError
from app.oneinbox.transport import open_transport
from app.store import LimitRequest, Rate, Slot, StoreUnavailable
from app.store.valkey import ValkeyStore

LONGEST_ANSWER = 8.0
"""Seconds for one answer of OneInbox, whatever longer ONEINBOX_TIMEOUT allows: there are two in a row."""
CLOCK_TOLERANCE = 30.0
AGENTS_ASKED_ABOUT = 20
OLDEST_STORE = 6

KEY_REMEDIES = {
    401: "put a key that is in force into ONEINBOX_API_KEY",
    402: "top the account up",
    403: "let the key start calls, or use a secret key of full access",
    404: "look at ONEINBOX_BASE_URL: there is no OneInbox",
}
UNREACHABLE = "look at ONEINBOX_BASE_URL, the firewall, and HTTPS_PROXY if there is one"

STORE_REMEDIES = {
    "AuthenticationError": "mend user and password in BROKER_STORE_URL",
    "NoPermissionError": "let its user read, write and run scripts on keys oib:*",
    "ReadOnlyError": "point BROKER_STORE_URL at the primary, not at a replica",
    "OutOfMemoryError": "give it more memory",
    "MovedError": "use one primary: a cluster does not do",
    "ClusterCrossSlotError": "use one primary: a cluster does not do",
}
STORE_REMEDY = "start it, or mend BROKER_STORE_URL"


async def diagnose(
    environ: Mapping[str, str] | None = None,
    env_file: Path | None = Path(".env"),
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    now: Callable[[], float] = time.time,
    deadline: float = DEADLINE,
) -> list[Finding]:
    """All checks, in a fixed order, within `deadline` seconds.

    `environ`, `env_file`: as for `load_settings`. `transport` replaces the connection to OneInbox. `now`: Unix time.
    """
    try:
        settings = load_settings(environ, env_file)
    except SettingsError as error:
        lines = [_from_line("settings", line) for line in error.lines]
        return [*lines, warning("the rest", "not checked, as it takes settings that can be read")]
    findings = [fine("settings", "none is wrong"), *_parts(settings), _key_shape(settings)]
    network = await asyncio.gather(
        within(deadline, lambda: _oneinbox(settings, transport, now), ("oneinbox", "agents", "clock")),
        within(deadline, lambda: _store(settings), ("store",)),
        within(deadline, lambda: _logins(settings), ("logins",)),
    )
    return [*findings, *(finding for group in network for finding in group), *settings_review.review(settings)]


def _from_line(name: str, line: str) -> Finding:
    """A finding out of a line of SettingsError, which says what the variable takes."""
    return wrong(name, line, "mend it in the environment, or in .env")


# What the parts themselves say, without asking anybody


def _parts(settings: Settings) -> list[Finding]:
    """The agents file, and keys against algorithms."""
    name = "agents file"
    try:
        agents = load_agents(settings)
    except SettingsError as error:
        findings = [wrong(name, line, "mend the file") for line in error.lines]
    else:
        found = "not used" if settings.agents_file is None else f"agents {_listed(list(agents.by_name))}"
        findings = [fine(name, found)]
    try:
        # A broken agents file must not hide what is wrong with the keys.
        check(settings.model_copy(update={"agents_file": None, "oneinbox_agent_id": "any"}))
    except SettingsError as error:
        findings += [_from_line("settings", line) for line in error.lines]
    return findings


def _key_shape(settings: Settings) -> Finding:
    name = "key"
    if not settings.oneinbox_api_key.get_secret_value().startswith("oi_sk_"):
        return warning(name, "does not look like a secret key, which starts with oi_sk_", "look at ONEINBOX_API_KEY")
    return fine(name, "looks like a secret key")


# OneInbox


class _Dated(httpx.AsyncBaseTransport):
    """Notes how far our clock is from the answers' Date, in seconds; None while there was none."""

    def __init__(self, inner: httpx.AsyncBaseTransport, now: Callable[[], float]) -> None:
        self._inner = inner
        self._now = now
        self.skew: float | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        asked = self._now()
        response = await self._inner.handle_async_request(request)
        answered = self._now()
        try:
            # Date has whole seconds, cut off.
            theirs = parsedate_to_datetime(response.headers["date"]).timestamp() + 0.5
        except (KeyError, ValueError):
            return response
        self.skew = (asked + answered) / 2 - theirs
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


async def _oneinbox(
    settings: Settings, transport: httpx.AsyncBaseTransport | None, now: Callable[[], float]
) -> list[Finding]:
    bounded = settings.model_copy(
        update={
            "oneinbox_timeout": min(settings.oneinbox_timeout, LONGEST_ANSWER),
            "oneinbox_connect_timeout": min(settings.oneinbox_connect_timeout, LONGEST_ANSWER),
        }
    )
    dated = _Dated(transport or open_transport(settings.oneinbox_base_url, pool_size=AGENTS_ASKED_ABOUT), now)
    oneinbox = open_oneinbox(bounded, dated)
    try:
        reached = await _reach(oneinbox)
        return [reached, await _agents(settings, oneinbox, reached), _clock(dated.skew)]
    finally:
        await oneinbox.aclose()


async def _reach(oneinbox: OneInbox) -> Finding:
    name = "oneinbox"
    try:
        await oneinbox.list_calls(limit=1)
    except Busy as busy:
        return warning(name, "asks for a pause (429): reachable, the key could not be checked", _again(busy))
    except OneInboxError as error:
        if error.status in KEY_REMEDIES:
            return wrong(name, f"{error.reason}: it does not take the key", KEY_REMEDIES[error.status])
        why = _cause(error)
        detail = f"{error.reason}: {why}" if why else error.reason
        return wrong(name, detail, UNREACHABLE if error.status is None else "look at OneInbox's status, and try again")
    return fine(name, "reachable, and takes the key")


def _again(busy: Busy) -> str:
    return f"try again in {busy.retry_after} s"


CAUSES = {
    "ClientConnectorDNSError": "its name is not known here",
    "ClientConnectorCertificateError": "its certificate is not trusted; a company's proxy needs SSL_CERT_FILE",
    "ClientConnectorSSLError": "no TLS connection came about",
    "ConnectionTimeoutError": "nobody answers there",
    "ClientProxyConnectionError": "the proxy of HTTPS_PROXY cannot be reached",
    "ClientHttpProxyError": "the proxy of HTTPS_PROXY refuses",
    "ConnectionRefusedError": "nobody listens there",
}


def _cause(error: BaseException | None) -> str:
    """Why there was no connection, by the first known cause. Messages are not looked at: they may repeat anything."""
    while error is not None:
        if type(error).__name__ in CAUSES:
            return CAUSES[type(error).__name__]
        error = error.__cause__
    return ""


async def _agents(settings: Settings, oneinbox: OneInbox, reached: Finding) -> Finding:
    """Without starting a call OneInbox says of an agent only whether it had calls."""
    name = "agents"
    try:
        agents = load_agents(settings)
    except SettingsError:
        return warning(name, "not checked, as the agents file cannot be read")
    if reached.level != "ok":
        return warning(name, "not checked, as OneInbox did not list calls")
    return _told(name, agents, await _calls_of(agents, oneinbox))


async def _calls_of(agents: Agents, oneinbox: OneInbox) -> dict[str, bool | None]:
    """For each agent's name whether it had calls; None: OneInbox refuses its id."""

    async def had_calls(agent_id: str) -> bool | None:
        try:
            return bool((await oneinbox.list_calls(agent_id=agent_id, limit=1)).items)
        except OneInboxError as error:
            return None if error.status in (400, 404, 422) else False

    chosen = list(agents.by_name.values())[:AGENTS_ASKED_ABOUT]
    return dict(
        zip(
            [agent.name for agent in chosen],
            await asyncio.gather(*(had_calls(agent.agent_id) for agent in chosen)),
            strict=True,
        )
    )


def _told(name: str, agents: Agents, calls: Mapping[str, bool | None]) -> Finding:
    refused = [agent for agent, had in calls.items() if had is None]
    if refused:
        return warning(
            name, f"OneInbox refuses the id of {_listed(refused)}", "compare the ids with those in OneInbox's dashboard"
        )
    unknown = [agent for agent in agents.by_name if not calls.get(agent)]
    had_some = [agent for agent in calls if calls[agent]]
    known = f"{_listed(had_some)} had calls" if had_some else ""
    open_question = f"whether OneInbox knows {_listed(unknown)}, only a first call tells" if unknown else ""
    return fine(name, "; ".join(part for part in (known, open_question) if part))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _clock(skew: float | None) -> Finding:
    name = "clock"
    if skew is None:
        return warning(name, "not checked, as no answer of OneInbox named a time")
    seconds = round(abs(skew))
    way = "ahead of" if skew > 0 else "behind"
    if abs(skew) > CLOCK_TOLERANCE:
        return wrong(
            name,
            f"{seconds} s {way} OneInbox's: tokens are taken for expired, or for valid after their end",
            "set this machine's clock by NTP",
        )
    # Whole seconds, perhaps of a cached header: one or two say nothing.
    return fine(name, f"{seconds} s {way} OneInbox's" if seconds > 2 else "agrees with OneInbox's")


# The store


class _OpenedStore(ValkeyStore):
    """The shared store, asked for what it says of itself."""

    async def about(self) -> Mapping[str, str]:
        """Its answer to INFO. Raises StoreUnavailable."""
        answer: Any = await self._ask("INFO")
        pairs = (line.partition(":") for line in bytes(answer).decode("utf-8", "replace").splitlines())
        return {name: value for name, separator, value in pairs if separator}


async def _store(settings: Settings) -> list[Finding]:
    name, url = "store", settings.store_url.get_secret_value()
    if url == "memory://":
        return [settings_review.memory_store()]
    try:
        store = _OpenedStore(url)
    except ValueError as error:
        return [wrong(name, f"BROKER_STORE_URL: {error}", "mend BROKER_STORE_URL")]
    async with store:
        try:
            milliseconds = await _exercise(store)
        except StoreUnavailable as error:
            return [wrong(name, f"does not work: {error}", STORE_REMEDIES.get(str(error), STORE_REMEDY))]
        except _UnexpectedError:
            return [wrong(name, "does not do what it is asked", "look at what answers behind BROKER_STORE_URL")]
        try:
            about = await store.about()
        except StoreUnavailable:
            about = {}
    return [_fit(name, about, milliseconds)]


class _UnexpectedError(Exception):
    """The store answered, but not what a store answers."""


async def _exercise(store: ValkeyStore) -> float:
    """Write, read, delete, count and give back under throw-away names; milliseconds of the last question.

    Raises StoreUnavailable, _UnexpectedError.
    """
    key = f"doctor-{secrets.token_hex(16)}"
    value = key.encode()
    try:
        await store.set(key, value, ttl=10)
    except StoreUnavailable:
        await store.set(key, value, ttl=10)  # a first connection may take longer: name, TLS, login
    kept = await store.get(key)
    asked = time.perf_counter()
    deleted = await store.delete(key, value)
    milliseconds = (time.perf_counter() - asked) * 1000
    if kept != value or not deleted:
        raise _UnexpectedError
    request = LimitRequest([Rate(key, 1, 10)], [Slot(key, 1)], member="first", lease=10)
    first = await store.decide(request)
    second = await store.decide(request._replace(member="second"))
    await store.give_back(request, first)
    if not first.allowed or second.allowed:
        raise _UnexpectedError
    return milliseconds


def _fit(name: str, about: Mapping[str, str], milliseconds: float) -> Finding:
    server = "Valkey" if "valkey_version" in about else "Redis"
    version = about.get("valkey_version", about.get("redis_version", ""))
    if about.get("redis_mode") == "cluster":
        return wrong(name, f"{server} {version} is a cluster, where scripts over several keys fail", "use one primary")
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) < OLDEST_STORE:
        return wrong(name, f"{server} {version} is too old", f"use Valkey, or Redis {OLDEST_STORE} or newer")
    policy = about.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        return warning(
            name,
            f"{server} {version} drops keys when its memory is full ({policy}): limits would be forgotten",
            "set its maxmemory-policy to noeviction",
        )
    told = f"{server} {version}" if version else "its version is not told"
    return fine(name, f"{told}, reads, writes and runs scripts; {milliseconds:.0f} ms an answer")


# Logins


class _OneFetch(KeySet):
    """The issuer's keys, fetched once, as the broker fetches them."""

    async def fetch(self) -> list[VerifyingKey]:
        """Those that logins could be verified with. Raises KeySetError, and what the connection raises."""
        async with asyncio.timeout(FETCH_SECONDS):
            return self._read(await self._download())


async def _logins(settings: Settings) -> list[Finding]:
    name = "logins"
    if settings.auth == "anonymous":
        return [fine(name, "none: limits go by address")]
    if settings.auth == "header":
        return [fine(name, f"a trusted proxy names the user in {settings.user_header}")]
    if settings.jwt_jwks_url is None:
        return [fine(name, "tokens, verified with the configured key")]
    try:
        keys = _OneFetch(settings.jwt_jwks_url, settings.jwt_algorithms)
    except ValueError:
        return [warning(name, "not checked, as the algorithms do not fit")]
    remedy = "look at BROKER_JWT_JWKS_URL, and at what is published there"
    try:
        found = await keys.fetch()
    except KeySetError as error:
        return [wrong(name, f"BROKER_JWT_JWKS_URL answers no keys: {error}", remedy)]
    except TimeoutError:
        return [wrong(name, f"BROKER_JWT_JWKS_URL: no answer within {FETCH_SECONDS} s", remedy)]
    except ValueError:
        return [wrong(name, "BROKER_JWT_JWKS_URL answers no JSON", remedy)]
    except httpx.HTTPError as error:
        return [wrong(name, f"BROKER_JWT_JWKS_URL cannot be read ({type(error).__name__})", remedy)]
    finally:
        await keys.aclose()
    algorithms = sorted({algorithm for key in found for algorithm in key.algorithms})
    count = "1 usable key" if len(found) == 1 else f"{len(found)} usable keys"
    return [fine(name, f"{count} behind BROKER_JWT_JWKS_URL, for {', '.join(algorithms)}")]
