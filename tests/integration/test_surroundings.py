"""`doctor` and `serve` in every kind of surroundings: never a traceback, and the exit status that the contract says."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from jwt.algorithms import ECAlgorithm

from app.sandbox.server import RunningEmulator, running_emulator
from tests.support.brokers import LONG_CALLS, environ_of
from tests.support.commands import invoke
from tests.support.needs import cannot, program
from tests.support.processes import PATIENCE, run, running, surroundings

in_modules_loop = pytest.mark.asyncio(loop_scope="module")

SECRET = "a secret shared with the issuer, long enough"
JWT = {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": SECRET}
HEADER = {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "10.0.0.0/8"}
KEYS = "https://issuer.invalid/keys"
JWKS = {
    "BROKER_AUTH": "jwt",
    "BROKER_JWT_JWKS_URL": KEYS,
    "BROKER_JWT_ISSUER": "https://issuer.invalid",
    "BROKER_JWT_AUDIENCE": "broker",
}
CHALLENGE = {"BROKER_CHALLENGE_SECRET": "secret"}
CLOSED = "http://127.0.0.1:1"
CANNOT_LISTEN = ("--host", "192.0.2.1", "--port", "1")
"""With these `serve` ends where it would listen: a documentation address is no machine's own (RFC 5737)."""

Files = dict[str, str | bytes]
MODES = {"anonymous": {}, "jwt": JWT, "keys": JWKS, "header": HEADER, "challenge": CHALLENGE}

REFUSED: dict[str, tuple[dict[str, str], Files, str]] = {
    # Lines of .env that are no settings
    "colon": ({}, {".env": "BROKER_SESSION_LIMITS: 1/day"}, ".env: line 1 "),
    "open-quote": ({}, {".env": '\nBROKER_SESSION_LIMITS="1/day'}, ".env: line 2 "),
    "set": ({}, {".env": "set BROKER_SESSION_LIMITS=1/day"}, ".env: line 1 "),
    "two-on-a-line": ({}, {".env": "BROKER_DOCS=false BROKER_SESSION_LIMITS=1/day"}, ".env: line 1 "),
    "no-equals": ({}, {".env": "BROKER_SESSION_LIMITS"}, ".env: line 1 "),
    "hyphens": ({}, {".env": "BROKER-SESSION-LIMITS=1/day"}, ".env: line 1 "),
    # A .env that cannot be read
    "utf-16": ({}, {".env": "BROKER_DOCS=false".encode("utf-16")}, ".env: cannot be read ("),
    "dangling": ({}, {".env": "-> nowhere"}, ".env: cannot be read ("),
    "loop": ({}, {".env": "-> .env"}, ".env: cannot be read ("),
    # Proxies and certificates
    "socks": ({"HTTPS_PROXY": "socks5://127.0.0.1:1"}, {}, "HTTPS_PROXY: "),
    "socks-for-all": ({"ALL_PROXY": "socks5h://127.0.0.1:1"}, {}, "ALL_PROXY: "),
    "proxy-port": ({"HTTPS_PROXY": "http://127.0.0.1:port"}, {}, "HTTPS_PROXY: "),
    "proxy-brackets": ({"https_proxy": "http://[::1"}, {}, "HTTPS_PROXY: "),
    "certificates-missing": ({"SSL_CERT_FILE": "nowhere.pem"}, {}, "SSL_CERT_FILE: "),
    "certificates-empty": ({"SSL_CERT_FILE": "empty"}, {"empty": ""}, "SSL_CERT_FILE: "),
    "certificates-folder": ({"SSL_CERT_DIR": "nowhere"}, {}, "SSL_CERT_DIR: "),
    "key-log": ({"SSLKEYLOGFILE": "nowhere/keys"}, {}, "SSLKEYLOGFILE: "),
    # What is inside a value
    "issuer": ({**JWKS, "BROKER_JWT_ISSUER": "https://a\r.invalid"}, {}, "BROKER_JWT_ISSUER: "),
    "audience": ({**JWKS, "BROKER_JWT_AUDIENCE": "bro\nker"}, {}, "BROKER_JWT_AUDIENCE: "),
    "claim": ({**JWT, "BROKER_JWT_USER_CLAIM": "u\rid"}, {}, "BROKER_JWT_USER_CLAIM: "),
    "quoted-secret": ({**JWT, "BROKER_JWT_SECRET": f'"{SECRET}"'}, {}, "BROKER_JWT_SECRET: "),
    "url": ({**JWKS, "BROKER_JWT_JWKS_URL": "https://a\n.invalid/keys"}, {}, "BROKER_JWT_JWKS_URL: "),
    "left-over": ({**HEADER, "BROKER_JWT_ISSUER": "https://a.invalid"}, {}, "BROKER_JWT_ISSUER: "),
    # URLs that only a library complains about
    "store-tls": ({"BROKER_STORE_URL": "rediss://h.invalid?ssl_cert_reqs=CERT_NONE"}, {}, "BROKER_STORE_URL: "),
    "store-parameter": ({"BROKER_STORE_URL": "redis://h.invalid?socket_timeout=x"}, {}, "BROKER_STORE_URL: "),
    "store-port": ({"BROKER_STORE_URL": "redis://h.invalid:port"}, {}, "BROKER_STORE_URL: "),
    "store-host": ({"BROKER_STORE_URL": "redis://h..invalid"}, {}, "BROKER_STORE_URL: "),
    "store-address": ({"BROKER_STORE_URL": "redis://[::::]"}, {}, "BROKER_STORE_URL: "),
    "store-database": ({"BROKER_STORE_URL": "redis://h.invalid/x"}, {}, "BROKER_STORE_URL: "),
    "international-name": ({"ONEINBOX_BASE_URL": "https://xn--a.invalid"}, {}, "ONEINBOX_BASE_URL: "),
    "keys-name": ({**JWKS, "BROKER_JWT_JWKS_URL": "https://xn--a.invalid"}, {}, "BROKER_JWT_JWKS_URL: "),
    "verify-name": (
        {**CHALLENGE, "BROKER_CHALLENGE_VERIFY_URL": "https://a..invalid"},
        {},
        "BROKER_CHALLENGE_VERIFY_URL: ",
    ),
    "port": ({"PORT": "http"}, {}, "PORT: "),
    **{
        f"{name}-in-{mode}-mode": ({**changes, **environ}, {}, f"{next(iter(environ))}: ")
        for mode, changes in MODES.items()
        for name, environ in {
            "socks": {"HTTPS_PROXY": "socks5://127.0.0.1:1"},
            "all": {"ALL_PROXY": "socks5://127.0.0.1:1"},
            "certificates": {"SSL_CERT_FILE": "/nowhere.pem"},
        }.items()
    },
}  # fmt: skip

ACCEPTED: dict[str, tuple[dict[str, str], Files]] = {
    "nothing": ({}, {}),
    "network": ({"NO_PROXY": "fd07::/64"}, {}),
    "loopback": ({"NO_PROXY": "[::1]"}, {}),
    "nonsense": ({"NO_PROXY": "[,::/999"}, {}),
    "network-and-proxy": ({"NO_PROXY": "fd07::/64,[::1]", "HTTPS_PROXY": CLOSED}, {}),
    "everything": ({"HTTPS_PROXY": CLOSED, "HTTP_PROXY": CLOSED, "ALL_PROXY": CLOSED}, {}),
    "empty": (dict.fromkeys(("HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "PORT"), ""), {}),
    "folder-for-a-file": ({}, {".env/bin": ""}),
    "empty-file": ({}, {".env": b""}),
    "windows": ({}, {".env": b"\xef\xbb\xbfBROKER_DOCS=false\r\nBROKER_SECRET='" + b"x" * 32 + b"'\r\n"}),
    "cr": ({"BROKER_AUTH": "anonymous\r", "BROKER_DOCS": '"true"'}, {}),
    **{
        f"{mode}-behind-a-proxy": ({**changes, "NO_PROXY": "fd07::/64,[::1]", "HTTPS_PROXY": CLOSED}, {})
        for mode, changes in MODES.items()
    },
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is set, and signals are handled afterwards as before."""
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def oneinbox() -> AsyncIterator[RunningEmulator]:
    async with running_emulator(LONG_CALLS) as running:
        yield running


def write(files: Files) -> None:
    """Write files into the working directory; `-> name` is a symbolic link."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, str) and content.startswith("-> "):
            path.symlink_to(content.removeprefix("-> "))
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


async def findings(environ: dict[str, str]) -> tuple[int, list[str]]:
    """The exit status of `doctor`, and the details of what is wrong."""
    done = await asyncio.to_thread(invoke, "doctor", "--json", environ=environ)
    assert done.err == ""
    return done.code, [check["detail"] for check in json.loads(done.out)["checks"] if not check["ok"]]


@in_modules_loop
@pytest.mark.parametrize(("changes", "files", "line"), REFUSED.values(), ids=REFUSED.keys())
async def test_refused(changes: dict[str, str], files: Files, line: str, oneinbox: RunningEmulator) -> None:
    write(files)
    environ = environ_of(oneinbox.url, changes)
    host = () if "PORT" in changes else CANNOT_LISTEN

    served = invoke("serve", *host, environ=environ)
    code, wrong = await findings(environ)

    assert (served.code, served.out) == (2, "")
    assert [said.startswith(line) for said in served.err.splitlines()] == [True]
    if "PORT" not in changes:  # which is `serve`'s alone
        assert code == 1
        assert wrong[0] == served.err.splitlines()[0]
        assert all(said.startswith(line) for said in wrong)


@in_modules_loop
@pytest.mark.parametrize(("changes", "files"), ACCEPTED.values(), ids=ACCEPTED.keys())
async def test_accepted(changes: dict[str, str], files: Files, oneinbox: RunningEmulator) -> None:
    write(files)
    environ = environ_of(oneinbox.url, changes)

    served = invoke("serve", *CANNOT_LISTEN, environ=environ)
    code, wrong = await findings(environ)

    assert (served.code, served.out) == (1, "")
    assert served.err.splitlines()[-1].startswith("--port 1: cannot listen on 192.0.2.1 (")
    if changes.get("BROKER_JWT_JWKS_URL") == KEYS:  # there is no such issuer
        assert code == 1
        assert all("BROKER_JWT_JWKS_URL" in detail for detail in wrong)
    else:
        assert (code, wrong) == (0, [])


OTHER_COMMANDS = {
    "sandbox": ("sandbox", "--port", "0"),
    "openapi": ("openapi",),
    "pause": ("pause",),
    "calls": ("calls", "list"),
    "webhook": ("webhook", "list"),
}


@in_modules_loop
@pytest.mark.process
@pytest.mark.parametrize("command", OTHER_COMMANDS.values(), ids=OTHER_COMMANDS.keys())
async def test_other_commands_say_it_in_a_line(command: tuple[str, ...], oneinbox: RunningEmulator) -> None:
    for name, value in (("ALL_PROXY", "socks5://127.0.0.1:1"), ("SSL_CERT_FILE", "/nowhere.pem")):
        done = await asyncio.to_thread(run, *command, cwd=Path(), environ=environ_of(oneinbox.url, {name: value}))

        assert (done.code, done.out) == (2, "")
        [line] = done.err.splitlines()
        assert line.startswith(f"{name}: ")


@in_modules_loop
async def test_doctor_probe_in_the_same_surroundings(oneinbox: RunningEmulator) -> None:
    for name, value in (("HTTPS_PROXY", "socks5://127.0.0.1:1"), ("SSL_CERT_FILE", "/nowhere.pem")):
        done = await asyncio.to_thread(invoke, "doctor", "--probe", "https://voice.invalid", environ={name: value})
        assert (done.code, done.err) == (1, "")
        assert done.out.startswith(f"✗ surroundings: {name}: ")
    done = await asyncio.to_thread(
        invoke, "doctor", "--probe", "http://voice.invalid", environ={"HTTP_PROXY": "socks5://127.0.0.1:1"}
    )
    assert done.out.startswith("✗ surroundings: HTTP_PROXY: ")
    for url in ("https://xn--a.invalid", "https://a..invalid", "https://[::::]"):
        done = await asyncio.to_thread(invoke, "doctor", "--probe", url, environ={})
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("--probe: is not a URL")
    # A proxy that captured loopback would answer for it.
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        done = await asyncio.to_thread(invoke, "doctor", "--probe", oneinbox.url, environ={name: CLOSED})
        assert "this is not a broker" in done.out


@asynccontextmanager
async def answering(body: bytes) -> AsyncIterator[str]:
    """A server on loopback that answers everything with this JSON; its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@in_modules_loop
@pytest.mark.process
async def test_every_client_reaches_loopback_past_any_proxy(oneinbox: RunningEmulator, tmp_path: Path) -> None:
    """A served broker gets the issuer's keys, verifies challenges and starts calls, and `doctor` finds all well."""
    key = generate_private_key(SECP256R1())
    published = json.dumps({"keys": [json.loads(ECAlgorithm.to_jwk(key.public_key())) | {"kid": "1"}], "success": True})
    async with answering(published.encode()) as url:
        environ = environ_of(
            oneinbox.url,
            {
                "BROKER_AUTH": "jwt",
                "BROKER_JWT_JWKS_URL": f"{url}/keys",
                "BROKER_JWT_ISSUER": '"https://issuer.example"\r',
                "BROKER_JWT_AUDIENCE": "broker\n",
                "BROKER_JWT_USER_CLAIM": "uid\r",
                "BROKER_CHALLENGE_SECRET": "secret\r\n",
                "BROKER_CHALLENGE_VERIFY_URL": f"{url}/verify",
                **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"), CLOSED),
                "NO_PROXY": "fd07::/64",
            },
        )
        claims = {"uid": "ann", "iss": "https://issuer.example", "aud": "broker", "exp": 4_000_000_000}
        token = jwt.encode(claims, key, "ES256", {"kid": "1"})
        assert await findings(environ) == (0, [])
        with running("serve", "--port", "0", cwd=tmp_path, environ=environ) as process:
            headers = {"Authorization": f"Bearer {token}", "X-Challenge-Token": "solved"}
            broker = await process.listens()
            async with httpx.AsyncClient(base_url=broker, timeout=PATIENCE, trust_env=False) as client:
                answer = await client.post("/session", headers=headers)
            assert answer.status_code == 201, answer.text
            assert await process.stop() == 0


def locked_out(path: Path) -> None:
    (path / ".env").write_text("BROKER_DOCS=false")
    (path / ".env").chmod(0)


def not_searchable(path: Path) -> None:
    path.chmod(0o600)


@pytest.mark.process
@pytest.mark.parametrize("lock", [locked_out, not_searchable])
@pytest.mark.parametrize(("command", "status"), [("serve", 2), ("doctor", 1), ("openapi", 0)])
def test_what_the_user_may_not_read(lock: Callable[[Path], None], command: str, status: int, tmp_path: Path) -> None:
    """One line; `openapi` needs no settings."""
    # Without these rights the administrator is refused as everybody is.
    rights = "-dac_override,-dac_read_search"
    start = [program("setpriv", "util-linux"), "--bounding-set", rights, "--inh-caps", rights]
    if subprocess.run([*start, "true"], check=False, capture_output=True).returncode:
        cannot("this user may not give up rights")
    (tmp_path / "in").mkdir()
    lock(tmp_path / "in")

    done = subprocess.run(
        [*start, sys.executable, "-P", "-m", "app", command],
        cwd=tmp_path / "in",
        env=surroundings(environ_of(CLOSED, {})),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    said = {"serve": done.stderr, "doctor": done.stdout}.get(command, "")
    if said:
        assert ".env: cannot be read (Permission denied)" in said.splitlines()[0]
        assert len(done.stderr.splitlines()) == (1 if command == "serve" else 0)
