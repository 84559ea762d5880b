"""Who is at the other end of the connection: the peer, or whom a trusted proxy names in X-Forwarded-For.

Anybody can write X-Forwarded-For. It is believed from a trusted peer alone, and only as far back as trusted proxies
wrote it: https://developer.mozilla.org/en-US/docs/Web/HTTP/Reference/Headers/X-Forwarded-For#selecting_an_ip_address
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

UNIX_SOCKET = "local"
MAX_HOPS = 100
MAX_HOP_LENGTH = 64  # the longest address, 45 characters, in brackets, with a port and some blanks
CACHED_TEXTS = 4096

# `1.2.3.4:567` (Azure), `[2001:db8::1]` and `[2001:db8::1]:567` (RFC 7239 writes it so, and some proxies copy that).
WITH_PORT = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<v4>[0-9.]+))(?::[0-9]{1,5})?", re.ASCII)

log = structlog.get_logger(__name__)


def client_address(peer: str | None, forwarded: Sequence[str], trusted: Sequence[Network]) -> str:
    """The client's address, normalised; the peer's own when nobody trustworthy says otherwise.

    `peer`: who connected; None: over a Unix socket, which no network can name, so that it is never trusted.
    `forwarded`: every X-Forwarded-For value, in the order received. From a trusted peer the answer is the right-most
    hop that is not trusted itself. A malformed one there, or none within MAX_HOPS: the peer. Never raises.
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


@lru_cache(maxsize=CACHED_TEXTS)
def limit_key(address: str) -> str:
    """What limits count by: an IPv4 address; of IPv6 the /64, since one household or machine has all of it."""
    parsed = parse_address(address)
    return str(IPv6Network((parsed, 64), strict=False)) if isinstance(parsed, IPv6Address) else address


@lru_cache(maxsize=CACHED_TEXTS)
def parse_address(text: str) -> Address | None:
    """An address without its zone (`%eth0`), IPv4 written as IPv6 (`::ffff:1.2.3.4`) as IPv4; None: no address."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


def parse_hop(text: str) -> Address | None:
    """One hop of X-Forwarded-For: an address, perhaps with a port; None: malformed."""
    if len(text) > MAX_HOP_LENGTH:  # before the cache, which would keep it
        return None
    text = text.strip(" \t")
    match = WITH_PORT.fullmatch(text)
    return parse_address((match["v6"] or match["v4"]) if match else text)


def is_trusted(address: Address, trusted: Sequence[Network]) -> bool:
    """Whether an address lies in a trusted network."""
    return any(address in network for network in trusted)


def _hops_from_right(forwarded: Sequence[str]) -> Iterator[str]:
    left = MAX_HOPS
    for value in reversed(forwarded):
        hops = value.rsplit(",", left)[-left:]  # a longer header's rest is not looked at
        yield from reversed(hops)
        left -= len(hops)
        if left == 0:
            return


@dataclass
class ClientAddresses:
    """The client address of requests, behind given trusted networks."""

    trusted: Sequence[Network]
    _warned: bool = field(default=False, init=False)

    def of(self, request: HTTPConnection) -> str:
        """The client address of a request. Warns once of an X-Forwarded-For that is not believed."""
        peer = request.client.host if request.client else None
        forwarded = request.headers.getlist("x-forwarded-for")
        if forwarded and not self._warned and not self.is_proxy(request):
            self._warned = True
            log.warning(
                "forwarded_for_ignored",
                peer=peer or UNIX_SOCKET,
                hint="X-Forwarded-For from a peer that is not in BROKER_TRUSTED_PROXIES; said once",
            )
        return client_address(peer, forwarded, self.trusted)

    def is_proxy(self, request: HTTPConnection) -> bool:
        """Whether the peer itself is a trusted proxy."""
        peer = parse_address(request.client.host) if request.client else None
        return peer is not None and is_trusted(peer, self.trusted)
