"""From a session request to a started call."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog
from starlette.requests import ClientDisconnect

from app.config.plans import Entitlement
from app.identity import User
from app.identity.keyring import Keyring
from app.limits import Allowance, CallAttempt, Limits, LiveCalls, Reconciler
from app.limits.call_attempt import NEVER
from app.limits.live_calls import UNUSABLE
from app.oneinbox import OneInbox, WebCall
from app.oneinbox.errors import OneInboxError, Rejected
from app.oneinbox.models import BROKER_CALL, BROKER_REQUEST_ID, BROKER_USER, BROKER_USER_ID
from app.problems import Problem, retry_later
from app.sessions.challenge import Challenge
from app.sessions.disconnect import ClientConnection
from app.sessions.handover import StartedCall, hand_over
from app.sessions.idempotency import Idempotency, read_key
from app.sessions.policy import CallSpec, Policy
from app.sessions.schemas import SessionRequest
from app.telemetry.metrics import Metrics

ACCOUNT_SETTINGS = {401: "ONEINBOX_API_KEY", 403: "ONEINBOX_API_KEY"}
"""The setting behind OneInbox's refusal, by its status."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SessionInput:
    """One POST /session, parsed.

    `body`: its JSON, to recognise repeats. `keys`: its Idempotency-Key headers. `challenge_token`: its bot
    challenge's. `answer_headers`: receives headers for the response, whatever its status. `entitlement`: the limits of
    its user.
    """

    request: SessionRequest
    body: Any
    keys: list[str]
    challenge_token: str | None
    client: ClientConnection
    answer_headers: dict[str, str]
    entitlement: Entitlement


@dataclass(kw_only=True, repr=False, eq=False)
class Sessions:
    """Start calls: policy, idempotency, challenge, limits, OneInbox, in this order.

    `max_waiting`: sessions that may wait for OneInbox at once; `waiting`: those waiting now. `share_user_id`: write the
    plain user id on OneInbox's record. `challenge`: None if not configured. `now`: Unix time.
    """

    policy: Policy
    allowance: Allowance
    limits: Limits
    live: LiveCalls
    reconciler: Reconciler
    oneinbox: OneInbox
    keyring: Keyring
    idempotency: Idempotency
    challenge: Challenge | None
    max_waiting: int
    share_user_id: bool
    metrics: Metrics
    now: Callable[[], float] = time.time
    waiting: int = field(default=0, init=False)

    async def start(self, user: User, session_input: SessionInput) -> tuple[WebCall, bool]:
        """Return the user's new call and False, or the call that this request started before and True.

        A call started for a client that has disconnected is stopped. Raises Problem, Refused, OneInboxError,
        ClientDisconnect.
        """
        spec = self.policy.decide(user, session_input.request)
        key = read_key(session_input.keys, user)
        if key is None:
            started = await self._start(user, session_input, spec)
            await hand_over(self.live, started, session_input.client)
            return started.call, False
        start = partial(self._start, user, session_input, spec)
        return await self.idempotency.once(user, key, session_input.body, session_input.client, start)

    async def _start(self, user: User, session_input: SessionInput, spec: CallSpec) -> StartedCall:
        if self.challenge is not None:
            await self.challenge.check(session_input.challenge_token, user.address)
        if self.waiting >= self.max_waiting:
            self.metrics.count_refusal(["waiting"])
            raise retry_later("at-capacity", 1, reason="waiting")
        self.waiting += 1
        try:
            return await self._reserve_and_call(user, session_input, spec)
        finally:
            self.waiting -= 1

    async def _reserve_and_call(self, user: User, session_input: SessionInput, spec: CallSpec) -> StartedCall:
        self.allowance.check()
        entitlement = session_input.entitlement
        try:
            attempt = self._attempt(user, spec, entitlement)
            reservation = await self.limits.reserve(user, spec.agent, attempt, entitlement)
        except Problem as problem:
            # A call may have ended unnoticed.
            if problem.slug != "too-many-live-calls" or not await self.live.recheck(user):
                raise
            attempt = self._attempt(user, spec, entitlement)
            reservation = await self.limits.reserve(user, spec.agent, attempt, entitlement)
        session_input.answer_headers.update(reservation.headers)
        sent = False

        def before_sending() -> None:
            nonlocal sent
            sent = False
            if session_input.client.is_closed():
                raise ClientDisconnect
            sent = True

        try:
            call = await self.oneinbox.start_web_call(
                agent_id=spec.agent.agent_id,
                variables=spec.variables,
                overrides=spec.overrides,
                metadata=self._metadata(user, spec, attempt),
                before_sending=before_sending,
            )
            return StartedCall(attempt, call)
        except OneInboxError as error:
            error.log_fields = _to_log(error, spec)
            if not error.may_have_acted:
                await self.limits.release(reservation)
            elif error.call_id is not None:
                await self.live.stop(attempt, error.call_id, UNUSABLE)
            else:
                self.reconciler.report_lost(attempt)
            if isinstance(error, Rejected) and (errors := _browser_errors(error.errors, session_input.request, spec)):
                raise Problem("upstream-rejected", errors=errors) from error
            raise
        except BaseException:  # a client that has gone, a shutdown, or a bug
            if sent:
                self.reconciler.report_lost(attempt)
            else:
                await self.limits.release(reservation)
            raise

    def _attempt(self, user: User, spec: CallSpec, entitlement: Entitlement) -> CallAttempt:
        now, longest = self.now(), entitlement.bound(spec.agent)
        return CallAttempt(
            # Never the client's request id: OneInbox's record is found by it.
            request_id=secrets.token_hex(16),
            since=int(now),
            agent=spec.agent.name,
            user=user.store_name,
            owner=self.keyring.pseudonym(user),
            organization=entitlement.organization,
            ends=now + longest if longest else NEVER,
        )

    def _metadata(self, user: User, spec: CallSpec, attempt: CallAttempt) -> dict[str, Any]:
        own = {BROKER_USER: attempt.owner, BROKER_REQUEST_ID: attempt.request_id}
        if self.live.store.shared:  # to read the call back if the store loses it
            own[BROKER_CALL] = self.keyring.seal(attempt.unwritten, self.live.ledger.seal_context(attempt.request_id))
        if self.share_user_id:
            own[BROKER_USER_ID] = user.id
        return {**spec.metadata, **own}


def _to_log(error: OneInboxError, spec: CallSpec) -> dict[str, str]:
    """Return which agent a failed start was for and, if OneInbox refused something, which setting to look at."""
    agent = spec.agent
    setting = agent.set_in if error.status == 404 else ACCOUNT_SETTINGS.get(error.status or 0, "")
    if isinstance(error, Rejected):
        settings = [_setting_of(each.get("loc"), spec) for each in error.errors[:20]]
        setting = ", ".join(filter(None, dict.fromkeys(settings)))
    return {"agent": agent.name, "agent_id": agent.agent_id} | ({"setting": setting} if setting else {})


def _setting_of(loc: Any, spec: CallSpec) -> str:
    """Return the setting behind a field that OneInbox rejected; empty if none is."""
    path = [part for part in loc if part != "body"] if isinstance(loc, list) else []
    match path:
        case ["agent_id", *_]:
            return spec.agent.set_in
        case ["variables", str(name), *_] if name in spec.agent.fixed_variables:
            return f"{spec.agent.table}.fixed_variables.{name}"
        case ["variables", str(name), *_] if name in spec.variables and name not in spec.own_variables:
            return "BROKER_VARIABLES_FROM_CLAIMS"
        case ["overrides", str(part), *_] if part in spec.agent.fixed_overrides:
            return f"{spec.agent.table}.fixed_overrides.{part}"
    return ""


def _browser_errors(
    errors: Sequence[Mapping[str, Any]], request: SessionRequest, spec: CallSpec
) -> list[dict[str, Any]] | None:
    """Return the place and text of OneInbox's errors, if all are about something that the browser itself sent."""
    overrides = request.overrides or {}
    sent = {"variables": spec.own_variables, "overrides": overrides, "metadata": spec.metadata}
    # A whole field is the browser's if nothing was added to it; the broker always adds to metadata.
    unchanged = {"variables": spec.own_variables == spec.variables, "overrides": overrides == spec.overrides}
    found: list[dict[str, Any]] = []
    for error in errors:
        loc = error.get("loc")
        if not isinstance(loc, list) or not all(isinstance(part, (str, int)) for part in loc):
            return None
        path = loc[1:] if loc[:1] == ["body"] else loc
        whole = len(path) == 1 and bool(sent.get(path[0])) and unchanged.get(path[0], False)
        if not (whole or _lies_under(path, sent)):
            return None
        found.append({"loc": ["body", *path], "msg": str(error.get("msg", ""))[:500], "type": "upstream"})
    return found[:20] or None


def _lies_under(path: Sequence[str | int], sent: Mapping[str, Any]) -> bool:
    """Return whether a path of at least two parts leads to, or below, a value in `sent`."""
    if len(path) < 2:
        return False
    value: Any = sent
    for part in path:
        if not isinstance(value, Mapping):
            return True  # below a leaf that was sent
        if part not in value:
            return False
        value = value[part]
    return True
