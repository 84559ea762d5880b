"""Reload secrets at run time from the files that *_FILE variables name.

What happens with each secret is one table: `secret_handlers` in app.broker.build.
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
"""Takes settings with a new secret and puts the secret to use. Raises SettingsError if it cannot."""

log = structlog.get_logger(__name__)


@dataclass(repr=False, eq=False)
class SecretReloader:
    """Hold the settings in force, and replace them when a secret's file changes.

    It compares contents, not times or inodes: Kubernetes swaps a symlink in the file's path
    (https://kubernetes.io/docs/concepts/configuration/secret/#mounted-secrets-are-updated-automatically).
    A missing file or an invalid value is logged once, and the old secret stays in force.

    `settings`: those in force; a new object after each change. `every`: seconds between reads. `sleep`: waits seconds.
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
        """Set the handlers, by variable. Before that nothing is read."""
        self._handlers = {name: secret_handlers[name] for name in self.settings.secret_files}

    async def run(self) -> None:
        """Reload every few seconds, until cancelled."""
        while self._handlers:
            await self.sleep(self.every)
            try:
                async with self._lock:
                    await self._reload()
            except Exception:
                log.exception("secret_reload_failed")

    async def reload(self) -> None:
        """Reload now. Concurrent calls share one reload, begun after the first of them."""
        before = self._requested_reloads
        async with self._lock:
            if self._requested_reloads == before:
                await self._reload()
                self._requested_reloads += 1

    async def _reload(self) -> None:
        # In a thread: the event loop must not wait for a disk. The lock keeps older content from replacing newer.
        found = await asyncio.to_thread(self._read_all)
        for name, text in found.items():
            try:
                if isinstance(text, SettingsError):
                    raise text
                self._use(name, text)
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

    def _use(self, name: str, text: str) -> None:
        if getattr(self.settings, field_of(name)).get_secret_value() == text:
            return
        settings = with_secret(self.settings, name, text)
        self._handlers[name](settings)
        self.settings = settings
        log.info("secret_renewed", setting=name)

    def _refuse(self, name: str, text: str | SettingsError, error: SettingsError) -> None:
        """Log why a file's content is rejected, once per content."""
        # Only a hash is kept, since the content may be a secret.
        digest = hashlib.sha256(str(text).encode()).digest()
        if self._refused.get(name) != digest:
            self._refused[name] = digest
            log.error("secret_rejected", setting=name, reason="; ".join(error.lines))
