"""Rooms of calls on a real LiveKit server: each is made before its token is handed out, and deleted when it ends."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx

from app.sandbox.calls import Call, Calls
from app.sandbox.options import EmulatorOptions
from app.sandbox.tokens import agent_token, server_token

GREETING = "Hello, this is the sandbox. I repeat what you say, one second later."
"""What the agent says first, unless the call's overrides say something else."""

MAX_ROOMS = 50
"""Calls at once. Beyond, OneInbox's answer is a 429."""

_API_TIMEOUT = 3
"""Seconds for one request to LiveKit's server API, on loopback as a rule."""
_RETRY = 1
"""Seconds until the agent tries again to join."""
_CLOSING = 5
"""Seconds for all rooms to be deleted when the emulator ends."""
_SPARE = 60
"""Seconds that a room outlives the longest wait for its participants, so that it is never gone before its call."""

_logger = logging.getLogger(__name__)


class Rooms:
    """The rooms of running calls. `changed` is told of each call whose state changed in its room."""

    def __init__(self, options: EmulatorOptions, calls: Calls, changed: Callable[[Call], None]) -> None:
        self._options = options
        self._calls = calls
        self._changed = changed
        self._open: dict[str, tuple[asyncio.Event, asyncio.Task[None]]] = {}
        """By call id: an event that says "look at the call again", and the task that waits for its end."""
        self._closing = False
        if options.voice == "agent":
            from app.sandbox.voice import Agent  # noqa: PLC0415 - needs the extra `voice`, and takes its time

            self._agents = Agent
        # No proxy: the agent's own connection knows none either.
        self._client = httpx.AsyncClient(
            base_url=options.server_url.replace("ws", "http", 1), trust_env=False, timeout=_API_TIMEOUT
        )

    @property
    def full(self) -> bool:
        """True if another call cannot have a room now."""
        return len(self._open) >= MAX_ROOMS

    async def open(self, call: Call) -> None:
        """Make the call's room, and send the agent there. If LiveKit's server does not answer, the call goes on."""
        timeout = int(self._options.join_timeout) + _SPARE
        await self._ask("CreateRoom", name=call.room_name, empty_timeout=timeout, departure_timeout=timeout)
        look = asyncio.Event()
        self._open[call.id] = look, asyncio.create_task(self._attend(call, look))

    def follow(self, call: Call) -> None:
        """Close the room of a call that has ended."""
        if call.id in self._open:
            self._open[call.id][0].set()

    async def aclose(self) -> None:
        """Delete all rooms, so that their participants know."""
        self._closing = True
        for look, _ in self._open.values():
            look.set()
        if tasks := [task for _, task in self._open.values()]:
            await asyncio.wait(tasks, timeout=_CLOSING)
        await self._client.aclose()

    async def _attend(self, call: Call, look: asyncio.Event) -> None:
        agent = asyncio.create_task(self._talk(call, look)) if self._options.voice == "agent" else None
        try:
            await self._until_ended(call, look)
            self._changed(call)  # also when its time was up
        finally:
            del self._open[call.id]
            # The room first: those in it hear of the end at once.
            await self._ask("DeleteRoom", room=call.room_name)
            if agent is not None:
                agent.cancel()
                [outcome] = await asyncio.gather(agent, return_exceptions=True)
                if call.met_at is None:  # it may have been on its way, and have opened the room again
                    await self._ask("DeleteRoom", room=call.room_name)
                if isinstance(outcome, Exception):
                    _logger.warning("the agent of a call failed: %s", type(outcome).__name__)

    async def _until_ended(self, call: Call, look: asyncio.Event) -> None:
        while not self._closing and self._calls.get(call.id) is call and (state := self._calls.state(call)).running:
            look.clear()
            pause = None if state.next_change is None else max(0.0, state.next_change - self._options.now())
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await look.wait()

    async def _talk(self, call: Call, look: asyncio.Event) -> None:
        """Send the agent into the room, again until it gets in, and end the call as it says."""

        def met() -> None:
            self._calls.meet(call)
            self._changed(call)
            look.set()

        def said(role: str, text: str) -> None:
            call.said.append({"role": role, "content": text})

        greeting = call.overrides.get("first_message") or GREETING
        while True:
            agent = self._agents(greeting, self._options.silence_timeout_seconds, met, said)
            token = agent_token(self._options, call.room_name, self._options.now())
            try:
                reason = await agent.run(self._options.server_url, token)
            except ConnectionError:
                await asyncio.sleep(_RETRY)
            else:
                break
        self._calls.stop(call, reason)
        look.set()

    async def _ask(self, method: str, **body: Any) -> None:
        """Send a request to LiveKit's server API. A room that is gone already is no failure."""
        token = server_token(self._options, self._options.now())
        try:
            answer = await self._client.post(
                f"/twirp/livekit.RoomService/{method}", json=body, headers={"Authorization": f"Bearer {token}"}
            )
        except httpx.HTTPError as error:
            _logger.warning("LiveKit's server does not answer %s: %s", method, type(error).__name__)
            return
        if answer.status_code not in (200, 404):
            _logger.warning("LiveKit's server answers %s with %s", method, answer.status_code)
