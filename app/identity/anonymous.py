"""anonymous mode: limits apply per client address. An address is not an identity and owns no calls."""

from starlette.requests import HTTPConnection

from app.identity.base import Identity
from app.identity.user import User, user_named


class Anonymous(Identity):
    """Accept every request, and count it by address."""

    async def identify(self, request: HTTPConnection) -> User:
        """Return a user for the client address; never refuses."""
        address = self.addresses.of(request)
        return user_named("anonymous", address, address=address)
