"""nginx and Caddy with the files of deploy/ in front of a broker, on free loopback ports.

async with running("caddy", tmp_path, broker=url) as proxy, proxy.client("127.0.0.2") as client:
    await client.post("/session")
"""

import asyncio
import os
import pwd
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.deploy.settings import DEPLOY
from tests.support.needs import program
from tests.support.ports import free_port

PATIENCE = 30
"""Seconds for a proxy to start and to end; ample on a busy machine."""
NAMES = ("nginx", "caddy")
PAGE = "https://www.example.com"
"""The allowed origin of nginx's file; Caddy gets it by a variable, among others."""
BURST = 30
"""Requests that a strict nginx lets through at once."""
EDITS = {
    "nginx": {
        "prefix": {"location / {": "location /voice/ {"},
        "stripped prefix": {
            "location / {": "location /voice/ {",
            "proxy_pass http://oneinbox_broker;": "proxy_pass http://oneinbox_broker/;",
        },
        "sign-in": {
            'set $broker_user "";': "auth_basic sign-in;\nauth_basic_user_file FOLDER/users;\n"
            "set $broker_user $remote_user;"
        },
        "strict": {"rate=50r/s;": "rate=1r/m;", "burst=100": f"burst={BURST}"},
    },
    "caddy": {
        "prefix": {"route {": "route /voice/* {"},
        "stripped prefix": {"route {": "route /voice/* {\nuri strip_prefix /voice"},
        "sign-in": {
            "\t\treverse_proxy": "\t\tbasicauth {\nimport FOLDER/users\n}\n"
            "request_header X-Forwarded-User {http.auth.user.id}\n\t\treverse_proxy"
        },
    },
}
"""What the files' comments tell an operator to change, by proxy and purpose; `strict`: our own. FOLDER: the proxy's."""


@dataclass(frozen=True)
class Proxy:
    """A proxy that listens. `log`: all it wrote, wherever."""

    name: str
    url: str
    authority: Path
    """Who signed its certificate."""
    folder: Path

    def client(self, address: str = "127.0.0.1", **options: object) -> httpx.AsyncClient:
        """A client at a loopback address of its own."""
        context = ssl.create_default_context(cafile=self.authority)
        transport = httpx.AsyncHTTPTransport(verify=context, local_address=address)
        return httpx.AsyncClient(base_url=self.url, transport=transport, timeout=PATIENCE, **options)  # type: ignore[arg-type]

    @property
    def log(self) -> str:
        """All that it wrote, wherever."""
        return "".join(file.read_text() for file in sorted(self.folder.glob("*.log")))


@asynccontextmanager
async def running(name: str, folder: Path, *, broker: str, edit: str | None = None) -> AsyncIterator[Proxy]:
    """A proxy in front of the broker at this URL. `edit`: one of EDITS."""
    port = free_port()
    address = broker.removeprefix("http://")
    edits = EDITS[name][edit] if edit else {}
    given = {old: new.replace("FOLDER", str(folder)) for old, new in edits.items()}
    command, environ = (_nginx if name == "nginx" else _caddy)(folder, port, address, given)
    with (folder / "output.log").open("w") as output:
        process = await asyncio.create_subprocess_exec(*command, env=environ, stdout=output, stderr=output)
        proxy = Proxy(name, f"https://localhost:{port}", folder / "authority.pem", folder)
        try:
            await _until_it_serves(process, proxy, port)
            yield proxy
        finally:
            if process.returncode is None:
                process.terminate()
            await asyncio.wait_for(process.wait(), PATIENCE)


async def _until_it_serves(process: asyncio.subprocess.Process, proxy: Proxy, port: int) -> None:
    """Caddy listens first, and signs its certificate then."""
    async with asyncio.timeout(PATIENCE):
        while True:
            assert process.returncode is None, proxy.log
            try:
                context = ssl.create_default_context(cafile=proxy.authority)
                _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
            except OSError:  # of TLS, too
                await asyncio.sleep(0.05)
            else:
                writer.close()
                await writer.wait_closed()
                return


def _nginx(folder: Path, port: int, broker: str, edits: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    nginx, openssl = program("nginx", "nginx"), program("openssl", "openssl")
    key, certificate = folder / "key.pem", folder / "authority.pem"
    made = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1")
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    _ran(openssl, *made, *subject, "-keyout", str(key), "-out", str(certificate))
    # alice and bob, both with the password "secret"
    (folder / "users").write_text("alice:{PLAIN}secret\nbob:{PLAIN}secret\n")
    site = _edited(
        "nginx/oneinbox-broker.conf",
        {
            "listen 443 ssl http2;": f"listen 127.0.0.1:{port} ssl http2;",
            "server_name voice.example.com;": "server_name localhost;",
            "/etc/ssl/voice.example.com/fullchain.pem": str(certificate),
            "/etc/ssl/voice.example.com/privkey.pem": str(key),
            "/var/log/nginx": str(folder),
            "server 127.0.0.1:8000;": f"server {broker};",
            **edits,
        },
    )
    (folder / "site.conf").write_text(site)
    temporary = "\n".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = folder / "nginx.conf"
    main.write_text(
        f"daemon off;\nuser {pwd.getpwuid(os.geteuid()).pw_name};\nworker_processes 1;\npid {folder}/nginx.pid;\n"
        f"error_log stderr;\nevents {{}}\nhttp {{\n{temporary}\ninclude {folder}/site.conf;\n}}\n"
    )
    return [nginx, "-c", str(main), "-p", str(folder)], dict(os.environ)


def _caddy(folder: Path, port: int, broker: str, edits: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    caddy = program("caddy", "caddy")
    hashed = _ran(caddy, "hash-password", "--plaintext", "secret").strip()
    (folder / "users").write_text(f"alice {hashed}\nbob {hashed}\n")
    (folder / "authority.pem").symlink_to(folder / "caddy/pki/authorities/local/root.crt")
    # Nothing outside this folder: no port below 1024, no administration, no authority for the whole machine.
    options = (f"http_port {free_port()}", f"https_port {port}", "default_bind 127.0.0.1", "admin off")
    text = _edited("caddy/Caddyfile", edits)
    file = folder / "Caddyfile"
    file.write_text(text.replace("{\n", "\n".join(["{", *options, "skip_install_trust", ""]), 1))
    origins = f"https://app.example.com, {PAGE}"
    environ = {"DOMAIN": "localhost", "BROKER_ADDRESS": broker, "BROKER_ALLOWED_ORIGINS": origins}
    command = [caddy, "run", "--adapter", "caddyfile", "--config", str(file)]
    return command, {**os.environ, **environ, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}


def _edited(name: str, edits: dict[str, str]) -> str:
    """A file of deploy/ with every place that an operator fills in filled in; each is there once."""
    text = (DEPLOY / name).read_text(encoding="utf-8")
    for old, new in edits.items():
        lines = text.splitlines(keepends=True)
        places = [number for number, line in enumerate(lines) if old in line.split("#")[0]]
        assert places, f"{name} has no {old!r}"
        for number in places:
            lines[number] = lines[number].replace(old, new)
        text = "".join(lines)
    return text


def _ran(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
