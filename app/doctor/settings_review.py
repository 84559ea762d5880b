"""Settings that are allowed and worth a second thought: `doctor` lists them, `serve` warns about them."""

import resource
from collections.abc import Iterator
from urllib.parse import urlsplit

from app.config.settings import Network, Settings, is_loopback
from app.doctor.findings import Finding, fine, warning, wrong

WIDEST_PUBLIC_PREFIX = {4: 8, 6: 16}
"""A network of public addresses wider than this is nobody's own."""
FILES_BESIDES = 100


def review(settings: Settings) -> list[Finding]:
    """What the settings themselves tell, a finding for each subject, in a fixed order. Asks nobody."""
    return [
        _origins(settings),
        _proxies(settings),
        _variables(settings),
        _limits(settings),
        _secret(settings),
        _open_files(settings),
    ]


def settings_warnings(settings: Settings, host: str) -> list[Finding]:
    """What `serve` warns about before it listens on `host`."""
    findings = (*_exposure(settings, host), *_memory(settings), *review(settings))
    return [finding for finding in findings if finding.level != "ok"]


def _exposure(settings: Settings, host: str) -> Iterator[Finding]:
    if settings.auth == "anonymous" and settings.challenge_secret is None and not is_loopback(host):
        yield warning(
            "anonymous and public",
            "whoever reaches this address may start calls that you pay for, as many as the limits let through",
            "set BROKER_AUTH, or BROKER_CHALLENGE_SECRET; at least look at BROKER_GLOBAL_SESSION_LIMITS",
        )


def _memory(settings: Settings) -> Iterator[Finding]:
    if settings.store_url.get_secret_value() == "memory://":
        yield memory_store()


def memory_store() -> Finding:
    """What memory:// means."""
    return warning(
        "store",
        "memory://: a restart forgets what was counted, and pause, block and status have nothing to act on",
        "fine for one process; else set BROKER_STORE_URL to a Valkey or Redis",
    )


def _origins(settings: Settings) -> Finding:
    name, allowed = "allowed origins", settings.allowed_origins
    if "*" in allowed:
        return warning(
            name, "*: any site's pages may start calls", "list your own sites in BROKER_ALLOWED_ORIGINS instead"
        )
    if not allowed:
        return warning(
            name,
            "none: only pages that the broker's own origin serves may use it",
            "list your sites in BROKER_ALLOWED_ORIGINS, such as https://www.example.com",
        )
    readable = [origin for origin in allowed if origin.startswith("http://") and not _on_loopback(origin)]
    if readable:
        return warning(
            name,
            f"anybody on the way can change the pages of {', '.join(readable)}",
            "serve them over https, and list that origin",
        )
    return fine(name, ", ".join(allowed))


def _on_loopback(origin: str) -> bool:
    return is_loopback(urlsplit(origin.removesuffix(":*")).hostname or "")


def _proxies(settings: Settings) -> Finding:
    name, trusted = "trusted proxies", settings.trusted_proxies
    everybody = [str(network) for network in trusted if network.prefixlen == 0]
    if everybody:
        meaning = (
            "whoever reaches the broker is whatever user it writes into a header"
            if settings.auth == "header"
            else "no address counts as a client's, so that all users behind your proxy share its limits"
        )
        return wrong(
            name,
            f"{', '.join(everybody)}: {meaning}",
            "list the networks of your own proxies in BROKER_TRUSTED_PROXIES",
        )
    wide = [str(network) for network in trusted if _is_wide(network)]
    if wide:
        return warning(
            name,
            f"{', '.join(wide)}: a network of many strangers",
            "list only your own proxies in BROKER_TRUSTED_PROXIES",
        )
    if not trusted and settings.public_url is not None:
        return warning(
            name,
            "none, though BROKER_PUBLIC_URL is set: behind a proxy all users are one address, and share its limits",
            "list your proxy's network in BROKER_TRUSTED_PROXIES",
        )
    return fine(name, ", ".join(map(str, trusted)) or "none: nobody's X-Forwarded-For is believed")


def _is_wide(network: Network) -> bool:
    return not network.is_private and network.prefixlen < WIDEST_PUBLIC_PREFIX[network.version]


def _variables(settings: Settings) -> Finding:
    name = "variables"
    if "*" in settings.allowed_variables:
        return warning(
            name,
            "*: a page may put text of its own into any variable of the agent's prompt",
            "list the names you need in BROKER_ALLOWED_VARIABLES, or set it to nothing",
        )
    return fine(name, f"a page may set {', '.join(settings.allowed_variables) or 'none'}")


def _limits(settings: Settings) -> Finding:
    name = "limits"
    if settings.limits_mode == "observe":
        return warning(name, "observe: they refuse nothing", "set BROKER_LIMITS_MODE=enforce once the log looks right")
    return fine(name, f"{settings.session_limits} per user, {settings.global_session_limits} of all users")


def _secret(settings: Settings) -> Finding:
    name = "secret"
    if settings.secret is None:
        return warning(
            name,
            "BROKER_SECRET is derived from the API key: a new key makes calls under way strangers to their users",
            "set BROKER_SECRET to at least 32 random characters",
        )
    return fine(name, "BROKER_SECRET is set")


def _open_files(settings: Settings) -> Finding:
    # Each waiting session takes two connections, each stream one.
    wanted = 2 * settings.max_waiting + settings.max_streams_total + FILES_BESIDES
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    name = "open files"
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        return warning(
            name,
            f"{allowed} at most, {wanted} wanted for what BROKER_MAX_WAITING and BROKER_MAX_STREAMS_TOTAL allow",
            f"ulimit -n {wanted}",
        )
    return fine(name, "as many as the settings may need")
