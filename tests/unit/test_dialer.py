"""Names of OneInbox that move to another address, or whose addresses take turns."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from app.oneinbox.dialer import ADDRESS_SECONDS, MOST_PATIENCE, Dialer
from app.oneinbox.http1 import Connection
from tests.support.simulated_time import in_simulated_time


def dialer(monkeypatch: pytest.MonkeyPatch, addresses: Callable[[], list[str]]) -> Dialer:
    """A dialer whose resolver answers as `addresses` does."""

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        assert (host, port) == ("oneinbox.invalid", 80)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in addresses()]

    made = Dialer(httpx.URL("http://oneinbox.invalid"))
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    return made


def connected_to(address: str) -> Connection:
    connection = Connection()
    connection.address = address
    return connection


@in_simulated_time
async def test_a_name_that_moves_is_followed() -> None:
    now = ["192.0.2.1"]
    with pytest.MonkeyPatch.context() as patch:
        names = dialer(patch, lambda: now)
        await names.refresh()
        connection = connected_to("192.0.2.1")
        assert not names.has_moved(connection)

        now = ["192.0.2.2"]
        await asyncio.sleep(ADDRESS_SECONDS)
        await names.refresh()

        assert names.has_moved(connection)
        assert not names.has_moved(connected_to("192.0.2.2"))


@in_simulated_time
async def test_an_address_that_was_never_looked_up_has_not_moved() -> None:
    with pytest.MonkeyPatch.context() as patch:
        names = dialer(patch, lambda: ["192.0.2.1"])
        await names.refresh()

        assert not names.has_moved(connected_to("198.51.100.7"))
        assert not names.has_moved(connected_to(""))


@in_simulated_time
async def test_a_name_without_an_address_for_a_while_changes_nothing() -> None:
    fails = False

    def addresses() -> list[str]:
        if fails:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return ["192.0.2.1"]

    with pytest.MonkeyPatch.context() as patch:
        names = dialer(patch, addresses)
        await names.refresh()
        fails = True
        await asyncio.sleep(60)
        await names.refresh()

        assert not names.has_moved(connected_to("192.0.2.1"))
        with pytest.raises(httpx.ConnectError):
            await names.connect(3)


@in_simulated_time
async def test_addresses_that_take_turns_end_no_connections_for_long() -> None:
    turn = 0

    def addresses() -> list[str]:
        return [f"192.0.2.{turn % 3}"]

    with pytest.MonkeyPatch.context() as patch:
        names = dialer(patch, addresses)
        moved = []
        for turn in range(60):  # noqa: B007 - `addresses` reads it
            await names.refresh()
            moved.append(names.has_moved(connected_to("192.0.2.1")))
            await asyncio.sleep(ADDRESS_SECONDS)

        assert any(moved[:6])
        assert not any(moved[6:])


@in_simulated_time
async def test_a_move_is_followed_even_after_addresses_have_taken_turns() -> None:
    turn = 0
    gone = False

    def addresses() -> list[str]:
        return ["192.0.2.9"] if gone else [f"192.0.2.{turn % 3}"]

    with pytest.MonkeyPatch.context() as patch:
        names = dialer(patch, addresses)
        for turn in range(60):  # noqa: B007 - `addresses` reads it
            await names.refresh()
            await asyncio.sleep(ADDRESS_SECONDS)
        gone = True
        await asyncio.sleep(MOST_PATIENCE)
        await names.refresh()

        assert names.has_moved(connected_to("192.0.2.1"))


@in_simulated_time
async def test_concurrent_callers_share_one_look_up() -> None:
    asked = 0

    def addresses() -> list[str]:
        nonlocal asked
        asked += 1
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    with pytest.MonkeyPatch.context() as patch:
        names = dialer(patch, addresses)
        await asyncio.gather(*(names.connect(3) for _ in range(5)), return_exceptions=True)

        assert asked == 1
