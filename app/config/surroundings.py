"""Proxy and trusted certificates, as every HTTP client of the broker takes them from its surroundings.

HTTPS_PROXY (or ALL_PROXY), NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR mean the same for OneInbox, an issuer's keys, a
challenge service and `doctor`. A loopback address is never proxied. Libraries differ here: httpx cannot read an IPv6
network in NO_PROXY and trusts certificates of its own.
"""

import os
import re
import ssl
from collections.abc import Iterator, Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

import httpx

from app.config.settings import SettingsError, is_host, is_loopback

PORTS = {"https": 443, "http": 80}


def surroundings_mistakes() -> list[str]:
    """Return a line for each variable of the surroundings that cannot be used, whatever the settings."""
    return [*_proxy_mistakes(), *_certificate_mistakes()]


def proxy_for(url: str) -> httpx.Proxy | None:
    """Return the proxy that the environment names for a URL, if any. Raises SettingsError if it cannot be used."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    name, text = _named_proxy(parts.scheme)
    if not text or is_loopback(host) or _is_direct(host, parts.port or PORTS.get(parts.scheme)):
        return None
    return _proxy(name, text)


def tls_context() -> ssl.SSLContext:
    """Return a client's TLS context, which trusts SSL_CERT_FILE and SSL_CERT_DIR, or else the system's certificates."""
    file, folder = (os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"))
    if "" not in (file, folder):
        return ssl.create_default_context()
    # OpenSSL would take the empty text for a name; empty means unset, as in all settings.
    usual = ssl.get_default_verify_paths()
    usual_file = usual.openssl_cafile if Path(usual.openssl_cafile).is_file() else None
    return ssl.create_default_context(cafile=file or usual_file, capath=folder or usual.openssl_capath)


def open_client(
    url: str,
    *,
    timeout: float,
    transport: httpx.AsyncBaseTransport | None = None,
    headers: Mapping[str, str] | None = None,
) -> httpx.AsyncClient:
    """Return a client for one server, which follows no redirects. The caller closes it.

    `timeout`: seconds, for each step of a request. `transport` replaces the connection. Raises SettingsError.
    """
    proxy = proxy_for(url) if transport is None else None
    tls = tls_context()
    if proxy is not None and proxy.url.scheme == "https":
        proxy = httpx.Proxy(proxy.url, auth=proxy.auth, ssl_context=tls)
    return httpx.AsyncClient(
        transport=transport,
        proxy=proxy,
        verify=tls,
        trust_env=False,
        follow_redirects=False,
        timeout=timeout,
        headers=headers,
    )


def _named_proxy(scheme: str) -> tuple[str, str]:
    """Return the variable that names a proxy for a scheme, and its value; empty if none does."""
    named = getproxies_environment()
    texts = {f"{kind.upper()}_PROXY": named.get(kind, "").strip() for kind in (scheme, "all")}
    return next(((name, text) for name, text in texts.items() if text), ("", ""))


def _proxy(name: str, text: str) -> httpx.Proxy:
    try:
        proxy = httpx.Proxy(text if "://" in text else f"http://{text}")  # as curl reads it
        _ = proxy.url.host  # an internationalized name is decoded only now
        usable = proxy.url.scheme in PORTS and is_host(proxy.url.raw_host.decode("ascii"))
    except (httpx.InvalidURL, ValueError):
        usable = False
    if not usable:
        raise SettingsError([f"{name}: is not the URL of a proxy; takes an http:// or https:// URL"])
    return proxy


def _is_direct(host: str, port: int | None) -> bool:
    """Return whether NO_PROXY names this host."""
    entries = re.split(r"[\s,]+", getproxies_environment().get("no", ""))
    return any(_names(entry.lower(), host.rstrip("."), port) for entry in entries if entry)


def _names(entry: str, host: str, port: int | None) -> bool:
    """Return whether an entry of NO_PROXY names a host.

    It is `*`, a name with all names below it, an address or a network, each perhaps with a port: `example.com`,
    `.example.com:8443`, `10.0.0.0/8`, `fd07::/64`, `[::1]:8443`.
    """
    if entry == "*":
        return True
    before, colon, number = entry.rpartition(":")
    if colon and number.isdecimal() and (":" not in before or before.endswith("]")):
        if int(number) != port:
            return False
        entry = before
    try:
        return ip_address(host) in ip_network(re.sub(r"[\[\]]", "", entry), strict=False)
    except ValueError:
        name = entry.removeprefix("*").strip(".")
        return bool(name) and (host == name or host.endswith(f".{name}"))


def _proxy_mistakes() -> Iterator[str]:
    name, text = _named_proxy("https")
    try:
        if text:
            _proxy(name, text)
    except SettingsError as error:
        yield from error.lines


def _certificate_mistakes() -> Iterator[str]:
    if file := os.environ.get("SSL_CERT_FILE"):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
        except (OSError, ValueError) as error:
            reason = "it holds no certificate" if isinstance(error, ssl.SSLError) else _reason(error)
            yield f"SSL_CERT_FILE: cannot be used ({reason}); takes the path of a file of certificates in PEM"
            return
    elif (folders := os.environ.get("SSL_CERT_DIR")) and not any(map(os.path.isdir, folders.split(os.pathsep))):
        yield "SSL_CERT_DIR: cannot be used (no such folder); takes the path of a folder of certificates"
        return
    if os.environ.get("SSLKEYLOGFILE"):  # Python opens it for each TLS context
        try:
            tls_context()
        except OSError as error:
            yield f"SSLKEYLOGFILE: cannot be used ({_reason(error)}); takes the path of a file"


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or "it is not a path"
