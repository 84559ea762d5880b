"""The sandbox's page: what a frontend does with the broker, and everything it receives."""

import re
from html import escape
from pathlib import Path
from string import Template

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.sandbox.demo.qr import qr_svg

# LiveKit's own client, to join a real LiveKit server. The hash pins the published file of this version.
LIVEKIT_CLIENT = "https://cdn.jsdelivr.net/npm/livekit-client@2.23.0/dist/livekit-client.umd.js"
LIVEKIT_CLIENT_INTEGRITY = "sha384-HkA7rQNo8H04l1p4zoXX1Cy+h9YoYp8LvKt4vfMFhv4KFk07UkrNwIUnyBum8Pw6"
LIVEKIT = f' data-livekit-client="{LIVEKIT_CLIENT}" data-livekit-client-integrity="{LIVEKIT_CLIENT_INTEGRITY}"'

ASSETS = {
    "demo.css": "text/css",
    "demo.js": "text/javascript",
    "budget.js": "text/javascript",
    "code.js": "text/javascript",
    "inspector.js": "text/javascript",
    "livekit.js": "text/javascript",
    "page.js": "text/javascript",
    "wire.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
PHONE = """<details class="phone"><summary>On your phone</summary><div><img src="/demo/phone.svg" alt="QR code of this \
page’s address" width="112" height="112"><p class="soft">{url}<br>Over plain http a phone gives no page its \
microphone: listen there, or put TLS in front.</p></div></details>"""
_HERE = Path(__file__).parent
# URLs that a Content-Security-Policy can name: no IPv6 address, and no character that would end the source.
_SERVER = re.compile(r"(wss?)://([A-Za-z0-9.-]+(?::[0-9]{1,5})?)/?", re.ASCII)


class DemoPage:
    """ASGI app that serves `/` and the page's files, and passes all other requests to `app`, the broker.

    `livekit_url`: a LiveKit server that the page's calls join. `phone_url`: the page's address for other devices on
    the network, shown as a QR code. `agent`: the sandbox's agent talks on that server. `serves_livekit`: the broker
    serves LiveKit's client; else it comes from its CDN. Raises ValueError if `livekit_url` is not a LiveKit URL.
    """

    def __init__(
        self,
        app: ASGIApp,
        livekit_url: str | None = None,
        phone_url: str | None = None,
        *,
        agent: bool = False,
        serves_livekit: bool = False,
    ) -> None:
        self._app = app
        livekit = LIVEKIT if livekit_url and not serves_livekit else ""
        if livekit_url is None:
            about = "OneInbox is simulated, and nothing leaves your machine."
        elif agent:
            about = f"OneInbox is simulated: its agent, on {escape(livekit_url)}, greets you and repeats what you say."
        else:
            about = f"No agent is in the room on {escape(livekit_url)}: OneInbox is simulated."
        page = Template((_HERE / "index.html").read_text(encoding="utf-8")).substitute(
            about=about, livekit=livekit, phone=PHONE.format(url=escape(phone_url)) if phone_url else ""
        )
        policy = content_security_policy(livekit_url)
        self._answers = {"/": _answer(page.encode(), "text/html", {"Content-Security-Policy": policy})}
        for name, media_type in ASSETS.items():
            self._answers[f"/demo/{name}"] = _answer((_HERE / name).read_bytes(), media_type)
        if phone_url:
            self._answers["/demo/phone.svg"] = _answer(qr_svg(phone_url).encode(), "image/svg+xml")

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
