"""The kill switch: what is stopped, for whom and how long, and that a lost store releases nothing."""

import asyncio
import os
import pwd
from types import SimpleNamespace
from typing import NoReturn

import pytest
from starlette.requests import Request
from structlog.testing import capture_logs

from app.cli.operator import Operator, operator_name
from app.config.settings import SettingsError
from app.identity import User
from app.identity.addresses import ClientAddresses
from app.identity.anonymous import Anonymous
from app.identity.keyring import Keyring
from app.limits import KillSwitch
from app.limits.kill_switch import BLOCKS, BY_PSEUDONYM, CONTROLS, NO_NOTE, PAUSE, READ_SECONDS, Note, read_controls
from app.problems import Problem
from app.store.failover import FailoverStore
from app.store.memory import MemoryStore
from app.store.valkey import ValkeyStore
from tests.conftest import Logs
from tests.support.harness import API_KEY, settings
from tests.support.simulated_time import in_simulated_time

ANN, BEN = User(mode="jwt", id="ann"), User(mode="jwt", id="ben")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def verdict(kill_switch: KillSwitch, user: User = ANN, pseudonym: str = "") -> tuple[str, str | None]:
    try:
        kill_switch.check(user, pseudonym)
    except Problem as problem:
        return problem.slug, problem.headers.get("Retry-After")
    return "open", None


OPEN = ("open", None)
BLOCKED = ("blocked", None)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(clock)


async def test_a_pause_stops_everybody_until_it_ends(store: MemoryStore, clock: Clock) -> None:
    kill_switch, other = KillSwitch(store, clock), KillSwitch(store, clock)
    await other.pause(90)
    assert verdict(kill_switch) == OPEN, "seen at the next look"
    await kill_switch.refresh()
    assert verdict(kill_switch) == verdict(kill_switch, BEN) == ("at-capacity", "60")
    clock.now += 70.5
    assert verdict(kill_switch) == ("at-capacity", "20")
    clock.now += 20
    assert verdict(kill_switch) == OPEN
    await kill_switch.refresh()
    assert verdict(kill_switch) == OPEN


async def test_resume_ends_a_pause(store: MemoryStore, clock: Clock) -> None:
    kill_switch = KillSwitch(store, clock)
    await kill_switch.pause(3600)
    await kill_switch.refresh()
    assert await kill_switch.resume()
    await kill_switch.refresh()
    assert verdict(kill_switch) == OPEN
    assert not await kill_switch.resume()


async def test_a_second_pause_moves_the_end(store: MemoryStore, clock: Clock) -> None:
    kill_switch = KillSwitch(store, clock)
    await kill_switch.pause(3600)
    await kill_switch.pause(30)
    await kill_switch.refresh()
    assert verdict(kill_switch) == ("at-capacity", "30")
    clock.now += 31
    assert verdict(kill_switch) == OPEN


async def test_a_block_is_for_one_user(store: MemoryStore, clock: Clock) -> None:
    kill_switch = KillSwitch(store, clock)
    await kill_switch.block(ANN.store_name, 60)
    await kill_switch.refresh()
    assert verdict(kill_switch, ANN) == BLOCKED
    assert verdict(kill_switch, BEN) == verdict(kill_switch, User(mode="header", id="ann")) == OPEN
    assert await kill_switch.unblock(ANN.store_name)
    assert not await kill_switch.unblock(ANN.store_name)
    await kill_switch.refresh()
    assert verdict(kill_switch, ANN) == OPEN


async def test_a_block_ends_by_itself(store: MemoryStore, clock: Clock) -> None:
    kill_switch = KillSwitch(store, clock)
    await kill_switch.block(ANN.store_name, 60)
    await kill_switch.block(BEN.store_name, 120)
    await kill_switch.refresh()
    clock.now += 61
    assert (verdict(kill_switch, ANN), verdict(kill_switch, BEN)) == (OPEN, BLOCKED)


async def test_a_paused_user_who_is_blocked_is_told_of_the_pause(store: MemoryStore, clock: Clock) -> None:
    kill_switch = KillSwitch(store, clock)
    await kill_switch.block(ANN.store_name, 60)
    await kill_switch.pause(60)
    await kill_switch.refresh()
    assert verdict(kill_switch, ANN)[0] == "at-capacity"


async def test_without_its_store_a_brake_stays_as_it_is(clock: Clock) -> None:
    async with FailoverStore(ValkeyStore("redis://127.0.0.1:1"), MemoryStore(clock)) as store:
        kill_switch = KillSwitch(store, clock)
        kill_switch._paused_until, kill_switch._blocked_until = clock.now + 100, {ANN.store_name: clock.now + 200}
        for _ in range(3):
            await kill_switch.refresh()
        assert store.state == "down"
        assert verdict(kill_switch, BEN) == ("at-capacity", "60")
        clock.now += 101
        assert (verdict(kill_switch, ANN), verdict(kill_switch, BEN)) == (BLOCKED, OPEN)


# --- who is meant ---


async def test_a_block_by_pseudonym_is_for_the_user_whom_logs_call_so(store: MemoryStore, clock: Clock) -> None:
    kill_switch = KillSwitch(store, clock)
    await kill_switch.block(BY_PSEUDONYM + "pseudonym-of-ann", 60)
    await kill_switch.refresh()
    assert verdict(kill_switch, ANN, "pseudonym-of-ann") == BLOCKED
    assert verdict(kill_switch, BEN, "pseudonym-of-ben") == OPEN
    clock.now += 61
    assert verdict(kill_switch, ANN, "pseudonym-of-ann") == OPEN


JWT = {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": "a secret shared with the issuer, long enough"}
KEYRING = Keyring([API_KEY])


@pytest.mark.parametrize("length", [16, 43])
@pytest.mark.parametrize(("modes", "user"), [({}, User(mode="anonymous", id="192.0.2.1")), (JWT, ANN)])
async def test_a_block_takes_the_pseudonym_that_logs_show_or_the_whole_one(
    store: MemoryStore, modes: dict[str, str], user: User, length: int
) -> None:
    kill_switch = KillSwitch(store)
    operator = Operator(settings(modes), store, kill_switch, limits=None)  # type: ignore[arg-type]  # blocks only
    pseudonym = KEYRING.pseudonym(user)

    await operator.block(pseudonym[:length], 60, "")
    await kill_switch.refresh()

    assert verdict(kill_switch, user, pseudonym[:16]) == BLOCKED
    assert verdict(kill_switch, BEN, KEYRING.pseudonym(BEN)[:16]) == OPEN


async def test_an_id_that_looks_like_a_pseudonym_is_still_an_id(store: MemoryStore) -> None:
    user = User(mode="jwt", id="user-of-16-chars")
    kill_switch = KillSwitch(store)
    operator = Operator(settings(JWT), store, kill_switch, limits=None)  # type: ignore[arg-type]  # blocks only

    await operator.block(user.id, 60, "")
    await kill_switch.refresh()

    assert verdict(kill_switch, user, KEYRING.pseudonym(user)[:16]) == BLOCKED


def test_what_is_no_text_is_no_user(store: MemoryStore) -> None:
    operator = Operator(settings(JWT), store, KillSwitch(store), limits=None)  # type: ignore[arg-type]  # names users only
    with pytest.raises(SettingsError, match=r"USER '\\udcff': is not a user's id"):
        operator.users("\udcff")


@pytest.mark.parametrize("blocked_by", ["id", "pseudonym"])
@pytest.mark.parametrize("unblocked_by", ["id", "pseudonym"])
async def test_unblock_ends_a_block_however_it_was_made(store: MemoryStore, blocked_by: str, unblocked_by: str) -> None:
    names = {"id": ANN.id, "pseudonym": KEYRING.pseudonym(ANN)[:16]}
    kill_switch = KillSwitch(store)
    operator = Operator(settings(JWT), store, kill_switch, limits=None)  # type: ignore[arg-type]  # blocks only
    await operator.block(names[blocked_by], 60, "")
    await operator.block(BEN.id, 60, "")

    assert await operator.unblock(names[unblocked_by])
    assert not await operator.unblock(names[unblocked_by])
    await kill_switch.refresh()

    assert verdict(kill_switch, ANN, names["pseudonym"]) == OPEN
    assert verdict(kill_switch, BEN) == BLOCKED


# --- what the log and `status` say ---

WHY = Note(by="root", reason="an invoice in dispute", since=1.8e9)


def told(logs: Logs) -> Logs:
    """The entries about controls, taken out of the log."""
    entries = [entry for entry in logs if str(entry["event"]).startswith("control_")]
    logs.clear()
    return entries


async def test_a_control_is_logged_once_when_it_comes_into_force_and_when_it_ends(
    store: MemoryStore, clock: Clock, logs: Logs
) -> None:
    kill_switch, other = KillSwitch(store, clock), KillSwitch(store, clock)
    await other.pause(90, WHY)
    await other.announce()
    for _ in range(3):
        await kill_switch.refresh()
    begun = {"event": "control_in_force", "log_level": "warning", "kind": "pause", "seconds": 90}
    assert told(logs) == [{**begun, "by": "root", "reason": "an invoice in dispute"}]

    await other.resume("ann")
    for _ in range(3):
        await kill_switch.refresh()
    ended = {"event": "control_ended", "log_level": "warning", "kind": "pause"}
    assert told(logs) == [{**ended, "by": "root", "reason": "an invoice in dispute", "ended_by": "ann"}]


async def test_a_control_that_expires_is_logged_without_who_ended_it(
    store: MemoryStore, clock: Clock, logs: Logs
) -> None:
    kill_switch = KillSwitch(store, clock)
    await kill_switch.block(ANN.store_name, 60, Note(user="pseudonym-of-ann", by="root"))
    await kill_switch.refresh()
    clock.now += 61
    await kill_switch.refresh()
    said = {"log_level": "warning", "kind": "block", "user": "pseudonym-of-ann", "by": "root"}
    assert told(logs) == [
        {"event": "control_in_force", **said, "seconds": 60},
        {"event": "control_ended", **said},
    ]


async def test_a_control_that_is_changed_is_logged_again(store: MemoryStore, clock: Clock, logs: Logs) -> None:
    kill_switch = KillSwitch(store, clock)
    for reason in ("first", "second"):
        await kill_switch.pause(60, Note(reason=reason))
        await kill_switch.announce()
        await kill_switch.refresh()
    assert [(entry["event"], entry["reason"]) for entry in told(logs)] == [
        ("control_in_force", "first"),
        ("control_in_force", "second"),
    ]


async def test_a_control_of_a_version_without_notes_is_in_force_all_the_same(
    store: MemoryStore, clock: Clock, logs: Logs
) -> None:
    kill_switch = KillSwitch(store, clock)
    await store.add_member(PAUSE, PAUSE, 60)
    await store.add_member(BLOCKS, ANN.store_name, 60)
    await kill_switch.refresh()
    assert (kill_switch.paused, kill_switch.blocked) == (True, 1)
    assert [(entry["event"], entry["kind"]) for entry in told(logs)] == [
        ("control_in_force", "pause"),
        ("control_in_force", "block"),
    ]
    assert [control.note for control in await read_controls(store)] == [NO_NOTE, NO_NOTE]


NOTES = {
    "no-json": (b"\xff", NO_NOTE),
    "no-object": (b"[]", NO_NOTE),
    "no-text": (b'{"by": 5}', NO_NOTE),
    "no-number": (b'{"since": "soon"}', NO_NOTE),
    "no-time": (b'{"by": "root", "since": 1e300}', Note(by="root")),
    "unknown-fields": (b'{"v": 9, "by": "root", "more": 1}', Note(by="root")),
    "control-characters": (b'{"reason": "a\\u001b[2Jb\\nc"}', Note(reason="a?[2Jb?c")),
    "too-long": (b'{"reason": "' + b"x" * 300 + b'"}', Note(reason="x" * 200)),
}


@pytest.mark.parametrize(("value", "note"), NOTES.values(), ids=NOTES.keys())
async def test_what_stands_in_the_store_is_shown_with_care(store: MemoryStore, value: bytes, note: Note) -> None:
    await store.add_member(PAUSE, PAUSE, 60)
    await store.set(f"control:{PAUSE}", value, 60)
    (control,) = await read_controls(store)
    assert control.note == note


async def test_a_control_in_force_ends_in_the_log_while_the_store_is_gone(clock: Clock, logs: Logs) -> None:
    async with FailoverStore(ValkeyStore("redis://127.0.0.1:1"), MemoryStore(clock)) as store:
        kill_switch = KillSwitch(store, clock)
        kill_switch._paused_until = clock.now + 100
        await kill_switch.refresh()
        clock.now += 101
        await kill_switch.refresh()
        assert [entry["event"] for entry in told(logs)] == ["control_in_force", "control_ended"]


async def test_an_operator_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nameless)
    assert operator_name() == f"uid {os.getuid()}"
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_name="root\x1b" + "x" * 100))
    assert operator_name() == "root?" + "x" * 59


def test_an_operator_cannot_choose_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "mallory")
    monkeypatch.setenv("USER", "mallory")
    assert operator_name() == pwd.getpwuid(os.getuid()).pw_name


ADDRESSES = [
    ("192.0.2.1", "192.0.2.1", True),
    ("192.0.2.1", "192.0.2.2", False),
    ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
    ("2001:DB8:1:2::1", "2001:db8:1:2::7", True),
    ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
    ("::ffff:192.0.2.1", "192.0.2.1", True),
    ("192.0.2.1", "::ffff:192.0.2.1", True),
]


@pytest.mark.parametrize(("named", "peer", "same"), ADDRESSES)
async def test_an_address_means_who_comes_from_there(
    store: MemoryStore, clock: Clock, named: str, peer: str, same: bool
) -> None:
    kill_switch = KillSwitch(store, clock)
    operator = Operator(settings(), store, kill_switch, limits=None)  # type: ignore[arg-type]  # names users only
    await operator.block(named, 60, "")
    await kill_switch.refresh()

    request = Request({"type": "http", "headers": [], "client": (peer, 1)})
    user = await Anonymous(ClientAddresses([])).identify(request)

    assert verdict(kill_switch, user) == (BLOCKED if same else OPEN)


@pytest.mark.parametrize("name", ["", "ann", "192.0.2", "192.0.2.1/32", "2001:db8::/64", "192.0.2.1 "])
def test_what_is_no_address_is_refused(store: MemoryStore, name: str) -> None:
    operator = Operator(settings(), store, KillSwitch(store), limits=None)  # type: ignore[arg-type]  # names users only
    with pytest.raises(SettingsError, match="takes an IPv4 or IPv6 address"):
        operator.user(name)


@in_simulated_time
async def test_a_value_that_cannot_be_read_does_not_end_the_reading() -> None:
    store = MemoryStore()
    kill_switch = KillSwitch(store)
    reading = asyncio.create_task(kill_switch.run())
    await store.set(CONTROLS, b"\xff", 60)
    with capture_logs() as logs:
        await asyncio.sleep(2 * READ_SECONDS)  # simulated: it reads, and fails
    assert "controls_check_failed" in [entry["event"] for entry in logs]
    operator = KillSwitch(store)
    await operator.pause(90)
    await operator.announce()
    await asyncio.sleep(2 * READ_SECONDS)  # simulated: it reads again
    assert verdict(kill_switch)[0] == "at-capacity"
    reading.cancel()
