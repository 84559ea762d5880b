"""What load balancers and older proxies send, over real sockets."""

import asyncio

import pytest

from app.sandbox.server import running_emulator
from tests.support.brokers import LONG_CALLS, served, settings_of

WITHIN = 10.0

CHECKS = {
    "haproxy": (b"OPTIONS / HTTP/1.0\r\n\r\n", b"204"),
    "haproxy-with-host": (b"OPTIONS / HTTP/1.1\r\nHost: broker\r\nConnection: close\r\n\r\n", b"204"),
    "whole-server": (b"OPTIONS * HTTP/1.1\r\nHost: broker\r\nConnection: close\r\n\r\n", b"204"),
    "options": (b"OPTIONS /readyz HTTP/1.0\r\n\r\n", b"204"),
    "head": (b"HEAD /readyz HTTP/1.0\r\n\r\n", b"200"),
    "head-twice": (
        b"HEAD /docs HTTP/1.1\r\nHost: b\r\n\r\nHEAD /nowhere HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n",
        b"200",
    ),
}


async def ask(url: str, request: bytes) -> bytes:
    """Send bytes; all that comes until the broker closes."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), WITHIN)
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(("request_bytes", "status"), CHECKS.values(), ids=CHECKS.keys())
async def test_a_health_check_gets_a_head_and_no_body(request_bytes: bytes, status: bytes) -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, served(settings_of(oneinbox.url, {})) as url:
        answered = await ask(url, request_bytes)

    *heads, rest = answered.split(b"\r\n\r\n")
    assert rest == b""
    assert len(heads) == request_bytes.count(b"\r\n\r\n")
    assert heads[0].split()[1] == status
    assert all(head.startswith(b"HTTP/1.1 ") for head in heads)


async def test_a_proxy_that_speaks_http_1_0_gets_events_without_chunks() -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, served(settings_of(oneinbox.url, {})) as url:
        location = (await ask(url, b"POST /session HTTP/1.0\r\n\r\n")).partition(b"location: ")[2].split()[0]
        await ask(url, b"POST " + location + b"/stop HTTP/1.0\r\n\r\n")

        head, _, events = (await ask(url, b"GET " + location + b"/events HTTP/1.0\r\n\r\n")).partition(b"\r\n\r\n")

    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert events.startswith(b"event: call\nid: ")
    assert events.endswith(b"data: {}\n\n")
