"""What the parts of a broker are given when it is built."""

import asyncio
from typing import Any

import pytest

from app.broker import build
from app.broker.build import open_broker
from app.identity import User
from app.identity.jwks import KeySet
from app.identity.keys import VerifyingKey
from app.limits.call_attempt import ALL_CALLS, CallAttempt
from app.oneinbox import WebCall
from app.sessions.disconnect import ClientConnection
from app.sessions.handover import StartedCall
from app.sessions.schemas import SessionRequest
from app.sessions.service import SessionInput
from tests.support.harness import Upstream, settings


async def nothing_more() -> dict[str, Any]:
    """A client that stays connected."""
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(("max_call_seconds", "lease"), [("600", 900), ("0", 86400)])
async def test_the_slot_of_an_unobserved_call_is_freed_in_the_end(
    upstream: Upstream, max_call_seconds: str, lease: float
) -> None:
    """Five minutes after the longest call; a day if calls may run without limit."""
    async with open_broker(settings({"BROKER_MAX_CALL_SECONDS": max_call_seconds}), upstream) as broker:
        asked = SessionInput(SessionRequest(), {}, [], None, ClientConnection(nothing_more), {}, broker.plans.default)
        await broker.sessions.start(User(mode="jwt", id="ann"), asked)
        (left,) = (await broker.store.members(ALL_CALLS)).values()
    assert left == pytest.approx(lease, abs=60)


@pytest.mark.parametrize("works", [True, False])
async def test_a_start_waits_for_the_issuers_keys_but_not_for_long(
    upstream: Upstream, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "START_SECONDS", 60 if works else 0.01)
    answered = asyncio.Event()

    async def fetch(_: KeySet) -> list[VerifyingKey]:
        if not works:
            await asyncio.Event().wait()
        for _turn in range(100):  # an answer takes its time
            await asyncio.sleep(0)
        answered.set()
        return []

    monkeypatch.setattr(KeySet, "fetch", fetch)
    tokens = {
        "BROKER_AUTH": "jwt",
        "BROKER_JWT_JWKS_URL": "https://issuer.example/keys",
        "BROKER_JWT_ISSUER": "https://issuer.example",
        "BROKER_JWT_AUDIENCE": "voice",
    }
    async with open_broker(settings(tokens), upstream):
        assert answered.is_set() == works


async def test_the_parts_say_nothing_of_what_they_hold(upstream: Upstream) -> None:
    """An event loop logs the repr of an object whose callback failed; these know users, claims and transcripts."""
    async with open_broker(settings(), upstream) as broker:
        asked = SessionInput(SessionRequest(), {}, [], None, ClientConnection(nothing_more), {}, broker.plans.default)
        await broker.sessions.start(User(mode="jwt", id="ann", claims={"email": "ann@example.com"}), asked)
        parts = [broker, *(getattr(broker, name) for name in type(broker).__slots__)]
    for part in (part for part in parts if part is not None):
        assert "object at 0x" in repr(part), type(part)


def test_no_repr_holds_a_participant_token() -> None:
    call = WebCall("call_1", "wss://voice.example.com", "the-token")

    assert "the-token" not in repr(StartedCall(CallAttempt("r", 0, "main", "ann", "owner"), call))
