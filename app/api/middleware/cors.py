"""Sites that may use the broker from a browser: the Origin check and CORS (Fetch standard, section 3.2)."""

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import problem_response
from app.api.middleware.response_head import head_of
from app.api.middleware.root_path import route_path
from app.config.settings import is_loopback
from app.problems import Problem

EXPOSED = "Location, Date, Retry-After, RateLimit, RateLimit-Policy, ETag, X-Request-ID, Idempotency-Replayed"
ALLOWED_HEADERS = (
    "Authorization, Content-Type, Idempotency-Key, X-Challenge-Token, X-Request-ID, If-None-Match, Last-Event-ID"
)
PORT = re.compile(r":[0-9]{1,5}$", re.ASCII)
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
VARY = (b"vary", b"Origin")


@dataclass(repr=False, eq=False)
class CorsPolicy:
    """Refuse requests from other sites, whatever the method, before anything else handles them.

    `allowed`: origins as in the settings (`*`: any; a port of `*`: any port of a loopback host). `own`: the broker's
    public origin; None: an Origin equal to a loopback Host is its own. `credentials`: browsers may send cookies.
    `any_host`: an Origin equal to the Host, or to the forwarder's X-Forwarded-Host, is its own, whatever it is.
    `require`: POST /session needs an Origin. `same_site_posts`: a POST is refused with neither an Origin nor
    `Sec-Fetch-Site: same-origin`, for logins that browsers send by themselves.
    """

    app: ASGIApp
    _: KW_ONLY
    allowed: InitVar[Sequence[str]]
    own: str | None = None
    any_host: bool = False
    credentials: bool = False
    require: bool = False
    same_site_posts: bool = False

    def __post_init__(self, allowed: Sequence[str]) -> None:
        self.any = "*" in allowed
        self.exact = frozenset(origin for origin in allowed if not origin.endswith(":*"))
        self.any_port = frozenset(origin.removesuffix(":*") for origin in allowed if origin.endswith(":*"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope).startswith("/webhooks/"):
            return await self.app(scope, receive, send)  # webhooks are not for browsers; their secret protects them
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        headers = [VARY]
        if origins or self._needs_origin(scope):
            origin = origins[0].decode("latin-1") if len(origins) == 1 else ""
            if not self.allows(origin, scope):
                problem = Problem("forbidden-origin", headers={"Vary": "Origin"})
                return await problem_response(scope, problem)(scope, receive, send)
            headers = self._cors(origin)
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in dict(scope["headers"]):
                return await _answer_preflight(headers, send)

        head_of(scope).edits.append(lambda own: own.extend(headers))
        return await self.app(scope, receive, send)

    def allows(self, origin: str, scope: Scope) -> bool:
        """True for an origin that is allowed or the broker's own, never for `null` or an empty one."""
        if not origin or origin == "null":
            return False
        if origin in self.exact or self.any or origin == self.own:
            return True
        if self.any_port and PORT.sub("", origin) in self.any_port:
            return True
        if self.any_host:
            return _is_any_host_of(origin, scope)
        return self.own is None and _is_loopback_host_of(origin, scope)

    def _needs_origin(self, scope: Scope) -> bool:
        if scope["method"] != "POST":
            return False
        if self.require and route_path(scope) == "/session":
            return True
        return self.same_site_posts and (b"sec-fetch-site", b"same-origin") not in scope["headers"]

    def _cors(self, origin: str) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", EXPOSED.encode()),
            VARY,
        ]
        if self.credentials:
            headers.append((b"access-control-allow-credentials", b"true"))
        return headers


def _is_any_host_of(origin: str, scope: Scope) -> bool:
    scheme, separator, authority = origin.lower().partition("://")
    if not separator or scheme not in DEFAULT_PORTS:
        return False
    names = (b"host", b"x-forwarded-host")
    hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name in names]
    return authority in [host.removesuffix(DEFAULT_PORTS[scheme]) for host in hosts]


def _is_loopback_host_of(origin: str, scope: Scope) -> bool:
    host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    scheme, separator, authority = origin.partition("://")
    if not separator or scheme not in ("http", "https") or authority.lower() != host.lower():
        return False
    try:
        return is_loopback(urlsplit(origin).hostname or "")
    except ValueError:
        return False


async def _answer_preflight(headers: list[tuple[bytes, bytes]], send: Send) -> None:
    preflight = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", ALLOWED_HEADERS.encode()),
        (b"access-control-max-age", b"7200"),  # two hours, the most that browsers accept
    ]
    await send({"type": "http.response.start", "status": 204, "headers": [*preflight, *headers]})
    await send({"type": "http.response.body", "body": b""})
