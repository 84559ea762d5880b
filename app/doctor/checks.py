"""Checks of this broker's set-up: its settings, OneInbox, the store and the identity provider.

They start no call, and write only throw-away names into the store.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from app.broker.build import check, mistakes, open_oneinbox
from app.broker.deployment import Deployment
from app.broker.replicas import read_reports
from app.config.agents import Agent, Agents, load_agents
from app.config.loading import load_settings
from app.config.plans import load_plans
from app.config.settings import Settings, SettingsError
from app.config.surroundings import surroundings_mistakes
from app.doctor import settings_review
from app.doctor.causes import Cause, cause_of
from app.doctor.findings import DEADLINE, Finding, fine, warning, within, wrong
from app.identity.jwks import FETCH_SECONDS, KeySet, KeySetError
from app.identity.jwt import NOT_YET_LEEWAY_SECONDS
from app.limits.allowance import NOT_OFFERED
from app.oneinbox import OneInbox
from app.oneinbox.errors import Busy, Invalid, OneInboxError, Unreachable
from app.oneinbox.transport import NEVER_SENT, open_transport
from app.store import LimitRequest, Rate, Slot, StoreUnavailable
from app.store.review import weaknesses
from app.store.valkey import Refused, ValkeyStore

LONGEST_ANSWER = 8.0
"""Seconds for one answer of OneInbox, even if ONEINBOX_TIMEOUT allows more: there are two in a row."""
AGENTS_AT_ONCE = 20
OLDEST_STORE = 6
NO_SUCH_AGENT = (400, 404, 422)
"""How OneInbox answers for an agent that it does not have, or whose id has another form than its own."""
ONEINBOX_CHECKS = ("oneinbox", "agents", "allowance", "clock")

KEY_REMEDIES = {
    401: "set ONEINBOX_API_KEY to a valid key",
    402: "top up the account",
    403: "allow the key to start calls, or use a secret key with full access",
    404: "check ONEINBOX_BASE_URL: no OneInbox API there",
}
MORE_CALLS = "have OneInbox allow more calls a day, or lower BROKER_GLOBAL_SESSION_LIMITS"
SCARCE = 0.1
"""Share of OneInbox's calls of the day; less is worth a warning."""
UNREACHABLE = "check ONEINBOX_BASE_URL, the firewall, and HTTPS_PROXY if it is set"

STORE_REMEDIES = {
    "AuthenticationError": "correct the user and password in BROKER_STORE_URL",
    "ReadOnlyError": "point BROKER_STORE_URL at the primary, not at a replica",
    "OutOfMemoryError": "give it more memory",
    "MovedError": "it is a cluster: write BROKER_STORE_URL as redis+cluster://host:port",
    "ClusterCrossSlotError": "it is a cluster: write BROKER_STORE_URL as redis+cluster://host:port",
    "ClusterDownError": "start the cluster's missing nodes",
    "BusyLoadingError": "wait until it has loaded its data",
    "MasterNotFoundError": "compare the service in BROKER_STORE_URL with the Sentinels' `sentinel monitor`",
}
STORE_REMEDY = "start it, or correct BROKER_STORE_URL"


async def diagnose(
    environ: Mapping[str, str] | None = None,
    env_file: Path | None = Path(".env"),
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    now: Callable[[], float] = time.time,
    deadline: float = DEADLINE,
) -> list[Finding]:
    """Run all checks within `deadline` seconds; return their findings in a fixed order.

    `environ`, `env_file`: as for `load_settings`. `transport` replaces the connection to OneInbox. `now`: Unix time.
    """
    try:
        settings = load_settings(environ, env_file, lambda _: surroundings_mistakes())
    except SettingsError:
        errors = _settings_errors(_all_mistakes(environ, env_file))
        return [*errors, warning("the rest", "not checked: this needs correct settings")]
    agents, agents_file = _agents_file(settings)
    findings = [*_parts(settings), *agents_file, *_plans_file(settings), _key_shape(settings)]
    network = await asyncio.gather(
        within(deadline, lambda: _oneinbox(settings, agents, transport, now), ONEINBOX_CHECKS),
        within(deadline, lambda: _store(settings), ("store",)),
        within(deadline, lambda: _logins(settings), ("logins",)),
    )
    return [*findings, *(finding for group in network for finding in group), *settings_review.review(settings)]


def _all_mistakes(environ: Mapping[str, str] | None, env_file: Path | None) -> SettingsError:
    """Return the error of settings that are wrong, with what the parts say, too."""
    try:
        load_settings(environ, env_file, mistakes)
    except SettingsError as error:
        return error
    return SettingsError([])  # corrected meanwhile


def _settings_errors(error: SettingsError) -> list[Finding]:
    return [wrong("settings", line, "correct it in the environment or in .env") for line in error.lines]


def _parts(settings: Settings) -> list[Finding]:
    """Check what settings mean together, such as keys and algorithms."""
    try:
        # Without the files: their errors must not hide the others.
        check(settings.model_copy(update={"agents_file": None, "oneinbox_agent_id": "any", "plans_file": None}))
    except SettingsError as error:
        return _settings_errors(error)
    return [fine("settings", "all valid")]


def _agents_file(settings: Settings) -> tuple[Agents | None, list[Finding]]:
    name = "agents file"
    try:
        agents = load_agents(settings)
    except SettingsError as error:
        return None, [wrong(name, line, "correct the file") for line in error.lines]
    return agents, [fine(name, f"agents {_listed(list(agents.by_name))}" if settings.agents_file else "not used")]


def _plans_file(settings: Settings) -> list[Finding]:
    name = "plans file"
    if settings.plans_file is None:
        return [fine(name, "not used")]
    try:
        plans = load_plans(settings)
    except SettingsError as error:
        return [wrong(name, line, "correct the file") for line in error.lines]
    listed = f"plans {_listed(list(plans.by_name))} (claim {plans.claim}, default {plans.default.plan})"
    organizations = f"; organizations (claim {plans.organization_claim})" if plans.organization_claim else ""
    return [fine(name, listed + organizations)]


def _key_shape(settings: Settings) -> Finding:
    if not settings.oneinbox_api_key.get_secret_value().startswith("oi_sk_"):
        return warning("key", "does not look like a secret key, which starts with oi_sk_", "check ONEINBOX_API_KEY")
    return fine("key", "looks like a secret key")


# OneInbox


@dataclass
class _DatedTransport(httpx.AsyncBaseTransport):
    """Note our clock's distance from the answers' Date: `skew`, in seconds; None until there is one."""

    inner: httpx.AsyncBaseTransport
    now: Callable[[], float]
    skew: float | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        asked = self.now()
        response = await self.inner.handle_async_request(request)
        answered = self.now()
        try:
            # Date is cut to whole seconds.
            theirs = parsedate_to_datetime(response.headers["date"]).timestamp() + 0.5
        except (KeyError, ValueError):
            return response
        self.skew = (asked + answered) / 2 - theirs
        return response

    async def aclose(self) -> None:
        await self.inner.aclose()


async def _oneinbox(
    settings: Settings, agents: Agents | None, transport: httpx.AsyncBaseTransport | None, now: Callable[[], float]
) -> list[Finding]:
    bounded = settings.model_copy(
        update={
            "oneinbox_timeout": min(settings.oneinbox_timeout, LONGEST_ANSWER),
            "oneinbox_connect_timeout": min(settings.oneinbox_connect_timeout, LONGEST_ANSWER),
        }
    )
    dated = _DatedTransport(transport or open_transport(settings.oneinbox_base_url, pool_size=AGENTS_AT_ONCE), now)
    oneinbox = open_oneinbox(bounded, dated)
    try:
        reached = await _reach(oneinbox, settings)
        known, allowance = await asyncio.gather(
            _agents(settings, agents, oneinbox, reached), _allowance(oneinbox, reached)
        )
        return [reached, *known, allowance, _clock(dated.skew)]
    finally:
        await oneinbox.aclose()


async def _reach(oneinbox: OneInbox, settings: Settings) -> Finding:
    name = "oneinbox"
    try:
        await oneinbox.list_calls(limit=1)
    except Busy as busy:
        remedy = f"try again in {busy.retry_after} s"
        return warning(name, "asks for a pause (429): reachable, but the key could not be checked", remedy)
    except OneInboxError as error:
        if error.status in KEY_REMEDIES:
            return wrong(name, f"{error.reason}: it does not accept the key", KEY_REMEDIES[error.status])
        if cause := _cause(error, settings):
            return wrong(name, f"cannot be reached: {cause.reason}", cause.remedy)
        return wrong(
            name, error.reason, UNREACHABLE if error.status is None else "check OneInbox's status, and try again"
        )
    return fine(name, "reachable, and accepts the key")


def _cause(error: OneInboxError, settings: Settings) -> Cause | None:
    if not isinstance(error, Unreachable):
        return None
    return cause_of(error, setting="ONEINBOX_BASE_URL", url=settings.oneinbox_base_url)


async def _agents(settings: Settings, agents: Agents | None, oneinbox: OneInbox, reached: Finding) -> list[Finding]:
    """Ask OneInbox for each agent; return one finding for those that are there, and one per agent that needs a look."""
    name = "agents"
    if agents is None:
        return [warning(name, "not checked: the agents file cannot be read")]
    if reached.level != "ok":
        return [warning(name, "not checked: OneInbox did not list calls")]
    found = await asyncio.gather(*(_agent(settings, agent, oneinbox) for agent in agents.by_name.values()))
    odd = [finding for finding in found if finding is not None]
    known = [agent for agent, finding in zip(agents.by_name, found, strict=True) if finding is None]
    return [*odd, *([fine(name, f"OneInbox has {_listed(known)}")] if known else [])]


async def _agent(settings: Settings, agent: Agent, oneinbox: OneInbox) -> Finding | None:
    """Return what is odd about an agent; None if nothing is."""
    name = "agents"
    shown = f"{agent.name} ({agent.agent_id})"
    try:
        record = await oneinbox.get_agent(agent.agent_id)
    except OneInboxError as error:
        if error.status in NO_SUCH_AGENT:
            remedy = f"correct {agent.set_in}; OneInbox's dashboard shows the ids"
            return wrong(name, f"OneInbox has no agent {shown}: it {error.reason}", remedy)
        return warning(name, f"{shown} was not checked: OneInbox {error.reason}", "try again")
    most = settings.max_call_seconds if agent.max_call_seconds is None else agent.max_call_seconds
    own = record.max_duration_seconds
    if not own or (most and own >= most):
        return None
    bound = "BROKER_MAX_CALL_SECONDS" if agent.max_call_seconds is None else "its max_call_seconds"
    detail = (
        f"OneInbox ends calls of {shown} after {own:g} s, before {bound} ({most or 'none'}): pages show a later end"
    )
    return warning(name, detail, f"set {bound} to {own:g}, or raise the agent's max_duration_seconds")


async def _allowance(oneinbox: OneInbox, reached: Finding) -> Finding:
    """Check how many calls OneInbox still allows today."""
    name = "allowance"
    if reached.level != "ok":
        return warning(name, "not checked: OneInbox did not list calls")
    try:
        usage = await oneinbox.usage()
    except OneInboxError as error:
        if isinstance(error, Invalid) or error.status in NOT_OFFERED:
            return fine(name, "not watched: OneInbox does not tell the calls left today")
        return warning(name, f"not checked: OneInbox {error.reason}", "try again")
    left, cap = usage.left, usage.max_calls_per_day
    if not cap:
        return fine(name, "no cap on the calls of a day")
    if left is None:
        return fine(name, "not watched: OneInbox does not tell the calls left today")
    detail = f"{left} of {cap} calls are left until 00:00 UTC"
    if left == 0:
        return wrong(name, f"{detail}: every session is refused", MORE_CALLS)
    return warning(name, detail, MORE_CALLS) if left < cap * SCARCE else fine(name, detail)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _clock(skew: float | None) -> Finding:
    name = "clock"
    if skew is None:
        return warning(name, "not checked: OneInbox sent no date")
    distance = f"{round(abs(skew))} s {'ahead of' if skew > 0 else 'behind'} OneInbox's"
    if abs(skew) > NOT_YET_LEEWAY_SECONDS:
        detail = f"{distance}: tokens seem expired too early, or stay valid too long"
        return wrong(name, detail, "set this machine's clock by NTP")
    # Date has whole seconds, and may come from a cache: one or two seconds mean nothing.
    return fine(name, distance if round(abs(skew)) > 2 else "agrees with OneInbox's")


# The store


async def _store(settings: Settings) -> list[Finding]:
    name, url = "store", settings.store_url.get_secret_value()
    if url == "memory://":
        return [settings_review.memory_store()]
    try:
        store = ValkeyStore(url, timeout=settings.store_timeout, prefix=settings.store_prefix)
    except ValueError as error:
        return [wrong(name, f"BROKER_STORE_URL: {error}", "correct BROKER_STORE_URL")]
    async with store:
        try:
            milliseconds = await _exercise(store)
            publishes = await store.may_publish()
        except Refused:
            return [wrong(name, "its user lacks rights", f"give the user these: {store.rights}")]
        except StoreUnavailable as error:
            cause = cause_of(error, setting="BROKER_STORE_URL")
            reason, remedy = cause or (str(error), STORE_REMEDIES.get(str(error), STORE_REMEDY))
            return [wrong(name, f"does not work: {reason}", remedy)]
        if milliseconds is None:
            return [wrong(name, "does not answer as a store does", "check what listens at BROKER_STORE_URL")]
        about: Mapping[str, str] = {}
        with contextlib.suppress(StoreUnavailable):
            about = await store.info()
        try:
            await Deployment(store, load_agents(settings), lambda: settings).compare()
            silent = [report for report in await read_reports(store) if report.stale]
        except SettingsError as error:
            problem, _, remedy = error.lines[0].partition("; ")
            return [wrong(name, problem, remedy)]
        except StoreUnavailable as error:
            return [wrong(name, f"does not work: {error}", STORE_REMEDY)]
    findings = [_server(name, about, milliseconds)]
    if not publishes:
        detail = "its user may not use channels, so that replicas hear of each other's news up to a second late"
        findings.append(warning(name, detail, f"give the user these rights: {store.rights}"))
    for report in silent:
        detail = f"replica {report.id} is silent for {report.age:.0f} s: it has died, or does not reach the store"
        findings.append(warning(name, detail, "look at its /readyz and its log (store_lost)"))
    return [*findings, *(warning(name, *weakness) for weakness in weaknesses(about))]


async def _exercise(store: ValkeyStore) -> float | None:
    """Write, read, delete, count and give back under throw-away names; return the milliseconds of one answer.

    None: it gives answers that no store gives. Raises StoreUnavailable.
    """
    key = f"doctor-{secrets.token_hex(16)}"
    value = key.encode()
    try:
        await store.set(key, value, ttl=10)
    except Refused:
        raise
    except StoreUnavailable:
        await store.set(key, value, ttl=10)  # a first connection may take longer: name, TLS, login
    kept = await store.get(key)
    asked = time.perf_counter()
    deleted = await store.delete(key, value)
    milliseconds = (time.perf_counter() - asked) * 1000
    if kept != value or not deleted:
        return None
    request = LimitRequest([Rate(key, 1, 10)], [Slot(key, 1)], member="first", lease=10)
    first = await store.decide(request)
    second = await store.decide(request._replace(member="second"))
    await store.give_back(request, first)
    return milliseconds if first.allowed and not second.allowed else None


def _server(name: str, about: Mapping[str, str], milliseconds: float) -> Finding:
    version = about.get("valkey_version", about.get("redis_version", ""))
    server = f"{'Valkey' if 'valkey_version' in about else 'Redis'} {version}"
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) < OLDEST_STORE:
        return wrong(name, f"{server} is too old", f"use Valkey, or Redis {OLDEST_STORE} or newer")
    shown = server if version else "version unknown"
    return fine(name, f"{shown}, reads, writes and runs scripts; {milliseconds:.0f} ms per answer")


# Logins


async def _logins(settings: Settings) -> list[Finding]:
    name = "logins"
    if settings.auth == "anonymous":
        return [fine(name, "none: limits are per address")]
    if settings.auth == "header":
        return [fine(name, f"a trusted proxy names the user in {settings.user_header}")]
    if settings.jwt_jwks_url is None:
        return [fine(name, "tokens, verified with the configured key")]
    try:
        keys = KeySet(settings.jwt_jwks_url, settings.jwt_algorithms)
    except ValueError:
        return [warning(name, "not checked: the algorithms do not fit")]
    try:
        found = await keys.fetch()
    except KeySetError as error:
        problem = f" returns no keys: {error}"
    except TimeoutError:
        problem = f": no answer within {FETCH_SECONDS} s"
    except ValueError:
        problem = " does not return JSON"
    except httpx.HTTPError as error:
        cause = None
        if isinstance(error, NEVER_SENT):
            cause = cause_of(error, setting="BROKER_JWT_JWKS_URL", url=settings.jwt_jwks_url)
        if cause is not None:
            return [wrong(name, f"BROKER_JWT_JWKS_URL cannot be reached: {cause.reason}", cause.remedy)]
        problem = f" cannot be read ({type(error).__name__})"
    else:
        algorithms = sorted({algorithm for key in found for algorithm in key.algorithms})
        count = "1 usable key" if len(found) == 1 else f"{len(found)} usable keys"
        return [fine(name, f"{count} at BROKER_JWT_JWKS_URL, for {', '.join(algorithms)}")]
    finally:
        await keys.aclose()
    return [wrong(name, f"BROKER_JWT_JWKS_URL{problem}", "check BROKER_JWT_JWKS_URL, and what is published there")]
