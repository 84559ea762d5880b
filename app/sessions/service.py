"""From an asking user to a started call."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from app.calls.ownership import BROKER_REQUEST_ID, BROKER_USER, BROKER_USER_ID, Ownership
from app.identity import User
from app.limits import Limits, LiveCalls
from app.oneinbox import OneInbox, WebCall
from app.oneinbox.errors import OneInboxError, Rejected
from app.problems import Problem
from app.sessions.challenge import Challenge
from app.sessions.idempotency import Idempotency, NotKept
from app.sessions.policy import Order, Policy
from app.sessions.schemas import SessionRequest

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """One POST /session, read and checked.

    `body`: its JSON, for telling a repeat from another request. `key`: its Idempotency-Key. `proof`: its answer to the
    bot challenge. `answer_headers`: gets what the answer carries whatever comes of it.
    """

    request: SessionRequest
    body: Any
    key: str | None
    proof: str | None
    answer_headers: dict[str, str]


class Sessions:
    """Starts calls: policy, idempotency, challenge, limits, OneInbox, in this order.

    `max_waiting`: sessions that may wait for OneInbox at once. `share_user_id`: whether OneInbox's record names the
    user plainly. `challenge`: None where none is asked for.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        limits: Limits,
        live: LiveCalls,
        oneinbox: OneInbox,
        ownership: Ownership,
        idempotency: Idempotency,
        challenge: Challenge | None,
        max_waiting: int,
        share_user_id: bool,
    ) -> None:
        self._policy = policy
        self._limits = limits
        self._live = live
        self._oneinbox = oneinbox
        self._ownership = ownership
        self._idempotency = idempotency
        self._challenge = challenge
        self._max_waiting = max_waiting
        self._share_user_id = share_user_id
        self._waiting = 0

    async def start(self, user: User, asked: Asked) -> tuple[WebCall, bool]:
        """The user's new call, and False; or the call that this request started before, and True.

        Raises Problem, Refused and OneInboxError.
        """
        order = self._policy.decide(user, asked.request)

        member = secrets.token_hex(16)  # 128 bits, the broker's own: what OneInbox's record is found by

        async def start() -> WebCall:
            return await self._start(user, asked, order, member)

        if asked.key is None:
            return await start(), False
        try:
            return await self._idempotency.run(user, asked.key, asked.body, start)
        except NotKept as unkept:
            await self._live.stop(member, unkept.call.id, "its answer could not be kept")
            raise Problem("at-capacity", headers={"Retry-After": "5"}) from None

    async def _start(self, user: User, asked: Asked, order: Order, member: str) -> WebCall:
        if self._challenge is not None:
            await self._challenge.check(asked.proof, user.address)
        if self._waiting >= self._max_waiting:
            raise Problem("at-capacity", headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            return await self._reserve_and_call(user, asked, order, member)
        finally:
            self._waiting -= 1

    async def _reserve_and_call(self, user: User, asked: Asked, order: Order, member: str) -> WebCall:
        try:
            reservation = await self._limits.reserve(user, order.agent, member)
        except Problem as problem:
            # A call may have ended without anybody having looked.
            if problem.slug != "too-many-live-calls" or not await self._live.look_again(user):
                raise
            reservation = await self._limits.reserve(user, order.agent, member)
        asked.answer_headers.update(reservation.headers)
        try:
            call = await self._oneinbox.start_web_call(
                agent_id=order.agent.agent_id,
                variables=order.variables,
                overrides=order.overrides,
                metadata=self._metadata(user, order, member),
            )
        except OneInboxError as error:
            if not error.may_have_acted:
                await self._limits.release(reservation)
            elif error.call_id is not None:
                await self._live.begin(user, member=member, call_id=error.call_id, agent=order.agent.name)
                await self._live.stop(member, error.call_id, "its answer was not usable")
            if isinstance(error, Rejected) and (errors := _of_the_browser(error.errors, asked.request, order)):
                raise Problem("upstream-rejected", errors=errors) from error
            raise
        await self._live.begin(user, member=member, call_id=call.id, agent=order.agent.name)
        return call

    def _metadata(self, user: User, order: Order, member: str) -> dict[str, Any]:
        own = {BROKER_USER: self._ownership.pseudonym(user), BROKER_REQUEST_ID: member}
        if self._share_user_id:
            own[BROKER_USER_ID] = user.id
        return {**order.metadata, **own}


def _of_the_browser(
    errors: Sequence[Mapping[str, Any]], request: SessionRequest, order: Order
) -> list[dict[str, Any]] | None:
    """OneInbox's complaints, when all are about something that the browser itself sent: their place and words only."""
    sent = {"variables": order.own_variables, "overrides": request.overrides or {}, "metadata": order.metadata}
    about: list[dict[str, Any]] = []
    for error in errors[:20]:
        loc = error.get("loc")
        if not isinstance(loc, list) or not all(isinstance(part, (str, int)) for part in loc):
            return None
        path = loc[1:] if loc[:1] == ["body"] else loc
        if not _lies_under(path, sent):
            return None
        about.append({"loc": ["body", *path], "msg": str(error.get("msg", ""))[:500], "type": "upstream"})
    return about or None


def _lies_under(path: Sequence[str | int], sent: Mapping[str, Any]) -> bool:
    """Whether a path of at least two parts leads to, or below, a value in `sent`."""
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
