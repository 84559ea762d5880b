"""The sandbox's demo page: what a frontend does with the broker, and everything it receives."""

import re
from html import escape
from pathlib import Path
from string import Template

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

# LiveKit's own client, to join a real LiveKit server. The hash pins the published file of this version.
LIVEKIT_CLIENT = "https://cdn.jsdelivr.net/npm/livekit-client@2.23.0/dist/livekit-client.umd.js"
LIVEKIT_CLIENT_INTEGRITY = "sha384-HkA7rQNo8H04l1p4zoXX1Cy+h9YoYp8LvKt4vfMFhv4KFk07UkrNwIUnyBum8Pw6"

ASSETS = {
    "demo.css": "text/css",
    "demo.js": "text/javascript",
    "join.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_HERE = Path(__file__).parent
# URLs that a Content-Security-Policy can name: no IPv6 address, and no character that would end the source.
_SERVER = re.compile(r"(wss?)://([A-Za-z0-9.-]+(?::[0-9]{1,5})?)/?", re.ASCII)


class DemoPage:
    """ASGI app that serves `/` and the page's files, and passes all other requests to `app`, the broker.

    `livekit_url`: a LiveKit server that the page offers to join. Raises ValueError if it is not a LiveKit URL.
    """

    def __init__(self, app: ASGIApp, livekit_url: str | None = None) -> None:
        self._app = app
        page = Template((_HERE / "index.html").read_text(encoding="utf-8")).substitute(
            livekit_client=LIVEKIT_CLIENT if livekit_url else "",
            livekit_client_integrity=LIVEKIT_CLIENT_INTEGRITY if livekit_url else "",
            livekit_url=escape(livekit_url or ""),
        )
        policy = content_security_policy(livekit_url)
        self._answers = {"/": _answer(page.encode(), "text/html", {"Content-Security-Policy": policy})}
        for name, media_type in ASSETS.items():
            self._answers[f"/demo/{name}"] = _answer((_HERE / name).read_bytes(), media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            answer = self._answers.get(scope["path"])
            if answer is not None:
                return await answer(scope, receive, send)
        return await self._app(scope, receive, send)


def content_security_policy(livekit_url: str | None) -> str:
    """Return the page's policy; it allows LiveKit's client and server if given. Raises ValueError for a bad URL."""
    scripts = connections = ""
    if livekit_url is not None:
        match = _SERVER.fullmatch(livekit_url)
        if match is None:
            raise ValueError("takes ws:// or wss://, a host name or IPv4 address, and an optional port")
        scripts = f" {LIVEKIT_CLIENT}"
        # If the WebSocket fails, the client asks over HTTP for the reason.
        connections = f" {match[1]}://{match[2]} {match[1].replace('ws', 'http')}://{match[2]}"
    return (
        f"default-src 'none'; script-src 'self'{scripts}; style-src 'self'; img-src 'self'; "
        f"connect-src 'self'{connections}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _answer(content: bytes, media_type: str, headers: dict[str, str] | None = None) -> Response:
    always = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return Response(content, headers={**always, **(headers or {})}, media_type=media_type)
