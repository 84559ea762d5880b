"""The client's address: the peer's, or the one that a trusted proxy names in X-Forwarded-For or another header.

Anyone can write X-Forwarded-For, so it is accepted only from a trusted peer, and only as far back as trusted proxies
wrote it: https://developer.mozilla.org/en-US/docs/Web/HTTP/Reference/Headers/X-Forwarded-For#selecting_an_ip_address
Some platforms vouch for a header of their own instead, such as Fly-Client-IP, and always overwrite it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import structlog
from starlette.requests import HTTPConnection

from app.config.settings import Network

Address = IPv4Address | IPv6Address

LIST_HEADER = "x-forwarded-for"
"""The one header that lists hops. Any other names one client."""
UNIX_SOCKET = "local"
MAX_HOPS = 100
MAX_HOP_LENGTH = 64  # the longest address, 45 characters, with brackets, a port and some blanks
CACHED_TEXTS = 512

# `1.2.3.4:567` (Azure), `[2001:db8::1]` and `[2001:db8::1]:567` (RFC 7239; some proxies copy that).
WITH_PORT = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<v4>[0-9.]+))(?::[0-9]{1,5})?", re.ASCII)

log = structlog.get_logger(__name__)


def client_address(peer: str | None, forwarded: Sequence[str], trusted: Sequence[Network]) -> str:
    """Return the client's address, normalised: the peer's unless a trusted proxy names another. Never raises.

    `peer`: the other end of the connection; None: a Unix socket, which is never trusted, since no network contains it.
    `forwarded`: all X-Forwarded-For values in the order received: one list (RFC 9110, section 5.3). For a trusted peer
    the client is the right-most hop that is not trusted; if that is malformed, or not within MAX_HOPS, it is the peer.
    """
    if peer is None:
        return UNIX_SOCKET
    connected = parse_address(peer)
    if connected is None:
        return peer
    if is_trusted(connected, trusted):
        for text in _hops_from_right(forwarded):
            hop = parse_hop(text)
            if hop is None:
                break
            if not is_trusted(hop, trusted):
                return str(hop)
    return str(connected)


def named_client(peer: str | None, named: Sequence[str], trusted: Sequence[Network]) -> str:
    """Return the client's address: the peer's, unless a trusted proxy names exactly one. Never raises.

    `peer`: as for `client_address`. `named`: all values of the header that names the client.
    """
    own = client_address(peer, (), trusted)
    connected = parse_address(own)
    if connected is None or not is_trusted(connected, trusted) or len(named) != 1:
        return own
    client = parse_hop(named[0])
    return own if client is None else str(client)


@lru_cache(maxsize=CACHED_TEXTS)
def limit_key(address: str) -> str:
    """Return what limits count by: an IPv4 address, or an IPv6 /64, shared by one household."""
    parsed = parse_address(address)
    return str(IPv6Network((parsed, 64), strict=False)) if isinstance(parsed, IPv6Address) else address


@lru_cache(maxsize=CACHED_TEXTS)
def parse_address(text: str) -> Address | None:
    """Parse an address, without its zone (`%eth0`) and with `::ffff:1.2.3.4` as IPv4; None if malformed."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def parse_hop(text: str) -> Address | None:
    """Parse one hop of X-Forwarded-For, an address with or without a port; None if malformed."""
    if len(text) > MAX_HOP_LENGTH:  # before the cache, which would keep it
        return None
    text = text.strip(" \t")
    match = WITH_PORT.fullmatch(text)
    return parse_address((match["v6"] or match["v4"]) if match else text)


def is_trusted(address: Address, trusted: Sequence[Network]) -> bool:
    """Return whether an address lies in a trusted network."""
    return any(address in network for network in trusted)


def _hops_from_right(forwarded: Sequence[str]) -> Iterator[str]:
    left = MAX_HOPS
    for value in reversed(forwarded):
        hops = value.rsplit(",", left)[-left:]  # the rest of a longer header is ignored
        yield from reversed(hops)
        left -= len(hops)
        if left == 0:
            return


@dataclass(repr=False, eq=False)
class ClientAddresses:
    """Find the client address of requests. `trusted`: the proxies' networks; `header`: where they name the client."""

    trusted: Sequence[Network]
    header: str = LIST_HEADER
    _warned: bool = field(default=False, init=False)

    def of(self, request: HTTPConnection) -> str:
        """Return the client address of a request. Warns once about the header from an untrusted peer."""
        peer = request.client.host if request.client else None
        forwarded = request.headers.getlist(self.header)
        if forwarded and not self._warned and not self.is_proxy(request):
            self._warned = True
            log.warning(
                "forwarded_for_ignored",
                peer=peer or UNIX_SOCKET,
                hint=f"{self.header} from a peer that is not in BROKER_TRUSTED_PROXIES; logged once",
            )
        find = client_address if self.header.lower() == LIST_HEADER else named_client
        return find(peer, forwarded, self.trusted)

    def is_proxy(self, request: HTTPConnection) -> bool:
        """Return whether the peer itself is a trusted proxy."""
        peer = parse_address(request.client.host) if request.client else None
        return peer is not None and is_trusted(peer, self.trusted)
