"""jwt mode with a fixed key: which tokens log in, and how the others are refused."""

import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from ipaddress import ip_network
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from starlette.requests import Request

from app.config.claims import read_required_claims
from app.identity import User
from app.identity.addresses import ClientAddresses
from app.identity.jwt import MAX_TOKEN_BYTES, NOT_YET_LEEWAY_SECONDS, REMEMBERED_SECONDS, REMEMBERED_TOKENS, JwtIdentity
from app.identity.keys import FixedKey, VerifyingKey, public_key, secret_key
from app.problems import Problem

NOW = 1_800_000_000.0
SECRET = "correct horse battery staple, and then some more of that, please"
RSA = rsa.generate_private_key(65537, 2048)
EC = {
    name: ec.generate_private_key(curve)
    for name, curve in {
        "ES256": ec.SECP256R1(),
        "ES384": ec.SECP384R1(),
        "ES512": ec.SECP521R1(),
        "ES256K": ec.SECP256K1(),
    }.items()
}
ED25519, ED448 = ed25519.Ed25519PrivateKey.generate(), ed448.Ed448PrivateKey.generate()

INVALID = 'Bearer error="invalid_token"'


def pem_of(key: Any) -> str:
    public: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return public.decode()


def claims_of(**changes: Any) -> dict[str, Any]:
    """A good token's claims; None takes one out."""
    claims = {"sub": "user-1", "exp": NOW + 600} | changes
    return {name: value for name, value in claims.items() if value is not None}


def token_of(
    key: Any = SECRET, algorithm: str = "HS256", headers: Mapping[str, Any] | None = None, **changes: Any
) -> str:
    return jwt.encode(claims_of(**changes), key, algorithm, headers=dict(headers or {}))


def b64(data: bytes | str | Mapping[str, Any]) -> str:
    data = json.dumps(data) if isinstance(data, Mapping) else data
    return urlsafe_b64encode(data.encode() if isinstance(data, str) else data).rstrip(b"=").decode()


def signed(header: Any, payload: Any, secret: bytes = SECRET.encode()) -> str:
    """An HS256 token of any header and payload, also of those that PyJWT would not sign."""
    text = f"{b64(header)}.{b64(payload)}"
    mac = hmac.HMAC(secret, hashes.SHA256())
    mac.update(text.encode())
    return f"{text}.{b64(mac.finalize())}"


def request_with(*headers: tuple[str, str], peer: str = "203.0.113.9") -> Request:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    return Request({"type": "http", "headers": raw, "client": (peer, 1234)})


def bearer(token: str) -> tuple[str, str]:
    return ("Authorization", f"Bearer {token}")


def identity_of(key: VerifyingKey | None = None, now: float = NOW, **settings: Any) -> JwtIdentity:
    addresses = ClientAddresses([ip_network("10.0.0.0/8")])
    return JwtIdentity(addresses, FixedKey(key or secret_key(SECRET)), now=lambda: now, **settings)


async def login(identity: JwtIdentity, *headers: tuple[str, str]) -> User:
    return await identity.identify(request_with(*headers))


async def refused(identity: JwtIdentity, *headers: tuple[str, str], challenge: str = INVALID) -> str:
    """The detail of a refusal; checks the rest of its shape."""
    with pytest.raises(Problem) as caught:
        await login(identity, *headers)
    assert (caught.value.slug, caught.value.headers) == ("unauthenticated", {"WWW-Authenticate": challenge})
    return caught.value.detail


# --- what logs in ---

ED_CHOICES: tuple[list[str], ...] = ([], ["EdDSA"], ["Ed25519"], ["EdDSA", "Ed25519"])
GOOD = [
    *((SECRET, secret_key(SECRET), name) for name in ("HS256", "HS384", "HS512")),
    *((RSA, public_key(pem_of(RSA)), name) for name in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
    *((key, public_key(pem_of(key)), name) for name, key in EC.items()),
    *((ED25519, public_key(pem_of(ED25519), chosen), name) for chosen in ED_CHOICES for name in ("EdDSA", "Ed25519")),
    *((ED448, public_key(pem_of(ED448)), name) for name in ("EdDSA", "Ed448")),
]


@pytest.mark.parametrize(("private", "key", "algorithm"), GOOD)
async def test_every_algorithm_family(private: Any, key: VerifyingKey, algorithm: str) -> None:
    token = token_of(private, algorithm)
    assert (await login(identity_of(key), bearer(token))).id == "user-1"
    head, payload, signature = token.split(".")
    forged = b64(claims_of(sub="user-2"))
    assert "signature" in await refused(identity_of(key), bearer(f"{head}.{forged}.{signature}"))
    flipped = ("B" if signature[9] == "A" else "A").join((signature[:9], signature[10:]))
    await refused(identity_of(key), bearer(f"{head}.{payload}.{flipped}"))
    await refused(identity_of(key), bearer(f"{head}.{payload}."))


async def test_the_fields_of_a_user() -> None:
    user = await login(identity_of(), bearer(token_of(iss="https://issuer.example/", plan="pro")))
    assert user == User(
        mode="jwt",
        id="user-1",
        issuer="",  # what a token says of its issuer counts only where it was checked
        claims=claims_of(iss="https://issuer.example/", plan="pro"),
        expires_at=NOW + 600,
        address="203.0.113.9",
    )


async def test_address_is_the_forwarded_one() -> None:
    request = request_with(bearer(token_of()), ("X-Forwarded-For", "1.1.1.1, 198.51.100.1"), peer="10.0.0.1")
    assert (await identity_of().identify(request)).address == "198.51.100.1"


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": NOW + 0.5},
        {"exp": int(NOW) + 600},
        {"nbf": NOW},
        {"nbf": NOW + NOT_YET_LEEWAY_SECONDS},
        {"iat": NOW + NOT_YET_LEEWAY_SECONDS},
        {"iat": NOW - 1e9},
        {"aud": "https://other.example"},
        {"aud": 5},
        {"jti": 5},
        {"sub": "x" * 255},
        {"sub": "Jürgen 🙂"},
    ],
)
async def test_good_claims(changes: dict[str, Any]) -> None:
    assert (await login(identity_of(), bearer(token_of(**changes)))).id == changes.get("sub", "user-1")


@pytest.mark.parametrize("audience", ["api", "api-2", ["api"], ["other", "api"], ["api-2", "api"]])
async def test_issuer_and_audience(audience: Any) -> None:
    identity = identity_of(issuer="https://issuer.example", audience=["api", "api-2"])
    user = await login(identity, bearer(token_of(iss="https://issuer.example", aud=audience)))
    assert user.issuer == "https://issuer.example"


async def test_another_user_claim() -> None:
    identity = identity_of(user_claim="https://example.com/uid")
    token = signed({"alg": "HS256"}, claims_of(sub=7) | {"https://example.com/uid": "u-9"})
    assert (await login(identity, bearer(token))).id == "u-9"
    assert "names no user" in await refused(identity, bearer(token_of()))


async def test_a_user_claim_inside_another() -> None:
    identity = identity_of(user_claim="/user/id")
    assert (await login(identity, bearer(token_of(user={"id": "u-9"})))).id == "u-9"
    for user in ({"id": 9}, {}, "u-9", ["u-9"]):
        assert "names no user" in await refused(identity, bearer(token_of(user=user)))


async def test_headers_that_name_keys_are_ignored() -> None:
    """The token is good; its `jku`, `x5u`, `jwk` and `x5c` neither help nor harm."""
    headers = {"jku": "https://evil.example/jwks", "x5u": "https://evil.example/c", "x5c": ["x"], "jwk": {"kty": "oct"}}
    assert (await login(identity_of(), bearer(token_of(headers=headers)))).id == "user-1"


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer   "])
async def test_bearer_is_read_as_rfc_9110_says(scheme: str) -> None:
    assert (await login(identity_of(), ("Authorization", scheme + token_of()))).id == "user-1"


# --- what does not: claims ---


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"exp": None}, "has no exp"),
        ({"exp": NOW}, "expired"),
        ({"exp": NOW - 1}, "expired"),
        ({"exp": 0}, "expired"),
        ({"exp": -1e9}, "expired"),
        ({"exp": True}, "exp is not a time"),
        ({"exp": str(NOW + 600)}, "exp is not a time"),
        ({"exp": [NOW + 600]}, "exp is not a time"),
        ({"exp": 1e300}, "exp is not a time"),
        ({"exp": 10**400}, "exp is not a time"),
        ({"exp": float("inf")}, "exp is not a time"),
        ({"exp": float("nan")}, "exp is not a time"),
        ({"nbf": NOW + NOT_YET_LEEWAY_SECONDS + 1}, "not valid yet"),
        ({"nbf": "soon"}, "nbf is not a time"),
        ({"iat": NOW + NOT_YET_LEEWAY_SECONDS + 1}, "not valid yet"),
        ({"iat": {}}, "iat is not a time"),
        ({"sub": None}, "names no user"),
        ({"sub": ""}, "names no user"),
        ({"sub": 7}, "names no user"),
        ({"sub": ["user-1"]}, "names no user"),
        ({"sub": "x" * 256}, "names no user"),
        ({"sub": "a\nb"}, "names no user"),
        ({"sub": "a\x1fb"}, "names no user"),
        ({"sub": "a\x85b"}, "names no user"),
        ({"sub": "a\ud800b"}, "names no user"),
    ],
)
async def test_bad_claims(changes: dict[str, Any], detail: str) -> None:
    token = signed({"alg": "HS256"}, claims_of(**changes))
    assert detail in await refused(identity_of(), bearer(token))


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"iss": "https://other.example", "aud": "api"}, "another issuer"),
        ({"iss": ["https://issuer.example"], "aud": "api"}, "another issuer"),
        ({"iss": "https://issuer.example/", "aud": "api"}, "another issuer"),
        ({"aud": "api"}, "has no iss"),
        ({"iss": "https://issuer.example", "aud": "other"}, "another audience"),
        ({"iss": "https://issuer.example", "aud": ["other"]}, "another audience"),
        ({"iss": "https://issuer.example", "aud": {"api": 1}}, "another audience"),
        ({"iss": "https://issuer.example", "aud": ["api", 5]}, "another audience"),
        ({"iss": "https://issuer.example", "aud": []}, "has no aud"),
        ({"iss": "https://issuer.example"}, "has no aud"),
    ],
)
async def test_wrong_issuer_or_audience(changes: dict[str, Any], detail: str) -> None:
    identity = identity_of(issuer="https://issuer.example", audience=["api", "api-2"])
    assert detail in await refused(identity, bearer(signed({"alg": "HS256"}, claims_of(**changes))))


REQUIRED: dict[str, tuple[str, Any, str | None]] = {
    "one-of": ("app=a|b", "b", None),
    "one-only": ("app=a", "a", None),
    "in-a-list": ("app=a|b", ["x", "b"], None),
    "a-number": ("app=42", 42, None),
    "a-number-in-a-list": ("app=42", ["x", 42], None),
    "a-boolean": ("app=true", True, None),
    "a-boolean-as-text": ("app=true", "true", None),
    "with-equals-signs": ("app=a=b?c=d", "a=b?c=d", None),
    "a-pointer": ("/o/id=org_1", {"id": "org_1"}, None),
    "a-pointer-into-a-list": ("/o/1=org_1", ["x", "org_1"], None),
    "a-pointer-to-a-list": ("/o/roles=voice", {"roles": ["x", "voice"]}, None),
    "no-claim": ("app=a", None, "has no app"),
    "another": ("app=a|b", "c", "for another app"),
    "part-of-it": ("app=abc", "ab", "for another app"),
    "more-than-it": ("app=ab", "abc", "for another app"),
    "both-as-one": ("app=a|b", "a|b", "for another app"),
    "in-another-case": ("app=a", "A", "for another app"),
    "with-a-blank": ("app=a", "a ", "for another app"),
    "an-empty-list": ("app=a", [], "for another app"),
    "a-list-of-others": ("app=a", ["b", "c"], "for another app"),
    "a-list-in-a-list": ("app=a", [["a"]], "for another app"),
    "a-name-in-an-object": ("app=a", {"a": True}, "for another app"),
    "one-is-not-true": ("app=1", True, "for another app"),
    "true-is-not-one": ("app=true", 1, "for another app"),
    "an-unlike-number": ("app=42", 42.0, "for another app"),
    "nowhere": ("/o/id=org_1", {}, "has no /o/id"),
    "another-nested": ("/o/id=org_1", {"id": "org_2"}, "for another /o/id"),
    "top-level-is-no-pointer": ("o=org_1", {"id": "org_1"}, "for another o"),
}


@pytest.mark.parametrize(("setting", "value", "detail"), REQUIRED.values(), ids=REQUIRED.keys())
async def test_required_claims(setting: str, value: Any, detail: str | None) -> None:
    identity = identity_of(required_claims=read_required_claims([setting]))
    name = setting[1] if setting.startswith("/") else setting.partition("=")[0]
    header = bearer(signed({"alg": "HS256"}, claims_of(**{name: value})))
    if detail is None:
        assert (await login(identity, header)).id == "user-1"
    else:
        assert detail in await refused(identity, header)


async def test_all_required_claims_and_the_audience() -> None:
    required = read_required_claims(["azp=https://a.example", "token_use=access"])
    identity = identity_of(audience=["api"], required_claims=required)
    good: dict[str, Any] = {"aud": "api", "azp": "https://a.example", "token_use": "access"}
    assert (await login(identity, bearer(token_of(**good)))).id == "user-1"
    for name in good:
        await refused(identity, bearer(token_of(**{**good, name: "another"})))


# --- what does not: signature and header ---

PEM = pem_of(RSA)


@pytest.mark.parametrize(
    ("key", "token"),
    [
        # Another family, or none.
        (secret_key(SECRET), f"{b64({'alg': 'none'})}.{b64(claims_of())}."),
        (secret_key(SECRET), f"{b64({'alg': 'nOnE'})}.{b64(claims_of())}."),
        (public_key(PEM), f"{b64({'alg': 'none'})}.{b64(claims_of())}."),
        (public_key(PEM), signed({"alg": "HS256"}, claims_of(), PEM.encode())),
        (public_key(PEM), signed({"alg": "HS256"}, claims_of(), PEM.strip().encode())),
        (public_key(PEM), token_of(EC["ES256"], "ES256")),
        (public_key(pem_of(EC["ES256"])), token_of(EC["ES384"], "ES384")),
        (public_key(pem_of(ED25519)), token_of(ED448, "EdDSA")),
        (public_key(pem_of(ED25519)), token_of(ED25519, "Ed448")),
        (public_key(pem_of(ED448)), token_of(ED448, "Ed25519")),
        (secret_key(SECRET), token_of(RSA, "RS256")),
        # The right family, another key.
        (public_key(PEM), token_of(rsa.generate_private_key(65537, 2048), "RS256")),
        (secret_key(SECRET), token_of("x" * 64)),
        # Signed with what its own header offers.
        (
            public_key(PEM),
            token_of(
                EC["ES256"], "ES256", {"jwk": json.loads(jwt.algorithms.ECAlgorithm.to_jwk(EC["ES256"].public_key()))}
            ),
        ),
        (public_key(PEM), token_of(rsa.generate_private_key(65537, 2048), "RS256", {"jku": "https://evil.example/"})),
        # An algorithm that is not among those chosen.
        (secret_key(SECRET, ["HS512"]), token_of()),
        (public_key(PEM, ["PS256"]), token_of(RSA, "RS256")),
        # Extensions that must be understood.
        (secret_key(SECRET), signed({"alg": "HS256", "crit": ["exp"], "exp": 1}, claims_of())),
        (secret_key(SECRET), signed({"alg": "HS256", "crit": ["b64"], "b64": True}, claims_of())),
        (secret_key(SECRET), signed({"alg": "HS256", "crit": []}, claims_of())),
        (secret_key(SECRET), signed({"alg": "HS256", "b64": False}, claims_of())),
        # Headers of other shapes.
        (secret_key(SECRET), signed({}, claims_of())),
        (secret_key(SECRET), signed({"alg": ["HS256"]}, claims_of())),
        (secret_key(SECRET), signed({"alg": None}, claims_of())),
        (secret_key(SECRET), signed({"alg": "HS256", "kid": 5}, claims_of())),
        (secret_key(SECRET), signed({"alg": "HS256", "kid": None}, claims_of())),
        (secret_key(SECRET), signed("[]", claims_of())),
        (secret_key(SECRET), signed("[" * 5000, claims_of())),
        (secret_key(SECRET), signed("{", claims_of())),
        (secret_key(SECRET), signed(b"\xff\xfe", claims_of())),
        # Payloads of other shapes.
        (secret_key(SECRET), signed({"alg": "HS256"}, "[]")),
        (secret_key(SECRET), signed({"alg": "HS256"}, "null")),
        (secret_key(SECRET), signed({"alg": "HS256"}, "")),
        (secret_key(SECRET), signed({"alg": "HS256"}, '{"sub":' + "[" * 5000)),
        (secret_key(SECRET), signed({"alg": "HS256"}, '{"exp":' + "9" * 5000 + "}")),
        (secret_key(SECRET), signed({"alg": "HS256"}, b"\xff\xfe")),
        # No tokens at all.
        (secret_key(SECRET), "x"),
        (secret_key(SECRET), ".."),
        (secret_key(SECRET), "..."),
        (secret_key(SECRET), "ÿ.ÿ.ÿ"),
        (secret_key(SECRET), token_of() + "."),
        (secret_key(SECRET), token_of() + ".x.y"),
        (secret_key(SECRET), token_of() + "!"),
        (secret_key(SECRET), "!" + token_of()),
        (secret_key(SECRET), f"{token_of()},{token_of()}"),
        (secret_key(SECRET), f'"{token_of()}"'),
    ],
)
async def test_forged_and_malformed_tokens(key: VerifyingKey, token: str) -> None:
    detail = await refused(identity_of(key), bearer(token))
    assert "user-1" not in detail
    assert token not in detail


async def test_long_tokens() -> None:
    def of_length(length: int) -> str:
        for padding in range(length):
            token = token_of(pad="x" * (length * 3 // 4 - 150 + padding))
            if len(token) >= length:
                return token
        raise AssertionError

    longest = of_length(MAX_TOKEN_BYTES)
    assert len(longest) == MAX_TOKEN_BYTES
    assert (await login(identity_of(), bearer(longest))).id == "user-1"
    for length in (MAX_TOKEN_BYTES + 1, 100_000):
        assert "8 KiB" in await refused(identity_of(), bearer(of_length(length)))
        assert "8 KiB" in await refused(identity_of(cookie="t"), ("Cookie", f"t={of_length(length)}"))


# --- where the token is ---


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        ([], "Bearer"),
        ([("Authorization", "")], "Bearer"),
        ([("Authorization", "Basic dXNlcjpwYXNz")], "Bearer"),
        ([("Authorization", token_of())], "Bearer"),
        ([("Cookie", f"t={token_of()}")], "Bearer"),
        ([("X-Authorization", f"Bearer {token_of()}")], "Bearer"),
        ([("Authorization", "Bearer")], INVALID),
        ([("Authorization", "Bearer ")], INVALID),
        ([("Authorization", f"Bearer{token_of()}")], INVALID),
        ([("Authorization", f"Bearer {token_of()} {token_of()}")], INVALID),
        ([("Authorization", f"Bearer {token_of()}, Bearer {token_of()}")], INVALID),
        ([bearer(token_of()), bearer(token_of())], INVALID),
        ([bearer(token_of()), ("Authorization", "Basic dXNlcjpwYXNz")], INVALID),
    ],
)
async def test_no_token_or_two(headers: list[tuple[str, str]], challenge: str) -> None:
    await refused(identity_of(), *headers, challenge=challenge)


GOOD_TOKEN, OTHER_TOKEN = token_of(), token_of(sub="user-2")


@pytest.mark.parametrize(
    ("headers", "by_cookie"),
    [
        ([("Cookie", f"t={GOOD_TOKEN}")], True),
        ([("Cookie", f'a=b; t="{GOOD_TOKEN}" ;c=d')], True),
        ([("Cookie", "a=b"), ("Cookie", f"t={GOOD_TOKEN}")], True),
        ([("Cookie", f"t={GOOD_TOKEN}; t={GOOD_TOKEN}; t=")], True),
        ([("Cookie", f"t={GOOD_TOKEN}"), ("Authorization", "Basic dXNlcjpwYXNz")], True),
        ([("Cookie", f"t={GOOD_TOKEN}"), bearer(GOOD_TOKEN)], False),
        ([("Cookie", f"T={OTHER_TOKEN}; tt={OTHER_TOKEN}; t="), bearer(GOOD_TOKEN)], False),
        ([bearer(GOOD_TOKEN)], False),
    ],
)
async def test_cookie(headers: list[tuple[str, str]], by_cookie: bool) -> None:
    identity = identity_of(cookie="t")
    for _ in range(2):  # verified, then remembered
        user = await login(identity, *headers)
        assert (user.id, user.by_cookie) == ("user-1", by_cookie)


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        ([("Cookie", f"t={GOOD_TOKEN}"), bearer(OTHER_TOKEN)], INVALID),
        ([("Cookie", f"t={OTHER_TOKEN}"), bearer(GOOD_TOKEN)], INVALID),
        ([("Cookie", "t=x"), bearer(GOOD_TOKEN)], INVALID),
        ([("Cookie", f"t={GOOD_TOKEN}; t={OTHER_TOKEN}")], INVALID),
        ([("Cookie", f"t={GOOD_TOKEN}"), ("Cookie", f"t={OTHER_TOKEN}")], INVALID),
        ([("Cookie", f"t={GOOD_TOKEN}"), ("Authorization", "Bearer ")], INVALID),
        ([("Cookie", "t=x")], INVALID),
        ([("Cookie", "t=")], "Bearer"),
        ([("Cookie", "t")], "Bearer"),
        ([("Cookie", "")], "Bearer"),
        ([("Cookie", f"T={GOOD_TOKEN}")], "Bearer"),
    ],
)
async def test_bad_cookies(headers: list[tuple[str, str]], challenge: str) -> None:
    identity = identity_of(cookie="t")
    await login(identity, bearer(GOOD_TOKEN))  # remembered tokens are refused in bad company just the same
    await login(identity, bearer(OTHER_TOKEN))
    await refused(identity, *headers, challenge=challenge)


# --- remembering ---


class CountingKey(FixedKey):
    """Counts verifications, as each begins with finding the key."""

    found = 0

    async def find(self, algorithm: str, kid: str | None) -> VerifyingKey | None:
        self.found += 1
        return await super().find(algorithm, kid)


async def test_verified_tokens_are_remembered_for_a_while() -> None:
    keys, clock = CountingKey(secret_key(SECRET)), [NOW]
    identity = JwtIdentity(ClientAddresses([]), keys, now=lambda: clock[0])
    token = bearer(token_of(exp=NOW + REMEMBERED_SECONDS * 2.5))
    for clock[0], verified in (
        (NOW, 1),
        (NOW + REMEMBERED_SECONDS - 1, 1),
        (NOW + REMEMBERED_SECONDS, 2),
        (NOW + REMEMBERED_SECONDS * 2 - 1, 2),
        (NOW + REMEMBERED_SECONDS * 2, 3),
        (NOW + REMEMBERED_SECONDS * 2.5 - 1, 3),
    ):
        assert (await login(identity, token)).id == "user-1"
        assert keys.found == verified
    clock[0] = NOW + REMEMBERED_SECONDS * 2.5
    assert "expired" in await refused(identity, token)
    keys.version = 1
    clock[0] = NOW
    keys.key = secret_key("y" * 64)
    assert "signature" in await refused(identity, token)


async def test_memory_is_bounded_and_failures_are_not_kept() -> None:
    keys = CountingKey(secret_key(SECRET))
    identity = JwtIdentity(ClientAddresses([]), keys, now=lambda: NOW)
    tokens = [bearer(token_of(sub=f"user-{number}")) for number in range(REMEMBERED_TOKENS + 1)]
    for token in tokens:
        await login(identity, token)
    assert len(identity._remembered) == REMEMBERED_TOKENS
    before = keys.found
    await login(identity, tokens[-1])
    assert keys.found == before
    await login(identity, tokens[0])
    assert keys.found == before + 1
    for _ in range(2):
        await refused(identity, bearer(token_of(exp=NOW - 1)))
    assert keys.found == before + 3


# --- keys ---


def test_algorithms_by_kind_of_key() -> None:
    assert secret_key("x" * 32).algorithms == ("HS256",)
    assert secret_key("x" * 48).algorithms == ("HS256", "HS384")
    assert secret_key("x" * 64).algorithms == ("HS256", "HS384", "HS512")
    assert secret_key("ü" * 32).algorithms == ("HS256", "HS384", "HS512")  # RFC 7518 counts bytes
    assert public_key(PEM, ["PS256", "RS512"]).algorithms == ("RS512", "PS256")
    assert public_key(pem_of(EC["ES384"])).algorithms == ("ES384",)
    assert public_key(PEM.replace("\n", "\\n")).key == public_key(PEM).key


PRIVATE_PEM = RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


@pytest.mark.parametrize(
    ("make", "text", "algorithms", "detail"),
    [
        (secret_key, "x" * 31, [], "shorter than 32"),
        (secret_key, PEM, [], "public key"),
        (secret_key, json.dumps({"kty": "oct", "k": "x" * 43}), [], "public key"),
        (secret_key, SECRET, ["RS256"], "RS256"),
        (secret_key, SECRET, ["HS256", "none"], "none"),
        (secret_key, "x" * 47, ["HS384"], "HS384"),
        (public_key, PEM, ["HS256"], "HS256"),
        (public_key, PEM, ["RS256", "ES256"], "ES256"),
        (public_key, PEM, ["none"], "none"),
        (public_key, pem_of(EC["ES256"]), ["ES384"], "ES384"),
        (public_key, pem_of(ED25519), ["ES256"], "ES256"),
        (public_key, PRIVATE_PEM, [], "private key"),
        (public_key, "nonsense " * 9, [], "not a public key"),
        (public_key, PEM[:60], [], "not a public key"),
        (public_key, pem_of(rsa.generate_private_key(65537, 1024)), [], "2048 bits"),
        (public_key, pem_of(x25519.X25519PrivateKey.generate()), [], "signs no logins"),
        (public_key, pem_of(dsa.generate_private_key(1024)), [], "signs no logins"),
        (public_key, pem_of(ec.generate_private_key(ec.SECP224R1())), [], "no algorithm uses"),
    ],
)
def test_unfit_keys_are_refused_at_the_start(make: Any, text: str, algorithms: list[str], detail: str) -> None:
    with pytest.raises(ValueError, match=detail) as caught:
        make(text, algorithms)
    assert text not in str(caught.value)
    assert str(caught.value.__cause__) in ("None", "")
