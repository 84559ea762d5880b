"""Store URLs: one server, a Unix socket, Sentinels or a cluster, in the schemes that limits and kombu use too.

    redis://[user:password@]host[:6379][/database]
    redis+unix://[user:password@]/path[?db=database]
    redis+sentinel://[user:password@]host[:26379][,host2…]/service[/database]
    redis+cluster://[user:password@]host[:6379][,host2…]

`valkey` is the same as `redis`; `rediss` and `valkeys` use TLS, for Sentinels too. The login is the data servers';
Sentinels with another one: `?sentinel_username=…&sentinel_password=…`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote

Address = tuple[str, int]
Kind = Literal["server", "unix", "sentinel", "cluster"]

_SCHEME = re.compile(r"(redis|valkey)(s?)(?:\+(unix|sentinel|cluster))?://(.*)", re.IGNORECASE | re.DOTALL)
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(\[[0-9A-Fa-f:.]+\]|{_LABEL}(?:\.{_LABEL})*\.?)(?::([0-9]{{1,5}}))?")
_LONGEST_HOST = 253
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS = (*_FILES, "ssl_password", "ssl_cert_reqs", "ssl_check_hostname")
_SENTINEL = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True, repr=False)
class StoreUrl:
    """A store's URL, parsed. `options`: for redis-py's connections. `sentinel_login`: the same, for Sentinels."""

    kind: Kind
    tls: bool
    addresses: tuple[Address, ...]
    options: Mapping[str, Any]
    service: str = ""
    sentinel_login: Mapping[str, Any] | None = None


def parse_store_url(url: str) -> StoreUrl:
    """Parse a URL. Raises ValueError that says what is wrong, without the URL in it."""
    found = _SCHEME.fullmatch(url)
    kind: Any = (found[3] or "server").lower() if found else None
    if found is None or (kind == "unix" and found[2]):
        raise ValueError("is not the URL of a store")
    tls = bool(found[2])
    # Not urlsplit: it takes a list that ends in an IPv6 address for a broken one.
    rest, _, query = found[4].partition("?")
    authority, _, path = rest.partition("/")
    login, _, hosts = authority.rpartition("@")
    username, _, password = login.partition(":")
    options = {name: unquote(text) for name, text in (("username", username), ("password", password)) if text}
    parameters = _parameters(query, tls=tls, sentinel=kind == "sentinel")
    sentinel_login = {name.removeprefix("sentinel_"): parameters.pop(name) for name in _SENTINEL if name in parameters}
    service = ""
    if kind == "unix":
        if hosts or not path:
            raise ValueError("the URL names no socket; takes redis+unix:///path")
        return StoreUrl(kind, tls, (), {**options, **parameters, "path": f"/{unquote(path)}"})
    if kind == "sentinel":
        service, _, path = path.partition("/")
        if not service:
            raise ValueError("the URL names no service; a Sentinel URL ends in /service or /service/database")
    database = _database(path) if path.rstrip("/") else parameters.get("db", 0)
    if kind == "cluster" and database:
        raise ValueError("the URL names a database, but a cluster has none; it ends after the hosts")
    addresses = tuple(_address(host, 26379 if kind == "sentinel" else 6379) for host in hosts.split(","))
    if kind == "server" and len(addresses) > 1:
        raise ValueError("the URL names several hosts; takes them with redis+sentinel:// or redis+cluster://")
    return StoreUrl(
        kind, tls, addresses, {**options, **parameters, "db": database}, unquote(service), sentinel_login or None
    )


def _parameters(query: str, *, tls: bool, sentinel: bool) -> dict[str, Any]:
    known = ("db", "client_name", *(_TLS if tls else ()), *(_SENTINEL if sentinel else ()))
    parameters: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            raise ValueError(f"the URL has an unknown parameter (known: {', '.join(known)})")
        if name in _FILES and not Path(text).is_file():
            raise ValueError(f"the URL has {name} naming a file that is not there")
        parameters[name] = _CONVERTERS.get(name, str)(text)
    return parameters


def _address(text: str, port: int) -> Address:
    found = _HOST.fullmatch(text.strip())
    if not found or (found[2] and not 0 < int(found[2]) < 65536) or len(found[1]) > _LONGEST_HOST:
        raise ValueError("the URL has an invalid host")
    if found[1].startswith("["):
        _check_address(found[1].strip("[]"))
    return found[1].strip("[]"), int(found[2] or port)


def _check_address(text: str) -> None:
    try:
        IPv6Address(text)
    except ValueError:
        raise ValueError("the URL has an invalid host") from None


def _database(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}/?", text):
        raise ValueError("the URL has a database that is not a number")
    return int(text.rstrip("/"))


def _certificates(text: str) -> str:
    if text.lower().removeprefix("cert_") != "required":
        raise ValueError("the URL has ssl_cert_reqs other than required, so that any server could pose as the store")
    return "required"


def _check_hostname(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError("the URL has ssl_check_hostname that is neither true nor false")
    return text.lower() in ("true", "1")


_CONVERTERS: Mapping[str, Callable[[str], Any]] = {
    "db": _database,
    "ssl_cert_reqs": _certificates,
    "ssl_check_hostname": _check_hostname,
}
