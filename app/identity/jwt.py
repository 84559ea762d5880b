"""jwt mode: a signed token from the application's own login (RFC 7519), checked as RFC 8725 advises.

PyJWT verifies signature, issuer and audience. Key, algorithm and times are checked here. `jku`, `x5u`, `jwk` and `x5c`
in a token's header are ignored: with them the token's author would choose the key.
"""

import hashlib
import json
import re
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import jwt
from starlette.requests import HTTPConnection

from app.config.claims import claim_of, is_accepted
from app.identity.base import Identity, is_user_id
from app.identity.keys import Keys
from app.identity.user import User, user_named
from app.problems import Problem

MAX_TOKEN_BYTES = 8 * 1024
# Clocks differ: a broker a few seconds behind the issuer must not refuse a new token. An expired one gets no leeway, as
# in PyJWT, jose and jsonwebtoken: clients fetch a new token in time anyway. `doctor` warns of a clock beyond it.
NOT_YET_LEEWAY_SECONDS = 30
LATEST_TIME = 1e12  # the year 33658; anything later is not a time, nor are infinity and NaN
REMEMBERED_SECONDS = 60
REMEMBERED_TOKENS = 1024

BEARER = re.compile(r"bearer +([^ ]+)", re.IGNORECASE | re.ASCII)


class InvalidLogin(Exception):
    """A token that is refused. The message says why, for a developer, and quotes nothing of the token."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """A verified token's user, and the time until which it need not be verified again."""

    user: User
    until: float


@dataclass(repr=False, eq=False)
class JwtIdentity(Identity):
    """Identify users by a token from `Authorization: Bearer` or a cookie.

    `issuer`: what the token must name; `audience`: of which it must name one; empty: not checked. `required_claims`: by
    name or JSON pointer, the texts of which each must have one. `user_claim`: name of the claim with the user's id, or
    a JSON pointer to it. `cookie`: its name; empty: no cookie is accepted. `now`: Unix time.
    """

    keys: Keys
    _: KW_ONLY
    issuer: str = ""
    audience: Sequence[str] = ()
    required_claims: Mapping[str, Collection[str]] = field(default_factory=dict)
    user_claim: str = "sub"
    cookie: str = ""
    now: Callable[[], float] = time.time
    # By hash, so that no token stays in memory longer than its request. A page sends several requests a minute, and a
    # hit costs about a tenth of a verification.
    _remembered: dict[bytes, Remembered] = field(default_factory=dict, init=False)
    _remembered_version: int = field(default=0, init=False)

    async def identify(self, request: HTTPConnection) -> User:
        """Return the user of the request's token. Raises Problem: 401, or 503 while there are no keys."""
        try:
            token, by_cookie = self._token(request)
            if token is None:
                raise Problem("unauthenticated", "Send a token.", {"WWW-Authenticate": "Bearer"})
            user = await self._verified(token)
        except InvalidLogin as error:
            # RFC 6750, section 3.1
            headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
            raise Problem("unauthenticated", str(error), headers) from None
        return replace(user, address=self.addresses.of(request), by_cookie=by_cookie)

    def _token(self, request: HTTPConnection) -> tuple[str | None, bool]:
        """Return the token, and whether only the cookie holds it."""
        in_header = self._header_token(request)
        in_cookie = self._cookie_token(request) if self.cookie else None
        if in_header is None:
            return in_cookie, True
        if in_cookie not in (None, in_header):
            raise InvalidLogin("The Authorization header and the cookie hold different tokens.")
        return in_header, False

    def _header_token(self, request: HTTPConnection) -> str | None:
        values = request.headers.getlist("authorization")
        if len(values) > 1:
            raise InvalidLogin("There is more than one Authorization header.")
        if not values or not values[0].lower().startswith("bearer"):
            return None  # such as a staging site's password, which browsers send with every request
        match = BEARER.fullmatch(values[0].strip())
        if match is None:
            raise InvalidLogin("The Authorization header is not 'Bearer' and one token.")
        return match[1]

    def _cookie_token(self, request: HTTPConnection) -> str | None:
        found = set()
        for pair in "; ".join(request.headers.getlist("cookie")).split(";"):
            name, _, value = pair.partition("=")
            if name.strip() == self.cookie:
                found.add(value.strip().strip('"'))
        found.discard("")  # some servers sign users out this way
        if len(found) > 1:
            # Of two cookies one may have been set by another host of the same site (RFC 6265, section 8.6).
            raise InvalidLogin("The cookie was sent twice, with different tokens.")
        return found.pop() if found else None

    async def _verified(self, token: str) -> User:
        if len(token) > MAX_TOKEN_BYTES:
            raise InvalidLogin("The token is longer than 8 KiB.")
        if self._remembered_version != self.keys.version:
            self._remembered.clear()
            self._remembered_version = self.keys.version
        digest = hashlib.sha256(token.encode("latin-1")).digest()
        now = self.now()
        remembered = self._remembered.get(digest)
        if remembered is not None and now < remembered.until:
            return remembered.user
        user = await self._verify(token)
        self._remembered.pop(digest, None)  # so that it moves to the end, away from the oldest
        if len(self._remembered) >= REMEMBERED_TOKENS:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[digest] = Remembered(user, min(user.expires_at or 0, now + REMEMBERED_SECONDS))
        return user

    async def _verify(self, token: str) -> User:
        header = _unverified_header(token)
        algorithm, kid = header.get("alg"), header.get("kid")
        if "crit" in header:  # RFC 7515, section 4.1.11: extensions that must be understood; none is
            raise InvalidLogin("The token's header has critical extensions.")
        if not isinstance(algorithm, str) or not isinstance(kid, str | None):
            raise InvalidLogin("The token's header is malformed.")
        key = await self.keys.find(algorithm, kid)
        if key is None:
            raise InvalidLogin("The token is signed with a key or an algorithm that is not accepted.")
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key.key,
                algorithms=key.algorithms,
                issuer=self.issuer or None,
                audience=self.audience or None,
                options={
                    "require": ["exp"],
                    "verify_iss": bool(self.issuer),
                    "verify_aud": bool(self.audience),
                    # Checked here: with our clock, and without accepting strings and booleans as numbers.
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                    # Checked here: the id may be another claim.
                    "verify_sub": False,
                    "verify_jti": False,
                },
            )
        except jwt.InvalidIssuerError:
            raise InvalidLogin("The token is from another issuer.") from None
        except jwt.InvalidAudienceError:
            raise InvalidLogin("The token is for another audience.") from None
        except jwt.MissingRequiredClaimError as error:
            raise InvalidLogin(f"The token has no {error.claim}.") from None
        except jwt.PyJWTError:
            raise InvalidLogin("The token is malformed, or its signature is wrong.") from None
        return self._user(claims)

    def _user(self, claims: Mapping[str, Any]) -> User:
        now = self.now()
        expires_at = _time(claims, "exp")
        if now >= expires_at:
            raise InvalidLogin("The token has expired.")
        for name in ("nbf", "iat"):
            if name in claims and now < _time(claims, name) - NOT_YET_LEEWAY_SECONDS:
                raise InvalidLogin("The token is not valid yet.")
        for name, accepted in self.required_claims.items():
            claim = claim_of(claims, name)
            if not is_accepted(claim, accepted):
                raise InvalidLogin(
                    f"The token has no {name}." if claim is None else f"The token is for another {name}."
                )
        # The token's own issuer counts only if it was checked; operators block users by the configured one.
        user = user_named("jwt", _name(claims, self.user_claim), self.issuer)
        return replace(user, claims=claims, expires_at=expires_at)


def _unverified_header(token: str) -> Mapping[str, Any]:
    """Return the header, to find the key. PyJWT parses it again, more strictly."""
    segment = token.partition(".")[0]
    try:
        header: Any = json.loads(urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise InvalidLogin("The token is malformed.")
    return header


def _time(claims: Mapping[str, Any], name: str) -> float:
    """Return a claim that is a NumericDate (RFC 7519, section 2)."""
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LATEST_TIME < value < LATEST_TIME:
        raise InvalidLogin(f"The token's {name} is not a time.")
    return float(value)


def _name(claims: Mapping[str, Any], claim: str) -> str:
    value = claim_of(claims, claim)
    if not is_user_id(value):
        raise InvalidLogin("The token's iss is malformed." if claim == "iss" else "The token names no user.")
    return value
