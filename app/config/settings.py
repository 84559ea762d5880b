"""Every setting, once: its variable, type, default and meaning. README and .env.example get their tables from here."""

import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, PrivateAttr, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from app.config.overrides import OVERRIDE_LEAVES
from app.config.validation import AGENT_ID, check_limits, takes_of, taking

Network = IPv4Network | IPv6Network

HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


class SettingsError(Exception):
    """Settings that cannot be used. `lines`: one per wrong setting, naming the variable; never a secret."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        super().__init__("; ".join(lines))


def is_loopback(host: str) -> bool:
    """Whether a host, bare or as it stands in a URL, is this machine."""
    host = host.strip("[]").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def split_url(text: str) -> SplitResult:
    """An absolute http(s) URL in parts; ValueError says what is wrong with it, without repeating it."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # ValueError when it is none
    except ValueError:
        raise ValueError("is not a URL") from None  # the library's own words repeat the text
    if parts.scheme not in ("http", "https") or not HOST.fullmatch(parts.hostname or ""):
        raise ValueError("is not an http(s) URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a user name or password")
    return parts


def _protected_url(text: str) -> str:
    parts = split_url(text)
    if parts.fragment:
        raise ValueError("has a fragment")
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ValueError("is http:// to another machine: anybody on the way could read or change what passes")
    return text


def _base_url(text: str) -> str:
    if split_url(text).query:
        raise ValueError("has a query")
    return text.rstrip("/")


def _origin(text: str) -> str:
    if text == "*":
        return text
    # A port of `*` is for development servers, which pick theirs: loopback only.
    any_port = text.endswith(":*")
    parts = split_url(text.removesuffix(":*"))
    if parts.path or parts.query or parts.fragment:
        raise ValueError("has more than scheme, host and port")
    if any_port and (parts.port is not None or not is_loopback(parts.hostname or "")):
        raise ValueError("has a port of * on a host other than loopback")
    origin = origin_of(parts)
    return f"{origin}:*" if any_port else origin


def origin_of(parts: SplitResult) -> str:
    """The origin of a URL as browsers write it (RFC 6454, section 6.2): lower case, no default port."""
    host = (parts.hostname or "").lower()
    host = f"[{host}]" if ":" in host else host
    default = 443 if parts.scheme == "https" else 80
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port not in (None, default) else "")


def _public_url(text: str) -> str:
    parts = split_url(text)
    if parts.query or parts.fragment:
        raise ValueError("has a query or fragment")
    return origin_of(parts) + parts.path.rstrip("/")


def _root_path(text: str) -> str:
    if text and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+/?", text):
        raise ValueError("is not a path prefix")
    return text.rstrip("/")


def _store_url(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if text != "memory://" and not re.match(r"(redis|rediss|valkey|valkeys)://[^/]", text):
        raise ValueError("is not the URL of a store")
    return value


def _header_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", text):
        raise ValueError("is not the name of a header")
    if text.lower() in ("authorization", "cookie", "host", "origin", "x-forwarded-for"):
        raise ValueError("has a meaning of its own")
    return text


def _claim_pairs(value: Any) -> Any:
    pairs: dict[str, str] = {}
    for word in words(value):
        name, equals, claim = (part.strip() for part in word.partition("="))
        if not equals or not claim or not VARIABLE_NAME.fullmatch(name) or name in pairs:
            raise ValueError("is not a list of variable=claim")
        pairs[name] = claim
    return pairs


def words(value: Any) -> Any:
    """Split a comma-separated text; leave anything else as it is."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _network(text: Any) -> Network:
    try:
        return ip_network(text)
    except ValueError:
        raise ValueError("has something other than a network, or one with bits of a host") from None


def _variable_names(names: list[str]) -> list[str]:
    if any(name != "*" and not VARIABLE_NAME.fullmatch(name) for name in names):
        raise ValueError("has a name other than letters, digits and _")
    return names


def _override_paths(paths: list[str]) -> list[str]:
    for path in paths:
        if path not in OVERRIDE_LEAVES:
            raise ValueError("names something other than a single leaf")
    return paths


def _secret_key(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if text.startswith("oi_pk_"):
        raise ValueError("is a publishable key (oi_pk_…), which belongs in a browser")
    _token_text(value)
    return value


def _token_text(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
        raise ValueError("has spaces, line breaks or other characters that do not fit a header")
    return value


def _long_enough(value: SecretStr) -> SecretStr:
    if len(value.get_secret_value()) < 32:
        raise ValueError("is shorter than 32 characters")
    return value


def _at_least_16(value: SecretStr) -> SecretStr:
    if len(_token_text(value).get_secret_value()) < 16:
        raise ValueError("is shorter than 16 characters")
    return value


def _url_safe(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[A-Za-z0-9._~-]{22,}", value.get_secret_value()):
        raise ValueError("is shorter, or not URL-safe")
    return value


def _secret_lines(value: SecretStr) -> SecretStr:
    if any(len(line) < 32 for line in value.get_secret_value().splitlines() if line.strip()):
        raise ValueError("has a line shorter than 32 characters")
    return value


def _present(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().strip():
        raise ValueError("is empty")
    return value


Words = Annotated[list[str], BeforeValidator(words)]
Limits = Annotated[str, AfterValidator(check_limits)]
Secret = Annotated[SecretStr, AfterValidator(_present)]


def setting(default: Any, meaning: str, takes: str, **bounds: Any) -> Any:
    """A field: its default, what it means (for the README), and what it takes (for the error line)."""
    return taking(takes, default, description=meaning, **bounds)


def variable(field: str) -> str:
    """The environment variable of a field."""
    return field.upper() if field.startswith("oneinbox_") else f"BROKER_{field.upper()}"


def field_of(name: str) -> str:
    """The field of an environment variable."""
    return name.removeprefix("BROKER_").lower()


class Settings(BaseSettings):
    """The broker's settings, checked. Secrets are secret types: their `repr` hides them."""

    model_config = SettingsConfigDict(
        alias_generator=variable, frozen=True, extra="forbid", hide_input_in_errors=True, arbitrary_types_allowed=True
    )

    oneinbox_api_key: Annotated[Secret, AfterValidator(_secret_key)] = setting(
        ..., "OneInbox's secret key. It stays on the server", "a secret key, oi_sk_…"
    )
    oneinbox_base_url: Annotated[str, AfterValidator(_base_url), AfterValidator(_protected_url)] = setting(
        "https://api.oneinbox.ai", "Where OneInbox is; `http://` only for loopback", "an https:// URL"
    )
    oneinbox_agent_id: str | None = setting(
        None,
        "The agent used when the browser names none. Required unless BROKER_AGENTS_FILE is set",
        "an agent's id, agt_… or a UUID",
        pattern=AGENT_ID,
    )
    oneinbox_timeout: float = setting(
        15, "Seconds for OneInbox's whole answer", "seconds, above 0 and at most 300", gt=0, le=300
    )
    oneinbox_connect_timeout: float = setting(
        3, "Seconds for a connection to OneInbox", "seconds, above 0 and at most 60", gt=0, le=60
    )
    agents_file: Path | None = setting(
        None, "TOML file: named agents, and what a browser may ask of each", "the path of a TOML file"
    )
    auth: Literal["anonymous", "jwt", "header"] = setting(
        "anonymous",
        "How users are told apart: `anonymous`, by address; `jwt`, by a signed token; `header`, by what a proxy says",
        "anonymous, jwt or header",
    )
    jwt_jwks_url: Annotated[str, AfterValidator(_protected_url)] | None = setting(
        None, "Where the identity provider publishes its keys; one of three in jwt mode", "an https:// URL"
    )
    jwt_secret: Annotated[Secret, AfterValidator(_long_enough)] | None = setting(
        None, "Secret shared with the tokens' issuer (HS256 and kin); one of three", "at least 32 characters"
    )
    jwt_public_key: Secret | None = setting(
        None, "Public key of the tokens' issuer; one of three", "a public key in PEM"
    )
    jwt_issuer: str | None = setting(
        None, "Issuer (`iss`) that tokens must name. Required with BROKER_JWT_JWKS_URL", "an issuer's name"
    )
    jwt_audience: str | None = setting(
        None, "Audience (`aud`) that tokens must name. Required with BROKER_JWT_JWKS_URL", "an audience's name"
    )
    jwt_algorithms: Words = setting(
        [],
        "Algorithms that tokens may be signed with. Unset: those of the key's kind",
        "names, comma-separated: ES256,RS256",
    )
    jwt_user_claim: str = setting("sub", "Claim that holds the user's id", "a claim's name")
    jwt_cookie: str | None = setting(
        None,
        "Also take the token from this cookie",
        "a cookie's name",
        pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$",
    )
    user_header: Annotated[str, AfterValidator(_header_name)] = setting(
        "X-Forwarded-User", "header mode: the header in which the proxy names the user", "the name of a header"
    )
    trusted_proxies: Annotated[list[Annotated[Any, BeforeValidator(_network)]], BeforeValidator(words)] = setting(
        [],
        "Networks of the proxies in front; their X-Forwarded-For and user header are believed, nobody else's",
        "networks, comma-separated: 10.0.0.0/8,fd00::/8",
    )
    allowed_origins: Annotated[list[Annotated[str, AfterValidator(_origin)]], BeforeValidator(words)] = setting(
        [],
        "Browser origins that may use the broker. `*`: any. A loopback origin may have the port `*`",
        "origins, comma-separated: https://a.example,https://b.example",
    )
    public_url: Annotated[str, AfterValidator(_public_url)] | None = setting(
        None,
        "The broker's own public URL, so that pages it serves may call it. Unset: only loopback is its own",
        "an http(s) URL",
    )
    require_origin: bool = setting(False, "Refuse POST /session without an Origin", "true or false")
    challenge_secret: Annotated[Secret, AfterValidator(_token_text)] | None = setting(
        None, "Ask for a bot challenge (Turnstile, hCaptcha) before a session, verified with this secret", "a secret"
    )
    challenge_verify_url: Annotated[str, AfterValidator(_protected_url)] = setting(
        "https://challenges.cloudflare.com/turnstile/v0/siteverify", "Where challenges are verified", "an https:// URL"
    )
    session_limits: Limits = setting("5/minute;50/day", "Sessions per user", "limits such as 5/minute;50/day")
    global_session_limits: Limits = setting(
        "60/minute;1000/day", "Sessions of all users together", "limits such as 60/minute;1000/day"
    )
    request_limits: Limits = setting(
        "120/minute", "Requests per user, whatever comes of them", "limits such as 120/minute"
    )
    max_live_calls: int = setting(2, "Calls running at once, per user", "a whole number, at least 1", ge=1)
    max_live_calls_total: int | None = setting(
        None, "Calls running at once, in all. Unset: any", "a whole number, at least 1", ge=1
    )
    max_call_seconds: int = setting(
        3600, "The broker hangs up a call that runs longer; 0: never", "seconds, 0 or more", ge=0, le=604800
    )
    join_timeout: int = setting(
        0,
        "Seconds a call may stay unjoined before the broker hangs it up; 0: any",
        "seconds, 0 or more",
        ge=0,
        le=86400,
    )
    talk_minutes: int | None = setting(
        None,
        "Minutes of calls in any 24 h, per user, after which no new session is given. Unset: any",
        "a whole number, at least 1",
        ge=1,
    )
    global_talk_minutes: int | None = setting(
        None, "Minutes of calls in any 24 h, of all users together. Unset: any", "a whole number, at least 1", ge=1
    )
    limits_mode: Literal["enforce", "observe"] = setting(
        "enforce", "`observe`: log what the limits would refuse, and let it through", "enforce or observe"
    )
    max_waiting: int = setting(
        1000,
        "Sessions that may wait for OneInbox at once, per process; more are refused",
        "a whole number, at least 1",
        ge=1,
    )
    max_streams: int = setting(10, "Open event streams per user", "a whole number, at least 1", ge=1)
    max_streams_total: int = setting(5000, "Open event streams per process", "a whole number, at least 1", ge=1)
    store_url: Annotated[Secret, AfterValidator(_store_url)] = setting(
        SecretStr("memory://"),
        "Where counters live: `memory://`, or a Valkey or Redis shared by all replicas",
        "memory://, or a redis://, rediss://, valkey:// or valkeys:// URL",
    )
    on_store_loss: Literal["local", "refuse"] = setting(
        "local", "While the shared store is gone: count per process, or refuse sessions", "local or refuse"
    )
    expose: Annotated[
        list[Literal["transcript", "messages", "recording_url", "summary", "outcome"]], BeforeValidator(words)
    ] = setting(
        [],
        "Fields of a call, beyond the basic ones, that a browser may read",
        "names out of transcript, messages, recording_url, summary, outcome",
    )
    allowed_variables: Annotated[Words, AfterValidator(_variable_names)] = setting(
        ["*"], "Variables a browser may set; `*`: any, empty: none", "names, comma-separated, or *"
    )
    allowed_overrides: Annotated[Words, AfterValidator(_override_paths)] = setting(
        [],
        "Parts of the agent that a browser may override: dotted paths of single leaves",
        "paths, comma-separated, out of " + ", ".join(OVERRIDE_LEAVES),
    )
    variables_from_claims: Annotated[dict[str, str], BeforeValidator(_claim_pairs)] = setting(
        {},
        "Trusted variables, out of the verified token's claims; a browser cannot set these",
        "pairs, comma-separated: customer_name=name,plan=https://example.com/plan",
    )
    secret: Annotated[Secret, AfterValidator(_secret_lines)] | None = setting(
        None,
        "Key for pseudonyms, call keys and stored answers, one per line: the first signs, all verify. "
        "Unset: derived from the API key",
        "lines of at least 32 characters each",
    )
    share_user_id: bool = setting(
        False, "Also write the plain user id on OneInbox's call record, as `broker_user_id`", "true or false"
    )
    metrics_token: Annotated[Secret, AfterValidator(_at_least_16)] | None = setting(
        None,
        "Bearer token that `/metrics` wants; unset: there is no such path",
        "at least 16 characters without spaces",
    )
    webhook_secret: Annotated[Secret, AfterValidator(_url_safe)] | None = setting(
        None,
        "Last part of the path where OneInbox delivers webhooks; unset: there is no such path",
        "at least 22 URL-safe characters",
    )
    drain_seconds: int = setting(
        0,
        "After SIGTERM, keep accepting this long while /readyz says draining",
        "seconds, 0 to 3600",
        ge=0,
        le=3600,
    )
    docs: bool = setting(True, "Serve /docs and /openapi.json", "true or false")
    root_path: Annotated[str, AfterValidator(_root_path)] = setting(
        "", "Path prefix, when a proxy in front strips one", "a path such as /voice"
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Least level that is logged", "debug, info, warning or error"
    )
    log_format: Literal["json", "text"] | None = setting(
        None, "`json` or `text`. Unset: text on a terminal, json elsewhere", "json or text"
    )

    _secret_files: Mapping[str, Path] = PrivateAttr(default_factory=dict)

    @property
    def secret_files(self) -> Mapping[str, Path]:
        """Where secrets came from, by variable: those that were read from a file."""
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
        """Only what is given: `load_settings` reads the variables, as pydantic-settings knows no NAME_FILE."""
        return (init_settings,)


FIELDS: Mapping[str, FieldInfo] = {variable(name): field for name, field in Settings.model_fields.items()}
SECRETS = frozenset(name for name, field in FIELDS.items() if "SecretStr" in str(field.annotation))
KNOWN = frozenset(FIELDS) | {f"{name}_FILE" for name in SECRETS}


def takes(name: str) -> str:
    """What a variable takes, in words."""
    return takes_of(FIELDS[name if name in FIELDS else name.removesuffix("_FILE")])
