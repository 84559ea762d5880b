"""jwt mode with a key set: rotation, outages, and how seldom the issuer is asked."""

import asyncio
import json
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from starlette.requests import Request
from structlog.testing import capture_logs

from app.identity import User
from app.identity import jwks as module
from app.identity.addresses import ClientAddresses
from app.identity.jwks import KeySet
from app.identity.jwt import JwtIdentity
from app.problems import Problem

NOW = 1_800_000_000.0
DAY = 24 * 3600
URL = "https://issuer.example/.well-known/jwks.json?token=hush"
RSA, RSA_NEW = (rsa.generate_private_key(65537, 2048) for _ in range(2))
EC, ED = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
ED448 = ed448.Ed448PrivateKey.generate()
HEADERS = {
    "at-capacity": {"Retry-After": "5"},
    "unauthenticated": {"WWW-Authenticate": 'Bearer error="invalid_token"'},
}
LOADERS: dict[type, Any] = {rsa.RSAPrivateKey: RSAAlgorithm, ec.EllipticCurvePrivateKey: ECAlgorithm}


def jwk_of(key: Any, **more: Any) -> dict[str, Any]:
    kind = next((loader for of, loader in LOADERS.items() if isinstance(key, of)), OKPAlgorithm)
    jwk: dict[str, Any] = kind.to_jwk(key.public_key(), as_dict=True) | more
    return {name: value for name, value in jwk.items() if value is not None}


class Issuer:
    """Serves `keys`, or does what `answer` says; counts how often it is asked. Waits for `gate` first."""

    def __init__(self, *keys: Any) -> None:
        self.keys = list(keys)
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.answer: Callable[[httpx.Request], httpx.Response] | None = None

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        assert str(request.url) == URL
        assert request.headers["accept-encoding"] == "identity"
        await self.gate.wait()
        return self.answer(request) if self.answer else httpx.Response(200, json={"keys": self.keys})


class Clock:
    """Time that stands still, and sleeps that end on request."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.sleeping: list[float] = []
        self._wake = asyncio.Event()

    def __call__(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        self.sleeping.append(seconds)
        await self._wake.wait()
        self._wake.clear()

    async def wake(self) -> None:
        """End the sleep, and let what follows happen."""
        self._wake.set()
        await settle()


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


class Setup:
    def __init__(self, issuer: Issuer, *algorithms: str) -> None:
        self.issuer, self.clock = issuer, Clock()
        self.keys = KeySet(
            URL, algorithms, transport=httpx.MockTransport(issuer), clock=self.clock, sleep=self.clock.sleep
        )
        self.identity = JwtIdentity(ClientAddresses([]), self.keys, issuer="i", audience=["a"], now=lambda: NOW)

    async def login(self, key: Any = RSA, algorithm: str = "RS256", kid: str | None = "k1", **more: Any) -> User:
        claims = {"sub": "user-1", "exp": NOW + 600, "iss": "i", "aud": "a"} | more
        token = jwt.encode(claims, key, algorithm, headers={} if kid is None else {"kid": kid})
        headers = [(b"authorization", f"Bearer {token}".encode())]
        return await self.identity.identify(Request({"type": "http", "headers": headers, "client": ("192.0.2.1", 1)}))

    async def slug(self, *args: Any, **more: Any) -> str:
        """How a login ends."""
        try:
            await self.login(*args, **more)
        except Problem as raised:
            problem = raised
        else:
            return "in"
        assert problem.headers == HEADERS[problem.slug]
        return problem.slug


MakeSetup = Callable[..., Awaitable[Setup]]


@pytest.fixture
async def begin() -> AsyncIterator[MakeSetup]:
    """Makes an issuer with these keys and an identity that has fetched them."""
    made: list[Setup] = []

    async def make(*keys: Any, algorithms: tuple[str, ...] = (), issuer: Issuer | None = None) -> Setup:
        setup = Setup(issuer or Issuer(*keys), *algorithms)
        made.append(setup)
        await setup.keys.start()
        await settle()
        return setup

    yield make
    for setup in made:
        await setup.keys.aclose()


def failing(reason: Exception) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        raise reason

    return answer


# --- which key ---


@pytest.mark.parametrize(
    ("key", "algorithm"), [*((RSA, f"{kind}{bits}") for kind in ("RS", "PS") for bits in (256, 384, 512)),
                           (EC, "ES256"), (ED, "EdDSA"), (ED, "Ed25519"), (ED448, "EdDSA"), (ED448, "Ed448")]
)  # fmt: skip
async def test_every_kind_of_key(begin: MakeSetup, key: Any, algorithm: str) -> None:
    setup = await begin(jwk_of(RSA_NEW, kid="k0"), jwk_of(key, kid="k1"))
    assert (await setup.login(key, algorithm)).id == "user-1"
    assert await setup.slug(key, algorithm, kid="k0") == "unauthenticated"
    assert setup.issuer.asked == 1


@pytest.mark.parametrize(
    ("keys", "kid", "outcome"),
    [
        ([jwk_of(RSA)], None, "in"),
        ([jwk_of(RSA, kid="k1")], None, "in"),
        ([jwk_of(RSA, kid="k1"), jwk_of(EC, kid="k2")], None, "in"),
        ([jwk_of(RSA, kid="k1"), jwk_of(RSA_NEW, kid="k2")], None, "unauthenticated"),
        ([jwk_of(RSA, kid="k1"), jwk_of(RSA_NEW, kid="k2", alg="PS256")], None, "in"),
        ([jwk_of(EC, kid="k1"), jwk_of(RSA, kid="k1")], "k1", "in"),  # RFC 7517, section 4.5: kinds may share a kid
        ([jwk_of(RSA)], "k1", "unauthenticated"),
        ([jwk_of(RSA, kid=5)], "k1", "unauthenticated"),
        ([jwk_of(RSA, kid="K1")], "k1", "unauthenticated"),
        ([jwk_of(RSA, kid="k1", alg="RS256", use="sig")], "k1", "in"),
        ([jwk_of(RSA, kid="k1", alg="RS512")], "k1", "unauthenticated"),
        ([jwk_of(RSA, kid="k1", key_ops=["verify"])], "k1", "in"),
    ],
)
async def test_choice_of_key(begin: MakeSetup, keys: list[Any], kid: str | None, outcome: str) -> None:
    setup = await begin(*keys)
    assert await setup.slug(kid=kid) == outcome


@pytest.mark.parametrize("published", [None, "EdDSA", "Ed25519", "Ed448"])
@pytest.mark.parametrize("chosen", [None, "EdDSA", "Ed25519", "Ed448", "ES384"])
@pytest.mark.parametrize(("key", "name"), [(ED, "Ed25519"), (ED448, "Ed448")])
async def test_an_edwards_curve_goes_by_its_old_and_its_new_name(
    begin: MakeSetup, key: Any, name: str, chosen: str | None, published: str | None
) -> None:
    algorithms = (chosen, "ES256") if chosen else ()
    setup = await begin(jwk_of(key, kid="k1", alg=published), jwk_of(EC, kid="k2"), algorithms=algorithms)
    fits = {published, chosen} <= {None, "EdDSA", name}
    for token in ("EdDSA", "Ed25519", "Ed448"):
        expected = "in" if fits and token in ("EdDSA", name) else "unauthenticated"
        assert await setup.slug(key, token) == expected, token


OCT = {"kty": "oct", "kid": "k1", "k": urlsafe_b64encode(b"x" * 64).decode()}
WEAK = rsa.generate_private_key(65537, 1024)


@pytest.mark.parametrize(
    "entry",
    [
        OCT,
        jwk_of(RSA, kid="k1", use="enc"),
        jwk_of(RSA, kid="k1", key_ops=["encrypt"]),
        jwk_of(RSA, kid="k1", key_ops="verify"),
        jwk_of(RSA, kid="k1", alg="RSA-OAEP"),
        jwk_of(RSA, kid="k1", alg="HS256"),
        jwk_of(RSA, kid="k1", alg=["RS256"]),
        jwk_of(RSA, kid="k1", n=None),
        jwk_of(RSA, kid="k1", n=5),
        jwk_of(RSA, kid="k1", n="!"),
        jwk_of(RSA, kid="k1", e="AA"),
        jwk_of(RSA, kid="k1", kty="EC"),
        jwk_of(RSA, kid="k1", kty=["RSA"]),
        jwk_of(WEAK, kid="k1"),
        jwk_of(EC, kid="k1", x="AA"),
        jwk_of(EC, kid="k1", crv="P-999"),
        jwk_of(ED, kid="k1", x="AA"),
        jwk_of(ED, kid="k1", crv="X25519"),
        "k1",
        None,
        ["kty"],
    ],
)
async def test_entries_that_are_no_keys_are_ignored(begin: MakeSetup, entry: Any) -> None:
    setup = await begin(entry, jwk_of(RSA_NEW, kid="k2"))
    for key, algorithm in ((RSA, "RS256"), (EC, "ES256"), (ED, "EdDSA"), ("x" * 64, "HS256")):
        assert await setup.slug(key, algorithm) == "unauthenticated"
    assert await setup.slug(RSA_NEW, kid="k2") == "in"


async def test_private_parts_published_by_mistake_are_not_used(begin: MakeSetup) -> None:
    setup = await begin(RSAAlgorithm.to_jwk(RSA, as_dict=True) | {"kid": "k1", "key_ops": None, "use": "sig"})
    assert await setup.slug() == "at-capacity"  # key_ops of null is malformed; no other key is there
    published = RSAAlgorithm.to_jwk(RSA, as_dict=True)
    del published["key_ops"]
    setup = await begin(published | {"kid": "k1"})
    assert await setup.slug() == "in"


async def test_at_most_a_hundred_keys(begin: MakeSetup) -> None:
    setup = await begin(*(jwk_of(RSA, kid=f"k{number}") for number in range(102)))
    assert await setup.slug(kid="k99") == "in"
    assert await setup.slug(kid="k100") == "unauthenticated"


async def test_chosen_algorithms(begin: MakeSetup) -> None:
    setup = await begin(jwk_of(RSA, kid="k1"), jwk_of(EC, kid="k2"), algorithms=("PS256", "ES256"))
    assert await setup.slug(RSA, "PS256") == "in"
    assert await setup.slug(EC, "ES256", kid="k2") == "in"
    assert await setup.slug(RSA, "RS256") == "unauthenticated"
    for name in ("HS256", "none", "RS1"):
        with pytest.raises(ValueError, match=name):
            KeySet(URL, ["RS256", name])


async def test_forged_tokens(begin: MakeSetup) -> None:
    setup = await begin(jwk_of(RSA, kid="k1"))
    assert await setup.slug(RSA_NEW) == "unauthenticated"
    assert await setup.slug("x" * 64, "HS256", kid="unknown") == "unauthenticated"
    assert await setup.slug(exp=NOW - 1) == "unauthenticated"
    assert await setup.slug(aud="b") == "unauthenticated"
    assert setup.issuer.asked == 1  # an algorithm that no key can have is no reason to ask


# --- rotation ---


async def test_rotation_is_noticed_by_an_unknown_key_id(begin: MakeSetup) -> None:
    setup = await begin(jwk_of(RSA, kid="k1"))
    assert await setup.slug() == "in"
    setup.issuer.keys = [jwk_of(RSA_NEW, kid="k2")]
    assert await setup.slug() == "in"
    assert await setup.slug(RSA_NEW, kid="k2") == "in"
    assert setup.issuer.asked == 2
    assert await setup.slug() == "unauthenticated"  # remembered tokens included


async def test_rotation_is_noticed_in_the_background(begin: MakeSetup) -> None:
    setup = await begin(jwk_of(RSA))
    setup.issuer.keys = [jwk_of(RSA_NEW)]
    assert setup.clock.sleeping == [300]
    await setup.clock.wake()
    assert (setup.issuer.asked, setup.clock.sleeping) == (2, [300, 300])
    assert await setup.slug(RSA_NEW, kid=None) == "in"
    assert await setup.slug(RSA, kid=None) == "unauthenticated"


async def test_unknown_key_ids_cause_one_fetch_per_30_seconds(begin: MakeSetup) -> None:
    setup = await begin(jwk_of(RSA, kid="k1"))
    for after, asked in ((0, 2), (0.1, 2), (29.9, 2), (30, 3), (59.9, 3), (60, 4)):
        setup.clock.at = 1000 + after
        assert await setup.slug(kid=f"unknown-{after}") == "unauthenticated"
        assert setup.issuer.asked == asked
    assert await setup.slug() == "in"


async def test_a_hundred_unknown_key_ids_at_once_cause_one_fetch(begin: MakeSetup) -> None:
    setup = await begin(jwk_of(RSA, kid="k1"))
    setup.issuer.keys.append(jwk_of(RSA_NEW, kid="k2"))
    setup.issuer.gate.clear()
    logins = [asyncio.create_task(setup.slug(RSA_NEW, kid="k2")) for _ in range(100)]
    await settle()
    assert await setup.slug() == "in"  # tokens with a known key do not wait
    assert not any(login.done() for login in logins)
    logins[0].cancel()  # a client that disconnects takes nothing from the others
    setup.issuer.gate.set()
    outcomes = await asyncio.gather(*logins, return_exceptions=True)
    assert outcomes[1:] == ["in"] * 99
    assert setup.issuer.asked == 2


async def test_unknown_key_id_joins_a_fetch_under_way(begin: MakeSetup) -> None:
    setup = await begin(jwk_of(RSA, kid="k1"))
    setup.issuer.keys.append(jwk_of(RSA_NEW, kid="k2"))
    setup.issuer.gate.clear()
    await setup.clock.wake()
    login = asyncio.create_task(setup.slug(RSA_NEW, kid="k2"))
    await settle()
    assert (setup.issuer.asked, login.done()) == (2, False)
    setup.issuer.gate.set()
    assert await login == "in"
    assert setup.issuer.asked == 2


async def test_waiting_is_bounded(begin: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0)
    issuer = Issuer(jwk_of(RSA, kid="k1"))
    issuer.gate.clear()
    setup = await begin(issuer=issuer)
    assert await setup.slug() == "at-capacity"
    issuer.gate.set()
    await settle()
    assert await setup.slug() == "in"
    issuer.gate.clear()
    assert await setup.slug(kid="unknown") == "unauthenticated"


# --- outages ---


async def test_first_requests_wait_for_the_first_fetch(begin: MakeSetup) -> None:
    issuer = Issuer(jwk_of(RSA, kid="k1"))
    issuer.gate.clear()
    setup = await begin(issuer=issuer)
    logins = [asyncio.create_task(setup.slug()) for _ in range(3)]
    await settle()
    assert not any(login.done() for login in logins)
    issuer.gate.set()
    assert await asyncio.gather(*logins) == ["in"] * 3
    assert issuer.asked == 1


async def test_a_start_may_wait_for_the_first_fetch(begin: MakeSetup) -> None:
    issuer = Issuer(jwk_of(RSA, kid="k1"))
    issuer.gate.clear()
    setup = await begin(issuer=issuer)
    ready = asyncio.create_task(setup.keys.ready())
    await settle()
    assert not ready.done()
    issuer.gate.set()
    await ready
    issuer.gate.clear()
    assert await setup.slug() == "in"


async def test_never_fetched(begin: MakeSetup) -> None:
    issuer = Issuer(jwk_of(RSA, kid="k1"))
    issuer.answer = failing(httpx.ConnectError("no route to hush"))
    with capture_logs() as logs:
        setup = await begin(issuer=issuer)
        for _ in range(10):
            assert await setup.slug() == "at-capacity"
            assert await setup.slug("x" * 64, "HS256") == "unauthenticated"  # no key could change that
    assert logs == [
        {"event": "jwks_fetch_failed", "log_level": "error", "host": "issuer.example", "reason": "ConnectError"}
    ]
    assert (issuer.asked, setup.clock.sleeping) == (1, [5])
    issuer.answer = None
    await setup.clock.wake()
    assert await setup.slug() == "in"
    assert setup.clock.sleeping == [5, 300]


async def test_not_started() -> None:
    setup = Setup(Issuer(jwk_of(RSA, kid="k1")))
    assert await setup.slug() == "at-capacity"
    await setup.keys.aclose()


async def test_an_outage_changes_nothing_for_a_day(begin: MakeSetup) -> None:
    setup = await begin(jwk_of(RSA, kid="k1"))
    setup.issuer.answer = lambda _: httpx.Response(503)
    await setup.clock.wake()
    assert setup.clock.sleeping == [300, 30]
    for after in (1, DAY / 2, DAY):
        setup.clock.at = 1000 + after
        assert await setup.slug(sub=f"user-{after}") == "in"
        assert await setup.slug(RSA_NEW) == "unauthenticated"
        assert await setup.slug(RSA_NEW, kid="k2") == "unauthenticated"
    setup.clock.at = 1000 + DAY + 1
    assert await setup.slug(sub="other") == "at-capacity"
    setup.issuer.answer = None
    await setup.clock.wake()
    assert await setup.slug(sub="other") == "in"


def big(_: httpx.Request) -> httpx.Response:
    async def body() -> AsyncIterator[bytes]:
        yield b'{"keys": [' + b" " * 999_000
        yield b" " * 1_000
        raise AssertionError("read on past the bound")

    return httpx.Response(200, content=body())


ANSWERS: list[tuple[Callable[[httpx.Request], httpx.Response], str]] = [
    (lambda _: httpx.Response(302, headers={"location": "https://evil.example/"}), "status 302"),
    (lambda _: httpx.Response(301, headers={"location": URL}), "status 301"),
    (lambda _: httpx.Response(404), "status 404"),
    (lambda _: httpx.Response(500), "status 500"),
    (lambda _: httpx.Response(204), "status 204"),
    (big, "larger than 1000000 bytes"),
    (lambda _: httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b"")), "compressed"),
    (lambda _: httpx.Response(200, content=b"<html>"), "JSONDecodeError"),
    (lambda _: httpx.Response(200, content=b"\xff\xff"), "UnicodeDecodeError"),
    (lambda _: httpx.Response(200, content=b"[" * 100_000), "RecursionError"),
    (lambda _: httpx.Response(200, json=[]), "not a key set"),
    (lambda _: httpx.Response(200, json={}), "not a key set"),
    (lambda _: httpx.Response(200, json={"keys": {}}), "not a key set"),
    (lambda _: httpx.Response(200, json={"keys": []}), "no usable key"),
    (lambda _: httpx.Response(200, json={"keys": [OCT]}), "no usable key"),
    (failing(httpx.ReadTimeout("hush")), "ReadTimeout"),
    (failing(RuntimeError("hush")), "RuntimeError"),
]


@pytest.mark.parametrize(("answer", "reason"), ANSWERS)
async def test_answers_that_are_no_key_set(
    begin: MakeSetup, answer: Callable[[httpx.Request], httpx.Response], reason: str
) -> None:
    setup = await begin(jwk_of(RSA, kid="k1"))
    setup.issuer.answer = answer
    with capture_logs() as logs:
        await setup.clock.wake()
        await settle()
    assert setup.issuer.asked == 2
    assert [(entry["event"], entry["reason"].startswith(reason)) for entry in logs] == [("jwks_fetch_failed", True)]
    assert "hush" not in json.dumps(logs)
    assert await setup.slug() == "in"


async def test_a_fetch_is_bounded_in_time(begin: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FETCH_SECONDS", 0.01)
    issuer = Issuer(jwk_of(RSA, kid="k1"))
    issuer.gate.clear()
    with capture_logs() as logs:
        setup = await begin(issuer=issuer)
        assert await setup.slug() == "at-capacity"  # it waited for the fetch, which gave up
    assert [entry["reason"] for entry in logs] == ["TimeoutError"]


async def test_close_ends_a_fetch_under_way(begin: MakeSetup) -> None:
    issuer = Issuer(jwk_of(RSA, kid="k1"))
    issuer.gate.clear()
    setup = await begin(issuer=issuer)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await setup.keys.aclose()
    assert all(task.done() for task in others if task.get_coro().__qualname__.startswith("KeySet"))  # type: ignore[union-attr]
    assert issuer.asked == 1
