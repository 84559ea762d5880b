"""The keys that logins are verified with, each bound to the algorithms it may be used with.

The key decides the algorithm, never the token (RFC 8725, sections 2.1 and 3.1): a token signed with HS256 and the text
of the public key as its secret, or with `none`, finds no key.
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
from jwt import PyJWTError
from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | Ed448PublicKey

RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
# RFC 7518, section 3.4, and RFC 8812: one algorithm for each curve.
CURVE_ALGORITHMS = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512", "secp256k1": "ES256K"}
# RFC 7518, section 3.2: the key must be as long as the hash, at least.
SECRET_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}
PUBLIC_KEY_ALGORITHMS = frozenset((*RSA_ALGORITHMS, *CURVE_ALGORITHMS.values(), "EdDSA"))
MIN_RSA_BITS = 2048

# What a public key consists of, RFC 7518, section 6, and RFC 8037: a private part published by mistake stays unread.
JWK_PARTS = {"RSA": ("kty", "n", "e"), "EC": ("kty", "crv", "x", "y"), "OKP": ("kty", "crv", "x")}
JWK_LOADERS = {"RSA": RSAAlgorithm.from_jwk, "EC": ECAlgorithm.from_jwk, "OKP": OKPAlgorithm.from_jwk}


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """One key, the algorithms it may verify, and its name in a key set."""

    key: PublicKey | bytes = field(repr=False)
    algorithms: Sequence[str]
    kid: str | None = None


class Keys(Protocol):
    """Where keys come from. `version` changes whenever the keys do."""

    version: int

    async def find(self, algorithm: str, kid: str | None) -> VerifyingKey | None:
        """The key for a token that names this algorithm and key id; None: there is none."""
        ...

    async def start(self) -> None:
        """Begin to fetch them, if they have to be."""
        ...

    async def aclose(self) -> None:
        """Stop that."""
        ...


@dataclass
class FixedKey:
    """One configured key; a token's key id does not matter."""

    key: VerifyingKey
    version: int = field(default=0, init=False)

    def use(self, key: VerifyingKey) -> None:
        """Another key from now on; logins remembered under the old one are forgotten."""
        self.key = key
        self.version += 1

    async def find(self, algorithm: str, kid: str | None) -> VerifyingKey | None:
        """The key, when it is one for this algorithm."""
        return self.key if algorithm in self.key.algorithms else None

    async def start(self) -> None:
        """Nothing to fetch."""

    async def aclose(self) -> None:
        """Nothing to end."""


def secret_key(secret: str, algorithms: Collection[str] = ()) -> VerifyingKey:
    """A shared secret, for HS256, HS384 and HS512, as far as it is long enough for them.

    `algorithms`: only these; empty: all that fit. Raises ValueError, which never repeats the secret.
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
    """A public key in PEM, for the algorithms of its kind. `algorithms`, ValueError: as for `secret_key`."""
    if "PRIVATE KEY" in pem:
        raise ValueError("is a private key, which belongs to the issuer alone")
    try:
        # A line of an .env file or a manifest often holds `\n` for each line break; PEM itself has no backslash.
        key = load_pem_public_key(pem.replace("\\n", "\n").encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("is not a public key in PEM") from None
    checked = _checked(key)
    return VerifyingKey(checked, _all_fitting(algorithms, _fitting(checked)))


def jwk_key(jwk: Any, algorithms: Collection[str] = ()) -> VerifyingKey:
    """One key of a key set (RFC 7517, section 4). Raises ValueError when logins cannot be verified with it.

    `algorithms`: at most these, which may be of several kinds, as a set's keys may be; empty: all that fit. Symmetric
    keys are refused: what is published is no secret.
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
    chosen = [name for name in _fitting(key) if jwk.get("alg", name) == name and name in (algorithms or (name,))]
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
    return ["EdDSA"]  # RFC 8037: both curves


def _all_fitting(wanted: Collection[str], fitting: Sequence[str]) -> Sequence[str]:
    """The wanted algorithms, which must all be the key's; unless any is wanted, all of the key's."""
    unfit = sorted(set(wanted) - set(fitting))
    if unfit:
        raise ValueError(f"does not go with {', '.join(unfit)}, only with {', '.join(fitting)}")
    return tuple(wanted) or tuple(fitting)
