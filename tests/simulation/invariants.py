"""What must hold, by what outsiders see: OneInbox's truth, what browsers were given, and what a store still holds.

Each check names the promise (contract, section 6, unless said otherwise) that it is about. A violation's kind is a
letter and a word; `-restart` and so on at its end say which allowed exception it is: see ALLOWED.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.simulation.loop import BEGIN, HOST, SimTask
from tests.simulation.oneinbox import Call, Given
from tests.simulation.store import LEFT, Contents, now
from tests.simulation.world import World

if TYPE_CHECKING:
    from tests.simulation.connections import Connection
    from tests.simulation.oneinbox import OneInbox
    from tests.simulation.replicas import Replica

KINDS = {
    "A-orphan": "a call runs that no browser was given",
    "B-stopped-given": "the broker hangs up a call that a browser was given",
    "B-given-stopped": "a browser is given a call that the broker was hanging up",
    "C-two-starts": "two requests of one key start calls at once",
    "C-two-calls": "one key was given two calls",
    "D-rate": "more starts in a window than its rate",
    "D-unreserved": "a call was started without a reservation",
    "E-live-cap": "more calls of one user run than may",
    "F-left": "the store still holds something of a call that is settled",
    "G-too-long": "a call runs longer than it may",
    "H-stuck": "a request, a process or the whole run does not end",
    "I-unwanted-start": "OneInbox is asked for a call whose browser had gone",
    "K-own-call": "a user is refused its own call",
    "L-left-running": "a call runs on although its page has gone",
    "L-leak": "a process still holds something of what is over",
    "N-no-news": "a follower is not told that its call ended",
    "N-false-end": "a follower is told the end of a call that runs",
    "N-back-to-life": "a follower is told that an ended call runs",
    "P-paused": "a session starts during a pause or a block",
    "S-not-stopped": "a stop was answered 200, and the call runs",
    "T-minutes": "a session starts beyond the user's minutes",
    "T-over": "calls run on although the minutes are used up",
    "U-stranger": "a browser is given another user's call",
    "X-500": "a browser got a 500",
    "X-exception": "an exception left the app",
    "X-logged": "the broker logged a failure of its own",
    "X-uncaught": "a task failed, and no one saw it",
}
ALLOWED = {
    "-restart": "On memory:// nothing outlives the process: a killed one's calls, and those it had given, are unknown.",
    "-one-look": "On memory:// SIGTERM looks for a lost call once, and stops it once: OneInbox did not list or answer.",
    "-two-faults": "The replica was killed while the store was away, so what only it knew is gone.",
    "-emptied": "The operator emptied the store (FLUSHALL), and with it all that was known of the call.",
    "-failed-over": "The store failed over and had not copied the call's last writes, although it had confirmed them.",
    "-killed-giving": "The replica was killed after the record said `given` and before the 201's last byte was sent.",
}
"""Violations that the contract allows: the end of the kind, and why. Each is decided per call, below."""
SERIOUS = frozenset(
    {
        "settling_failed",
        "ending_failed",
        "stop_failed",
        "sweep_failed",
        "restore_failed",
        "allowance_check_failed",
        "controls_check_failed",
        "store_probe_failed",
        "reconcile_failed",
        "call_check_failed",
        "poll_failed",
        "refresh_failed",
        "secret_reload_failed",
        "unhandled_error",
    }
)
"""Log events of the broker's own failures."""
NOTICE_SECONDS = 1.0
"""A caller who hangs up is noticed within this time (promise 3)."""
PAUSE_SECONDS = 2.0
"""A pause is in force on every replica after this time (section 1)."""
END_SECONDS = 2.5
"""A call is hung up this long after its end at most (promise 9: the stop is sent within 2 s)."""
OVER_SECONDS = 3.0
"""Minutes are exceeded by this much per running call at most (promise 9)."""
UNKNOWN_SECONDS = 250.0
"""A start whose outcome is unknown counts as running for this long at most."""
NOTICED_SECONDS = 65.0
"""The end of a call that no one follows is noticed by the next sweep, or the one after it (promise 8)."""
CALM_SECONDS = 10.0
"""Promise 9 holds where nothing has failed for this long."""
CLOCK_SECONDS = 5.5
"""Two clocks differ by this much at most: each by 2 s, half a second at a step; a start is in whole seconds."""
LOOK_SECONDS = 2.0
"""The one look at SIGTERM lies at most this long before the process's end, and what it sees is a little older."""
KEPT_SECONDS = 600.0
BEFORE_EXPIRY = 60.0


def allowed(kind: str) -> bool:
    """Return whether the contract allows a violation of this kind."""
    return any(kind.endswith(end) for end in ALLOWED)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The settings that invariants compare with. Rates: (amount, seconds). `minutes`: None: no limit."""

    live_calls: int = 2
    call_seconds: int = 3600
    user_rates: tuple[tuple[int, int], ...] = ((100, 60),)
    all_rates: tuple[tuple[int, int], ...] = ((100, 60),)
    minutes: int | None = None
    minutes_total: int | None = None
    memory: bool = False


@dataclass(eq=False)
class Refusal:
    """A pause, or the block of a `user`. `since`: when it was confirmed; `until`: when its end was asked for."""

    user: str
    since: float
    until: float = math.inf


@dataclass(eq=False)
class Invariants:
    """Sees everything that happens in one world, and notes what breaks a promise."""

    world: World
    bounds: Bounds
    oneinbox: "OneInbox" = field(init=False)
    refusals: list[Refusal] = field(default_factory=list)
    logged: Counter[str] = field(default_factory=Counter)
    reservations: dict[str, tuple[float, int]] = field(default_factory=dict)
    """By request id: when it was reserved, and which memory counted it."""
    given_written: dict[str, float] = field(default_factory=dict)
    """By request id: when the record's state became `given`."""
    epoch: int = 0
    """The present process's memory, on memory://."""
    _starting: dict[tuple[str, str], list["Connection"]] = field(default_factory=dict)
    _of_key: dict[tuple[str, str], dict[str, Call]] = field(default_factory=dict)
    _emptied: list[float] = field(default_factory=list)
    _forgotten: list[tuple[float, float]] = field(default_factory=list)
    """Times whose writes a failover lost, from and to."""

    # What happens

    def log(self, method: str, name: str, fields: dict[str, Any]) -> None:
        """X: the broker's own failures are seen in its log."""
        host: Replica | None = HOST.get()
        who = host.name if host is not None else "?"
        if self.world.over or name == "request":
            return
        if method == "exception" or fields.get("exc_info") or name in SERIOUS:
            self.world.violate("X-logged", f"{who} {name} {fields}")
            return
        self.logged[name] += 1
        self.world.note(who, f"log {method}: {name} {fields}")

    def uncaught(self, context: dict[str, Any]) -> None:
        """X: no task fails unseen."""
        error, task = context.get("exception"), context.get("task") or context.get("future")
        host = task.host if isinstance(task, SimTask) else None
        if self.world.over or isinstance(error, GeneratorExit) or (host is not None and host.dead):
            return
        if "destroyed" not in context.get("message", ""):  # a process that has ended did not wait for it
            self.world.violate("X-uncaught", f"{context.get('message')}: {error!r} {task or ''}"[:400])

    def reserved(self, request_id: str, epoch: int) -> None:
        """A store counted a start."""
        self.reservations.setdefault(request_id, (self.world.now, epoch))

    def record_changed(self, request_id: str, before: str, after: str) -> None:
        """The record of a start moved from one state to another."""
        self.world.counts[f"transition {before} → {after}"] += 1
        if after == "given":
            self.given_written[request_id] = self.world.now

    def store_emptied(self) -> None:
        """The operator emptied the store."""
        self._emptied.append(self.world.now)

    def writes_lost(self, since: float) -> None:
        """A failover lost the writes since a moment."""
        self._forgotten.append((since, self.world.now))

    def start_sent(self, connection: "Connection") -> None:
        """I and C (promise 3; Idempotency-Key, section 4): no call for one who has gone, nor a second one for a key."""
        world = self.world
        if connection.noticed is not None and world.now - connection.noticed > NOTICE_SECONDS:
            world.violate("I-unwanted-start", f"{connection}: POST to OneInbox although its browser hung up long ago")
        for refusal in self.refusals:
            self._check_refusal(refusal, connection)
        if connection.key is None:
            return
        others = self._starting.setdefault(connection.key, [])
        if other := next((each for each in others if not each.replica.dead), None):
            end = self._excuse_of_counts(other.arrived or 0)
            world.violate(f"C-two-starts{end}", f"{connection} starts a call while {other} does, with the same key")
        others.append(connection)

    def start_over(self, connection: "Connection") -> None:
        """The request to OneInbox is over, however it ended."""
        if connection.key is not None and connection in (others := self._starting.get(connection.key, [])):
            others.remove(connection)

    def _check_refusal(self, refusal: Refusal, connection: "Connection") -> None:
        """P (section 1, pause and block): no session whose request came two seconds after the command."""
        world = self.world
        if refusal.user not in ("", connection.user) or connection.arrived is None:
            return
        in_force = refusal.since + PAUSE_SECONDS
        if in_force < connection.arrived < refusal.until and not self._store_lost_something(refusal.since):
            what = "block of the user" if refusal.user else "pause"
            world.violate(
                "P-paused", f"{connection} starts a call {connection.arrived - refusal.since:.1f} s into a {what}"
            )

    def call_created(self, call: Call) -> None:
        """D, E, T: a call that begins was reserved, and there was room for it."""
        world = self.world
        reserved = self.reservations.get(call.request_id)
        if reserved is None:
            world.violate("D-unreserved", f"{call.id} was started without a reservation")
        call.reserved, call.epoch = reserved or (world.now, self.epoch)
        self._check_live_calls(call)
        self._check_minutes(call)

    def _check_live_calls(self, call: Call) -> None:
        """E (promises 4 and 8): a user's running calls."""
        mine = [each for each in self.oneinbox.running() if each.user == call.user and each.epoch == call.epoch]
        most = self.bounds.live_calls * (3 if self.world.troubles else 1)  # each replica counts alone, and the store
        if len(mine) > most:
            names = ", ".join(each.id for each in mine)
            end = self._excuse_of_counts(min(each.reserved for each in mine))
            self.world.violate(f"E-live-cap{end}", f"{len(mine)} calls of one user run: {names}; {most} may")

    def _budgets(self, call: Call) -> list[tuple[int, str]]:
        """Return the minutes that a call may use, and whose they are; empty: all users'."""
        limits = ((self.bounds.minutes, call.user), (self.bounds.minutes_total, ""))
        return [(minutes, who) for minutes, who in limits if minutes is not None]

    def _most_used(self, call: Call, who: str) -> float:
        """Return the most seconds that the broker may have counted by now."""
        mine = [each for each in self.oneinbox.calls.values() if each.epoch == call.epoch and who in ("", each.user)]
        known = {each.request_id for each in self.oneinbox.calls.values()}
        unknown = [at for name, (at, epoch) in self.reservations.items() if epoch == call.epoch and name not in known]
        now = self.world.now
        # Without lists an end may go unnoticed, and the call counts on.
        listed = self.oneinbox.lists_down_until
        ends = [now if each.ended is None else min(now, max(each.ended, listed) + NOTICED_SECONDS) for each in mine]
        seconds = sum(end - each.reserved + 1 for end, each in zip(ends, mine, strict=True))
        return seconds + sum(min(now - at, UNKNOWN_SECONDS) + 1 for at in unknown)

    def _check_minutes(self, call: Call) -> None:
        """T (section 2, BROKER_TALK_MINUTES): no session once the minutes are used up, running calls included."""
        for minutes, who in self._budgets(call):
            if self.world.troubles:
                continue
            earlier = [
                each
                for each in self.oneinbox.calls.values()
                if each is not call
                and each.epoch == call.epoch
                and who in ("", each.user)
                and each.created < call.reserved
            ]
            used = sum(each.lasted(call.reserved) for each in earlier)
            if used > minutes * 60 + CLOCK_SECONDS * (1 + len(earlier)):
                end = self._excuse_of_counts(BEGIN)
                self.world.violate(
                    f"T-minutes{end}", f"{call.id} begins after {used:.0f} s of {minutes} minutes of {who or 'all'}"
                )

    def call_ended(self, call: Call) -> None:
        """G, T (promise 9): where nothing failed, no call runs longer than it may, nor on its user's last minutes."""
        world = self.world
        age = world.now - call.reserved
        late = age - self.bounds.call_seconds
        if call.given and late > END_SECONDS and world.is_calm(world.now - late - CALM_SECONDS):
            world.violate(
                f"G-too-long{self._excuse(call)}", f"{call.id} ran {age:.1f} s; {self.bounds.call_seconds} may be"
            )
        for minutes, who in self._budgets(call):
            if not call.given or (self.bounds.memory and call.epoch != self.epoch):
                continue  # it is looked for; the process that knew of it has ended
            calls = [each for each in self.oneinbox.calls.values() if each.epoch == call.epoch]
            mine = [each for each in calls if who in ("", each.user)]
            # A stop that OneInbox refuses, or does not answer, is sent again later.
            asked = next((stop.at for stop in call.stops if stop.by == "broker"), world.now)
            used = sum(each.lasted(asked) for each in mine)
            running = sum(each.ended is None or each is call for each in mine)
            used_up = asked - (used - minutes * 60) / running
            # Before OneInbox has answered, no one knows the call's id.
            latest = max(used_up, call.answered or asked) + OVER_SECONDS
            # A store that was away, or lost something, may have missed calls.
            if asked > latest and not world.troubles and world.is_calm(latest - CALM_SECONDS):
                world.violate(
                    f"T-over{self._excuse_of_counts(BEGIN)}",
                    f"{used:.1f} s of {minutes} minutes of {who or 'all'} when {call.id} ends",
                )

    def stop_sent(self, call: Call) -> None:
        """B (promise 3): the broker hangs up no call that a browser was given, before its time."""
        stop = call.stops[-1]
        if stop.by != "broker" or call.ended is not None or not call.given or not self._is_early(call):
            return
        if any(each.by == "user" for each in call.stops):
            return
        # Without a shared store a process that ends cannot leave it to another to wait for the page.
        last = self.bounds.memory and call.home.told is not None
        if call.left is not None and (last or self.world.now >= call.left - CLOCK_SECONDS):
            return
        got = "received" if call.received else "sent"
        what = f"{call.id} was {got} by {call.given[0].connection} and is hung up by {stop.replica}"
        self.world.violate(f"B-stopped-given{self._excuse_of_counts(call.reserved)}", what)

    def _is_early(self, call: Call) -> bool:
        limit = self.bounds.call_seconds
        if limit and self.world.now - call.reserved >= limit - CLOCK_SECONDS:
            return False
        return not any(self._most_used(call, who) >= minutes * 60 for minutes, who in self._budgets(call))

    def answered(self, connection: "Connection") -> None:
        """B, C, U (promise 3; Idempotency-Key): the call that a 201 names may be given, and to this browser."""
        world = self.world
        if connection.path != "/session" or world.over:
            return
        replayed = "idempotency-replayed" in connection.sent_headers
        world.note(connection.replica.name, f"answers {connection}: {connection.status}{' (replayed)' * replayed}")
        world.counts[f"answer {connection.status}{' replayed' * replayed}"] += 1
        if connection.status != 201:
            return
        call = self.oneinbox.calls[connection.call_id]
        if call.user != connection.user:
            world.violate("U-stranger", f"{connection} of {connection.user} is given {call.id} of {call.user}")
        stop = next((each for each in call.stops if each.by == "broker"), None)
        if stop is not None and self._is_early(call):
            since = f"{stop.replica} was hanging up since {stop.at - BEGIN:.2f}"
            end = self._excuse_of_counts(call.reserved)
            world.violate(f"B-given-stopped{end}", f"{connection} is given {call.id}, which {since}")
        call.given.append(Given(world.now, connection))
        if connection.key is not None:
            self._check_key(connection.key, call)

    def _check_key(self, key: tuple[str, str], call: Call) -> None:
        before = self._of_key.setdefault(key, {})
        for other in before.values():
            expires = math.inf if other.token_end is None else other.token_end - BEFORE_EXPIRY
            end = min(other.created + KEPT_SECONDS, expires) - CLOCK_SECONDS
            if other is call or other.epoch != call.epoch or self.world.now >= end:
                continue
            if any(stop.by == "broker" and stop.at <= call.created for stop in other.stops):
                continue  # a stopped call is never replayed; whether it was to be stopped, B says
            what = f"key {key[1][-2:]}: {other.id} was given, and now {call.id}"
            since = min(other.reserved, call.starter.arrived or call.reserved)
            self.world.violate(f"C-two-calls{self._excuse_of_counts(since)}", what)
        before[call.id] = call

    def received(self, connection: "Connection") -> None:
        """A browser has its answer."""
        if connection.path == "/session" and connection.status == 201:
            call = self.oneinbox.calls[connection.call_id]
            call.received.append(Given(self.world.now, connection))
            self.world.note(connection.name, f"is given {call.id}")

    # At the end

    def check_calls(self) -> None:
        """A and G (promises 3 and 9), once all had time to settle: each running call is someone's, and not too old."""
        for call in self.oneinbox.running():
            age = self.world.now - call.reserved
            end = self._excuse(call)
            if not call.given:
                giving = "" if end else self._killed_giving(call)
                self.world.violate(
                    f"A-orphan{end or giving}", f"{call.id} runs for {age:.0f} s, and no one was given it"
                )
            if age > self.bounds.call_seconds + 95:
                what = f"{call.id} runs for {age:.0f} s; {self.bounds.call_seconds} may be"
                self.world.violate(f"G-too-long{end}", what)

    def check_store(self, contents: Contents) -> None:
        """F (promise 8): once all calls are over, no slot, and nothing that `status` would list, is left."""
        for name in LEFT:
            for member in now(contents.members(name)):
                call = next((each for each in self.oneinbox.calls.values() if _is_of(member, each)), None)
                end = self._excuse(call) if call is not None else self._excuse_of_counts(BEGIN)
                self.world.violate(f"F-left{end}", f"{name} still holds {call.id if call is not None else member[:60]}")

    def check_processes(self, replicas: list["Replica"], streams: int) -> None:
        """L (promise 10): an idle process holds nothing of what is over. `streams`: those that browsers have open."""
        for replica in replicas:
            broker = replica.state["broker"]
            if broker.sessions.waiting:
                self.world.violate("L-leak", f"{replica.name}: {broker.sessions.waiting} sessions wait for OneInbox")
            if broker.gauges.poller.streams and not streams:
                self.world.violate("L-leak", f"{replica.name}: {broker.gauges.poller.streams} streams are left")

    def check_rates(self) -> None:
        """D (promise 4): in any window, never more starts than its rate, per user and in all."""
        groups: dict[tuple[str, int], list[Call]] = {}
        for call in sorted(self.oneinbox.calls.values(), key=lambda each: each.reserved):
            groups.setdefault((call.user, call.epoch), []).append(call)
            groups.setdefault(("", call.epoch), []).append(call)
        for (who, _), calls in groups.items():
            for most, seconds in self.bounds.user_rates if who else self.bounds.all_rates:
                self._check_rate(who, [call.reserved for call in calls], most, seconds)

    def _check_rate(self, who: str, times: list[float], most: int, seconds: int) -> None:
        bound = most * (3 if self.world.troubles else 1)  # each replica counts alone, and the store
        for index, end in enumerate(times):
            inside = sum(each > end - seconds for each in times[: index + 1])
            if inside > bound:
                excuse = self._excuse_of_counts(end - seconds)
                self.world.violate(
                    f"D-rate{excuse}", f"{inside} starts of {who or 'all'} in {seconds} s; {bound} may be"
                )
                return

    # What the contract allows

    def _excuse(self, call: Call) -> str:
        """Return the exception that a call falls under, if any: the end of a violation's kind, see ALLOWED."""
        if self.bounds.memory:
            return self._excuse_of_memory(call) if call.epoch != self.epoch else ""
        if any(at >= call.reserved for at in self._emptied):
            return "-emptied"
        if any(until >= call.reserved for _, until in self._forgotten):
            return "-failed-over"
        died = call.home.died
        if died is not None and any(begun <= died and end >= call.reserved for begun, end in self.world.troubles):
            return "-two-faults"
        return ""

    def _excuse_of_memory(self, call: Call) -> str:
        """The same for a call of an earlier process. SIGTERM settles what only the process knew (promise 7)."""
        home = call.home
        if call.given or home.died is not None or home.told is None:
            return "-restart"
        end = self.world.now if home.over is None else home.over
        unseen = call.listed_from > end - LOOK_SECONDS or self.oneinbox.lists_down_until > home.told
        # A stop that hangs may have been sent before.
        hangs = self.world.failed("stop-hang", home.told - self.oneinbox.timeout, end)
        return "-one-look" if unseen or hangs or self.world.failed("oi- list- get- stop-", home.told, end) else ""

    def _excuse_of_counts(self, since: float) -> str:
        """The same for what is counted over several calls."""
        if any(at >= since for at in self._emptied):
            return "-emptied"
        return "-failed-over" if any(until >= since for _, until in self._forgotten) else ""

    def _killed_giving(self, call: Call) -> str:
        """The same for a process that died between `given` and the answer's last byte: exactly then."""
        written, died = self.given_written.get(call.request_id), call.home.died
        return "-killed-giving" if written is not None and died is not None and written <= died else ""

    def _store_lost_something(self, since: float) -> bool:
        changed = any(at >= since for at in self._emptied) or any(until >= since for _, until in self._forgotten)
        return changed or self.world.store_failed(since)


def _is_of(member: str, call: Call) -> bool:
    return call.id in member.split(" ") or call.request_id in member.split(" ")
