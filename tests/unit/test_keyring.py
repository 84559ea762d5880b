"""Keys: one secret signs, all verify, no purpose knows another's."""

import re

from hypothesis import given
from hypothesis import strategies as st

from app.identity.keyring import Keyring

OLD, NEW, OTHER = "o" * 32, "n" * 32, "x" * 32
SECRETS = st.text(st.characters(codec="utf-8"), min_size=32, max_size=64)


@given(SECRETS, st.binary())
def test_a_signature_is_url_safe_and_verifies(secret: str, message: bytes) -> None:
    keyring = Keyring([secret])

    mac = keyring.sign("call-key", message)

    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", mac)
    assert keyring.verify("call-key", message, mac)
    assert mac == Keyring([secret]).sign("call-key", message)


@given(st.binary(), st.binary(min_size=1))
def test_a_signature_is_good_for_one_message(message: bytes, more: bytes) -> None:
    keyring = Keyring([NEW])

    assert not keyring.verify("call-key", message + more, keyring.sign("call-key", message))


@given(st.text())
def test_anything_that_is_not_a_signature_is_refused(mac: str) -> None:
    keyring = Keyring([NEW, OLD])

    assert not keyring.verify("call-key", b"call_1", mac)


@given(st.integers(min_value=0, max_value=42))
def test_every_letter_counts(position: int) -> None:
    keyring = Keyring([NEW])
    mac = keyring.sign("call-key", b"call_1")
    other = "A" if mac[position] != "A" else "B"

    assert not keyring.verify("call-key", b"call_1", mac[:position] + other + mac[position + 1 :])


def test_purposes_have_separate_keys() -> None:
    keyring = Keyring([NEW])

    assert keyring.sign("call-key", b"m") != keyring.sign("pseudonym", b"m")
    assert not keyring.verify("pseudonym", b"m", keyring.sign("call-key", b"m"))


def test_the_first_secret_signs_and_all_verify() -> None:
    before, during, after = Keyring([OLD]), Keyring([NEW, OLD]), Keyring([NEW])

    assert during.sign("call-key", b"m") == after.sign("call-key", b"m")
    assert during.verify("call-key", b"m", before.sign("call-key", b"m"))
    assert during.verify("call-key", b"m", after.sign("call-key", b"m"))
    assert not after.verify("call-key", b"m", before.sign("call-key", b"m"))
    assert not Keyring([OTHER]).verify("call-key", b"m", during.sign("call-key", b"m"))


def test_what_is_encrypted_survives_a_rotation_and_nothing_else() -> None:
    before, during, after = Keyring([OLD]), Keyring([NEW, OLD]), Keyring([NEW])
    box = before.encrypt(b"token")

    assert b"token" not in box
    assert box != before.encrypt(b"token")
    assert during.decrypt(box) == b"token"
    assert after.decrypt(box) is None
    assert before.decrypt(box[:-1] + b"A") is None
    assert before.decrypt(b"") is None


def test_a_keyring_does_not_show_its_secrets() -> None:
    keyring = Keyring([NEW])

    assert NEW not in repr(keyring)
    assert NEW not in repr(vars(keyring))


@given(SECRETS, st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_a_sealed_text_opens_in_its_context_only(secret: str, text: str, context: str) -> None:
    keyring = Keyring([secret])

    sealed = keyring.seal(text, context)

    assert keyring.unseal(sealed, context) == text
    assert keyring.unseal(sealed, context + "x") is None
    assert Keyring([OTHER + secret]).unseal(sealed, context) is None
    assert Keyring([OTHER, secret]).unseal(sealed, context) == text


@given(st.text())
def test_anything_that_is_not_sealed_opens_nothing(sealed: str) -> None:
    assert Keyring([NEW]).unseal(sealed, "") is None
