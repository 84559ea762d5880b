"""The deployment that a prefix of the store belongs to: one OneInbox account and one BROKER_SECRET.

Two deployments in one place would free each other's slots: each looks the other's calls up in its own account, and
finds none. Every replica writes its marks for as long as it runs. Marks are hashes; one in common is enough, so that
a secret, the API key and the agents may be changed one after the other.
"""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from pydantic_core import from_json, to_json

from app.config.agents import Agents
from app.config.loading import secret_lines
from app.config.settings import Settings, SettingsError
from app.store import Store, StoreUnavailable

NAME = "deployment"
EVERY_SECONDS = 15
KEPT_SECONDS = 60
REMEDY = "set another BROKER_STORE_PREFIX, or stop the other deployment and wait a minute"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Deployment:
    """Marks a store as this deployment's. `settings`: those in force."""

    store: Store
    agents: Agents
    settings: Callable[[], Settings]

    async def claim(self) -> None:
        """Write our marks. Raises SettingsError if the store is in use by another deployment, StoreUnavailable."""
        await self.compare()
        accounts, secrets = self._marks()
        value = to_json({"v": 1, "accounts": sorted(accounts), "secrets": sorted(secrets)})
        await self.store.set(NAME, value, KEPT_SECONDS)

    async def compare(self) -> None:
        """Raises SettingsError if the store is in use by another deployment, StoreUnavailable."""
        kept = await self.store.get(NAME)
        if kept is not None:
            _compare(kept, *self._marks())

    async def keep(self) -> None:
        """Keep the marks until cancelled; log an error while they are another deployment's."""
        while True:
            try:
                await self.claim()
            except SettingsError as error:
                log.error("store_shared_with_another_deployment", reason="; ".join(error.lines))
            except StoreUnavailable:
                pass
            await asyncio.sleep(EVERY_SECONDS)

    def _marks(self) -> tuple[set[str], set[str]]:
        settings = self.settings()
        agents = [agent.agent_id for agent in self.agents.by_name.values()]
        accounts = {_hash("account", each) for each in (settings.oneinbox_api_key.get_secret_value(), *agents)}
        return accounts, {_hash("secret", each) for each in secret_lines(settings)}


def _compare(kept: bytes, accounts: set[str], secrets: set[str]) -> None:
    try:
        marks = from_json(kept)
        theirs = {name: set(marks[name]) for name in ("accounts", "secrets")}
    except (ValueError, KeyError, TypeError):
        log.warning("store_record_skipped", name=NAME)
        return
    place = "BROKER_STORE_PREFIX: the store already serves a deployment with"
    if theirs["accounts"].isdisjoint(accounts):
        raise SettingsError([f"{place} another OneInbox account; {REMEDY}"])
    if theirs["secrets"].isdisjoint(secrets):
        raise SettingsError([f"{place} another BROKER_SECRET; {REMEDY}, or add its secret as a line of BROKER_SECRET"])


def _hash(purpose: str, text: str) -> str:
    """Return a short hash that does not give a secret away: keys and secrets are long and random."""
    return hashlib.sha256(f"oneinbox-broker {purpose} {text}".encode()).hexdigest()[:32]
