"""`doctor`'s reasons for a connection that fails: each is raised here, and OneInbox, logins and store say the same."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.doctor import checks
from app.doctor.checks import diagnose
from app.doctor.findings import Finding, as_json
from tests.support.certificates import Authority
from tests.support.ports import free_port

SURROUNDINGS = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "NO_PROXY",
    "no_proxy",
)
SECRET = "PLANTED"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class World:
    """Where a failing server is built."""

    folder: Path
    servers: AsyncExitStack
    patch: pytest.MonkeyPatch

    async def serve(self, handler: Handler, authority: Authority | None = None) -> int:
        """Serve on loopback until the test ends; return the port."""
        return await self.servers.enter_async_context(serving(handler, authority))

    def trust(self, authority: Authority) -> None:
        """Trust this authority, and none besides."""
        self.patch.setenv("SSL_CERT_FILE", str(authority.certificate))


@asynccontextmanager
async def serving(handler: Handler, authority: Authority | None) -> AsyncIterator[int]:
    """A server on loopback."""
    tls = authority.server if authority else None
    server = await asyncio.start_server(handler, "127.0.0.1", 0, ssl=tls)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def reset(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


def says(text: str) -> Handler:
    """Answer whatever is asked with this, and close."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(text.encode())
        await writer.drain()
        writer.close()

    return handle


async def untrusted(world: World) -> str:
    return f"https://127.0.0.1:{await world.serve(close, Authority(world.folder))}"


async def other_authority(world: World) -> str:
    (world.folder / "other").mkdir()
    world.trust(Authority(world.folder / "other"))
    return await untrusted(world)


async def expired(world: World) -> str:
    authority = Authority(world.folder, days=(-3, -1))
    world.trust(authority)
    return f"https://127.0.0.1:{await world.serve(close, authority)}"


async def not_yet_valid(world: World) -> str:
    authority = Authority(world.folder, days=(1, 3))
    world.trust(authority)
    return f"https://127.0.0.1:{await world.serve(close, authority)}"


async def other_name(world: World) -> str:
    authority = Authority(world.folder)
    world.trust(authority)
    return f"https://localhost:{await world.serve(close, authority)}"


async def other_address(world: World) -> str:
    authority = Authority(world.folder, "127.0.0.2")
    world.trust(authority)
    return f"https://127.0.0.1:{await world.serve(close, authority)}"


async def unknown_name(world: World) -> str:
    return "https://nowhere.invalid"


async def refused(world: World) -> str:
    return f"https://127.0.0.1:{free_port()}"


async def refused_by_each_address(world: World) -> str:
    return f"https://localhost:{free_port()}"


async def no_tls(world: World) -> str:
    return f"https://127.0.0.1:{await world.serve(says('HTTP/1.1 400 Bad Request'))}"


async def closing(world: World) -> str:
    return f"https://127.0.0.1:{await world.serve(reset)}"


async def silent(world: World) -> str:
    world.patch.setattr(checks, "FETCH_SECONDS", 1.0)
    return f"https://127.0.0.1:{await world.serve(wait)}"


def proxy(answer: str) -> Callable[[World], Awaitable[str]]:
    """Build an address behind a proxy that answers this."""

    async def build(world: World) -> str:
        world.patch.setenv("HTTPS_PROXY", f"http://{SECRET}:{SECRET}@127.0.0.1:{await world.serve(says(answer))}")
        return "https://api.example"

    return build


async def proxy_that_is_down(world: World) -> str:
    world.patch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
    return "https://api.example"


async def proxy_that_is_unknown(world: World) -> str:
    world.patch.setenv("HTTPS_PROXY", "http://nowhere.invalid:3128")
    return "https://api.example"


TRUST = "its certificate is not trusted"
PROXY = "the proxy in HTTPS_PROXY"
CAUSES: dict[str, tuple[Callable[[World], Awaitable[str]], str, str]] = {
    "untrusted": (untrusted, TRUST, "name it in SSL_CERT_FILE"),
    "another authority": (other_authority, TRUST, "add the authority that signed it to SSL_CERT_FILE"),
    "expired": (expired, "its certificate has expired", "renewed"),
    "not yet valid": (not_yet_valid, "its certificate is not valid yet", "clock"),
    "another name": (other_name, "its certificate is for another name", "the name that the certificate has"),
    "another address": (other_address, "its certificate is for another name", "the name that the certificate has"),
    "unknown name": (unknown_name, "its name cannot be resolved", "host in {setting}"),
    "refused": (refused, "nothing listens there", "host and port in {setting}"),
    "refused by each address": (refused_by_each_address, "nothing listens there", "host and port in {setting}"),
    "no TLS": (no_tls, "it does not speak TLS on that port", "port"),
    "closes": (closing, "it closed the connection at once", "host and port in {setting}"),
    "no answer to the handshake": (silent, "no connection in time", "firewall"),
    "proxy refuses": (proxy("HTTP/1.1 403 Forbidden\r\n\r\n"), f"{PROXY} answered 403", "NO_PROXY"),
    "proxy wants a login": (proxy("HTTP/1.1 407 Who are you\r\n\r\n"), f"{PROXY} answered 407", "user and password"),
    "proxy cannot reach it": (proxy("HTTP/1.1 502 Bad Gateway\r\n\r\n"), f"{PROXY} answered 502", "HTTPS_PROXY"),
    "proxy closes": (proxy(""), f"{PROXY} closed the connection", "HTTPS_PROXY"),
    "proxy is down": (proxy_that_is_down, f"{PROXY}: nothing listens there", "host and port in HTTPS_PROXY"),
    "proxy is unknown": (proxy_that_is_unknown, f"{PROXY}: its name cannot be resolved", "host in HTTPS_PROXY"),
}

# The others have one bound for the whole answer, and cannot tell a proxy's end from the server's.
ONLY_ONEINBOX = ("no connection in time", f"{PROXY} closed the connection")


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    for name in SURROUNDINGS:
        monkeypatch.delenv(name, raising=False)
    async with AsyncExitStack() as servers:
        yield World(tmp_path, servers, monkeypatch)


async def examine(url: str, **more: str) -> dict[str, Finding]:
    """The findings about a OneInbox, a key set and a store at one address. None holds a secret."""
    environ = {
        "ONEINBOX_API_KEY": f"oi_sk_{SECRET}",
        "ONEINBOX_AGENT_ID": "agt_1",
        "ONEINBOX_BASE_URL": url,
        "ONEINBOX_CONNECT_TIMEOUT": "7",
        "BROKER_STORE_TIMEOUT": "5",
        "BROKER_AUTH": "jwt",
        "BROKER_JWT_JWKS_URL": f"{url}/keys?{SECRET}",
        "BROKER_JWT_ISSUER": "https://login.example",
        "BROKER_JWT_AUDIENCE": "broker",
        "BROKER_STORE_URL": url.replace("https://", f"rediss://:{SECRET}@"),
        "BROKER_SECRET": "s" * 32,
    }
    found = await diagnose(environ | more, None)
    assert SECRET not in as_json(found)
    return {finding.name: finding for finding in found}


@pytest.mark.parametrize(("build", "reason", "remedy"), CAUSES.values(), ids=CAUSES.keys())
async def test_why_there_is_no_connection(
    world: World, build: Callable[[World], Awaitable[str]], reason: str, remedy: str
) -> None:
    timeouts = {"ONEINBOX_CONNECT_TIMEOUT": "0.5", "BROKER_STORE_TIMEOUT": "0.5"} if build is silent else {}
    found = await examine(await build(world), **timeouts)
    assert found["oneinbox"].level == "error"
    assert found["oneinbox"].detail == f"cannot be reached: {reason}"
    assert remedy.format(setting="ONEINBOX_BASE_URL") in found["oneinbox"].remedy
    if reason in ONLY_ONEINBOX:
        return
    assert found["logins"].detail == f"BROKER_JWT_JWKS_URL cannot be reached: {reason}"
    assert remedy.format(setting="BROKER_JWT_JWKS_URL") in found["logins"].remedy
    if PROXY not in reason:  # no proxy leads to a store
        assert found["store"].detail == f"does not work: {reason}"
        assert remedy.format(setting="BROKER_STORE_URL") in found["store"].remedy


async def test_a_file_of_authorities_that_is_not_there(world: World) -> None:
    world.patch.setenv("SSL_CERT_FILE", str(world.folder / "missing.pem"))
    found = await examine(
        await untrusted(world),
        BROKER_AUTH="anonymous",
        BROKER_JWT_JWKS_URL="",
        BROKER_JWT_ISSUER="",
        BROKER_JWT_AUDIENCE="",
    )
    wrong = [finding for finding in found.values() if finding.level == "error"]
    assert any("SSL_CERT_FILE" in finding.detail + finding.remedy for finding in wrong)
    assert not any("firewall" in finding.remedy for finding in wrong)
