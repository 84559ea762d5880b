"""What an operator does from a terminal, through the shared store: the hand brake, and a look at the counters."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from app.broker import agents_of, open_limits
from app.config import Settings, SettingsError
from app.identity import User
from app.identity.addresses import limit_key, parse_address
from app.limits import Brake, Limits
from app.limits.brake import BLOCKS, PAUSE
from app.limits.live import UNSTOPPED
from app.limits.service import ALL_CALLS
from app.store import Store, StoreUnavailable, open_store


@dataclass(frozen=True, slots=True)
class Operator:
    """The parts of a broker that an operator's command needs."""

    settings: Settings
    store: Store
    brake: Brake
    limits: Limits

    def user(self, name: str) -> User:
        """A user as a request would make them: by id, in anonymous mode by address. Raises SettingsError."""
        if self.settings.auth != "anonymous":
            return User(mode=self.settings.auth, id=name, issuer=self.settings.jwt_issuer or "")
        if parse_address(name) is None:
            raise SettingsError([f"USER {name!r}: is no address; takes an IPv4 or IPv6 address"])
        return User(mode="anonymous", id=limit_key(name))

    async def status(self) -> str:
        """The counters and what is stopped, a line each."""
        pause = await self.store.members(PAUSE)
        blocks = await self.store.members(BLOCKS)
        unstopped = await self.store.members(UNSTOPPED)
        return "\n".join(
            [
                *(f"{name}: {used} of {amount} sessions" for name, used, amount in await self.limits.usage()),
                f"live calls: {len(await self.store.members(ALL_CALLS))}",
                *(f"paused for {round(left)} s more" for left in pause.values()),
                *([] if pause else ["not paused"]),
                f"blocked users: {len(blocks)}",
                f"calls that could not be stopped: {len(unstopped)}",
                *(f"  {call}" for call in sorted(unstopped)),
            ]
        )


async def operate(settings: Settings, work: Callable[[Operator], Awaitable[str]]) -> str:
    """Do an operator's work on the shared store.

    Raises SettingsError without one, StoreUnavailable when it does not answer.
    """
    url = settings.store_url.get_secret_value()
    if url == "memory://":
        raise SettingsError(
            ["BROKER_STORE_URL: is memory://; a command reaches running brokers only through a shared store"]
        )
    agents = agents_of(settings)
    async with open_store(url) as store:
        said = await work(Operator(settings, store, Brake(store), open_limits(settings, agents, store, lease=0)))
        if store.state == "down":
            raise StoreUnavailable
        return said
