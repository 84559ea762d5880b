"""Directed tests on the simulated world that read like a story: no random faults, only what the story says.

@told(memory=True)
async def test_something(story: Story) -> None:
    story.oneinbox("start-slow-answer", seconds=11)
    request = story.post("first", key="…")
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.connections import Answer, Connection, Gone
from tests.simulation.invariants import Bounds
from tests.simulation.loop import BEGIN
from tests.simulation.oneinbox import Call, Stop
from tests.simulation.scenario import BASE, Options, Plan, Scene, in_a_world
from tests.simulation.store import UNSTOPPED, Operation, StoreConnection, now
from tests.simulation.world import Planned

KEY = "the-key-of-the-story"
USER = "203.0.113.1"


def told(
    *,
    memory: bool = False,
    replicas: int = 2,
    timeout: int = 15,
    live_calls: int = 2,
    call_seconds: int = 3600,
    token_life: int | None = 3600,
    seed: int = 1,
) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], Callable[..., None]]:
    """Run a test in a world of its own, with these settings; its replicas are up when it begins."""
    bounds = Bounds(live_calls=live_calls, call_seconds=call_seconds, memory=memory)
    environ = {
        **BASE,
        "ONEINBOX_TIMEOUT": str(timeout),
        "BROKER_MAX_LIVE_CALLS": str(live_calls),
        "BROKER_MAX_CALL_SECONDS": str(call_seconds),
        "BROKER_SESSION_LIMITS": "100/minute",
        "BROKER_GLOBAL_SESSION_LIMITS": "100/minute",
        "BROKER_STORE_URL": "memory://" if memory else "redis://store",
    }
    plan = Plan(bounds, environ, timeout, [token_life], "anonymous", ())

    def decorate(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        def run(**parameters: Any) -> None:
            failures: list[BaseException] = []

            async def play(scene: Scene) -> None:
                scene.apart = False
                for slot in scene.slots[:replicas]:
                    await scene.boot(slot)
                try:
                    await test(Story(scene), **parameters)
                except (Exception, AssertionError) as failure:
                    failures.append(failure)
                scene.world.over = True

            world, _ = in_a_world(seed, plan, Options(keep_history=True), play)
            lines = "\n".join(f"{at:9.3f}  {who:<12} {what}" for at, who, what in world.history)
            if failures:
                failures[0].add_note(lines)
                raise failures[0]
            stuck = [each for each in world.violations if each.kind.startswith(("H-", "X-"))]
            assert not stuck, f"{stuck}\n{lines}"

        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        run.__dict__.update(test.__dict__)  # pytest's marks
        names = list(test.__code__.co_varnames[1 : test.__code__.co_argcount])
        run.__signature__ = _signature(names)  # type: ignore[attr-defined]  # pytest reads it
        return run

    return decorate


def _signature(names: list[str]) -> Any:
    import inspect

    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature([inspect.Parameter(name, kind) for name in names])


@dataclass(eq=False)
class Request:
    """One request of a story's browser."""

    connection: Connection
    events: list[str] = field(default_factory=list)
    """Statuses that a stream told, and `end`."""

    def hang_up(self) -> None:
        """The browser goes."""
        self.connection.hang_up()

    async def answer(self) -> Answer:
        """Return the answer. Raises Gone if there is none."""
        return await asyncio.wait_for(asyncio.shield(self.connection.answer), 60)

    async def status(self) -> int:
        """Return the answer's status; 0 if there is none."""
        try:
            return (await self.answer())[0]
        except Gone:
            return 0

    @property
    def call(self) -> str:
        """The id of the call that the browser was given; empty if none."""
        answer = self.connection.answer
        given = answer.done() and answer.exception() is None and answer.result()[0] == 201
        return self.connection.call_id if given else ""


@dataclass(eq=False)
class Story:
    """What a story can do, and what outsiders can see."""

    scene: Scene

    def __post_init__(self) -> None:
        self.world = self.scene.world

    # What happens

    def post(self, name: str, *, key: str | None = None, at: str = "r1", user: str = USER) -> Request:
        """A browser sends POST /session to a replica."""
        return self._send(name, "POST", "/session", at=at, user=user, key=key)

    def follow(self, name: str, request: Request, *, at: str = "r1", user: str = USER) -> Request:
        """A browser follows the call that a request was given."""
        events: list[str] = []

        def part(chunk: bytes) -> None:
            event, _, data = chunk.decode().partition("\n")
            if event == "event: call":
                events.append(json.loads(data.partition("data: ")[2])["status"])
            elif event == "event: end":
                events.append("end")

        path = request.connection.sent_headers["location"] + "/events"
        followed = self._send(name, "GET", path, at=at, user=user, chunks=part)
        followed.events = events
        return followed

    def read(self, name: str, request: Request, *, at: str = "r1", user: str = USER) -> Request:
        """A browser reads the call that a request was given."""
        return self._send(name, "GET", request.connection.sent_headers["location"], at=at, user=user)

    def webhook(self, call: str, *, at: str = "r1") -> None:
        """OneInbox says to a replica that a call ended."""
        body = json.dumps({"event": "call.ended", "call_id": call}).encode()
        path = f"/webhooks/oneinbox/{BASE['BROKER_WEBHOOK_SECRET']}"
        assert self.scene.connect(f"hook:{call}", "POST", path, to=at, body=body) is not None

    def oneinbox(self, fault: str, *, seconds: float | None = None, times: int = 1, of: str = "") -> None:
        """OneInbox's next answers have a fault (a kind of oneinbox.FAULTS). `of`: part of the request's place."""
        self.world.planned.append(Planned(fault, lambda place: of in place, times, seconds))

    def hears_late(self, seconds: float) -> None:
        """The next hang-up reaches the server this much later."""
        self.world.planned.append(Planned("late-fin", lambda _: True, 1, seconds))

    def lose_write(self, fault: str, *, of: str, after: Callable[[], object], nth: int = 0, seconds: float = 1) -> None:
        """The store loses one write of a request, whichever operation it is.

        `fault`: st-lost, st-lost-after or st-late. `of`: the request's name. `after`: counts writes from when this is
        true. `nth`: 0 is the first. `seconds`: how late.
        """
        seen = 0

        def watch(operation: Operation) -> tuple[str, float] | None:
            nonlocal seen
            if operation.connection != of or not operation.writes or not after():
                return None
            seen += 1
            return (fault, seconds) if seen == nth + 1 else None

        self._watch_store(watch)

    def lose_operations(self, number: int, *, of: str, after: Callable[[], object]) -> None:
        """The store loses its answers to the first operations of a request, reads too, once `after` is true."""
        seen = 0

        def watch(operation: Operation) -> tuple[str, float] | None:
            nonlocal seen
            if operation.connection != of or not after():
                return None
            seen += 1
            return ("st-lost-after", 0) if seen <= number else None

        self._watch_store(watch)

    def _watch_store(self, watch: Callable[[Operation], tuple[str, float] | None]) -> None:
        for connection in self.stores():
            connection.watch = watch

    def stores(self) -> list[StoreConnection]:
        """Return the replicas' connections to the store."""
        return self.scene.server.connections

    async def wait(self, seconds: float) -> None:
        """Let time pass."""
        await asyncio.sleep(seconds)

    async def clock(self, seconds: float) -> None:
        """Wait until so many seconds after the beginning."""
        await asyncio.sleep(max(0.0, seconds - (self.world.now - BEGIN)))

    async def until(self, happened: Callable[[], object], within: float = 60) -> None:
        """Wait until something is so. Fails if it does not come to be in time."""
        end = self.world.now + within
        while not happened():
            assert self.world.now < end, "it did not happen"
            await asyncio.sleep(0.0005)

    # What outsiders see

    @property
    def calls(self) -> dict[str, Call]:
        """All calls at OneInbox, by id."""
        return self.scene.oneinbox.calls

    def running(self) -> list[str]:
        """Return the ids of the calls that run at OneInbox."""
        return [call.id for call in self.scene.oneinbox.running()]

    def looks(self, call: str) -> int:
        """Return how often OneInbox was asked for a call."""
        return self.scene.oneinbox.asked[f"GET /calls/{call}"]

    def stops(self, call: str) -> list[Stop]:
        """Return the requests by which the broker itself stopped a call."""
        return [stop for stop in self.calls[call].stops if stop.by == "broker"]

    def unstopped(self) -> list[str]:
        """Return what `status` lists as calls that could not be stopped."""
        return sorted(now(self.scene.contents.members(UNSTOPPED)))

    def assert_just(self, *requests: Request) -> None:
        """Each call that a browser of these was given runs, and the broker stopped it for no one; no other runs."""
        given = {request.call for request in requests} - {""}
        for call in given:
            assert not self.stops(call), f"{call} was given, and is stopped"
        assert set(self.running()) == given

    def _send(
        self,
        name: str,
        method: str,
        path: str,
        *,
        at: str,
        user: str,
        key: str | None = None,
        chunks: Callable[[bytes], object] | None = None,
    ) -> Request:
        connection = self.scene.connect(name, method, path, user, to=at, key=key, chunks=chunks)
        assert connection is not None, f"{at} is not up"
        return Request(connection)
