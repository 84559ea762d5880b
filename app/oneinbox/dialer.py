"""Connect to one host: its addresses, its TLS, and a proxy in between."""

import asyncio
import base64
import contextlib
import socket
import ssl

import httpx
from aiohappyeyeballs import AddrInfoType, start_connection

from app.config.surroundings import tls_context
from app.oneinbox.http1 import Connection

ADDRESS_SECONDS = 10
"""A resolved name is not resolved again for this long."""
FORGET_SECONDS = 600
"""An address that its name has not had for this long is forgotten."""
MOST_PATIENCE = 300
"""Longest time in seconds to wait for an address to come back, of a name whose addresses take turns."""
NEXT_ADDRESS_SECONDS = 0.25
"""After this long without a connection the next address of a name is tried as well (RFC 8305, section 5)."""


class Dialer:
    """Open connections to the host of a URL, directly or through an HTTP proxy (RFC 9110, section 9.3.6).

    The name that is resolved is the proxy's, if there is one.
    """

    def __init__(self, url: httpx.URL, proxy: httpx.Proxy | None = None) -> None:
        self._host = url.raw_host.decode()
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = tls_context() if url.scheme == "https" else None
        self._proxy = proxy
        self._loop = asyncio.get_running_loop()
        self._found: list[AddrInfoType] = []
        self._found_at = float("-inf")
        self._last_seen: dict[str, float] = {}
        self._patience = 0.0
        self._resolving: asyncio.Task[list[AddrInfoType]] | None = None

    async def connect(self, seconds: float | None) -> Connection:
        """Return a new connection. Raises httpx.ConnectError, ConnectTimeout, ProxyError. `seconds`: in all."""
        try:
            async with asyncio.timeout(seconds):
                if self._proxy is None:
                    return await self._dial(self._tls, self._host)
                return await self._tunnel(self._proxy)
        except TimeoutError:
            raise httpx.ConnectTimeout("no connection in time") from None
        except (OSError, UnicodeError) as error:  # unknown or invalid name, refusal, wrong certificate
            raise httpx.ConnectError(type(error).__name__) from error

    async def refresh(self) -> None:
        """Resolve the name again. If that fails, its addresses stay as they were."""
        with contextlib.suppress(OSError, UnicodeError):
            await self._look_up()

    def has_moved(self, connection: Connection) -> bool:
        """Return whether the name has lost the address of a connection."""
        seen = self._last_seen.get(connection.address)
        return seen is not None and self._found_at - seen > self._patience

    def close(self) -> None:
        """Stop resolving."""
        if self._resolving is not None:
            self._resolving.cancel()

    async def _dial(self, tls: ssl.SSLContext | None, name: str) -> Connection:
        addresses = await self._resolve()
        server_hostname = name if tls else None
        if len(addresses) == 1:  # then the event loop connects at a fraction of the cost
            ((_, _, _, _, address),) = addresses
            host, port = str(address[0]), int(address[1])
            _, connection = await self._loop.create_connection(
                Connection, host, port, ssl=tls, server_hostname=server_hostname
            )
            return connection
        sock = await start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS, loop=self._loop)
        _, connection = await self._loop.create_connection(
            Connection, sock=sock, ssl=tls, server_hostname=server_hostname
        )
        return connection

    async def _tunnel(self, proxy: httpx.Proxy) -> Connection:
        """Connect through the proxy, which sees only the host's name."""
        # An https:// proxy has its own TLS, around that of the upstream.
        own = self._tls if proxy.url.scheme == "https" else None
        plain = await self._dial(own, proxy.url.raw_host.decode())
        try:
            host = f"[{self._host}]" if ":" in self._host else self._host
            target = f"{host}:{self._port}"
            lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
            if proxy.raw_auth is not None:
                lines.append("Proxy-Authorization: Basic " + base64.b64encode(b":".join(proxy.raw_auth)).decode())
            plain.send("\r\n".join([*lines, "", ""]).encode())
            status, _ = await plain.head()
            if not 200 <= status < 300:
                raise httpx.ProxyError(f"the proxy answered {status}")
            assert self._tls is not None  # noqa: S101 - only https goes through a proxy
            connection = Connection()
            below = await self._loop.start_tls(plain.transport, connection, self._tls, server_hostname=self._host)
            assert below is not None  # noqa: S101 - it raises, or there is one
            connection.connection_made(below)
            connection.address = plain.address
        except httpx.ReadError as error:
            plain.abort()
            raise httpx.ProxyError("the proxy closed the connection") from error
        except BaseException:
            plain.abort()
            raise
        return connection

    async def _resolve(self) -> list[AddrInfoType]:
        """Return the addresses of the name, at most ADDRESS_SECONDS old; concurrent callers share one look-up."""
        if self._loop.time() - self._found_at < ADDRESS_SECONDS:
            return self._found
        return await self._look_up()

    async def _look_up(self) -> list[AddrInfoType]:
        if self._resolving is None or self._resolving.done():
            self._resolving = self._loop.create_task(self._ask_resolver(), name="addresses")
        return await asyncio.shield(self._resolving)

    async def _ask_resolver(self) -> list[AddrInfoType]:
        host, port = self._host, self._port
        if self._proxy is not None:
            url = self._proxy.url
            host, port = url.raw_host.decode(), url.port or (443 if url.scheme == "https" else 80)
        found: list[AddrInfoType] = [*await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        now = self._loop.time()
        addresses = {str(info[4][0]) for info in found}
        if any(now - self._last_seen.get(address, now) > 1.5 * ADDRESS_SECONDS for address in addresses):
            # One came back: the name's addresses take turns, and all of them work.
            self._patience = min(2 * self._patience + ADDRESS_SECONDS, MOST_PATIENCE)
        self._last_seen = {address: at for address, at in self._last_seen.items() if now - at < FORGET_SECONDS}
        self._last_seen.update(dict.fromkeys(addresses, now))
        self._found, self._found_at = found, now
        return found
