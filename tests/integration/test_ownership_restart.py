"""A restarted broker remembers nothing and knows whose a call is all the same, also after a change of BROKER_SECRET."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx
import jwt
import pytest

from app.oneinbox.transport import open_transport
from app.sandbox.server import RunningEmulator, running_emulator
from tests.support.brokers import (
    LONG_CALLS,
    SECRET,
    from_address,
    outcomes,
    post_many,
    running_broker_process,
    settings_of,
)
from tests.support.harness import running_broker
from tests.support.shapes import assert_problem, remaining
from tests.support.valkey import running_valkey

NEW_SECRET = "the secret that comes after it, and no shorter"
JWT_SECRET = "a secret shared with the issuer, long enough"
MODES: dict[str, dict[str, str]] = {
    "anonymous": {"BROKER_TRUSTED_PROXIES": "127.0.0.0/8"},
    "jwt": {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": JWT_SECRET},
    "header": {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "127.0.0.0/8"},
}


def who(mode: str, name: str) -> dict[str, str]:
    """Headers that identify a user."""
    if mode == "anonymous":
        return from_address({"ann": "192.0.2.1", "ben": "192.0.2.2"}[name])
    if mode == "header":
        return {"X-Forwarded-User": name, "Sec-Fetch-Site": "same-origin"}
    return {"Authorization": f"Bearer {jwt.encode({'sub': name, 'exp': 4_000_000_000}, JWT_SECRET, 'HS256')}"}


@asynccontextmanager
async def broker_in_process(oneinbox: RunningEmulator, settings: Mapping[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    transport = open_transport(oneinbox.url, pool_size=20)
    async with running_broker(settings_of(oneinbox.url, settings), transport, peer="127.0.0.1") as client:
        yield client


@pytest.mark.parametrize("mode", MODES)
async def test_a_new_broker_knows_the_owner_of_a_call(mode: str) -> None:
    ann, ben = who(mode, "ann"), who(mode, "ben")
    settings = MODES[mode]
    rotated = {**settings, "BROKER_SECRET": f"{NEW_SECRET}\n{SECRET}"}
    forgotten = {**settings, "BROKER_SECRET": NEW_SECRET}
    async with running_emulator(LONG_CALLS) as oneinbox:
        async with broker_in_process(oneinbox, settings) as broker:
            path = (await broker.post("/session", headers=ann)).headers["location"]
            first = await broker.get(path, headers=ann)
            assert first.status_code == 200

        for later in (settings, rotated):
            async with broker_in_process(oneinbox, later) as broker:
                again = await broker.get(path, headers=ann)
                assert again.status_code == 200
                # Without a shared store a new process does not know when it ends the call.
                assert again.json() | {"ends_at": None} == first.json() | {"ends_at": None}
                if mode == "anonymous":
                    assert (await broker.get(path, headers=ben)).status_code == 200, "the key says it, not the address"
                    assert_problem(await broker.get(path.partition(".")[0], headers=ann), "not-found")
                    assert_problem(await broker.get(f"{path[:-1]}{'A' if path[-1] != 'A' else 'B'}"), "not-found")
                else:
                    assert_problem(await broker.get(path, headers=ben), "not-found")
                    assert (await broker.get(path, headers=ann)).status_code == 200, "after ben, too"

        # Without the old secret, calls made under it belong to no user; calls made under the new one still do.
        async with broker_in_process(oneinbox, rotated) as broker:
            newer = (await broker.post("/session", headers=ann)).headers["location"]
        async with broker_in_process(oneinbox, forgotten) as broker:
            assert (await broker.get(newer, headers=ann)).status_code == 200
            assert_problem(await broker.get(path, headers=ann), "not-found")


@pytest.mark.process
async def test_a_killed_process_and_a_new_secret_reset_nothing() -> None:
    ann, ben = who("anonymous", "ann"), who("anonymous", "ben")
    with running_valkey() as valkey:
        settings = {**MODES["anonymous"], "BROKER_SESSION_LIMITS": "3/hour", "BROKER_STORE_URL": valkey.url}
        async with running_emulator(LONG_CALLS) as oneinbox:
            async with running_broker_process(oneinbox.url, **settings) as broker:
                (response,) = await post_many([broker], 1, ann)
                path = response.headers["location"]
                assert remaining(response, "user-hour") == 2
                broker.process.kill()

            rotated = {**settings, "BROKER_SECRET": f"{NEW_SECRET}\n{SECRET}"}
            async with running_broker_process(oneinbox.url, **rotated) as broker:
                assert (await broker.client.get(path)).status_code == 200
                assert outcomes(await post_many([broker], 6, ann)) == {"201": 2, "rate-limited": 4}
                assert outcomes(await post_many([broker], 6, ben)) == {"201": 3, "rate-limited": 3}


@pytest.mark.parametrize("other", ["header", "another-issuer"])
async def test_the_same_name_elsewhere_is_another_user(other: str) -> None:
    issued = {**MODES["jwt"], "BROKER_JWT_ISSUER": "https://one.example"}
    claims = {"sub": "ann", "exp": 4_000_000_000, "iss": "https://one.example"}
    async with running_emulator(LONG_CALLS) as oneinbox:
        async with broker_in_process(oneinbox, issued) as broker:
            token = jwt.encode(claims, JWT_SECRET, "HS256")
            headers = {"Authorization": f"Bearer {token}"}
            path = (await broker.post("/session", headers=headers)).headers["location"]
            assert (await broker.get(path, headers=headers)).status_code == 200
        if other == "header":
            settings, headers = MODES["header"], who("header", "ann")
        else:
            settings = {**issued, "BROKER_JWT_ISSUER": "https://two.example"}
            token = jwt.encode({**claims, "iss": "https://two.example"}, JWT_SECRET, "HS256")
            headers = {"Authorization": f"Bearer {token}"}
        async with broker_in_process(oneinbox, settings) as broker:
            assert_problem(await broker.get(path, headers=headers), "not-found")
