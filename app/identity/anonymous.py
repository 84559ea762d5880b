"""Anonymous mode: limits go by client address. An address is no identity; it owns nothing."""

from starlette.requests import HTTPConnection

from app.identity.addresses import limit_key
from app.identity.base import Identity
from app.identity.user import User


class Anonymous(Identity):
    """Everybody is let in, and counted by address."""

    async def identify(self, request: HTTPConnection) -> User:
        """The caller by address; never refuses."""
        address = self.addresses.of(request)
        return User(mode="anonymous", id=limit_key(address), address=address)
