"""header mode: a proxy in front has signed the user in and says who it is in a header.

Whoever can reach the broker past that proxy could write the header too: it counts from a trusted peer alone. The
proxy must remove what the client sent under that name, and under names that differ in `-` and `_` only: many servers
take them for one (https://nginx.org/en/docs/http/ngx_http_core_module.html#underscores_in_headers).
"""

from starlette.requests import HTTPConnection

from app.identity.addresses import ClientAddresses
from app.identity.base import Identity, is_user_id
from app.identity.user import User
from app.problems import Problem


class HeaderIdentity(Identity):
    """Users by header. `header`: its name; `addresses` knows the proxies that may send it."""

    def __init__(self, addresses: ClientAddresses, header: str) -> None:
        super().__init__(addresses)
        self._header = header.lower().encode("ascii")
        self._plain = _plain(self._header)

    async def identify(self, request: HTTPConnection) -> User:
        """The user whom the proxy names. Raises Problem 401."""
        if not self.addresses.is_proxy(request):
            raise _unauthenticated("The request did not come through the sign-in proxy.")
        found = [(name, value) for name, value in request.headers.raw if _plain(name) == self._plain]
        if not found:
            raise _unauthenticated("The sign-in proxy names no user.")
        if len(found) > 1 or found[0][0].lower() != self._header:
            raise _unauthenticated("The user header is there twice, or under a name that looks like it.")
        try:
            user = found[0][1].decode("utf-8").strip(" \t")
        except UnicodeDecodeError:
            user = ""
        # A comma is what two header lines look like once something on the way has joined them (RFC 9110, section 5.3);
        # believed, a client's own line would make up a new user with each request.
        if not is_user_id(user) or "," in user:
            raise _unauthenticated("The user header does not name one user.")
        return User(mode="header", id=user, address=self.addresses.of(request))


def _plain(name: bytes) -> bytes:
    return name.lower().replace(b"_", b"-")


def _unauthenticated(detail: str) -> Problem:
    # RFC 9110, section 15.5.2, wants a challenge on every 401, and some clients raise an error without one. No
    # registered scheme says "ask the proxy", and one that browsers know would make them ask for a password.
    return Problem("unauthenticated", detail, {"WWW-Authenticate": "ForwardedUser"})
