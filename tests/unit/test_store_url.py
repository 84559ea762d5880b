"""URLs of stores: what is read from them, and what is refused in one line."""

from typing import Any

import pytest

from app.broker.build import check
from app.config.loading import load_settings
from app.config.settings import SettingsError
from app.store.url import parse_store_url
from app.store.valkey import ValkeyStore

READ: dict[str, tuple[str, dict[str, Any], list[tuple[str, int]], str]] = {
    "redis://h": ("server", {"db": 0}, [("h", 6379)], ""),
    "VALKEY://h:1/2": ("server", {"db": 2}, [("h", 1)], ""),
    "redis://:p%40w@h/0": ("server", {"password": "p@w", "db": 0}, [("h", 6379)], ""),
    "rediss://u:p@h?db=3&ssl_cert_reqs=required": (
        "server",
        {"username": "u", "password": "p", "db": 3, "ssl_cert_reqs": "required"},
        [("h", 6379)],
        "",
    ),
    "valkeys://[2001:db8::1]:7?ssl_check_hostname=false": (
        "server",
        {"db": 0, "ssl_check_hostname": False},
        [("2001:db8::1", 7)],
        "",
    ),
    "redis+unix:///run/a%20b.sock?db=1": ("unix", {"db": 1, "path": "/run/a b.sock"}, [], ""),
    "valkey+unix://u:p@/s": ("unix", {"username": "u", "password": "p", "path": "/s"}, [], ""),
    "redis+sentinel://a,b:5,[::1]/voice": ("sentinel", {"db": 0}, [("a", 26379), ("b", 5), ("::1", 26379)], "voice"),
    "valkeys+sentinel://u:p@a/my%20voice/4": (
        "sentinel",
        {"username": "u", "password": "p", "db": 4},
        [("a", 26379)],
        "my voice",
    ),
    "redis+cluster://a:1,b": ("cluster", {"db": 0}, [("a", 1), ("b", 6379)], ""),
    "rediss+cluster://u:p@a/0": ("cluster", {"username": "u", "password": "p", "db": 0}, [("a", 6379)], ""),
}


@pytest.mark.parametrize(("url", "expected"), READ.items(), ids=READ)
def test_what_is_read(url: str, expected: tuple[str, dict[str, Any], list[tuple[str, int]], str]) -> None:
    found = parse_store_url(url)
    assert (found.kind, found.options, list(found.addresses), found.service) == expected
    assert found.tls == url.startswith(("rediss", "valkeys"))
    assert "p@w" not in repr(found)
    ValkeyStore(url)


def test_sentinels_with_a_login_of_their_own() -> None:
    found = parse_store_url("redis+sentinel://u:p@a/voice?sentinel_username=s&sentinel_password=q%2B")
    assert found.sentinel_login == {"username": "s", "password": "q+"}
    assert found.options == {"username": "u", "password": "p", "db": 0}


REFUSED = {
    "": "is not",
    "http://h": "is not",
    "redis:///0": "host",
    "redis+proxy://h": "is not",
    "rediss+unix:///s": "is not",
    "redis+unix://h/s": "socket",
    "redis://h,h2": "redis+sentinel://",
    "redis://h:port": "host",
    "redis://h:0": "host",
    "redis://h:65536": "host",
    "redis://a b": "host",
    "redis://[::1": "host",
    "redis://h/zero": "database",
    "redis://h/1/2": "database",
    "redis://h?db=-1": "database",
    "redis+sentinel://h:26379": "service",
    "redis+sentinel://h:26379/": "service",
    "redis+sentinel://h//1": "service",
    "redis+sentinel://h/voice/one": "database",
    "redis+sentinel://h,/voice": "host",
    "redis+cluster://h/1": "database",
    "redis+cluster://h?db=1": "database",
    "redis+cluster://,": "host",
    "redis://h?nonsense=1": "unknown parameter",
    "redis://h?socket_timeout=5": "unknown parameter",
    "redis://h?ssl_ca_certs=/etc/hosts": "unknown parameter",
    "redis+cluster://h?sentinel_password=x": "unknown parameter",
    "rediss://h?ssl_cert_reqs=CERT_NONE": "ssl_cert_reqs",
    "rediss://h?ssl_cert_reqs=none": "ssl_cert_reqs",
    "rediss+sentinel://h/voice?ssl_cert_reqs=CERT_NONE": "ssl_cert_reqs",
    "rediss+cluster://h?ssl_cert_reqs=None": "ssl_cert_reqs",
    "rediss://h?ssl_ca_certs=/nowhere.pem": "ssl_ca_certs",
    "rediss://h?ssl_check_hostname=perhaps": "ssl_check_hostname",
}


@pytest.mark.parametrize(("url", "words"), REFUSED.items(), ids=REFUSED)
def test_what_is_refused(url: str, words: str) -> None:
    """One line that names the variable, what is wrong and what it takes; never the password."""
    secret = url.replace("://", "://user:s3cret@", 1)
    environ = {
        "ONEINBOX_API_KEY": "oi_sk_none",
        "ONEINBOX_AGENT_ID": "none",
        "BROKER_SECRET": "s" * 32,
        "BROKER_STORE_URL": secret if "://" in url else "s3cret",
    }
    with pytest.raises(SettingsError) as caught:
        check(load_settings(environ, env_file=None))
    (line,) = caught.value.lines
    assert line.startswith("BROKER_STORE_URL: ")
    assert words in line
    assert "; takes memory://" in line
    assert "s3cret" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BROKER_STORE_TIMEOUT", "0.04"),
        ("BROKER_STORE_TIMEOUT", "5.1"),
        ("BROKER_STORE_TIMEOUT", "nan"),
        ("BROKER_STORE_PREFIX", "a:b"),
        ("BROKER_STORE_PREFIX", "{oib}"),
        ("BROKER_STORE_PREFIX", "p*"),
        ("BROKER_STORE_PREFIX", "p" * 65),
    ],
)
def test_other_settings_of_the_store(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"ONEINBOX_API_KEY": "oi_sk_none", "ONEINBOX_AGENT_ID": "none", name: value}, env_file=None)
    (line,) = caught.value.lines
    assert line.startswith(f"{name}: ")
