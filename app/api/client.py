"""/client.js and its kin: the browser's side of the broker, for pages of any origin."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import app as package
from app.api.errors import problem_response
from app.api.etags import matches
from app.api.middleware.root_path import route_path
from app.config.loading import read_file
from app.config.settings import Settings, takes
from app.problems import Problem

FOLDER = Path(package.__file__).parent / "client"
NAMES = ("client.js", "element.js", "react.js", "client.d.ts", "element.d.ts", "react.d.ts")
LIVEKIT = "/livekit-client.js"
PATHS = frozenset({*(f"/{name}" for name in NAMES), LIVEKIT})
METHODS = "GET, HEAD, OPTIONS"
HEADERS = {
    # A module script of another site is fetched with CORS; what it holds is public.
    "Access-Control-Allow-Origin": "*",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
CACHED = {"Cache-Control": "public, max-age=3600"}
OTHER_METHODS = {**HEADERS, "Cache-Control": "no-store", "Allow": METHODS}


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ClientFile:
    """A file with its ETag. `path`: as the request log and the metrics name it."""

    path: str
    content: bytes
    media_type: str
    etag: str


def load_client_files(settings: Settings) -> Mapping[str, ClientFile]:
    """Return the files to serve, by path; none with BROKER_CLIENT=false. Raises SettingsError."""
    if not settings.client:
        return {}
    files = {f"/{name}": (FOLDER / name).read_bytes() for name in NAMES}
    if settings.livekit_client is not None:
        name = "BROKER_LIVEKIT_CLIENT"
        files[LIVEKIT] = read_file(name, settings.livekit_client, takes(name)).encode()
    return {path: _file(path, content) for path, content in files.items()}


def _file(path: str, content: bytes) -> ClientFile:
    # No media type is registered for declarations; compilers and editors read them as text.
    media_type = "text/plain" if path.endswith(".d.ts") else "text/javascript"
    etag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
    return ClientFile(path, content, f"{media_type}; charset=utf-8", etag)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ClientFiles:
    """Serve the files before the Origin check, which is about calls; pass all other requests on."""

    app: ASGIApp
    files: Mapping[str, ClientFile]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        file = self.files.get(route_path(scope)) if scope["type"] == "http" else None
        if file is None:
            return await self.app(scope, receive, send)
        scope["route"] = file
        return await _answer(file, scope)(scope, receive, send)


def _answer(file: ClientFile, scope: Scope) -> ASGIApp:
    if scope["method"] == "OPTIONS":
        return Response(status_code=204, headers=OTHER_METHODS)
    if scope["method"] not in ("GET", "HEAD"):
        return problem_response(scope, Problem("method-not-allowed", headers=OTHER_METHODS))
    headers = {**HEADERS, **CACHED, "ETag": file.etag}
    if matches(Headers(scope=scope).get("if-none-match", ""), file.etag):
        return Response(status_code=304, headers=headers)
    # To HEAD the server sends no body.
    return Response(file.content, headers={**headers, "Content-Type": file.media_type})
