"""One seeded run: settings, browsers, faults and events, all from a seed."""

import asyncio
import base64
import hashlib
import hmac
import json
import math
from collections import Counter
from collections.abc import Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from app.identity import User
from app.limits.kill_switch import KillSwitch
from app.store import Store, StoreUnavailable
from app.store.failover import FailoverStore
from app.store.valkey import ValkeyStore
from tests.simulation import loop as virtual
from tests.simulation import oneinbox, store
from tests.simulation.connections import Answer, Connection, Gone
from tests.simulation.invariants import CALM_SECONDS, CLOCK_SECONDS, END_SECONDS, Bounds, Invariants, Refusal
from tests.simulation.loop import BEGIN, SimLoop, Stuck
from tests.simulation.oneinbox import Call, OneInbox, Transport
from tests.simulation.replicas import Replica
from tests.simulation.store import Contents, Server, StoreConnection
from tests.simulation.world import Chance, Violation, World

SETTINGS = 60
ANSWER_SECONDS = 60.0
"""A request must be answered within this time, whatever happens."""
WEBHOOK_SECRET = "w" * 24
JWT_SECRET = "the login's secret, longer than 32 characters"
PROXY = "10.0.0.5"
SECRETS = ("the simulation's first secret, 32 characters", "the simulation's second secret, 32 characters")
API_KEYS = ("oi_sk_test_5d1f0c9a77e34b22", "oi_sk_test_9e27b1c46f0d83aa")
BASE = {
    "ONEINBOX_API_KEY": API_KEYS[0],
    "ONEINBOX_AGENT_ID": "agt_test",
    "BROKER_SECRET": SECRETS[0],
    "BROKER_WEBHOOK_SECRET": WEBHOOK_SECRET,
    "BROKER_REQUEST_LIMITS": "100000/minute",
    "BROKER_DOCS": "false",
}
BROWSER_FAULTS = {"hang": 0.35, "twin": 0.2, "late-fin": 0.3, "webhook-lost": 0.3}
FAULTS = {**BROWSER_FAULTS, **oneinbox.FAULTS, **store.FAULTS}
"""Kinds of faults, and how often each happens in a world that has it."""
ALWAYS = frozenset({"hang", "twin"})
EVENTS = (
    "crash",
    "sigterm",
    "refused",
    "frozen",
    "denied",
    "lagging",
    "failover",
    "emptied",
    "pause",
    "block",
    "rotation",
    "skew",
    "lists-down",
)
OF_MEMORY = frozenset({"sigterm", "crash", "rotation", "skew", "lists-down"})
"""Events that a broker on memory:// can meet."""
OUTAGES: Mapping[str, store.Outage] = {
    "refused": "refused",
    "frozen": "frozen",
    "denied": "denied",
    "lagging": "lagging",
}
WORDS = {1: "second", 30: "30 seconds", 60: "minute", 86400: "day"}


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a run.

    `without`: names of faults, events and browsers to leave out. `never`, `only`: kinds of faults and events.
    `memory`: True: memory://; False: a shared store; None: by the seed.
    """

    without: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    memory: bool | None = None
    keep_history: bool = False

    def has(self, kind: str) -> bool:
        """Return whether a kind of fault or event may happen."""
        return kind not in self.never and (self.only is None or kind in self.only or kind in ALWAYS)


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of a world. `environ`: the broker's."""

    bounds: Bounds
    environ: Mapping[str, str]
    timeout: int
    token_lives: list[int | None]
    auth: str
    events: tuple[tuple[float, str, str], ...]
    """When, which kind, and its place."""

    @classmethod
    def of(cls, chance: Chance, options: Options, length: float) -> "Plan":
        """Draw the settings from a seed: one of SETTINGS sets, since making an app takes longer than a run."""
        pick = Chance(int(chance.unit("settings") * SETTINGS)).pick
        memory = chance.unit("memory") < 0.3 if options.memory is None else options.memory
        bounds = Bounds(
            live_calls=pick("cap", [1, 2, 2, 3]),
            call_seconds=pick("max", [3600, 100, 150]),
            user_rates=pick("user-rates", [((5, 60), (50, 86400)), ((3, 30),), ((8, 60),)]),
            all_rates=pick("all-rates", [((60, 60),), ((7, 60),), ((100, 60),)]),
            minutes=pick("minutes", [None, None, None, 1, 2]),
            minutes_total=pick("minutes-total", [None, None, None, None, 3]),
            memory=memory,
        )
        timeout = pick("timeout", [15, 15, 6])
        auth = pick("auth", ["anonymous", "anonymous", "jwt", "header"])
        environ = {
            **BASE,
            "ONEINBOX_TIMEOUT": str(timeout),
            "BROKER_MAX_LIVE_CALLS": str(bounds.live_calls),
            "BROKER_MAX_CALL_SECONDS": str(bounds.call_seconds),
            "BROKER_SESSION_LIMITS": _text(bounds.user_rates),
            "BROKER_GLOBAL_SESSION_LIMITS": _text(bounds.all_rates),
            "BROKER_STORE_URL": "memory://" if memory else "redis://store",
            "BROKER_AUTH": auth,
        }
        if bounds.minutes is not None:
            environ["BROKER_TALK_MINUTES"] = str(bounds.minutes)
        if bounds.minutes_total is not None:
            environ["BROKER_GLOBAL_TALK_MINUTES"] = str(bounds.minutes_total)
        if auth == "jwt":
            environ["BROKER_JWT_SECRET"] = JWT_SECRET
        if auth == "header":
            environ["BROKER_TRUSTED_PROXIES"] = "10.0.0.0/8"
        lives: list[list[int | None]] = [[None], [None, 75, 90], [80, 100, 130], [64, 70, 88], [600, 3600]]
        return cls(bounds, environ, timeout, pick("tokens", lives), auth, _events(chance, options, memory, length))


def _events(chance: Chance, options: Options, memory: bool, length: float) -> tuple[tuple[float, str, str], ...]:
    kinds = [kind for kind in EVENTS if options.has(kind) and (not memory or kind in OF_MEMORY)]
    count = int(chance.between("events", 0, 3.99)) if chance.unit("calm") < 0.6 and kinds else 0
    drawn = [
        (chance.between(f"event:{i}", 1, length), chance.pick(f"eventkind:{i}", kinds), str(i)) for i in range(count)
    ]
    return tuple(sorted(each for each in drawn if f"{each[1]}@{each[2]}" not in options.without))


def _text(rates: tuple[tuple[int, int], ...]) -> str:
    return ";".join(f"{amount}/{WORDS[seconds]}" for amount, seconds in rates)


@dataclass(frozen=True, slots=True)
class Result:
    """What one run came to. `shuffled`: not first in, first out. `seconds`: virtual."""

    seed: int
    violations: tuple[Violation, ...]
    counts: Counter[str]
    fired: tuple[str, ...]
    actors: tuple[str, ...]
    history: tuple[tuple[float, str, str], ...]
    digest: str
    shuffled: bool
    seconds: float
    steps: int
    calls: int

    def kinds(self) -> set[str]:
        """Return the kinds of its violations."""
        return {each.kind for each in self.violations}


@dataclass(eq=False)
class Scene:
    """A world with its replicas, for scenarios and stories."""

    world: World
    plan: Plan
    slots: list[str] = field(init=False)
    """Names of the places in which replicas run."""
    running: dict[str, Replica] = field(default_factory=dict)
    """The replica of each slot, if one runs."""
    connections: list[Connection] = field(default_factory=list)
    restarted: bool = False

    def __post_init__(self) -> None:
        world, plan = self.world, self.plan
        self.invariants = Invariants(world, plan.bounds)
        self.oneinbox = OneInbox(
            world, self.invariants, plan.timeout, plan.token_lives, {plan.environ["ONEINBOX_API_KEY"]}
        )
        self.invariants.oneinbox = self.oneinbox
        self.server = Server(world, self.invariants, keep_journal=any(kind == "failover" for _, kind, _ in plan.events))
        self.slots = ["r1"] if plan.bounds.memory else ["r1", "r2"]
        self.environ = dict(plan.environ)
        self.memory: Contents | None = None
        self._epochs = 0
        self._tokens: dict[tuple[str, int], str] = {}
        self.apart = world.unit("apart") < 0.4

    async def boot(self, slot: str, environ: Mapping[str, str] | None = None) -> Replica:
        """Start a replica in a slot."""
        world = self.world
        name = world.numbered(slot).replace("#", ".").removesuffix(".0")
        skew = world.between(f"skew:{name}", -2, 2) if self.apart else 0.0
        transport = Transport(world, self.oneinbox, self.invariants)
        replica = Replica(world, name, environ or self.environ, transport, skew)
        replica.store = lambda: self._open_store(replica)
        await replica.start()
        self.running[slot] = replica
        return replica

    def _open_store(self, replica: Replica) -> Store:
        if self.plan.bounds.memory:
            self._epochs += 1
            self.invariants.epoch = self._epochs
            self.memory = Contents(self.world, self.invariants, self._epochs, watched=True)
            return self.memory
        connection = StoreConnection(self.world, self.server, replica)
        local = Contents(self.world, self.invariants, 0, watched=False)
        return FailoverStore(cast("ValkeyStore", connection), local, virtual.CLOCK.monotonic)

    @property
    def contents(self) -> Contents:
        """What the store holds: the server's, or the process's own memory."""
        return self.server.contents if self.memory is None else self.memory

    async def kill(self, slot: str) -> None:
        """SIGKILL."""
        if (replica := self.running.pop(slot, None)) is not None:
            self.restarted = True
            replica.kill()

    async def terminate(self, slot: str) -> None:
        """SIGTERM, until the process has ended."""
        if (replica := self.running.pop(slot, None)) is not None:
            self.restarted = True
            await replica.terminate()

    # Browsers

    def headers_of(self, user: str) -> tuple[str, list[tuple[bytes, bytes]]]:
        """Return the peer's address and the headers that tell who a user is."""
        if self.plan.auth == "anonymous":
            return user, []
        if self.plan.auth == "header":
            return PROXY, [(b"x-forwarded-user", user.encode()), (b"sec-fetch-site", b"same-origin")]
        token = self._token(user)
        return "198.51.100.9", [(b"authorization", f"Bearer {token}".encode())]

    def _token(self, user: str) -> str:
        """Return a login's token, renewed shortly before its end."""
        life = self.world.pick(f"login:{user}", [25, 3600])
        begun = math.floor(self.world.date / life) * life
        if self.world.date > begun + life - 6:
            begun += life  # the next one, early: a page renews its token in time
        if (user, begun) not in self._tokens:
            parts = ({"alg": "HS256"}, {"sub": user, "exp": begun + life})
            text = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts)
            mac = hmac.digest(JWT_SECRET.encode(), text.encode(), hashlib.sha256)
            self._tokens[user, begun] = f"{text}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
        return self._tokens[user, begun]

    def connect(
        self,
        name: str,
        method: str,
        path: str,
        user: str = "",
        *,
        to: str | None = None,
        key: str | None = None,
        body: bytes = b"",
        chunks: Any = None,
    ) -> Connection | None:
        """Send a request to a replica that is up; None if there is none. `to`: its slot; None: any."""
        world = self.world
        up = [self.running[slot] for slot in self.slots if slot in self.running and self.running[slot].up]
        if to is not None:
            up = [replica for replica in up if replica is self.running.get(to)]
        if not up:
            return None
        replica = world.pick(f"lb:{name}", up)
        peer, headers = self.headers_of(user) if user else ("203.0.113.200", [])
        if body:
            headers.append((b"content-type", b"application/json"))
        if key is not None:
            headers.append((b"idempotency-key", key.encode()))
        connection = Connection(
            world,
            self.invariants,
            name,
            replica,
            method=method,
            path=path,
            headers=headers,
            body=body,
            peer=peer,
            user=user,
            key=key,
            chunks=chunks,
        )
        self.connections.append(connection)
        world.later(world.between(f"syn:{name}", 0.001, 0.03), replica.accept, connection)
        return connection

    async def ask(
        self,
        name: str,
        method: str,
        path: str,
        user: str,
        *,
        key: str | None = None,
        hang_up_after: float | None = None,
    ) -> Answer | str:
        """Send a request; return its answer, or why there is none."""
        world = self.world
        connection = self.connect(name, method, path, user, key=key)
        if connection is None:
            await asyncio.sleep(0.05)
            return "refused"
        timer = world.later(hang_up_after, connection.hang_up) if hang_up_after is not None else None
        try:
            return await asyncio.wait_for(asyncio.shield(connection.answer), ANSWER_SECONDS)
        except Gone as gone:
            return str(gone)
        except TimeoutError:
            world.violate(
                "H-stuck", f"{connection} {method} {connection.shown} is not answered in {ANSWER_SECONDS:.0f} s"
            )
            return "stuck"
        finally:
            if timer is not None:
                timer.cancel()

    def webhook(self, call: Call) -> None:
        """OneInbox says that a call ended."""
        path = f"/webhooks/oneinbox/{WEBHOOK_SECRET}"
        body = json.dumps({"event": "call.ended", "call_id": call.id}).encode()
        self.connect(f"hook:{call.id}", "POST", path, body=body)

    # The end

    async def settle(self) -> None:
        """Give everything the time that the broker has to settle it.

        That is 30 s to collect, 60 s of scans and 30 s of sweeps. After a crash a lost start is old after the timeout
        and 60 s, and its scans begin 30 s after the sweep that saw it.
        """
        await asyncio.sleep(max(0.0, self.oneinbox.lists_down_until - self.world.now))
        simple = not (self.restarted or self.world.troubles or "lost_call_unresolved" in self.invariants.logged)
        await asyncio.sleep(140 if simple else 290)

    async def finish(self) -> None:
        """End all calls and processes; check what must hold then."""
        world, invariants = self.world, self.invariants
        await self.settle()
        invariants.check_calls()
        for call in self.oneinbox.running():
            self.oneinbox.end(call, "silence_timeout")
        await asyncio.sleep(70)
        invariants.check_store(self.contents)
        streams = sum(each.chunks is not None and each.finished is None for each in self.connections)
        invariants.check_processes(list(self.running.values()), streams)
        for connection in self.connections:
            if connection.arrived is not None and connection.finished is None and not connection.replica.dead:
                world.violate("H-stuck", f"{connection} is never over")
        for replica in list(self.running.values()):
            await replica.terminate()
        invariants.check_rates()
        world.over = True


def in_a_world(
    seed: int, plan: Plan, options: Options, play: Any, *, shuffle: bool = False, length: float = 0.0
) -> tuple[World, Any]:
    """Run `play(scene)` in virtual time; return the world and the scene. A run that cannot end is cut: H-stuck."""
    made: list[tuple[World, Scene]] = []

    async def main(loop: SimLoop) -> None:
        world = World(loop, seed, options.without, options.keep_history)
        scene = Scene(world, plan)
        made.append((world, scene))
        loop.set_exception_handler(lambda _, context: scene.invariants.uncaught(context))
        await play(scene)

    def log(method: str, name: str, fields: dict[str, Any]) -> None:
        made[0][1].invariants.log(method, name, fields)

    try:
        virtual.run(main, seed, log=log, shuffle=shuffle)
    except Stuck as stuck:
        made[0][0].violate("H-stuck", f"the run is cut: {stuck}")
    return made[0]


def run(seed: int, options: Options | None = None) -> Result:
    """Play the scenario of a seed."""
    options = options or Options()
    chance = Chance(seed)
    length = chance.between("length", 30, 80)
    plan = Plan.of(chance, options, length)
    shuffle = chance.unit("shuffle") < 0.25 and "shuffle" not in options.without
    played = Scenario(options, length)
    world, scene = in_a_world(seed, plan, options, played.play, shuffle=shuffle)
    for name, count in scene.invariants.logged.items():
        world.counts[f"log {name}"] += count
    return Result(
        seed,
        tuple(world.violations),
        world.counts,
        tuple(world.fired),
        tuple(played.actors),
        tuple(world.history),
        world.digest,
        shuffle,
        world.now - BEGIN,
        world.loop.steps,
        len(scene.oneinbox.calls),
    )


@dataclass(eq=False)
class Scenario:
    """What browsers, the weather and the operator do in one seeded run."""

    options: Options
    length: float
    actors: list[str] = field(default_factory=list)
    scene: Scene = field(init=False)
    world: World = field(init=False)

    async def play(self, scene: Scene) -> None:
        """Live through it, and check what must hold."""
        self.scene, self.world = scene, scene.world
        world, plan = self.world, scene.plan
        self._begin()
        for slot in scene.slots:
            await scene.boot(slot)
        names = [f"a{i}" for i in range(1, 1 + int(world.between("actors", 2, 7)))]
        self.actors = [f"actor@{name}" for name in names]
        tasks = [
            asyncio.create_task(Browser(self, name).live(), name=name)
            for name in names
            if f"actor@{name}" not in world.without
        ]
        scene.oneinbox.announce = self._announce
        events = asyncio.create_task(self._events(plan.events))
        await asyncio.sleep(self.length)
        await events
        world.quiet = True
        world.note("world", "no more faults")
        scene.server.recover()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=1200)
            for task in tasks:
                if task in late:
                    world.violate("H-stuck", f"browser {task.get_name()} is not through")
                else:
                    task.result()
        await scene.finish()

    def _begin(self) -> None:
        """Swarm testing: each run has its own few kinds of trouble."""
        world, plan = self.world, self.scene.plan
        for kind, rate in FAULTS.items():
            if self.options.has(kind) and (kind in ALWAYS or world.unit(f"swarm:{kind}") < 0.3):
                world.rates[kind] = rate * (0.5 + world.unit(f"strength:{kind}"))
        if "hang" in world.rates and world.unit("restless") < 0.25:
            world.rates["hang"] = 0.85
        if world.unit("swarm:background") < 0.3:
            world.rates["st-background"] = 1.0
        bounds = plan.bounds
        minutes = f", {bounds.minutes or '∞'} minutes each, {bounds.minutes_total or '∞'} in all"
        world.note(
            "settings",
            f"{'memory' if bounds.memory else 'shared store, 2 replicas'}, {plan.auth}; timeout {plan.timeout}, "
            f"{bounds.live_calls} live calls of {bounds.call_seconds} s{minutes}, {_text(bounds.user_rates)} per user, "
            f"{_text(bounds.all_rates)} in all; tokens {plan.token_lives}",
        )
        world.note("faults", ", ".join(sorted(world.rates)))

    def _announce(self, call: Call) -> None:
        """OneInbox tells of an end, if that is not lost."""
        if not self.world.fault("webhook-lost", call.id):
            self.world.later(self.world.between(f"hook:{call.id}", 0.05, 2), self.scene.webhook, call)

    # Events

    async def _events(self, planned: Collection[tuple[float, str, str]]) -> None:
        world = self.world
        for at, kind, place in planned:
            await asyncio.sleep(max(0.0, at - (world.now - BEGIN)))
            world.fire(f"{kind}@{place}")
            slot = world.pick(f"eventslot:{place}", self.scene.slots)
            if kind in ("crash", "sigterm"):
                await self._restart(kind, slot, place)
            elif kind in OUTAGES:
                self.scene.server.begin(OUTAGES[kind], world.between(f"lagged:{place}", 0.01, 0.3))
                await asyncio.sleep(world.between(f"outage:{place}", 0.1, 12))
                self.scene.server.recover()
            elif kind == "failover":
                self.scene.server.fail_over(world.between(f"unsynced:{place}", 0, 0.5))
            elif kind == "emptied":
                self.scene.server.empty()
            elif kind in ("pause", "block"):
                await self._refuse(kind, place)
            elif kind == "rotation":
                await self._rotate(place)
            elif kind == "lists-down":
                self.scene.oneinbox.lists_down_until = world.now + world.between(f"lists:{place}", 20, 200)
                world.note("oneinbox", "refuses all lists for a while")
            else:
                for replica in self.scene.running.values():
                    replica.skew += world.between(f"step:{replica.name}:{place}", -0.5, 0.5)

    async def _restart(self, kind: str, slot: str, place: str) -> None:
        if kind == "crash":
            await self.scene.kill(slot)
        else:
            await self.scene.terminate(slot)
        await asyncio.sleep(self.world.between(f"reboot:{place}", 0.1, 8 if kind == "crash" else 3))
        await self.scene.boot(slot)

    async def _refuse(self, kind: str, place: str) -> None:
        """The operator pauses all sessions or blocks a user, for a while."""
        world, scene = self.world, self.scene
        operator = Replica(world, f"operator{place}", scene.environ, Transport(world, scene.oneinbox, scene.invariants))
        switch = KillSwitch(cast("Store", StoreConnection(world, scene.server, operator)), virtual.CLOCK.monotonic)
        name = "203.0.113.1"
        user = User(mode=cast("Any", scene.plan.auth), id=name)
        refusal = Refusal(name if kind == "block" else "", world.now)
        try:
            await (switch.block(user.store_name, 600) if kind == "block" else switch.pause(600))
            refusal.since = world.now
            scene.invariants.refusals.append(refusal)
            world.note("operator", f"{kind} is confirmed")
        except StoreUnavailable:
            world.note("operator", f"{kind} fails: the store does not answer")
        await asyncio.sleep(world.between(f"refused:{place}", 2, 20))
        refusal.until = world.now
        for _ in range(30):
            try:
                await (switch.unblock(user.store_name) if kind == "block" else switch.resume())
            except StoreUnavailable:
                await asyncio.sleep(1)
            else:
                world.note("operator", f"ends the {kind}")
                return

    async def _rotate(self, place: str) -> None:
        """Change BROKER_SECRET and the API key, replica by replica: the new ones are accepted first, then used."""
        scene = self.scene
        scene.oneinbox.keys.update(API_KEYS)
        old = scene.environ
        for secret, key in (("\n".join(SECRETS), API_KEYS[0]), ("\n".join(reversed(SECRETS)), API_KEYS[1])):
            scene.environ = {**old, "BROKER_SECRET": secret, "ONEINBOX_API_KEY": key}
            for slot in scene.slots:
                await scene.terminate(slot)
                await asyncio.sleep(0.2)
                await scene.boot(slot)
        scene.oneinbox.keys.discard(API_KEYS[0])
        self.world.note("operator", f"has rotated the secrets ({place})")


@dataclass(eq=False)
class Browser:
    """One browser: it asks for calls, hangs up, repeats, talks, follows and stops."""

    scenario: Scenario
    name: str

    def __post_init__(self) -> None:
        self.scene, self.world = self.scenario.scene, self.scenario.world
        chance, users = self.world, self.world.pick("users", [1, 1, 2, 4])
        self.user = f"203.0.113.{1 + int(chance.unit(f'{self.name}:user') * users)}"
        keyed = chance.unit(f"{self.name}:keyed") < 0.65
        whose = "strangers" if chance.unit(f"{self.name}:shared") < 0.15 else self.name
        self.key = f"the-key-of-browser-{whose}" if keyed else None

    async def live(self) -> None:
        """Start calls and talk."""
        world, me = self.world, self.name
        await asyncio.sleep(world.between(f"{me}:start", 0, self.scenario.length * 0.7))
        for r in range(1 if self.key else world.pick(f"{me}:rounds", [1, 1, 2, 3])):
            path = await self._session(r)
            if path is not None:
                await self._talk(f"{me}.{r}", path)

    async def _session(self, r: int) -> str | None:
        """Ask until there is a call; return its path."""
        world = self.world
        for attempt in range(6):
            name = f"{self.name}.{r}{attempt}"
            answers = await asyncio.gather(*self._tries(name))
            got = [answer for answer in answers if not isinstance(answer, str)]
            if good := next((headers for status, headers, _ in got if status == 201), None):
                return good["location"]
            if got:
                status, headers, body = got[0]
                world.note(name, f"gets {status}")
                if status == 500:
                    world.violate("X-500", f"{name} got 500: {body[:300]!r}")
                if self.key is None and world.unit(f"again:{name}") < 0.5:
                    return None
                wait = min(float(headers.get("retry-after", 2)), 20)
                await asyncio.sleep(wait + world.between(f"wait:{name}", 0, 1))
                continue
            if self.key is None and world.unit(f"again:{name}") < 0.7:
                return None
            if answers[0] == "hung up" and world.unit(f"gives-up:{name}") < 0.15:
                return None
            await asyncio.sleep(world.between(f"back:{name}", 0, world.pick(f"backkind:{name}", [1, 40, 40])))
        return None

    def _tries(self, name: str) -> list[Coroutine[Any, Any, Answer | str]]:
        """One request, or two at nearly the same time; each may be hung up."""
        world = self.world
        hang = None
        if world.fault("hang", name):
            hang = world.length("hang", name, 0, world.pick(f"hangkind:{name}", [0.35, 0.35, 0.7, 4, 22]))
        tries = [self.scene.ask(name, "POST", "/session", self.user, key=self.key, hang_up_after=hang)]
        if self.key and world.fault("twin", name):
            tries.append(self._twin(f"{name}t"))
        return tries

    async def _twin(self, name: str) -> Answer | str:
        world = self.world
        await asyncio.sleep(world.between(f"twin:{name}", 0, world.pick(f"twinkind:{name}", [0.0, 0.02, 1.5])))
        hang = world.length("hang", name, 0, 6) if world.fault("hang", name) else None
        return await self.scene.ask(name, "POST", "/session", self.user, key=self.key, hang_up_after=hang)

    async def _talk(self, name: str, path: str) -> None:
        """Join the call, and do what people do."""
        world, scene = self.world, self.scene
        call = scene.oneinbox.calls[path.split("/")[2].partition(".")[0]]
        await asyncio.sleep(world.between(f"join:{name}", 0.05, 2))
        if call.ended is None:
            call.joined = world.now
            world.note(name, f"joins {call.id}")
        shared = self.key is not None and self.name not in self.key
        if not shared and world.unit(f"leaves:{name}") < 0.2 and not await self._leave(name, path, call):
            return
        stays = world.between(f"stay:{name}", 0.5, world.pick(f"stays:{name}", [3, 20, 60, 100_000]))
        follower = None
        if world.unit(f"follows:{name}") < 0.5:
            follower = asyncio.create_task(self._follow(f"{name}f", path, call))
        elif world.unit(f"reads:{name}") < 0.5:
            await self._read(name, path, call)
        if stays < 200:
            await asyncio.sleep(stays)
            if world.unit(f"stops:{name}") < 0.6:
                await self._stop(name, path, call)
            scene.oneinbox.end(call, "left")
        if follower is None:
            return
        if call.ended is not None:
            await asyncio.wait([follower], timeout=70)
            if not follower.done():
                world.violate("N-no-news", f"{name} is not told that {call.id} ended")
        follower.cancel()

    async def _read(self, name: str, path: str, call: Call) -> None:
        world = self.world
        for k in range(3):
            answer = await self.scene.ask(f"{name}g{k}", "GET", path, self.user)
            status = answer[0] if not isinstance(answer, str) else 0
            if status in (401, 403) or (status == 404 and not world.rates.get("get-404")):
                world.violate("K-own-call", f"{name} gets {status} for its own {call.id}")
            await asyncio.sleep(world.between(f"pause:{name}{k}", 0.1, 4))

    async def _leave(self, name: str, path: str, call: Call) -> bool:
        """Close the page, or reload it; return whether it is there again."""
        world, began = self.world, self.world.now
        after = int(world.between(f"after:{name}", 10, 31))
        call.left = began + after
        answer = await self.scene.ask(f"{name}l", "POST", f"{path}/stop?after={after}", self.user)
        if world.unit(f"returns:{name}") < 0.5:
            await asyncio.sleep(world.between(f"reload:{name}", 0, after / 4))
            back = await self.scene.ask(f"{name}b", "GET", path, self.user)
            # What the store did not take may be late, or be lost.
            if not isinstance(back, str) and back[0] == 200 and world.is_calm(began - CALM_SECONDS):
                call.left = None
            return True
        if isinstance(answer, str) or answer[0] != 200:
            return False
        await asyncio.sleep(max(0, call.left + END_SECONDS + CLOCK_SECONDS - world.now))
        if call.ended is None and not call.stops and world.is_calm(began - CALM_SECONDS):
            world.violate("L-left-running", f"{name} has left {call.id} {world.now - began:.1f} s ago")
        return False

    async def _stop(self, name: str, path: str, call: Call) -> None:
        for k in range(4):
            answer = await self.scene.ask(f"{name}s{k}", "POST", path + "/stop", self.user)
            if not isinstance(answer, str) and answer[0] == 200:
                if call.ended is None:
                    self.world.violate("S-not-stopped", f"{name}: stop of {call.id} was answered 200, and it runs")
                return
            await asyncio.sleep(2)

    async def _follow(self, name: str, path: str, call: Call) -> None:
        """Follow the call's events, reconnecting, until it is over (N: promise of section 4's events)."""
        world, ended = self.world, False
        for k in range(60):
            chunks: asyncio.Queue[bytes] = asyncio.Queue()
            stream = self.scene.connect(f"{name}{k}", "GET", path + "/events", self.user, chunks=chunks.put_nowait)
            if stream is None:
                await asyncio.sleep(1)
                continue
            try:
                while True:
                    getter = asyncio.ensure_future(chunks.get())
                    parts: list[asyncio.Future[Any]] = [getter, stream.answer]
                    await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
                    if not getter.done():
                        getter.cancel()
                        break
                    event, _, data = getter.result().decode().partition("\n")
                    status = "completed" if event == "event: end" else ""
                    if event == "event: call":
                        status = json.loads(data.partition("data: ")[2])["status"]
                    if ended and status not in ("", "completed"):
                        world.violate("N-back-to-life", f"{name}: {call.id} is told as {status} after its end")
                    if status == "completed" and call.ended is None:
                        world.violate("N-false-end", f"{name}: the end of {call.id}, which runs")
                    ended = ended or status == "completed"
                    if event == "event: end":
                        return
            finally:
                if not stream.answer.done():
                    stream.hang_up()
            if stream.status == 204:
                return
            await asyncio.sleep(1 + world.unit(f"back:{name}{k}"))
