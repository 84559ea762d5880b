"""Planted bugs: each breaks one promise, and an invariant must find it. They judge the simulation.

A bug patches a part at its edge, by a name that is likely to stay.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import app.broker.build
from app.calls.cache import CallCache
from app.calls.poller import Subscription
from app.identity import User
from app.identity.keyring import Keyring
from app.limits import KillSwitch, LiveCalls, Reconciler
from app.oneinbox import CallRecord, OneInbox
from app.oneinbox.errors import NoSuchCall, OneInboxError
from app.oneinbox.models import CallPage
from app.sessions.disconnect import ClientConnection
from app.sessions.idempotency import Idempotency
from app.store.budget import UsedTime
from app.store.failover import FailoverStore
from tests.simulation.loop import REQUEST
from tests.simulation.scenario import Options

Patch = AbstractContextManager[object]


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug. `kind`: the violation that shows it. `apply`: patches the app. `options`: of the runs that look for it."""

    kind: str
    apply: Callable[[], Patch]
    options: Options = field(default_factory=Options)


PLANTS: dict[str, Plant] = {}


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Plant a bug for a while; None: none."""
    with PLANTS[name].apply() if name is not None else contextlib.nullcontext():
        yield


def plant(kind: str, options: Options | None = None) -> Callable[[Callable[[], Patch]], Callable[[], Patch]]:
    """Register a bug under its function's name."""

    def register(apply: Callable[[], Patch]) -> Callable[[], Patch]:
        PLANTS[apply.__name__.replace("_", "-")] = Plant(kind, apply, options or Options())
        return apply

    return register


async def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""


SHARED = Options(memory=False)


@plant("A-orphan")
def unwanted_calls_are_not_stopped() -> Patch:
    """The broker only looks at a call where it should hang it up."""
    stop = OneInbox.stop_call

    async def stop_call(self: OneInbox, call_id: str) -> CallRecord:
        of_user = REQUEST.get() is not None and "/stop" in REQUEST.get().path
        return await (stop(self, call_id) if of_user else self.get_call(call_id))

    return patch.object(OneInbox, "stop_call", stop_call)


@plant("S-not-stopped")
def a_users_stop_is_not_sent() -> Patch:
    """A stop is answered with the call's state, and not sent."""
    return patch.object(OneInbox, "stop_call", OneInbox.get_call)


@plant("A-orphan")
def lost_calls_are_not_found() -> Patch:
    """The lists of calls seem empty."""

    async def list_calls(self: OneInbox, **_: Any) -> CallPage:
        return CallPage.model_validate({"items": []})

    return patch.object(OneInbox, "list_calls", list_calls)


@plant("A-orphan")
def a_doubtful_start_counts_as_none() -> Patch:
    """After a timeout or a 5xx the reservation is given back, although the call may exist."""
    start = OneInbox.start_web_call

    async def start_web_call(self: OneInbox, **spec: Any) -> Any:
        try:
            return await start(self, **spec)
        except OneInboxError as error:
            error.may_have_acted = False
            raise

    return patch.object(OneInbox, "start_web_call", start_web_call)


@plant("A-orphan")
def uncollected_calls_are_kept() -> Patch:
    """A call whose browser did not come back is not stopped."""
    return patch.object(LiveCalls, "take_due", _nothing)


@plant("L-left-running")
def pages_that_have_gone_keep_their_calls() -> Patch:
    """`stop?after=` is answered, and forgotten."""

    async def stop_later(*_: Any) -> bool:
        return True

    return patch.object(LiveCalls, "stop_later", stop_later)


@plant("B-stopped-given")
def a_page_that_comes_back_loses_its_call() -> Patch:
    """A read does not take `stop?after=` back."""
    return patch.object(LiveCalls, "keep", _nothing)


@plant("A-orphan", Options(memory=True, only=frozenset({"sigterm", "start-5xx-after", "start-hang-after"})))
def sigterm_forgets() -> Patch:
    """SIGTERM ends the process without settling what only it knows."""
    return patch.object(app.broker.build, "settle", _nothing)


@plant("E-live-cap", SHARED)
def a_404_is_believed_at_once() -> Patch:
    """One 404 counts as the call's end."""
    get = OneInbox.get_call

    async def get_call(self: OneInbox, call_id: str) -> CallRecord:
        try:
            return await get(self, call_id)
        except NoSuchCall:
            return CallRecord.model_validate({"id": call_id, "status": "completed"})

    return patch.object(OneInbox, "get_call", get_call)


@plant("F-left")
def slots_are_never_freed() -> Patch:
    """No call is ever seen to have ended."""
    return patch.object(CallRecord, "ended", property(lambda self: False))


@plant("G-too-long")
def calls_have_no_end() -> Patch:
    """No call runs too long."""
    return patch.object(LiveCalls, "_overdue", lambda *_: "")


@plant("B-stopped-given")
def calls_end_too_soon() -> Patch:
    """A call is hung up after 20 seconds."""
    begin = LiveCalls.__init__

    def __init__(self: LiveCalls, *args: Any, **settings: Any) -> None:  # noqa: N807 - replaces it
        begin(self, *args, **{**settings, "max_seconds": 20})

    return patch.object(LiveCalls, "__init__", __init__)


@plant("B-given-stopped")
def a_stopped_call_is_replayed() -> Patch:
    """A kept answer is given without a look at the record."""

    async def always(*_: Any, **__: Any) -> bool:
        return True

    return patch.object(LiveCalls, "collect", always)


@plant("C-two-starts", SHARED)
def a_key_is_no_lock() -> Patch:
    """Each request of a key believes that it is the first."""
    add = FailoverStore.add

    async def add_always(self: FailoverStore, name: str, value: bytes, ttl: float) -> bool:
        return await add(self, name, value, ttl) or name.startswith("answer:")

    return patch.object(FailoverStore, "add", add_always)


@plant("D-rate", SHARED)
def rates_are_counted_per_replica() -> Patch:
    """Each replica counts alone."""
    decide = FailoverStore.decide

    async def decide_alone(self: FailoverStore, request: Any) -> Any:
        if request.cost and request.member:
            await decide(self, request._replace(rates=()))
            return await self._local.decide(request._replace(slots=(), member=""))
        return await decide(self, request)

    return patch.object(FailoverStore, "decide", decide_alone)


@plant("E-live-cap", SHARED)
def a_sweep_frees_the_slots_of_running_starts() -> Patch:
    """A sweep believes that what has no call yet has none."""

    def report_stale(self: Reconciler, attempts: Any) -> None:
        import asyncio

        for attempt in attempts:
            asyncio.create_task(self.live.release(attempt))  # noqa: RUF006 - ends with the run

    return patch.object(Reconciler, "report_stale", report_stale)


@plant("I-unwanted-start")
def a_browser_that_left_is_not_noticed() -> Patch:
    """No hang-up is ever seen."""
    return patch.object(ClientConnection, "is_closed", lambda self: False)


@plant("K-own-call", Options(only=frozenset({"rotation"})))
def only_the_first_secret_verifies() -> Patch:
    """What the second secret signed is refused."""
    use = Keyring.use
    return patch.object(Keyring, "use", lambda self, secrets: use(self, secrets[:1]))


@plant("N-no-news")
def followers_are_not_told() -> Patch:
    """A stream never learns of a change."""
    return patch.object(Subscription, "update", lambda *_, **__: None)


@plant("N-back-to-life")
def a_stale_read_is_believed() -> Patch:
    """Each answer is the newest, whenever it was asked for."""
    update = CallCache.update

    async def update_anyway(self: CallCache, record: CallRecord, since: float) -> Any:
        self._cache.pop(record.id, None)
        return await update(self, record, since)

    return patch.object(CallCache, "update", update_anyway)


@plant("P-paused", Options(memory=False, only=frozenset({"pause", "block"})))
def a_pause_is_ignored() -> Patch:
    """Sessions start in spite of a pause or a block."""
    return patch.object(KillSwitch, "check", lambda *_: None)


@plant("T-minutes")
def minutes_of_ended_calls_are_free() -> Patch:
    """Only running calls count."""
    leave = UsedTime.leave
    return patch.object(UsedTime, "leave", lambda used, member, _: leave(used, member, 0))


@plant("T-over")
def minutes_end_no_calls() -> Patch:
    """Minutes only refuse the next session."""
    return patch.object(LiveCalls, "_end_budget", _nothing)


@plant("U-stranger")
def keys_belong_to_no_one() -> Patch:
    """Two users with the same key share an answer."""
    once = Idempotency.once
    anyone = User(mode="anonymous", id="anyone")

    async def once_for_all(self: Idempotency, user: User, *rest: Any) -> Any:
        return await once(self, anyone, *rest)

    return patch.object(Idempotency, "once", once_for_all)
