"""header mode: a proxy in front signs users in and names them in a header.

Clients that bypass the proxy could write the header too, so it is accepted only from a trusted peer. The proxy must
remove the client's own header of that name, and of names that differ only in `-` and `_`, since many servers treat
them as one (https://nginx.org/en/docs/http/ngx_http_core_module.html#underscores_in_headers).
"""

from starlette.requests import HTTPConnection

from app.identity.addresses import ClientAddresses
from app.identity.base import Identity, is_user_id
from app.identity.user import User, user_named
from app.problems import Problem


class HeaderIdentity(Identity):
    """Identify users by a header. `header`: its name; `addresses`: knows the proxies that may send it."""

    def __init__(self, addresses: ClientAddresses, header: str) -> None:
        super().__init__(addresses)
        self._header = header.lower().encode("ascii")
        self._plain = _plain(self._header)

    async def identify(self, request: HTTPConnection) -> User:
        """Return the user whom the proxy names. Raises Problem 401."""
        if not self.addresses.is_proxy(request):
            raise _unauthenticated("The request did not come through the sign-in proxy.")
        found = [(name, value) for name, value in request.headers.raw if _plain(name) == self._plain]
        if not found:
            raise _unauthenticated("The sign-in proxy sent no user.")
        if len(found) > 1 or found[0][0].lower() != self._header:
            raise _unauthenticated("The user header is repeated, or another header has a similar name.")
        try:
            user = found[0][1].decode("utf-8").strip(" \t")
        except UnicodeDecodeError:
            user = ""
        # A comma may come from two header lines that were joined on the way (RFC 9110, section 5.3): if it were
        # accepted, clients could invent a new user for each request with a line of their own.
        if not is_user_id(user) or "," in user:
            raise _unauthenticated("The user header does not name one user.")
        return user_named("header", user, address=self.addresses.of(request))


def _plain(name: bytes) -> bytes:
    return name.lower().replace(b"_", b"-")


def _unauthenticated(detail: str) -> Problem:
    # RFC 9110, section 15.5.2, requires a challenge on every 401, and some clients fail without one. No registered
    # scheme means "ask the proxy", and a scheme that browsers know would make them ask for a password.
    return Problem("unauthenticated", detail, {"WWW-Authenticate": "ForwardedUser"})
