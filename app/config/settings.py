"""Every setting, once: its variable, type, default and meaning. The documents get their tables from here."""

import re
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

import httpx
from pydantic import AfterValidator, BeforeValidator, PrivateAttr, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from app.config.claims import ClaimName, check_claim_name, read_required_claims
from app.config.overrides import OVERRIDE_LEAVES, OverridePath
from app.config.validation import (
    AGENT_ID,
    BLANKS,
    MAX_CALL_SECONDS,
    VARIABLE,
    AllowedVariable,
    check_limits,
    one_line,
    takes_of,
    taking,
    unquoted,
)

Network = IPv4Network | IPv6Network

PREFIXES = ("BROKER_", "ONEINBOX_")
"""Of the variables that are settings."""
MULTI_LINE = frozenset({"BROKER_SECRET", "BROKER_JWT_SECRET", "BROKER_JWT_PUBLIC_KEY"})
ANY_TEXT = frozenset({"BROKER_SECRET", "BROKER_JWT_SECRET"})
"""Secrets that others make, so that quotes may belong to them."""
LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
HOST = re.compile(rf"{LABEL}(?:\.{LABEL})*\.?")
LONGEST_HOST = 253  # RFC 1035, section 3.1

MAPPED = ip_network("::ffff:0:0/96")
"""IPv4 addresses in IPv6's form (RFC 4291, section 2.5.5.2)."""

ROUTES = frozenset(
    {"session", "calls", "webhooks", "healthz", "readyz", "metrics", "docs", "openapi.json", "problems"}
    | {f"{name}.{kind}" for name in ("client", "element", "react", "livekit-client") for kind in ("js", "d.ts")}
)
"""First parts of the broker's own paths."""


class SettingsError(Exception):
    """Settings that cannot be used. `lines`: one per wrong setting, naming the variable; never a secret."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        super().__init__("; ".join(lines))


def is_loopback(host: str) -> bool:
    """Return whether a host, bare or as in a URL, is this machine."""
    host = host.strip("[]").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def is_host(text: str) -> bool:
    """Return whether this is the name of a host (RFC 1123; `_` is usual in private networks), or an address."""
    if ":" not in text:
        return len(text) <= LONGEST_HOST and HOST.fullmatch(text) is not None
    try:
        return ip_address(text).version == 6 and "%" not in text
    except ValueError:
        return False


def trimmed(name: str, text: str) -> str:
    """Return a variable's value, from wherever it comes, without what is around it. ValueError says what is in it.

    Shells, editors and `docker --env-file` leave a CR, a byte order mark or quotes there.
    """
    if name not in ANY_TEXT:
        text = unquoted(text)
    elif unquoted(text := text.strip(BLANKS)) != text:
        raise ValueError("is in quotes")
    if name not in MULTI_LINE and not all(part.strip(BLANKS).isprintable() for part in re.split("[,;]", text)):
        raise ValueError("has a line break, or another character that does not print")
    return text


def split_url(text: str) -> SplitResult:
    """Split an absolute http(s) URL. ValueError says what is wrong with it, without repeating it."""
    parts = _split(text)
    if parts.scheme not in ("http", "https"):
        raise ValueError("is not an http(s) URL")
    try:
        _ = httpx.URL(text).host
    except (httpx.InvalidURL, ValueError):  # such as an internationalized name that cannot be decoded
        raise ValueError("is not a URL") from None
    return parts


def _split(text: str) -> SplitResult:
    try:
        parts = urlsplit(text)
        _ = parts.port  # ValueError if it is not one
    except ValueError:
        raise ValueError("is not a URL") from None  # the library's message repeats the text
    if not text.isprintable() or not is_host(parts.hostname or ""):  # urlsplit drops line breaks
        raise ValueError("is not a URL with a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a user name or password")
    return parts


def _protected_url(text: str) -> str:
    parts = split_url(text)
    if parts.fragment:
        raise ValueError("has a fragment")
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ValueError("is http:// to another machine, so others could read or change the traffic")
    return text


def _base_url(text: str) -> str:
    if split_url(text).query:
        raise ValueError("has a query")
    return text.rstrip("/")


def _origin(text: str) -> str:
    if text == "*":
        return text
    # Port `*` is for development servers, which pick their own.
    any_port = text.endswith(":*")
    # Apps and extensions have schemes of their own (RFC 6454, section 4).
    parts = split_url(text.removesuffix(":*")) if any_port else _split(text)
    if parts.path or parts.query or parts.fragment or text[-1] in "?#":
        raise ValueError("has more than scheme, host and port")
    if any_port and (parts.port is not None or not is_loopback(parts.hostname or "")):
        raise ValueError("has port * on a host other than loopback")
    origin = origin_of(parts)
    return f"{origin}:*" if any_port else origin


def origin_of(parts: SplitResult) -> str:
    """Return a URL's origin as browsers write it (RFC 6454, section 6.2): lower case, no default port."""
    host = (parts.hostname or "").lower()
    host = f"[{host}]" if ":" in host else host
    default = {"https": 443, "http": 80}.get(parts.scheme)
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port not in (None, default) else "")


def _public_url(text: str) -> str:
    parts = split_url(text)
    if parts.query or parts.fragment:
        raise ValueError("has a query or fragment")
    return origin_of(parts) + parts.path.rstrip("/")


def _root_path(text: str) -> str:
    if text and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+/?", text):
        raise ValueError("is not a path prefix")
    segments = text.split("/")[1:]
    if {".", ".."} & set(segments):
        raise ValueError("has a segment that browsers and proxies resolve")
    if segments and segments[0] in ROUTES:
        # For /calls/x it would be unclear whether the proxy has taken the prefix off.
        raise ValueError("begins as a path of the broker's own does")
    return text.rstrip("/")


def _header_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", text):
        raise ValueError("is not a header name")
    if text.lower() in ("authorization", "cookie", "host", "origin", "forwarded"):
        raise ValueError("is a header with another use")
    return text


def _user_header(text: str) -> str:
    if _header_name(text).lower() == "x-forwarded-for":
        raise ValueError("is a header with another use")
    return text


def _claim_pairs(value: Any) -> Any:
    pairs: dict[str, str] = {}
    for word in words(value):
        name, equals, claim = map(unquoted, word.partition("="))
        if not equals or not claim or not re.fullmatch(VARIABLE, name) or name in pairs:
            raise ValueError("is not a list of variable=claim")
        pairs[name] = check_claim_name(claim)
    return pairs


def _required_claims(value: Any) -> Any:
    return read_required_claims(words(value)) if isinstance(value, str) else value


def words(value: Any) -> Any:
    """Split a comma-separated text; leave anything else as it is. ValueError if there is nothing but commas."""
    if not isinstance(value, str):
        return value
    found = [unquoted(word) for word in value.split(",") if word.strip(BLANKS)]
    if value and not found:
        raise ValueError("names nothing")
    return found


def _network(text: Any) -> Network:
    try:
        network = ip_network(text)
    except ValueError:
        raise ValueError("is not a network, or has host bits") from None
    if isinstance(network, IPv6Network) and isinstance(MAPPED, IPv6Network) and network.subnet_of(MAPPED):
        # Addresses of this kind are read as the IPv4 addresses that they are.
        return IPv4Network((IPv4Address(int(network.network_address) & 0xFFFFFFFF), network.prefixlen - 96))
    return network


def _secret_rule(fits: Callable[[str], object], wrong: str) -> AfterValidator:
    """Return a validator of secrets. `wrong`: of a secret that does not fit; it never repeats the secret."""

    def check(value: SecretStr) -> SecretStr:
        if not fits(value.get_secret_value()):
            raise ValueError(wrong)
        return value

    return AfterValidator(check)


def _at_least(length: int) -> AfterValidator:
    return _secret_rule(lambda text: len(text) >= length, f"is shorter than {length} characters")


Line = Annotated[str, AfterValidator(one_line)]
Words = Annotated[list[Line], BeforeValidator(words)]
Limits = Annotated[str, AfterValidator(check_limits)]
Secret = Annotated[SecretStr, _secret_rule(str.strip, "is empty")]

_NOT_PUBLISHABLE = _secret_rule(
    lambda text: not text.startswith("oi_pk_"), "is a publishable key (oi_pk_…), which is for browsers"
)
_NO_QUOTE = _secret_rule(lambda text: text[0] not in "\"'" and text[-1] not in "\"'", "has a quote at one end")
_HEADER_TEXT = _secret_rule(
    re.compile(r"[\x21-\x7e]+").fullmatch, "has spaces, line breaks or other characters not allowed in a header"
)
_URL_SAFE = _secret_rule(re.compile(r"[A-Za-z0-9._~-]{22,}").fullmatch, "is too short or not URL-safe")
_LONG_LINES = _secret_rule(
    lambda text: all(len(line) >= 32 for line in text.splitlines() if line.strip()),
    "has a line shorter than 32 characters",
)
_STORE_URL = _secret_rule(
    re.compile(r"memory://\Z|(redis|valkey)(s?(\+sentinel|\+cluster)?://[^/]|\+unix://.)", re.IGNORECASE).match,
    "is not the URL of a store",
)


def setting(default: Any, meaning: str, takes: str, **bounds: Any) -> Any:
    """Make a field: its default, what it means (for the documents), and what it takes (for the error line)."""
    return taking(takes, default, description=meaning, **bounds)


def _count(default: int | None, meaning: str) -> Any:
    return setting(default, meaning, "a whole number from 1 to 1,000,000,000", ge=1, le=1_000_000_000)


def _seconds(default: int, meaning: str, most: int) -> Any:
    return setting(default, meaning, f"seconds, 0 to {most}", ge=0, le=most)


def variable(field: str) -> str:
    """Return a field's environment variable."""
    return field.upper() if field.startswith("oneinbox_") else f"BROKER_{field.upper()}"


def field_of(name: str) -> str:
    """Return an environment variable's field."""
    return name.removeprefix("BROKER_").lower()


class Settings(BaseSettings):
    """The broker's settings, checked. Secrets are SecretStr, so that `repr` hides them."""

    model_config = SettingsConfigDict(
        alias_generator=variable, frozen=True, extra="forbid", hide_input_in_errors=True, arbitrary_types_allowed=True
    )

    oneinbox_api_key: Annotated[Secret, _NOT_PUBLISHABLE, _HEADER_TEXT, _NO_QUOTE] = setting(
        ..., "OneInbox's secret key. It stays on the server", "a secret key, oi_sk_…"
    )
    oneinbox_base_url: Annotated[str, AfterValidator(_base_url), AfterValidator(_protected_url)] = setting(
        "https://api.oneinbox.ai", "OneInbox's base URL; `http://` only for loopback", "an https:// URL"
    )
    oneinbox_agent_id: str | None = setting(
        None,
        "Agent to use when the browser names none. Required unless BROKER_AGENTS_FILE is set",
        "an agent's id, agt_… or a UUID",
        pattern=AGENT_ID,
    )
    oneinbox_timeout: float = setting(
        15, "Seconds OneInbox may take for a whole answer", "seconds, above 0 and at most 300", gt=0, le=300
    )
    oneinbox_connect_timeout: float = setting(
        3, "Seconds a connection to OneInbox may take", "seconds, above 0 and at most 60", gt=0, le=60
    )
    agents_file: Path | None = setting(
        None, "TOML file of named agents and what a browser may ask of each", "the path of a TOML file"
    )
    auth: Literal["anonymous", "jwt", "header"] = setting(
        "anonymous",
        "How users are told apart: `anonymous` by address, `jwt` by a signed token, `header` by a proxy's header",
        "anonymous, jwt or header",
    )
    jwt_jwks_url: Annotated[str, AfterValidator(_protected_url)] | None = setting(
        None,
        "The identity provider's key set (JWKS). jwt mode needs this, BROKER_JWT_SECRET or BROKER_JWT_PUBLIC_KEY",
        "an https:// URL",
    )
    jwt_secret: Annotated[Secret, _at_least(32)] | None = setting(
        None, "Secret shared with the token issuer (HS256, HS384, HS512)", "at least 32 characters"
    )
    jwt_public_key: Secret | None = setting(None, "The token issuer's public key", "a public key in PEM")
    jwt_issuer: Line | None = setting(
        None, "Issuer (`iss`) that tokens must have. Required with BROKER_JWT_JWKS_URL", "an issuer's name"
    )
    jwt_audience: Words | None = setting(
        None,
        "Audiences (`aud`) of which tokens must have one. "
        "BROKER_JWT_JWKS_URL requires this or BROKER_JWT_REQUIRED_CLAIMS",
        "audiences, comma-separated",
    )
    jwt_required_claims: Annotated[dict[str, tuple[str, ...]], BeforeValidator(_required_claims)] = setting(
        {},
        "Claims that tokens must have, for those without `aud`. `|`: one of these. Of a claim that is a list, one item "
        "is enough. A claim that begins with `/` is a JSON pointer",
        "pairs, comma-separated: azp=https://www.example.com|https://app.example.com,token_use=access",
    )
    jwt_algorithms: Words = setting(
        [], "Accepted signature algorithms. Unset: all that fit the key", "names, comma-separated: ES256,RS256"
    )
    jwt_user_claim: Annotated[ClaimName, AfterValidator(one_line)] = setting(
        "sub", "Claim that holds the user's id", "a claim's name, or a JSON pointer such as /user/id"
    )
    jwt_cookie: str | None = setting(
        None, "Also accept the token from this cookie", "a cookie's name", pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$"
    )
    user_header: Annotated[str, AfterValidator(_user_header)] = setting(
        "X-Forwarded-User", "header mode: the header in which the proxy names the user", "a header name"
    )
    trusted_proxies: Annotated[list[Annotated[Any, BeforeValidator(_network)]], BeforeValidator(words)] = setting(
        [],
        "Networks of your proxies. Only their X-Forwarded-For (or BROKER_CLIENT_IP_HEADER) and user header are trusted",
        "networks, comma-separated: 10.0.0.0/8,fd00::/8",
    )
    client_ip_header: Annotated[str, AfterValidator(_header_name)] = setting(
        "X-Forwarded-For",
        "The header in which your proxy names the client. Any other than X-Forwarded-For holds exactly one address",
        "a header name, such as Fly-Client-IP or CF-Connecting-IP",
    )
    allowed_origins: Annotated[list[Annotated[str, AfterValidator(_origin)]], BeforeValidator(words)] = setting(
        [],
        "Origins that may use the broker, as browsers send them; apps and extensions have their own schemes "
        "(`capacitor://localhost`). `*`: any. A loopback origin may have port `*`",
        "origins, comma-separated: https://a.example,https://b.example",
    )
    public_url: Annotated[str, AfterValidator(_public_url)] | None = setting(
        None,
        "The broker's own public URL, so that pages it serves may call it. Unset: only on loopback",
        "an http(s) URL",
    )
    require_origin: bool = setting(False, "Refuse POST /session without an Origin header", "true or false")
    challenge_secret: Annotated[Secret, _HEADER_TEXT] | None = setting(
        None, "Require a bot challenge (Turnstile, hCaptcha) before a session; verified with this secret", "a secret"
    )
    challenge_verify_url: Annotated[str, AfterValidator(_protected_url)] = setting(
        "https://challenges.cloudflare.com/turnstile/v0/siteverify", "URL that verifies challenges", "an https:// URL"
    )
    session_limits: Limits = setting("5/minute;50/day", "Sessions per user", "limits such as 5/minute;50/day")
    global_session_limits: Limits = setting(
        "60/minute;1000/day", "Sessions of all users together", "limits such as 60/minute;1000/day"
    )
    request_limits: Limits = setting(
        "120/minute", "Requests per user, refused and failed ones included", "limits such as 120/minute"
    )
    max_live_calls: int = _count(2, "Calls a user may have running at once")
    max_live_calls_total: int | None = _count(None, "Calls that may run at once, all users together. Unset: no limit")
    max_call_seconds: int = _seconds(
        3600, "Seconds after which the broker hangs up a call. 0: never", most=MAX_CALL_SECONDS
    )
    warn_seconds: int = _seconds(
        60, "Seconds before a running call's `ends_at` at which its event stream sends `ending`. 0: never", most=86400
    )
    join_timeout: int = _seconds(
        0, "Seconds a call may stay unjoined before the broker hangs it up. 0: no limit", most=86400
    )
    talk_minutes: int | None = _count(
        None,
        "Call minutes per user in any 24 h; once they are used up, sessions are refused and running calls are hung up. "
        "Unset: no limit",
    )
    global_talk_minutes: int | None = _count(None, "The same for all users together. Unset: no limit")
    plans_file: Path | None = setting(
        None,
        "TOML file of limits by plan and by organization, chosen by the token's claims; jwt mode only",
        "the path of a TOML file",
    )
    limits_mode: Literal["enforce", "observe"] = setting(
        "enforce", "`observe`: log what the limits would refuse, but allow it", "enforce or observe"
    )
    max_waiting: int = _count(1000, "Sessions that may wait for OneInbox at once, per process; more are refused")
    max_streams: int = _count(10, "Open event streams per user")
    max_streams_total: int = _count(5000, "Open event streams per process")
    store_url: Annotated[Secret, _STORE_URL] = setting(
        SecretStr("memory://"),
        "Where counters are kept: `memory://`, or a Valkey or Redis shared by all replicas",
        "memory://, or a redis://, rediss://, redis+unix://, redis+sentinel:// or redis+cluster:// URL (also valkey…)",
    )
    store_timeout: float = setting(
        0.25,
        "Seconds the shared store may take for one operation, connecting included. More for a store in another region",
        "seconds, 0.05 to 5",
        ge=0.05,
        le=5,
    )
    store_prefix: str = setting(
        "oib",
        "First part of all names in the shared store. Deployments with different prefixes share nothing in it",
        "1 to 64 letters, digits, dots, hyphens and underscores",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
    )
    on_store_loss: Literal["local", "refuse"] = setting(
        "local",
        "While the shared store is down: `local` counts per process, `refuse` refuses sessions",
        "local or refuse",
    )
    expose: Annotated[
        list[Literal["transcript", "messages", "recording_url", "summary", "outcome"]], BeforeValidator(words)
    ] = setting(
        [],
        "Call fields, beyond the basic ones, that a browser may read",
        "names, comma-separated, out of transcript, messages, recording_url, summary, outcome",
    )
    allowed_variables: Annotated[list[AllowedVariable], BeforeValidator(words)] = setting(
        ["*"], "Variables a browser may set. `*`: any; empty: none", "names, comma-separated, or *"
    )
    allowed_overrides: Annotated[list[OverridePath], BeforeValidator(words)] = setting(
        [],
        "Parts of the agent that a browser may override, as dotted paths of single leaves",
        "paths, comma-separated, out of " + ", ".join(OVERRIDE_LEAVES),
    )
    variables_from_claims: Annotated[dict[str, str], BeforeValidator(_claim_pairs)] = setting(
        {},
        "Trusted variables from the verified token's claims; a browser cannot set them. "
        "A claim that begins with `/` is a JSON pointer",
        "pairs, comma-separated: customer_name=name,plan=https://example.com/plan,team=/team/name",
    )
    secret: Annotated[Secret, _LONG_LINES] | None = setting(
        None,
        "Key for pseudonyms, call keys and stored answers. One per line: the first signs, all verify. "
        "Unset: derived from the API key",
        "lines of at least 32 characters each",
    )
    share_user_id: bool = setting(
        False, "Also write the plain user id on OneInbox's call record, as `broker_user_id`", "true or false"
    )
    metrics_token: Annotated[Secret, _at_least(16), _HEADER_TEXT] | None = setting(
        None, "Bearer token for `/metrics`. Unset: `/metrics` answers 404", "at least 16 characters without spaces"
    )
    webhook_secret: Annotated[Secret, _URL_SAFE] | None = setting(
        None,
        "Last part of the path where OneInbox delivers webhooks. Unset: the path answers 404",
        "at least 22 URL-safe characters",
    )
    client: bool = setting(True, "Serve /client.js, /element.js and /react.js", "true or false")
    livekit_client: Path | None = setting(
        None,
        "livekit-client's browser build, to serve as /livekit-client.js: pages then need no other server",
        "the path of a JavaScript file",
    )
    drain_seconds: int = _seconds(
        0, "Seconds to keep accepting requests after SIGTERM while /readyz says draining", most=3600
    )
    warm_connections: int = setting(
        1,
        "Connections to OneInbox kept open and ready per process, however long no one calls. 0: none",
        "a whole number, 0 to 100",
        ge=0,
        le=100,
    )
    docs: bool = setting(True, "Serve /docs and /openapi.json", "true or false")
    root_path: Annotated[str, AfterValidator(_root_path)] = setting(
        "", "Path prefix that a proxy in front strips", "a path such as /voice, not one of the broker's own"
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Lowest level that is logged", "debug, info, warning or error"
    )
    log_format: Literal["json", "text"] | None = setting(
        None, "`json` or `text`. Unset: text on a terminal, json elsewhere", "json or text"
    )

    _secret_files: Mapping[str, Path] = PrivateAttr(default_factory=dict)

    @property
    def secret_files(self) -> Mapping[str, Path]:
        """The files that secrets were read from, by variable."""
        return self._secret_files

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use only what is passed in: `load_settings` reads the variables, as pydantic-settings has no NAME_FILE."""
        return (init_settings,)


FIELDS: Mapping[str, FieldInfo] = {variable(name): field for name, field in Settings.model_fields.items()}
SECRETS = frozenset(name for name, field in FIELDS.items() if "SecretStr" in str(field.annotation))
KNOWN = frozenset(FIELDS) | {f"{name}_FILE" for name in SECRETS}


def takes(name: str) -> str:
    """Return what a variable takes, in words."""
    return takes_of(FIELDS[name if name in FIELDS else name.removesuffix("_FILE")])
