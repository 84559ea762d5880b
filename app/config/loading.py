"""Reads the settings.

They come from the environment and from `.env` in the working directory; the environment wins. Every secret may
also come from a file named by the variable with `_FILE` appended, as container secrets do.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from dotenv import dotenv_values
from pydantic import ValidationError

from app.config.settings import FIELDS, KNOWN, SECRETS, Settings, SettingsError, _words, field_of, takes

# Kubernetes puts these into every pod for a Service called `broker` or `oneinbox`; they are not settings.
SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT|PORT_\d+_(TCP|UDP)(_.+)?)$")
PREFIXES = ("BROKER_", "ONEINBOX_")
JWT_KEYS = ("BROKER_JWT_JWKS_URL", "BROKER_JWT_SECRET", "BROKER_JWT_PUBLIC_KEY")
EMPTY_MEANS_NONE = frozenset({"BROKER_ALLOWED_VARIABLES"})


def load_settings(environ: Mapping[str, str] | None = None, env_file: Path | None = Path(".env")) -> Settings:
    """Read and check all settings.

    `environ`: os.environ unless told. `env_file`: read too where it exists. Raises SettingsError.
    """
    try:
        given = _read_variables(os.environ if environ is None else environ, env_file)
    except UnicodeDecodeError:
        raise SettingsError([f"{env_file}: is not UTF-8 text"]) from None
    lines: dict[str, str] = {}
    for name in [name for name, text in given.items() if not _is_text(text)]:
        lines[name] = f"{name}: is not UTF-8 text; takes {takes(name) if name in KNOWN else 'text'}"
        del given[name]
    for name in sorted(given.keys() - KNOWN):
        lines[name] = f"{name}: is not a setting of the broker" + _nearest(name)
    values = {name: text for name, text in given.items() if name in FIELDS}
    files = {name: Path(given[f"{name}_FILE"]) for name in sorted(SECRETS) if f"{name}_FILE" in given}
    for name, path in files.items():
        if name in given:
            lines[name] = f"{name}: is set, and {name}_FILE too; set one of them"
            continue
        try:
            values[name] = read_secret(name, path)
        except SettingsError as error:
            [lines[name]] = error.lines
    for name, line in _combinations(values, given):
        lines.setdefault(name, line)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        for name, line in _wrong(error):
            lines.setdefault(name, line)
    if lines:
        raise SettingsError(list(lines.values()))
    settings._secret_files = files
    return settings


def read_secret(name: str, path: Path) -> str:
    """A secret out of its file, without the line break at its end. `name`: its variable. Raises SettingsError."""
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        line = f"{name}_FILE: cannot be read ({reason}); takes the path of a file with {takes(name)}"
        raise SettingsError([line]) from None


def with_secret(settings: Settings, name: str, text: str) -> Settings:
    """The settings with another secret, checked as at the start. `name`: its variable. Raises SettingsError."""
    try:
        checked = Settings.model_validate({"ONEINBOX_API_KEY": settings.oneinbox_api_key, name: text})
    except ValidationError as error:
        raise SettingsError([line for _, line in _wrong(error)]) from None
    field = field_of(name)
    return settings.model_copy(update={field: getattr(checked, field)})


def secret_lines(settings: Settings) -> list[str]:
    """The secrets that keys are derived from, newest first."""
    if settings.secret is None:
        return [settings.oneinbox_api_key.get_secret_value()]
    return [line for line in settings.secret.get_secret_value().splitlines() if line.strip()]


def _wrong(error: ValidationError) -> Iterable[tuple[str, str]]:
    """The variables that are wrong, each with its line."""
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        name = str(each["loc"][0])
        why = "is required" if each["type"] == "missing" else each["msg"].removeprefix("Value error, ")
        yield name, f"{name}: {why[0].lower()}{why[1:]}; takes {takes(name)}"


def _read_variables(environ: Mapping[str, str], env_file: Path | None) -> dict[str, str]:
    """Ours out of both sources. An empty value is an unset one, unless empty means something."""
    both: dict[str, str] = {}
    if env_file is not None and env_file.is_file():
        both.update({name: text or "" for name, text in dotenv_values(env_file, encoding="utf-8").items()})
    both.update(environ)
    return {
        name: text
        for name, text in both.items()
        if name.upper().startswith(PREFIXES)
        and (name in KNOWN or not SERVICE_LINK.search(name))
        and (text != "" or name in EMPTY_MEANS_NONE)
    }


def _combinations(values: Mapping[str, str], given: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Rules between settings, on their texts: they speak up even while another setting is wrong."""
    for name, why in (*_agent_rules(values), *_identity_rules(values), *_secret_rules(values, given)):
        yield name, f"{name}: {why}; takes {takes(name)}"


def _agent_rules(values: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    if "BROKER_AGENTS_FILE" not in values and "ONEINBOX_AGENT_ID" not in values:
        yield "ONEINBOX_AGENT_ID", "is required, or BROKER_AGENTS_FILE instead"
    if "BROKER_AGENTS_FILE" in values and "ONEINBOX_AGENT_ID" in values:
        yield "ONEINBOX_AGENT_ID", "is set, and BROKER_AGENTS_FILE too; set one of them"


def _identity_rules(values: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    auth = values.get("BROKER_AUTH", "anonymous")
    keys = [name for name in JWT_KEYS if name in values]
    if auth == "jwt" and not keys:
        yield JWT_KEYS[0], f"is required in jwt mode, or {' or '.join(JWT_KEYS[1:])} instead"
    if auth == "jwt" and len(keys) > 1:
        yield keys[1], f"is set, and {keys[0]} too; set one of them"
    if auth != "jwt":
        for name in (*JWT_KEYS, "BROKER_JWT_COOKIE", "BROKER_VARIABLES_FROM_CLAIMS"):
            if name in values:
                yield name, "is set, but BROKER_AUTH is not jwt"
    if auth == "jwt" and JWT_KEYS[0] in keys:
        for name in ("BROKER_JWT_ISSUER", "BROKER_JWT_AUDIENCE"):
            if name not in values:
                yield name, f"is required with {JWT_KEYS[0]}"
    if auth == "header" and "BROKER_TRUSTED_PROXIES" not in values:
        yield "BROKER_TRUSTED_PROXIES", "is required in header mode"
    if "*" in _words(values.get("BROKER_ALLOWED_ORIGINS", "")) and (auth == "header" or "BROKER_JWT_COOKIE" in values):
        # The browser sends the login along by itself: any site could start calls in a user's name.
        yield "BROKER_ALLOWED_ORIGINS", "is *, which is refused in header mode and with BROKER_JWT_COOKIE"


def _secret_rules(values: Mapping[str, str], given: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    if "BROKER_SECRET" in values or "BROKER_SECRET_FILE" in given:
        return
    if "ONEINBOX_API_KEY_FILE" in given:
        # A key in a file may be swapped while the broker runs; what is derived from it would not survive that.
        yield "BROKER_SECRET", "is required with ONEINBOX_API_KEY_FILE"
    elif values.get("BROKER_STORE_URL", "memory://") != "memory://":
        yield "BROKER_SECRET", "is required with a shared BROKER_STORE_URL"


def _is_text(value: str) -> bool:
    """Whether a variable's bytes were UTF-8; Python reads others as lone surrogates (PEP 383)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name.upper(), KNOWN, n=1, cutoff=0.5)
    return f"; the nearest is {close[0]}" if close else ""
