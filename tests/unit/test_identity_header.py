"""header mode: whom a sign-in proxy names, and everybody who only pretends to be one."""

from ipaddress import ip_network

import pytest
from starlette.requests import Request

from app.identity import User
from app.identity.addresses import ClientAddresses
from app.identity.header import HeaderIdentity
from app.identity.user import user_named
from app.problems import Problem

BEHIND_PROXY = ClientAddresses([ip_network("10.0.0.0/8")])
PROXY = "10.0.0.1"


def request_from(peer: str | None, *headers: tuple[str, bytes]) -> Request:
    raw = [(name.encode(), value) for name, value in headers]
    return Request({"type": "http", "headers": raw, "client": None if peer is None else (peer, 1234)})


@pytest.mark.parametrize(
    ("value", "user"),
    [
        (b"jane", "jane"),
        (b" jane@example.com\t", "jane@example.com"),
        ("Jürgen 🙂".encode(), "Jürgen 🙂"),
        (b"CORP\\jane doe", "CORP\\jane doe"),
        (b"x" * 255, "x" * 255),
    ],
)
async def test_user_of_a_trusted_proxy(value: bytes, user: str) -> None:
    identity = HeaderIdentity(BEHIND_PROXY, "X-Forwarded-User")
    request = request_from(PROXY, ("x-forwarded-user", value), ("x-forwarded-for", b"1.1.1.1, 198.51.100.1"))
    assert await identity.identify(request) == User(mode="header", id=user, address="198.51.100.1")


async def test_peer_may_be_ipv4_in_ipv6() -> None:
    request = request_from("::ffff:10.0.0.1", ("x-forwarded-user", b"jane"))
    assert (await HeaderIdentity(BEHIND_PROXY, "X-Forwarded-User").identify(request)).address == "10.0.0.1"


@pytest.mark.parametrize(
    ("peer", "headers"),
    [
        # Not from the proxy, whatever else the request says.
        ("203.0.113.9", [("x-forwarded-user", b"jane")]),
        ("203.0.113.9", [("x-forwarded-user", b"jane"), ("x-forwarded-for", b"10.0.0.1")]),
        ("203.0.113.9", []),
        ("fd00::1", [("x-forwarded-user", b"jane")]),
        (None, [("x-forwarded-user", b"jane")]),
        ("testclient", [("x-forwarded-user", b"jane")]),
        # Not one.
        (PROXY, []),
        (PROXY, [("x-user", b"jane")]),
        (PROXY, [("x-forwarded-user", b"")]),
        (PROXY, [("x-forwarded-user", b" \t")]),
        (PROXY, [("x-forwarded-user", b"jane"), ("x-forwarded-user", b"jane")]),
        (PROXY, [("x-forwarded-user", b"jane"), ("x-forwarded-user", b"")]),
        (PROXY, [("x-forwarded-user", b"admin, jane")]),
        (PROXY, [("x-forwarded-user", b"jane,")]),
        # A twin.
        (PROXY, [("x-forwarded-user", b"jane"), ("x_forwarded_user", b"jane")]),
        (PROXY, [("x-forwarded-user", b"jane"), ("x-forwarded_user", b"admin")]),
        (PROXY, [("X_Forwarded-User", b"admin"), ("x-forwarded-user", b"jane")]),
        (PROXY, [("x_forwarded_user", b"jane")]),
        # No name.
        (PROXY, [("x-forwarded-user", b"x" * 256)]),
        (PROXY, [("x-forwarded-user", b"ja\x00ne")]),
        (PROXY, [("x-forwarded-user", b"ja\tne")]),
        (PROXY, [("x-forwarded-user", b"ja\x7fne")]),
        (PROXY, [("x-forwarded-user", "ja\x85ne".encode())]),
        (PROXY, [("x-forwarded-user", "Jürgen".encode("latin-1"))]),
        (PROXY, [("x-forwarded-user", b"\xed\xa0\x80")]),
    ],
)
async def test_refused(peer: str | None, headers: list[tuple[str, bytes]]) -> None:
    with pytest.raises(Problem) as caught:
        await HeaderIdentity(BEHIND_PROXY, "X-Forwarded-User").identify(request_from(peer, *headers))
    assert caught.value.slug == "unauthenticated"
    assert caught.value.headers == {"WWW-Authenticate": "ForwardedUser"}
    assert "jane" not in caught.value.detail


async def test_no_peer_is_trusted_by_default() -> None:
    identity = HeaderIdentity(ClientAddresses([]), "X-Forwarded-User")
    with pytest.raises(Problem):
        await identity.identify(request_from("127.0.0.1", ("x-forwarded-user", b"jane")))


async def test_a_configured_name_with_underscores() -> None:
    identity = HeaderIdentity(BEHIND_PROXY, "X_User")
    assert (await identity.identify(request_from(PROXY, ("x_user", b"jane")))).id == "jane"
    with pytest.raises(Problem):
        await identity.identify(request_from(PROXY, ("x-user", b"jane")))


async def test_an_issuer_names_nobody_here() -> None:
    """A block by id means the user of the request, whatever tokens of another mode would name."""
    user = await HeaderIdentity(BEHIND_PROXY, "X-Forwarded-User").identify(
        request_from(PROXY, ("x-forwarded-user", b"ann"))
    )

    assert user_named("header", "ann", "https://issuer.example").canonical == user.canonical
    assert user_named("jwt", "ann", "https://issuer.example").canonical != user_named("jwt", "ann").canonical
    assert user_named("anonymous", "2001:db8::1", "https://issuer.example").id == "2001:db8::/64"
