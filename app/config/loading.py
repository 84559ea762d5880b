"""Read settings from the environment and from `.env` in the working directory; the environment wins.

A secret may also be in a file, named by its variable with `_FILE` appended, as container secrets are.
"""

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.config.env_file import read_env_file
from app.config.settings import (
    FIELDS,
    KNOWN,
    PREFIXES,
    SECRETS,
    Settings,
    SettingsError,
    field_of,
    takes,
    trimmed,
)
from app.config.validation import BLANKS, nearest, unquoted, what_is_wrong

# Kubernetes sets these in every pod for a Service called `broker` or `oneinbox`; they are not settings.
SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT|PORT_\d+_(TCP|UDP)(_.+)?)$")
JWT_KEYS = ("BROKER_JWT_JWKS_URL", "BROKER_JWT_SECRET", "BROKER_JWT_PUBLIC_KEY")
JWT_CHECKS = ("BROKER_JWT_AUDIENCE", "BROKER_JWT_REQUIRED_CLAIMS")
"""What tells the tokens that are meant for this broker from others of the same issuer."""
EMPTY_MEANS_NONE = frozenset({"BROKER_ALLOWED_VARIABLES"})
MODES = ("anonymous", "jwt", "header")
TOKENS_ONLY = ("BROKER_PLANS_FILE", "BROKER_VARIABLES_FROM_CLAIMS")
"""Settings of jwt mode, besides BROKER_JWT_…."""
STAND_INS = {"ONEINBOX_API_KEY": "oi_sk_none", "ONEINBOX_AGENT_ID": "none"}
NO_KEY = "ONEINBOX_API_KEY: is required (a secret key, oi_sk_…). No key yet? Try `oneinbox-broker sandbox`."


def load_settings(
    environ: Mapping[str, str] | None = None,
    env_file: Path | None = Path(".env"),
    further: Callable[[Settings], Sequence[str]] = lambda _: (),
) -> Settings:
    """Read and check all settings.

    `environ`: os.environ by default. `env_file`: read if it exists. `further`: returns a line for each mistake that
    shows only later; it is asked even if other settings are wrong, so that one start shows all. Raises SettingsError.
    """
    lines: dict[str, str] = {}
    given = _read_variables(os.environ if environ is None else environ, env_file, lines)
    values = {name: text for name, text in given.items() if name in FIELDS}
    files = {name: Path(given[f"{name}_FILE"]) for name in sorted(SECRETS) if f"{name}_FILE" in given}
    for name, path in files.items():
        if name in given:
            lines[name] = f"{name}: is set, and so is {name}_FILE; set only one"
            continue
        try:
            values[name] = read_secret(name, path)
        except SettingsError as error:
            [lines[name]] = error.lines
    # On their texts, so that they are checked even while another setting is wrong.
    set_at_all = {**{name.removesuffix("_FILE"): "" for name in lines}, **dict.fromkeys(lines, ""), **values}
    for name, wrong in (*_agent_rules(set_at_all), *_identity_rules(set_at_all), *_secret_rules(set_at_all, given)):
        lines.setdefault(name, _line(name, wrong))
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        for name, line in _wrong(error):
            if f"{name}_FILE" not in lines:
                lines.setdefault(name, line)
    if lines:
        raise SettingsError(list(dict.fromkeys([*lines.values(), *_more(values, lines, further)])))
    settings._secret_files = files
    if more := further(settings):
        raise SettingsError(list(more))
    return settings


def _more(
    values: Mapping[str, str], lines: Mapping[str, str], further: Callable[[Settings], Sequence[str]]
) -> Iterator[str]:
    """Yield what `further` says of the settings that are right, about those that have no line yet."""
    if "BROKER_AUTH" in lines:
        return  # what is right depends on it
    right = STAND_INS | {name: text for name, text in values.items() if name not in lines}
    for line in further(Settings.model_validate(right)):
        if line.partition(":")[0] not in lines:
            yield line


def read_secret(name: str, path: Path) -> str:
    """Read a secret from its file, trimmed as a variable's value is. `name`: its variable. Raises SettingsError."""
    text = read_file(f"{name}_FILE", path, f"the path of a file with {takes(name)}")
    try:
        return trimmed(name, text)
    except ValueError as error:
        raise SettingsError([_line(name, str(error))]) from None


def read_file(name: str, path: Path, takes: str) -> str:
    """Read a text file. `name`: the variable that names it; `takes`: what that takes. Raises SettingsError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError([f"{name}: cannot be read ({reason}); takes {takes}"]) from None


def parse_toml(name: str, text: str) -> dict[str, Any]:
    """Parse the text of a configuration file. `name`: the variable that names it. Raises SettingsError."""
    try:
        return tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError as error:
        wrong = str(error)[:200]
    except (ValueError, RecursionError):
        wrong = "a number has too many digits, or brackets are nested too deep"
    raise SettingsError([f"{name}: is not TOML: {wrong}; takes TOML, see https://toml.io/en/v1.0.0"])


def with_secret(settings: Settings, name: str, text: str) -> Settings:
    """Return the settings with a new secret, checked as at startup. `name`: its variable. Raises SettingsError."""
    try:
        checked = Settings.model_validate({"ONEINBOX_API_KEY": settings.oneinbox_api_key, name: text})
    except ValidationError as error:
        raise SettingsError([line for _, line in _wrong(error)]) from None
    field = field_of(name)
    return settings.model_copy(update={field: getattr(checked, field)})


def secret_lines(settings: Settings) -> list[str]:
    """Return the secrets that keys are derived from, newest first."""
    if settings.secret is None:
        return [settings.oneinbox_api_key.get_secret_value()]
    return [line.strip(BLANKS) for line in settings.secret.get_secret_value().splitlines() if line.strip(BLANKS)]


def _wrong(error: ValidationError) -> Iterator[tuple[str, str]]:
    """Yield each wrong variable with its line."""
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        name, *item = each["loc"]
        which = f"item {item[0] + 1} " if item and isinstance(item[0], int) else ""
        yield str(name), NO_KEY if each["type"] == "missing" else _line(str(name), which + what_is_wrong(each))


def _line(name: str, wrong: str) -> str:
    return f"{name}: {wrong}; takes {takes(name)}"


def _read_variables(environ: Mapping[str, str], env_file: Path | None, lines: dict[str, str]) -> dict[str, str]:
    """Return the broker's variables from both sources, and add to `lines` what is wrong with them.

    Empty counts as unset, unless it means none.
    """
    both: dict[str, str] = {}
    if env_file is not None:
        both, mistakes = read_env_file(env_file, environ)
        lines.update({line: line for line in mistakes})
    given = {}
    for name, text in {**both, **environ}.items():
        if not name.upper().startswith(PREFIXES) or (name not in KNOWN and SERVICE_LINK.search(name)):
            continue
        if text == "" and name not in EMPTY_MEANS_NONE:
            continue
        if not _is_text(text):
            lines[name] = f"{name}: is not UTF-8 text; takes {takes(name) if name in KNOWN else 'text'}"
        elif name not in KNOWN:
            lines[name] = f"{name}: is not a setting{nearest(name.upper(), KNOWN)}"
        else:
            try:
                value = trimmed(name, text)
                if text and not value:
                    raise ValueError("is blank")
                given[name] = value
            except ValueError as error:
                lines[name] = _line(name, str(error))
    return given


def _agent_rules(values: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if "BROKER_AGENTS_FILE" not in values and "ONEINBOX_AGENT_ID" not in values:
        yield "ONEINBOX_AGENT_ID", "is required unless BROKER_AGENTS_FILE is set"
    if "BROKER_AGENTS_FILE" in values and "ONEINBOX_AGENT_ID" in values:
        yield "ONEINBOX_AGENT_ID", "is set, and so is BROKER_AGENTS_FILE; set only one"


def _identity_rules(values: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    auth = values.get("BROKER_AUTH", "anonymous")
    if auth not in MODES:
        return
    keys = [name for name in JWT_KEYS if name in values]
    if auth == "jwt" and not keys:
        yield JWT_KEYS[0], f"is required in jwt mode unless {' or '.join(JWT_KEYS[1:])} is set"
    if auth == "jwt":
        for name in keys[1:]:
            yield name, f"is set, and so is {keys[0]}; set only one"
    # Left over from another mode, a setting would seem to be in force.
    for name in sorted(values.keys() & FIELDS.keys()):
        if auth != "jwt" and (name.startswith("BROKER_JWT_") or name in TOKENS_ONLY):
            yield name, "is set, but BROKER_AUTH is not jwt"
        if auth != "header" and name == "BROKER_USER_HEADER":
            yield name, "is set, but BROKER_AUTH is not header"
    if auth == "jwt" and JWT_KEYS[0] in keys:
        if "BROKER_JWT_ISSUER" not in values:
            yield "BROKER_JWT_ISSUER", f"is required with {JWT_KEYS[0]}"
        if values.keys().isdisjoint(JWT_CHECKS):
            yield JWT_CHECKS[0], f"is required with {JWT_KEYS[0]} unless {JWT_CHECKS[1]} is set"
    if auth == "header":
        yield from _header_rules(values)
    origins = [unquoted(origin) for origin in values.get("BROKER_ALLOWED_ORIGINS", "").split(",")]
    if "*" in origins and (auth == "header" or "BROKER_JWT_COOKIE" in values):
        # The browser sends the login by itself: any site could start calls in a user's name.
        yield "BROKER_ALLOWED_ORIGINS", "must not be * in header mode or with BROKER_JWT_COOKIE"


def _header_rules(values: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if "BROKER_TRUSTED_PROXIES" not in values:
        yield "BROKER_TRUSTED_PROXIES", "is required in header mode"
    user = values.get("BROKER_USER_HEADER", FIELDS["BROKER_USER_HEADER"].default)
    if values.get("BROKER_CLIENT_IP_HEADER", "").lower() == user.lower():
        yield "BROKER_CLIENT_IP_HEADER", "is the same header as BROKER_USER_HEADER"


def _secret_rules(values: Mapping[str, str], given: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if "BROKER_SECRET" in values or "BROKER_SECRET_FILE" in given:
        return
    if "ONEINBOX_API_KEY_FILE" in given:
        # A key in a file may change while the broker runs, and with it everything derived from it.
        yield "BROKER_SECRET", "is required with ONEINBOX_API_KEY_FILE"
    elif values.get("BROKER_STORE_URL", "memory://") not in ("", "memory://"):
        yield "BROKER_SECRET", "is required with a shared BROKER_STORE_URL"


def _is_text(value: str) -> bool:
    """Return whether a variable's bytes were UTF-8; Python reads others as lone surrogates (PEP 383)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
