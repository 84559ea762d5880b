"""The pooled connection to OneInbox, as an httpx transport, and the mark that tells whether a request was sent."""

import contextvars
import ssl
from functools import partial
from types import SimpleNamespace
from typing import Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from httpx_aiohttp import AiohttpTransport

# The request that this task sends, so that aiohttp's trace can mark it. Judging by exceptions would bill twice:
# the transport reports "sent, then connection lost" as a connect error.
_under_way: contextvars.ContextVar[httpx.Request] = contextvars.ContextVar("request under way to OneInbox")

PIECE = 4096
MAX_INTERIM = 20
"""Answers (1xx) before the answer."""

NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)


def surely_not_sent(request: httpx.Request, error: Exception) -> bool:
    """Whether a request that failed with `error` never left this machine; in doubt it did."""
    if "sent" in request.extensions:
        return not request.extensions["sent"]
    return isinstance(error, NEVER_SENT)


class PooledTransport(AiohttpTransport):
    """aiohttp's connection pool behind httpx's interface.

    Follows no redirect, keeps no cookie, decodes no content, and resends no POST.
    """

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; raises httpx.TransportError only."""
        request.extensions["sent"] = False
        _under_way.set(request)
        try:
            return await super().handle_async_request(request)
        except aiohttp.ClientError as error:  # those without a counterpart in httpx
            raise httpx.RemoteProtocolError(type(error).__name__) from error


class _Connection(ResponseHandler):
    """Bounds what aiohttp parses at once: a flood of interim answers would hold the event loop up for seconds."""

    _interim = 0

    def data_received(self, data: bytes) -> None:
        """Take bytes from the wire."""
        if len(data) <= PIECE:
            super().data_received(data)
            return
        for start in range(0, len(data), PIECE):
            if self._interim > MAX_INTERIM:
                return
            super().data_received(data[start : start + PIECE])

    def feed_data(self, data: Any, size: int = 0) -> None:
        """Take a parsed head."""
        self._interim = self._interim + 1 if 100 <= data[0].code < 200 else 0
        if self._interim > MAX_INTERIM:
            if self.transport is not None:
                self.transport.abort()
            self.set_exception(HttpProcessingError(message="too many interim answers"))
            return
        super().feed_data(data, size)


class _Connector(aiohttp.TCPConnector):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factory = partial(_Connection, loop=self._loop)  # type: ignore[assignment] # takes no factory


def open_transport(base_url: str, *, pool_size: int) -> PooledTransport:
    """A transport for one upstream; must be called inside the event loop.

    `pool_size`: connections at most. HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE are honoured for https.
    """
    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(_mark_sent)
    tls = ssl.create_default_context()
    session = aiohttp.ClientSession(
        connector=_Connector(limit=pool_size, keepalive_timeout=15, ssl=tls),
        cookie_jar=aiohttp.DummyCookieJar(),
        trace_configs=[trace],
        auto_decompress=False,
        trust_env=False,  # aiohttp would read .netrc too, and the proxy for each request anew
    )
    return PooledTransport(verify=tls, client=session, proxy=_proxy_for(httpx.URL(base_url)))


async def _mark_sent(
    session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceRequestHeadersSentParams
) -> None:
    _under_way.get().extensions["sent"] = True


def _proxy_for(url: httpx.URL) -> httpx.Proxy | None:
    proxy = getproxies().get(url.scheme) if url.scheme == "https" else None
    return httpx.Proxy(proxy) if proxy and not proxy_bypass(url.host) else None
