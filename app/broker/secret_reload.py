"""Secrets change while the broker runs: a file named by a *_FILE variable is read again, and what it holds is taken.

Which secrets there are and what takes each is one table: `takers` in app.broker.build.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import structlog

from app.config.loading import read_secret, with_secret
from app.config.settings import Settings, SettingsError, field_of

EVERY_SECONDS = 2

SecretHandler = Callable[[Settings], None]
"""Puts a new secret to use, given settings that hold it. Raises SettingsError when it cannot."""

log = structlog.get_logger(__name__)


@dataclass
class SecretReloader:
    """Holds the settings in force, and renews them when a secret's file changes.

    The content is compared, not a time or an inode: Kubernetes swaps a symlink on the way to the file
    (https://kubernetes.io/docs/concepts/configuration/secret/#mounted-secrets-are-updated-automatically).
    A file that is gone, or holds what the setting does not take, is logged once, and the old secret stays in force.

    `settings`: those in force; a new object after each change. `sleep`: waits so many seconds.
    """

    settings: Settings
    _: KW_ONLY
    every: float = EVERY_SECONDS
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    read: Callable[[str, Path], str] = read_secret
    _handlers: Mapping[str, SecretHandler] = field(default_factory=dict, init=False)
    _refused: dict[str, bytes] = field(default_factory=dict, init=False)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _requested_reloads: int = field(default=0, init=False)

    def register(self, secret_handlers: Mapping[str, SecretHandler]) -> None:
        """Give new secrets to these, by variable. Until then nothing is read."""
        self._handlers = {name: secret_handlers[name] for name in self.settings.secret_files}

    async def run(self) -> None:
        """Look every few seconds, for ever."""
        while self._handlers:
            await self.sleep(self.every)
            try:
                async with self._lock:
                    await self._reload()
            except Exception:
                log.exception("secret_reload_failed")

    async def reload(self) -> None:
        """Look now: one look for all who ask meanwhile, begun after the first of them asked."""
        before = self._requested_reloads
        async with self._lock:
            if self._requested_reloads == before:
                await self._reload()
                self._requested_reloads += 1

    async def _reload(self) -> None:
        # Off the event loop, which must not wait for a disk; under a lock, so that no older content overtakes a newer.
        found = await asyncio.to_thread(self._read_all)
        for name, text in found.items():
            try:
                if isinstance(text, SettingsError):
                    raise text
                self._take(name, text)
            except SettingsError as error:
                self._refuse(name, text, error)
            else:
                self._refused.pop(name, None)

    def _read_all(self) -> dict[str, str | SettingsError]:
        found: dict[str, str | SettingsError] = {}
        for name in self._handlers:
            try:
                found[name] = self.read(name, self.settings.secret_files[name])
            except SettingsError as error:
                found[name] = error
        return found

    def _take(self, name: str, text: str) -> None:
        if getattr(self.settings, field_of(name)).get_secret_value() == text:
            return
        renewed = with_secret(self.settings, name, text)
        self._handlers[name](renewed)
        self.settings = renewed
        log.info("secret_renewed", setting=name)

    def _refuse(self, name: str, text: str | SettingsError, error: SettingsError) -> None:
        """Log why a file's content is not taken, once for each content."""
        # Its hash: what may be a secret is not kept longer than it is looked at.
        digest = hashlib.sha256(str(text).encode()).digest()
        if self._refused.get(name) != digest:
            self._refused[name] = digest
            log.error("secret_rejected", setting=name, reason="; ".join(error.lines))
