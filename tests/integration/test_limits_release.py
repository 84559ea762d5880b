"""What a session that came to nothing costs its user: nothing where no call can exist, and all of it otherwise."""

from typing import Any

import pytest

from app.oneinbox.transport import open_transport
from app.sandbox.faults import BrokenJson, Drop, Fault, Fields, Hang, NotUtf8, Redirect, Status, Truncated
from app.sandbox.server import running_emulator
from tests.support.brokers import LONG_CALLS, asked, eventually, settings_of
from tests.support.harness import running_broker
from tests.support.shapes import STATUS, assert_problem, remaining, states

START: dict[str, Any] = {"operation": "start", "times": 1}
UNREACHABLE = "http://127.0.0.1:1"

GIVEN_BACK: dict[str, tuple[Fault, str]] = {
    "400": (Status(**START, status=400), "upstream-error"),
    "402": (Status(**START, status=402), "upstream-misconfigured"),
    "403": (Status(**START, status=403), "upstream-misconfigured"),
    "404": (Status(**START, status=404), "upstream-misconfigured"),
    "409": (Status(**START, status=409), "upstream-error"),
    "422": (Status(**START, status=422), "upstream-misconfigured"),
    "451": (Status(**START, status=451), "upstream-error"),
    "429": (Status(**START, status=429, retry_after=1), "upstream-busy"),
}
KEPT: dict[str, tuple[Fault, str]] = {
    "408": (Status(**START, status=408), "upstream-error"),
    "500": (Status(**START, status=500), "upstream-error"),
    "503": (Status(**START, status=503, retry_after=1), "upstream-error"),
    "500-after-the-start": (Status(**START, status=500, takes_effect=True), "upstream-error"),
    "redirect": (Redirect(**START, location="http://127.0.0.1:1/"), "upstream-error"),
    "dropped": (Drop(**START), "upstream-error"),
    "dropped-after-the-start": (Drop(**START, takes_effect=True), "upstream-error"),
    "cut-in-the-middle": (Truncated(**START), "upstream-error"),
    "no-answer": (Hang(**START), "upstream-timeout"),
    "broken-json": (BrokenJson(**START), "upstream-invalid"),
    "not-utf-8": (NotUtf8(**START), "upstream-invalid"),
    "no-id": (Fields(**START, remove=["id"]), "upstream-invalid"),
    "no-token": (Fields(**START, remove=["participant_token"]), "upstream-invalid"),
    "foreign-url": (Fields(**START, set={"server_url": "https://evil.example"}), "upstream-invalid"),
}
CASES = [
    *(pytest.param(fault, slug, 0, id=name) for name, (fault, slug) in GIVEN_BACK.items()),
    *(pytest.param(fault, slug, 1, id=name) for name, (fault, slug) in KEPT.items()),
]


def limits(live: int) -> dict[str, str]:
    return {
        "BROKER_SESSION_LIMITS": "3/hour;10/day",
        "BROKER_MAX_LIVE_CALLS": str(live),
        "BROKER_TRUSTED_PROXIES": "203.0.113.0/24",
        "ONEINBOX_TIMEOUT": "0.5",
    }


@pytest.mark.parametrize(("fault", "slug", "cost"), CASES)
async def test_what_a_failure_costs(fault: Fault, slug: str, cost: int) -> None:
    # One live call where everything is given back: the slot must be free again at once.
    async with running_emulator(LONG_CALLS) as oneinbox:
        transport = open_transport(oneinbox.url, pool_size=10)
        async with running_broker(settings_of(oneinbox.url, limits(live=1 + 9 * cost)), transport) as broker:
            oneinbox.emulator.faults.add(fault)
            assert_problem(await broker.post("/session"), slug)
            if STATUS[slug] == 503:  # cooling down: what is refused unsent costs nothing either

                async def is_sent() -> bool:
                    await broker.post("/session", headers={"X-Forwarded-For": "192.0.2.9"})
                    return len(asked(oneinbox.emulator, "start")) > 1

                assert_problem(await broker.post("/session"), "upstream-busy")
                await eventually(is_sent, within=5)

            after = await broker.post("/session")

            assert after.status_code == 201, after.text
            assert remaining(after, "user-hour") == 3 - 1 - cost
            assert states(after)["user-day"][0] == 10 - 1 - cost


async def test_what_was_never_sent_costs_nothing() -> None:
    transport = open_transport(UNREACHABLE, pool_size=10)
    async with running_broker(settings_of(UNREACHABLE, limits(live=1)), transport) as broker:
        left = []
        for _ in range(5):
            response = await broker.post("/session")
            assert_problem(response, "upstream-unreachable")
            left.append(remaining(response, "user-hour"))
        assert left == [2] * 5, "each was counted while it ran, and given back"


@pytest.mark.process
async def test_a_call_whose_answer_was_lost_keeps_its_slot_until_it_is_stopped() -> None:
    async with running_emulator(LONG_CALLS) as oneinbox:
        transport = open_transport(oneinbox.url, pool_size=10)
        async with running_broker(settings_of(oneinbox.url, limits(live=1)), transport) as broker:
            oneinbox.emulator.faults.add(Drop(**START, takes_effect=True), Hang(operation="list", times=1))
            assert_problem(await broker.post("/session"), "upstream-error")
            (call,) = oneinbox.emulator.calls
            assert_problem(await broker.post("/session"), "too-many-live-calls")

            async def is_stopped() -> bool:
                return not oneinbox.emulator.calls.state(call).running

            async def has_room() -> bool:
                return (await broker.post("/session")).status_code == 201

            await eventually(is_stopped, within=10)
            await eventually(has_room, within=2)
