"""The kill switch: what is stopped, for whom and how long, and that a lost store releases nothing."""

import pytest
from starlette.requests import Request

from app.cli.operator import Operator
from app.config.settings import SettingsError
from app.identity import User
from app.identity.addresses import ClientAddresses
from app.identity.anonymous import Anonymous
from app.limits import KillSwitch
from app.problems import Problem
from app.store.failover import FailoverStore
from app.store.memory import MemoryStore
from app.store.valkey import ValkeyStore
from tests.support.harness import settings

ANN, BEN = User(mode="jwt", id="ann"), User(mode="jwt", id="ben")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def verdict(kill_switch: KillSwitch, user: User = ANN) -> tuple[str, str | None]:
    try:
        kill_switch.check(user)
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
