"""anonymous mode: limits apply per client address. An address is not an identity and owns no calls."""

from starlette.requests import HTTPConnection

from app.identity.addresses import limit_key
from app.identity.base import Identity
from app.identity.user import User


class Anonymous(Identity):
    """Accept every request, and count it by address."""

    async def identify(self, request: HTTPConnection) -> User:
        """Return a user for the client address; never refuses."""
        address = self.addresses.of(request)
        return User(mode="anonymous", id=limit_key(address), address=address)
