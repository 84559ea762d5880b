"""The first step of every route that needs a user: identify them, and count the request."""

from starlette.requests import ClientDisconnect, Request

from app.broker.context import Broker
from app.identity import User
from app.identity.keyring import LOGGED
from app.problems import Problem


async def authenticate(request: Request, broker: Broker) -> User:
    """Return the request's user and count the request.

    Raises 401, 403 and 429 problems, and 503 while logins cannot be checked.
    """
    state = request.scope["state"]
    if request.client is None and (request.scope.get("server") or ("", None))[1] is not None:
        raise ClientDisconnect  # a TCP connection without a peer was reset before the request was read
    try:
        user = await broker.identity.identify(request)
    except Problem as problem:
        if problem.slug == "unauthenticated":
            await broker.limits.count_failed_login(broker.identity.addresses.of(request))
        raise
    state["user"] = broker.keyring.pseudonym(user)[:LOGGED]
    if user.by_cookie and request.method == "POST":
        require_same_site(request)
    state["limit_headers"].update(await broker.limits.count_request(user))
    return user


def require_same_site(request: Request) -> None:
    """Refuse a POST that another site could have made the browser send with its login.

    An Origin that came this far is allowed or our own; without one, Sec-Fetch-Site says where the request comes from.
    """
    if "origin" not in request.headers and request.headers.get("sec-fetch-site") != "same-origin":
        raise Problem("forbidden-origin")
