"""Keys that verify logins, each bound to the algorithms it may be used with.

The key decides the algorithm, never the token (RFC 8725, sections 2.1 and 3.1): no key fits a token with `none`, or one
signed by HS256 with the public key's text as the secret.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt import PyJWTError, register_algorithm
from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm, get_default_algorithms

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | Ed448PublicKey

RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
# RFC 7518, section 3.4, and RFC 8812: one algorithm for each curve.
CURVE_ALGORITHMS = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512", "secp256k1": "ES256K"}
# RFC 9864, section 2.2: names that say the curve too. The old one of RFC 8037 stands for both.
ED25519_ALGORITHMS, ED448_ALGORITHMS = ("EdDSA", "Ed25519"), ("EdDSA", "Ed448")
# RFC 7518, section 3.2: the key must be at least as long as the hash.
SECRET_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}
PUBLIC_KEY_ALGORITHMS = frozenset((*RSA_ALGORITHMS, *CURVE_ALGORITHMS.values(), *ED25519_ALGORITHMS, *ED448_ALGORITHMS))
MIN_RSA_BITS = 2048

for name in {*ED25519_ALGORITHMS, *ED448_ALGORITHMS} - get_default_algorithms().keys():
    register_algorithm(name, OKPAlgorithm())

# The parts of a public key (RFC 7518, section 6, and RFC 8037); a private part published by mistake is ignored.
JWK_PARTS = {"RSA": ("kty", "n", "e"), "EC": ("kty", "crv", "x", "y"), "OKP": ("kty", "crv", "x")}
JWK_LOADERS = {"RSA": RSAAlgorithm.from_jwk, "EC": ECAlgorithm.from_jwk, "OKP": OKPAlgorithm.from_jwk}


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """One key, the algorithms it may verify, and its name in a key set."""

    key: PublicKey | bytes = field(repr=False)
    algorithms: Sequence[str]
    kid: str | None = None


class Keys(Protocol):
    """A source of keys. `version` changes whenever the keys do."""

    version: int

    async def find(self, algorithm: str, kid: str | None) -> VerifyingKey | None:
        """Return the key for a token with this algorithm and key id, if any."""

    async def start(self) -> None:
        """Begin to keep the keys up to date."""

    async def ready(self) -> None:
        """Wait for the first attempt to get them."""

    async def aclose(self) -> None:
        """End that."""

    def use(self, key: VerifyingKey) -> None:
        """Use another key from now on, if the keys are configured ones."""


@dataclass(repr=False, eq=False)
class FixedKey:
    """One configured key, whatever key id a token names."""

    key: VerifyingKey
    version: int = field(default=0, init=False)

    def use(self, key: VerifyingKey) -> None:
        """Use another key from now on; cached logins are dropped."""
        self.key = key
        self.version += 1

    async def find(self, algorithm: str, kid: str | None) -> VerifyingKey | None:
        """Return the key if it fits the algorithm."""
        return self.key if algorithm in self.key.algorithms else None

    async def start(self) -> None:
        """There is nothing to fetch."""

    async def ready(self) -> None:
        """The key is there."""

    async def aclose(self) -> None:
        """There is nothing to end."""


def secret_key(secret: str, algorithms: Collection[str] = ()) -> VerifyingKey:
    """Return a shared secret for HS256, HS384 and HS512, if long enough for each.

    `algorithms`: only these; empty: all that fit. Raises ValueError, which never quotes the secret.
    """
    key = secret.encode()
    if len(key) < SECRET_BYTES["HS256"]:
        raise ValueError("is shorter than 32 characters")
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(key)
    except PyJWTError:
        raise ValueError("is a public key, certificate or JWK, not a secret") from None
    fitting = [name for name, size in SECRET_BYTES.items() if len(key) >= size]
    return VerifyingKey(key, _all_fitting(algorithms, fitting))


def public_key(pem: str, algorithms: Collection[str] = ()) -> VerifyingKey:
    """Return a public key in PEM for the algorithms of its kind. `algorithms`, ValueError: as for `secret_key`."""
    if "PRIVATE KEY" in pem:
        raise ValueError("is a private key, which belongs to the issuer alone")
    try:
        # In an .env file or a manifest line breaks are often written `\n`; PEM itself has no backslash.
        key = load_pem_public_key(pem.replace("\\n", "\n").encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("is not a public key in PEM") from None
    checked = _checked(key)
    return VerifyingKey(checked, _all_fitting(algorithms, _fitting(checked)))


def jwk_key(jwk: Any, algorithms: Collection[str] = ()) -> VerifyingKey:
    """Return one key of a key set (RFC 7517, section 4). Raises ValueError if it cannot verify logins.

    `algorithms`: at most these, of any kind; empty: all that fit. Symmetric keys are refused: a published key is not a
    secret.
    """
    if not isinstance(jwk, Mapping) or not isinstance(jwk.get("kty"), str) or jwk["kty"] not in JWK_PARTS:
        raise ValueError("is of another kind")
    operations = jwk.get("key_ops", ["verify"])
    if jwk.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise ValueError("is for something else")
    kind = jwk["kty"]
    parts = {name: jwk.get(name) for name in JWK_PARTS[kind]}
    if not all(isinstance(part, str) for part in parts.values()):
        raise ValueError("is malformed")
    try:
        loaded = JWK_LOADERS[kind](parts)
    except (PyJWTError, UnsupportedAlgorithm) as error:
        raise ValueError("is malformed") from error
    key = _checked(loaded)
    chosen: Sequence[str] = _fitting(key)
    if "alg" in jwk:
        chosen = _named(chosen, (jwk["alg"],))
    if algorithms:
        chosen = _named(chosen, algorithms)
    if not chosen:
        raise ValueError("fits none of the algorithms")
    kid = jwk.get("kid")
    return VerifyingKey(key, chosen, kid if isinstance(kid, str) else None)


def _checked(key: object) -> PublicKey:
    if not isinstance(key, PublicKey):
        raise ValueError("is of a kind that signs no logins")
    if isinstance(key, RSAPublicKey) and key.key_size < MIN_RSA_BITS:
        raise ValueError(f"is an RSA key of fewer than {MIN_RSA_BITS} bits")
    return key


def _fitting(key: PublicKey) -> list[str]:
    if isinstance(key, RSAPublicKey):
        return list(RSA_ALGORITHMS)
    if isinstance(key, EllipticCurvePublicKey):
        if key.curve.name not in CURVE_ALGORITHMS:
            raise ValueError("is on a curve that no algorithm uses")
        return [CURVE_ALGORITHMS[key.curve.name]]
    return list(ED25519_ALGORITHMS if isinstance(key, Ed25519PublicKey) else ED448_ALGORITHMS)


def _named(fitting: Sequence[str], names: Collection[str]) -> Sequence[str]:
    """Return those of a key's algorithms that are named. An Edwards curve's two names are one algorithm."""
    named = [name for name in fitting if name in names]
    return fitting if named and "EdDSA" in fitting else named


def all_names(algorithms: Collection[str]) -> frozenset[str]:
    """Return algorithms by every name they have."""
    pairs = [pair for pair in (ED25519_ALGORITHMS, ED448_ALGORITHMS) if set(pair) & set(algorithms)]
    return frozenset(algorithms).union(*pairs)


def _all_fitting(wanted: Collection[str], fitting: Sequence[str]) -> Sequence[str]:
    """Return the wanted algorithms, which must all fit the key, or without any all that fit."""
    unfit = sorted(set(wanted) - set(fitting))
    if unfit:
        raise ValueError(f"does not support {', '.join(unfit)}, only {', '.join(fitting)}")
    return tuple(_named(fitting, wanted) if wanted else fitting)
