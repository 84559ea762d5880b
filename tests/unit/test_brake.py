"""The hand brake: what is stopped, for whom and how long, and that a lost store releases nothing."""

import pytest
from starlette.requests import Request

from app.cli.operator import Operator
from app.config.settings import SettingsError
from app.identity import Anonymous, User
from app.limits import Brake
from app.problems import Problem
from app.store.failover import FailoverStore
from app.store.memory import MemoryStore
from app.store.valkey import ValkeyStore
from tests.harness import settings

ANN, BEN = User(mode="jwt", id="ann"), User(mode="jwt", id="ben")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def verdict(brake: Brake, user: User = ANN) -> tuple[str, str | None]:
    try:
        brake.check(user)
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
    brake, other = Brake(store, clock), Brake(store, clock)
    await other.pause(90)
    assert verdict(brake) == OPEN, "seen at the next look"
    await brake.read()
    assert verdict(brake) == verdict(brake, BEN) == ("at-capacity", "60")
    clock.now += 70.5
    assert verdict(brake) == ("at-capacity", "20")
    clock.now += 20
    assert verdict(brake) == OPEN
    await brake.read()
    assert verdict(brake) == OPEN


async def test_resume_ends_a_pause(store: MemoryStore, clock: Clock) -> None:
    brake = Brake(store, clock)
    await brake.pause(3600)
    await brake.read()
    assert await brake.resume()
    await brake.read()
    assert verdict(brake) == OPEN
    assert not await brake.resume()


async def test_a_second_pause_moves_the_end(store: MemoryStore, clock: Clock) -> None:
    brake = Brake(store, clock)
    await brake.pause(3600)
    await brake.pause(30)
    await brake.read()
    assert verdict(brake) == ("at-capacity", "30")
    clock.now += 31
    assert verdict(brake) == OPEN


async def test_a_block_is_for_one_user(store: MemoryStore, clock: Clock) -> None:
    brake = Brake(store, clock)
    await brake.block(ANN, 60)
    await brake.read()
    assert verdict(brake, ANN) == BLOCKED
    assert verdict(brake, BEN) == verdict(brake, User(mode="header", id="ann")) == OPEN
    assert await brake.unblock(ANN)
    assert not await brake.unblock(ANN)
    await brake.read()
    assert verdict(brake, ANN) == OPEN


async def test_a_block_ends_by_itself(store: MemoryStore, clock: Clock) -> None:
    brake = Brake(store, clock)
    await brake.block(ANN, 60)
    await brake.block(BEN, 120)
    await brake.read()
    clock.now += 61
    assert (verdict(brake, ANN), verdict(brake, BEN)) == (OPEN, BLOCKED)


async def test_a_paused_user_who_is_blocked_is_told_of_the_pause(store: MemoryStore, clock: Clock) -> None:
    brake = Brake(store, clock)
    await brake.block(ANN, 60)
    await brake.pause(60)
    await brake.read()
    assert verdict(brake, ANN)[0] == "at-capacity"


async def test_without_its_store_a_brake_stays_as_it_is(clock: Clock) -> None:
    async with FailoverStore(ValkeyStore("redis://127.0.0.1:1"), MemoryStore(clock)) as store:
        brake = Brake(store, clock)
        brake._paused_until, brake._blocked_until = clock.now + 100, {ANN.store_name: clock.now + 200}
        for _ in range(3):
            await brake.read()
        assert store.state == "down"
        assert verdict(brake, BEN) == ("at-capacity", "60")
        clock.now += 101
        assert (verdict(brake, ANN), verdict(brake, BEN)) == (BLOCKED, OPEN)


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
    brake = Brake(store, clock)
    operator = Operator(settings(), store, brake, limits=None)  # type: ignore[arg-type]  # names users only
    await brake.block(operator.user(named), 60)
    await brake.read()

    caller = await Anonymous([]).identify(Request({"type": "http", "headers": [], "client": (peer, 1)}))

    assert verdict(brake, caller) == (BLOCKED if same else OPEN)


@pytest.mark.parametrize("name", ["", "ann", "192.0.2", "192.0.2.1/32", "2001:db8::/64", "192.0.2.1 "])
def test_what_is_no_address_is_refused(store: MemoryStore, name: str) -> None:
    operator = Operator(settings(), store, Brake(store), limits=None)  # type: ignore[arg-type]  # names users only
    with pytest.raises(SettingsError, match="takes an IPv4 or IPv6 address"):
        operator.user(name)
