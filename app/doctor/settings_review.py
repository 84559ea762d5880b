"""Settings that are allowed but risky: `doctor` lists them, `serve` warns about them."""

from importlib.util import find_spec
from urllib.parse import urlsplit

from app.config.settings import Network, Settings, is_loopback
from app.doctor.findings import Finding, fine, warning, wrong
from app.identity.addresses import LIST_HEADER
from app.oneinbox.client import BESIDE_STARTS

WIDEST_PUBLIC_PREFIX = {4: 8, 6: 16}
"""No one owns a network of public addresses wider than this."""
FILES_BESIDES = 100
KINDS_OF_TOKEN = frozenset({"token_use", "typ"})
"""Claims that say what kind of token it is, and not for which application."""


def review(settings: Settings) -> list[Finding]:
    """Return one finding per subject, in a fixed order, from the settings alone."""
    return [
        _origins(settings),
        _proxies(settings),
        *_tokens(settings),
        _variables(settings),
        _limits(settings),
        _secret(settings),
        _open_files(settings),
        *_prefix(settings),
    ]


def settings_warnings(settings: Settings, host: str) -> list[Finding]:
    """Return what `serve` warns about before it listens on `host`."""
    warnings = []
    if settings.auth == "anonymous" and settings.challenge_secret is None and not is_loopback(host):
        warnings.append(
            warning(
                "anonymous and public",
                "anyone who reaches this address can start calls that you pay for, up to the limits",
                "set BROKER_AUTH or BROKER_CHALLENGE_SECRET; at least check BROKER_GLOBAL_SESSION_LIMITS",
            )
        )
    if settings.store_url.get_secret_value() == "memory://":
        warnings.append(memory_store())
    return [*warnings, *(finding for finding in review(settings) if finding.level != "ok")]


def memory_store() -> Finding:
    """Return a warning of what memory:// lacks."""
    return warning(
        "store",
        "memory://: a restart forgets all counts, and the commands pause, block, calls and status cannot work",
        "fine for one process; otherwise set BROKER_STORE_URL to a Valkey or Redis",
    )


def _origins(settings: Settings) -> Finding:
    name, allowed = "allowed origins", settings.allowed_origins
    if "*" in allowed:
        return warning(
            name, "*: pages of any site can start calls", "list only your own sites in BROKER_ALLOWED_ORIGINS"
        )
    if not allowed:
        return warning(
            name,
            "none: only pages of the broker's own origin can use it",
            "list your sites in BROKER_ALLOWED_ORIGINS, such as https://www.example.com",
        )
    plain = [
        origin
        for origin in allowed
        if origin.startswith("http://") and not is_loopback(urlsplit(origin.removesuffix(":*")).hostname or "")
    ]
    if plain:
        return warning(
            name,
            f"plain http: anyone on the network path can change the pages of {', '.join(plain)}",
            "serve them over https, and list that origin",
        )
    return fine(name, ", ".join(allowed))


def _proxies(settings: Settings) -> Finding:
    name, trusted = "trusted proxies", settings.trusted_proxies
    if everyone := [str(network) for network in trusted if network.prefixlen == 0]:
        if settings.auth == "header":
            meaning = "anyone who reaches the broker can claim to be any user in a header"
        elif settings.client_ip_header.lower() != LIST_HEADER:
            meaning = f"anyone who reaches the broker can claim any address in {settings.client_ip_header}"
        else:
            meaning = "no address counts as a client's, so all users behind your proxy share its limits"
        return wrong(
            name, f"{', '.join(everyone)}: {meaning}", "list only your own proxies' networks in BROKER_TRUSTED_PROXIES"
        )
    if wide := [str(network) for network in trusted if _is_wide(network)]:
        return warning(
            name,
            f"{', '.join(wide)}: this includes many networks that are not yours",
            "list only your own proxies' networks in BROKER_TRUSTED_PROXIES",
        )
    if not trusted and settings.client_ip_header.lower() != LIST_HEADER:
        return warning(
            name,
            f"none, although BROKER_CLIENT_IP_HEADER is set: {settings.client_ip_header} is ignored",
            "list your proxy's network in BROKER_TRUSTED_PROXIES",
        )
    if not trusted and settings.public_url is not None:
        return warning(
            name,
            "none, although BROKER_PUBLIC_URL is set: behind a proxy, all users have its address and share its limits",
            "list your proxy's network in BROKER_TRUSTED_PROXIES",
        )
    return fine(name, ", ".join(map(str, trusted)) or "none: X-Forwarded-For is ignored")


def _prefix(settings: Settings) -> list[Finding]:
    public = urlsplit(settings.public_url or "").path
    if settings.public_url is None or public == settings.root_path:
        return []
    detail = f"BROKER_PUBLIC_URL has {public or 'none'}, BROKER_ROOT_PATH {settings.root_path or 'none'}: "
    detail += "addresses of calls would lead elsewhere"
    return [warning("prefix", detail, "set both to the path under which browsers reach the broker")]


def _is_wide(network: Network) -> bool:
    return not network.is_private and network.prefixlen < WIDEST_PUBLIC_PREFIX[network.version]


def _tokens(settings: Settings) -> list[Finding]:
    # A shared secret is no one else's; an issuer's key signs the tokens of all its applications.
    if settings.auth != "jwt" or settings.jwt_secret is not None:
        return []
    name, audience, claims = "tokens", settings.jwt_audience or [], settings.jwt_required_claims
    if not audience and claims.keys() <= KINDS_OF_TOKEN:
        return [
            warning(
                name,
                "a user of any application of the issuer can log in: nothing says that a token is meant for this one",
                "set BROKER_JWT_AUDIENCE, or a claim that names your application in BROKER_JWT_REQUIRED_CLAIMS",
            )
        ]
    needed = [f"aud {' or '.join(audience)}"] if audience else []
    return [fine(name, "need " + ", ".join([*needed, *(f"{claim} {' or '.join(claims[claim])}" for claim in claims)]))]


def _variables(settings: Settings) -> Finding:
    if "*" in settings.allowed_variables:
        return warning(
            "variables",
            "*: a page can put its own text into any variable of the agent's prompt",
            "list the names you need in BROKER_ALLOWED_VARIABLES, or set it to nothing to allow none",
        )
    return fine("variables", f"a page can set {', '.join(settings.allowed_variables) or 'none'}")


def _limits(settings: Settings) -> Finding:
    if settings.limits_mode == "observe":
        return warning(
            "limits",
            "observe: limits on requests, sessions and talk time only log",
            "set BROKER_LIMITS_MODE=enforce once the log looks right",
        )
    return fine("limits", f"{settings.session_limits} per user, {settings.global_session_limits} for all users")


def _secret(settings: Settings) -> Finding:
    if settings.secret is None:
        return warning(
            "secret",
            "BROKER_SECRET is derived from the API key: when that changes, users lose access to their running calls",
            "set BROKER_SECRET to at least 32 random characters",
        )
    return fine("secret", "BROKER_SECRET is set")


def _open_files(settings: Settings) -> Finding:
    if find_spec("resource") is None:  # Windows has no such bound
        return fine("open files", "not bounded here")
    import resource  # noqa: PLC0415

    # Two connections per waiting session, one per stream, and those for reads and stops.
    needed = 2 * settings.max_waiting + settings.max_streams_total + BESIDE_STARTS + FILES_BESIDES
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        return warning(
            "open files",
            f"{allowed} allowed; BROKER_MAX_WAITING and BROKER_MAX_STREAMS_TOTAL may need {needed}",
            f"ulimit -n {needed}",
        )
    return fine("open files", "as many as the settings may need")
