"""Security headers on every response."""

from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.middleware.response_head import RawHeaders, head_of

# An API response is neither a page nor a frame (OWASP REST Security Cheat Sheet); pages set their own policy.
UNLESS_SET = [
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]
ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SecurityHeaders:
    """Add the headers of every response, and the strictest policies unless the response has its own.

    Routes put rate-limit headers into `scope["state"]["limit_headers"]`, so that error responses have them too.
    """

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        limit_headers: dict[str, str] = {}
        scope["state"]["limit_headers"] = limit_headers

        def add(headers: RawHeaders) -> None:
            own = {name for name, _ in headers}
            for header in UNLESS_SET:
                if header[0] not in own:
                    headers.append(header)
            headers.extend(ALWAYS)
            for name, value in limit_headers.items():
                # A refusal already has the headers of the limit that refused.
                if (key := name.lower().encode()) not in own:
                    headers.append((key, value.encode()))

        head_of(scope).edits.append(add)
        return await self.app(scope, receive, send)
