"""Whose a call is, and which names it has."""

import pytest

from app.calls.ownership import Ownership
from app.identity import User
from app.identity.keyring import Keyring

KEYRING = Keyring(["s" * 32])
OWNERSHIP = Ownership(KEYRING)
ANONYMOUS = User(mode="anonymous", id="203.0.113.7")
ADA = User(mode="jwt", id="ada", issuer="https://id.example")
OTHERS = {
    "another-user": User(mode="jwt", id="bob", issuer="https://id.example"),
    "another-issuer": User(mode="jwt", id="ada", issuer="https://evil.example"),
    "another-mode": User(mode="header", id="ada"),
    "shifted": User(mode="jwt", id="https://id.example", issuer="ada"),
}


def test_a_signed_in_user_names_a_call_by_its_id() -> None:
    assert OWNERSHIP.public_id("call_1", ADA) == "call_1"
    assert OWNERSHIP.call_id("call_1", ADA) == "call_1"


def test_an_address_needs_the_key() -> None:
    public_id = OWNERSHIP.public_id("call_1", ANONYMOUS)

    assert public_id.startswith("call_1.")
    assert OWNERSHIP.call_id(public_id, ANONYMOUS) == "call_1"
    assert OWNERSHIP.call_id("call_1", ANONYMOUS) is None


ODD_IDS = [
    "",
    ".",
    "..",
    "../agents",
    "a/b",
    "call 1",
    "call_1\n",
    "cäll",
    "a" * 129,
    "call_1?x",
    "call_1.key",
    "a%2fb",
    "cursor",  # these two are routes of OneInbox
    "web",
]


@pytest.mark.parametrize("user", [ADA, ANONYMOUS], ids=["jwt", "anonymous"])
@pytest.mark.parametrize("name", ODD_IDS)
def test_an_odd_id_is_none(name: str, user: User) -> None:
    assert OWNERSHIP.call_id(name, user) is None


@pytest.mark.parametrize("stranger", OTHERS.values(), ids=OTHERS.keys())
def test_a_call_belongs_to_the_user_in_its_record(stranger: User) -> None:
    pseudonym = KEYRING.pseudonym(ADA)

    assert OWNERSHIP.owns(ADA, pseudonym)
    assert not OWNERSHIP.owns(stranger, pseudonym)


@pytest.mark.parametrize("pseudonym", ["", "ada", KEYRING.pseudonym(ADA)[:-1], KEYRING.pseudonym(ADA).upper()])
def test_a_call_without_an_owner_belongs_to_no_user(pseudonym: str) -> None:
    assert not OWNERSHIP.owns(ADA, pseudonym)


def test_a_pseudonym_reveals_nothing_and_outlives_a_change_of_secret() -> None:
    before = Keyring(["o" * 32]).pseudonym(ADA)

    assert "ada" not in before
    assert Ownership(Keyring(["n" * 32, "o" * 32])).owns(ADA, before)
    assert not Ownership(Keyring(["n" * 32])).owns(ADA, before)
