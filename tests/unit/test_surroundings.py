"""The surroundings: which proxy a URL gets, which certificates are trusted, and what is refused."""

import ssl
from pathlib import Path

import pytest

from app.config.settings import SettingsError
from app.config.surroundings import open_client, proxy_for, surroundings_mistakes, tls_context
from tests.support.certificates import Authority

VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")
URL = "https://api.example"
PROXY = "http://proxy.example:3128"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


PROXIED: dict[str, tuple[dict[str, str], str, str | None]] = {
    "none": ({}, URL, None),
    "https": ({"HTTPS_PROXY": PROXY}, URL, PROXY),
    "lower-case": ({"https_proxy": PROXY}, URL, PROXY),
    "lower-case-wins": ({"https_proxy": PROXY, "HTTPS_PROXY": "http://other.example"}, URL, PROXY),
    "blanks": ({"HTTPS_PROXY": f" {PROXY}\r"}, URL, PROXY),
    "without-scheme": ({"HTTPS_PROXY": "proxy.example:3128"}, URL, PROXY),
    "over-tls": ({"HTTPS_PROXY": "https://proxy.example"}, URL, "https://proxy.example"),
    "address": ({"HTTPS_PROXY": "http://[fd07::1]:3128"}, URL, "http://[fd07::1]:3128"),
    "all": ({"ALL_PROXY": PROXY}, URL, PROXY),
    "https-before-all": ({"HTTPS_PROXY": PROXY, "ALL_PROXY": "socks5://proxy.example"}, URL, PROXY),
    "empty": ({"HTTPS_PROXY": "", "ALL_PROXY": ""}, URL, None),
    "http-is-for-http": ({"HTTP_PROXY": PROXY}, URL, None),
    "http": ({"HTTP_PROXY": PROXY}, "http://api.example", PROXY),
    **{
        f"{scheme}-{host}": (dict.fromkeys(VARIABLES[:3], PROXY), f"{scheme}://{host}/x", None)
        for scheme in ("http", "https")
        for host in ("127.0.0.1:9", "localhost", "[::1]:9", "keys.localhost")
    },
}


@pytest.mark.parametrize(("environ", "url", "proxy"), PROXIED.values(), ids=PROXIED.keys())
def test_the_proxy_of_a_url(
    environ: dict[str, str], url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = proxy_for(url)

    assert (found and str(found.url)) == proxy


DIRECT: dict[str, tuple[str, str, bool]] = {
    "all": ("*", "https://api.example", True),
    "name": ("api.example", "https://api.example", True),
    "name-below": ("example", "https://api.example", True),
    "dot": (".example", "https://api.example", True),
    "star": ("*.example", "https://api.example", True),
    "capitals": ("API.Example", "https://api.example", True),
    "end-of-a-name": ("pi.example", "https://api.example", False),
    "other": ("api.test", "https://api.example", False),
    "last-of-a-list": ("a.test, b.test ,\tapi.example\r", "https://api.example", True),
    "port": ("api.example:443", "https://api.example", True),
    "another-port": ("api.example:444", "https://api.example", False),
    "address": ("192.0.2.1", "https://192.0.2.1:8443", True),
    "address-port": ("192.0.2.1:8443", "https://192.0.2.1:8443", True),
    "network": ("192.0.2.0/24", "https://192.0.2.1", True),
    "network-with-host-bits": ("192.0.2.9/24", "https://192.0.2.1", True),
    "another-network": ("198.51.100.0/24", "https://192.0.2.1", False),
    "ipv6": ("fd07::1", "https://[fd07::1]", True),
    "ipv6-brackets": ("[fd07::1]", "https://[fd07::1]", True),
    "ipv6-brackets-port": ("[fd07::1]:443", "https://[fd07::1]", True),
    "ipv6-brackets-another-port": ("[fd07::1]:444", "https://[fd07::1]", False),
    "ipv6-network": ("fd07::/64", "https://[fd07::1]", True),
    "ipv6-network-brackets": ("[fd07::]/64", "https://[fd07::1]", True),
    "ipv6-of-others": ("fd07::/64,[::1]", "https://api.example", False),
    "empty": (",, ,", "https://api.example", False),
    "nonsense": ("[,::/999,:,a:b:c,[]:99999999,%", "https://api.example", False),
}  # fmt: skip


@pytest.mark.parametrize(("entries", "url", "direct"), DIRECT.values(), ids=DIRECT.keys())
def test_no_proxy(entries: str, url: str, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", entries)

    assert (proxy_for(url) is None) is direct


UNUSABLE = {
    "socks": "socks5://proxy.example",
    "socks-h": "socks5h://ann:hush@proxy.example:1080",
    "ftp": "ftp://proxy.example",
    "no-host": "http://",
    "no-port": "http://proxy.example:hush",
    "brackets": "http://[::1",
    "no-international-name": "http://xn--a.example",
    "blanks": "http://a proxy.example",
    "not-text": "http://\udcff.example",
}


@pytest.mark.parametrize("value", UNUSABLE.values(), ids=UNUSABLE.keys())
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "ALL_PROXY"])
def test_a_proxy_that_cannot_be_used(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    [line] = surroundings_mistakes()

    assert line == f"{name}: is not the URL of a proxy; takes an http:// or https:// URL"
    with pytest.raises(SettingsError) as refused:
        open_client(URL, timeout=1)
    assert refused.value.lines == [line]


def test_one_context_for_every_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    assert surroundings_mistakes() == []
    assert "upstream of the tests" in str(tls_context().get_ca_certs())


def test_empty_variables_name_no_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ssl.create_default_context().cert_store_stats()
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"):
        monkeypatch.setenv(name, "")

    assert surroundings_mistakes() == []
    assert tls_context().cert_store_stats() == usual


def test_certificates_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no certificate")
    wrong = {
        "SSL_CERT_FILE": ["/nowhere.pem", str(tmp_path), str(tmp_path / "empty"), str(tmp_path / "text")],
        "SSL_CERT_DIR": ["/nowhere", str(tmp_path / "text")],
        "SSLKEYLOGFILE": ["/nowhere/keys"],
    }
    for name, values in wrong.items():
        for value in values:
            with monkeypatch.context() as context:
                context.setenv(name, value)
                [line] = surroundings_mistakes()
            assert line.startswith(f"{name}: cannot be used (")
            assert "takes the path of" in line
