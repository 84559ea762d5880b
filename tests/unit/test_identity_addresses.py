"""The client address: whom X-Forwarded-For may name, and whom not."""

from collections.abc import Sequence
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from structlog.testing import capture_logs

from app.identity.addresses import (
    MAX_HOPS,
    ClientAddresses,
    client_address,
    limit_key,
    named_client,
    parse_address,
)
from app.identity.anonymous import Anonymous

TRUSTED = tuple(ip_network(text) for text in ("10.0.0.0/8", "fd00::/8", "192.0.2.7/32"))
PROXY = "10.0.0.1"


def request_from(peer: str | None, *forwarded: str) -> Request:
    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    return Request({"type": "http", "headers": headers, "client": None if peer is None else (peer, 1234)})


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        # Without a trusted proxy the header proves nothing.
        ("203.0.113.9", [], "203.0.113.9"),
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("203.0.113.9", ["10.0.0.1"], "203.0.113.9"),
        ("2001:db8::1", ["198.51.100.1"], "2001:db8::1"),
        # From a trusted proxy: the right-most hop that is not trusted.
        (PROXY, [], PROXY),
        (PROXY, ["198.51.100.1"], "198.51.100.1"),
        (PROXY, ["1.1.1.1, 198.51.100.1"], "198.51.100.1"),
        (PROXY, ["1.1.1.1, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        (PROXY, ["1.1.1.1,\t198.51.100.1 ,10.0.0.2 , 192.0.2.7"], "198.51.100.1"),
        (PROXY, ["1.1.1.1, 198.51.100.1", "10.0.0.2"], "198.51.100.1"),
        (PROXY, ["1.1.1.1", "198.51.100.1"], "198.51.100.1"),
        ("fd00::1", ["2001:db8::1"], "2001:db8::1"),
        ("fd00::1", ["2001:DB8:0::1"], "2001:db8::1"),
        # All trusted, or a malformed hop where it counts: the peer.
        (PROXY, ["10.0.0.3, 10.0.0.2"], PROXY),
        (PROXY, ["198.51.100.1, unknown, 10.0.0.2"], PROXY),
        (PROXY, ["198.51.100.1, "], PROXY),
        (PROXY, ["198.51.100.1", ""], PROXY),
        (PROXY, [""], PROXY),
        (PROXY, ["unix:"], PROXY),
        (PROXY, ["_hidden"], PROXY),
        (PROXY, ["localhost"], PROXY),
        (PROXY, ["1.2.3"], PROXY),
        (PROXY, ["1.2.3.4.5"], PROXY),
        (PROXY, ["1.2.3.256"], PROXY),
        (PROXY, ["01.2.3.4"], PROXY),
        (PROXY, ["1.2.3.4:"], PROXY),
        (PROXY, ["1.2.3.4:http"], PROXY),
        (PROXY, ["1.2.3.4:123456"], PROXY),
        (PROXY, ["[1.2.3.4]:1"], "1.2.3.4"),
        (PROXY, ["[2001:db8::1"], PROXY),
        (PROXY, ["2001:db8::1]"], PROXY),
        (PROXY, ["[]"], PROXY),
        (PROXY, ["%eth0"], PROXY),
        (PROXY, ["1.2.3.4/32"], PROXY),
        (PROXY, ["١.2.3.4"], PROXY),
        (PROXY, ["3405803777"], PROXY),
        (PROXY, ["0x7f.1"], PROXY),
        (PROXY, ['for="198.51.100.1"'], PROXY),
        (PROXY, ["1.2.3.4\n5.6.7.8"], PROXY),
        (PROXY, ["1.1.1.1" + " " * 100], PROXY),
        # A malformed hop further left does not matter: no trusted proxy wrote it.
        (PROXY, ["<script>, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        # Ports, brackets, zones, IPv4 in IPv6's clothes.
        (PROXY, ["198.51.100.1:4711"], "198.51.100.1"),
        (PROXY, ["[2001:db8::1]"], "2001:db8::1"),
        (PROXY, ["[2001:db8::1]:4711"], "2001:db8::1"),
        (PROXY, ["[2001:db8::1]:4711, 10.0.0.9:80"], "2001:db8::1"),
        (PROXY, ["fe80::1%eth0"], "fe80::1"),
        (PROXY, ["[fe80::1%25eth0]:1"], "fe80::1"),
        (PROXY, ["::ffff:198.51.100.1"], "198.51.100.1"),
        (PROXY, ["198.51.100.1, ::ffff:10.0.0.2"], "198.51.100.1"),
        (PROXY, ["198.51.100.1, [::ffff:a00:2]:99"], "198.51.100.1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("::ffff:203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("fe80::1%eth0", ["198.51.100.1"], "fe80::1"),
        # Over a Unix socket, and from a test client, which has no address.
        (None, ["198.51.100.1"], "local"),
        ("testclient", ["198.51.100.1"], "testclient"),
    ],
)
def test_client_address(peer: str | None, forwarded: Sequence[str], expected: str) -> None:
    assert client_address(peer, forwarded, TRUSTED) == expected


@pytest.mark.parametrize(
    ("peer", "named", "expected"),
    [
        (PROXY, ["198.51.100.1"], "198.51.100.1"),
        (PROXY, ["198.51.100.1:4711"], "198.51.100.1"),
        (PROXY, [" 2001:db8::1 "], "2001:db8::1"),
        (PROXY, ["[2001:db8::1]:4711"], "2001:db8::1"),
        (PROXY, ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        (PROXY, ["10.0.0.9"], "10.0.0.9"),  # a client in the proxy's own network
        # Not exactly one address: the peer's counts.
        (PROXY, [], PROXY),
        (PROXY, [""], PROXY),
        (PROXY, ["unknown"], PROXY),
        (PROXY, ["198.51.100.1, 198.51.100.2"], PROXY),
        (PROXY, ["198.51.100.1,"], PROXY),
        (PROXY, ["198.51.100.1", "198.51.100.1"], PROXY),
        (PROXY, ["198.51.100.1", "198.51.100.2"], PROXY),
        (PROXY, ["1" * 1_000_000], PROXY),
        # From nobody else.
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        (None, ["198.51.100.1"], "local"),
        ("testclient", ["198.51.100.1"], "testclient"),
    ],
)
def test_a_header_that_names_one_client(peer: str | None, named: Sequence[str], expected: str) -> None:
    assert named_client(peer, named, TRUSTED) == expected
    headers = [(b"fly-client-ip", value.encode()) for value in named] + [(b"x-forwarded-for", b"192.0.2.99")]
    request = Request({"type": "http", "headers": headers, "client": None if peer is None else (peer, 1234)})

    assert ClientAddresses(TRUSTED, "Fly-Client-IP").of(request) == expected


def test_the_header_is_ignored_and_warned_about_from_another_peer() -> None:
    request = Request({"type": "http", "headers": [(b"fly-client-ip", b"192.0.2.1")], "client": ("203.0.113.9", 1)})
    with capture_logs() as logs:
        ClientAddresses(TRUSTED, "Fly-Client-IP").of(request)
        ClientAddresses(TRUSTED).of(request)

    [entry] = logs
    assert entry["event"] == "forwarded_for_ignored"
    assert entry["hint"].startswith("Fly-Client-IP from a peer")


def test_mapped_trusted_network_is_matched_by_its_ipv4_form_only() -> None:
    assert client_address("::ffff:10.0.0.1", ["198.51.100.1"], [ip_network("10.0.0.1/32")]) == "198.51.100.1"


def test_hops_are_bounded() -> None:
    within = ", ".join(["198.51.100.1"] + ["10.0.0.2"] * (MAX_HOPS - 1))
    assert client_address(PROXY, [within], TRUSTED) == "198.51.100.1"
    assert client_address(PROXY, [within + ", 10.0.0.2"], TRUSTED) == PROXY
    assert client_address(PROXY, ["198.51.100.1"] + ["10.0.0.2"] * MAX_HOPS, TRUSTED) == PROXY
    assert client_address(PROXY, ["198.51.100.1"] + ["10.0.0.2"] * (MAX_HOPS - 1), TRUSTED) == "198.51.100.1"


def test_long_hops_are_not_kept() -> None:
    before = parse_address.cache_info().currsize
    assert client_address(PROXY, ["1" * 1_000_000], TRUSTED) == PROXY
    assert client_address(PROXY, [f"fe80::1%{'x' * 1_000}"], TRUSTED) == PROXY
    assert parse_address.cache_info().currsize <= before + 1  # the proxy's own


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("local", "local"),
        ("testclient", "testclient"),
    ],
)
def test_limit_key(address: str, expected: str) -> None:
    assert limit_key(address) == expected


hop_texts = st.one_of(
    st.ip_addresses().map(str),
    st.ip_addresses(network="10.0.0.0/8").map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]:80"),
    st.ip_addresses(v=4).map(lambda address: f"{address}:80"),
    st.ip_addresses(v=4).map(lambda address: f"::ffff:{address}"),
    st.text(alphabet="0123456789abcdef.:[]% \t,"),
    st.text(),
)


@given(
    peer=st.one_of(st.none(), st.just(PROXY), st.just("fd00::1"), st.ip_addresses().map(str), st.text()),
    forwarded=st.lists(st.lists(hop_texts, max_size=8).map(",".join), max_size=4),
)
def test_any_header_gives_the_peer_or_an_untrusted_address(peer: str | None, forwarded: list[str]) -> None:
    answer = client_address(peer, forwarded, TRUSTED)
    plain = client_address(peer, [], TRUSTED)
    if answer != plain:
        assert parse_address(plain) is not None
        assert any(ip_address(plain) in network for network in TRUSTED)
        address = ip_address(answer)
        assert not any(address in network for network in TRUSTED)
        assert getattr(address, "ipv4_mapped", None) is None
    limit_key(answer)


@given(spoofed=st.lists(hop_texts, max_size=8).map(", ".join), client=st.ip_addresses(v=4, network="198.51.100.0/24"))
def test_what_the_client_wrote_itself_never_counts(spoofed: str, client: object) -> None:
    assert client_address(PROXY, [f"{spoofed}, {client}"], TRUSTED) == str(client)
    assert client_address(PROXY, [spoofed, f"{client}, 10.0.0.9"], TRUSTED) == str(client)


def test_ignored_header_is_warned_about_once() -> None:
    addresses = ClientAddresses(TRUSTED)
    with capture_logs() as logs:
        addresses.of(request_from("203.0.113.9"))
        addresses.of(request_from(PROXY, "203.0.113.9"))
        assert logs == []
        for _ in range(3):
            addresses.of(request_from("203.0.113.9", "198.51.100.1"))
            addresses.of(request_from(None, "198.51.100.1"))
    assert [entry["event"] for entry in logs] == ["forwarded_for_ignored"]
    assert "198.51.100.1" not in str(logs)


async def test_anonymous_users_are_counted_by_address() -> None:
    identity = Anonymous(ClientAddresses(TRUSTED))
    user = await identity.identify(request_from(PROXY, "1.1.1.1, 2001:db8:1:2:3:4:5:6"))
    assert (user.mode, user.id, user.address) == ("anonymous", "2001:db8:1:2::/64", "2001:db8:1:2:3:4:5:6")
    assert (user.issuer, user.claims, user.expires_at, user.by_cookie) == ("", {}, None, False)
    user = await identity.identify(request_from("203.0.113.9", "198.51.100.1"))
    assert (user.id, user.address) == ("203.0.113.9", "203.0.113.9")
    assert (await identity.identify(request_from(None))).id == "local"
