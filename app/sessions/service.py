"""From an asking user to a started call."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.calls.ownership import BROKER_REQUEST_ID, BROKER_USER, Ownership
from app.identity import User
from app.limits import Limits
from app.oneinbox import OneInbox, WebCall
from app.oneinbox.errors import OneInboxError, Rejected
from app.problems import Problem
from app.sessions.policy import Order, Policy
from app.sessions.schemas import SessionRequest


@dataclass(frozen=True, slots=True)
class Sessions:
    """Starts calls: policy, then limits, then OneInbox."""

    policy: Policy
    limits: Limits
    oneinbox: OneInbox
    ownership: Ownership

    async def start(self, user: User, request: SessionRequest, answer_headers: dict[str, str]) -> WebCall:
        """Start a call for a user.

        `answer_headers` gets what the answer carries whatever comes of it. Raises Problem, Refused and OneInboxError.
        """
        order = self.policy.decide(user, request)
        reservation = await self.limits.reserve(user)
        answer_headers.update(reservation.headers)
        metadata = {
            **order.metadata,
            BROKER_USER: self.ownership.pseudonym(user),
            BROKER_REQUEST_ID: secrets.token_hex(16),
        }
        try:
            return await self.oneinbox.start_web_call(
                agent_id=order.agent.agent_id, variables=order.variables, overrides=order.overrides, metadata=metadata
            )
        except OneInboxError as error:
            if not error.may_have_acted:
                await self.limits.release(reservation)
            if isinstance(error, Rejected) and (errors := _of_the_browser(error.errors, request, order)):
                raise Problem("upstream-rejected", errors=errors) from error
            raise


def _of_the_browser(
    errors: Sequence[Mapping[str, Any]], request: SessionRequest, order: Order
) -> list[dict[str, Any]] | None:
    """OneInbox's complaints, when all are about something that the browser itself sent: their place and words only."""
    sent = {"variables": order.variables, "overrides": request.overrides or {}, "metadata": order.metadata}
    about: list[dict[str, Any]] = []
    for error in errors:
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
