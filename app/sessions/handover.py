"""Give a started call to its client, or see to it that it does not run for no one."""

import asyncio
from typing import NamedTuple

import structlog
from starlette.requests import ClientDisconnect

from app.limits import CallAttempt, LiveCalls
from app.limits.ledger import Kept
from app.limits.live_calls import COLLECT_SECONDS, HUNG_UP, NOT_KEPT
from app.oneinbox import WebCall
from app.problems import retry_later
from app.sessions.disconnect import ClientConnection
from app.store import StoreUnavailable

log = structlog.get_logger(__name__)


class StartedCall(NamedTuple):
    """A started call and its attempt."""

    attempt: CallAttempt
    call: WebCall


async def hand_over(live: LiveCalls, started: StartedCall, client: ClientConnection, kept: Kept | None = None) -> None:
    """Record that the client gets the call, right before the response.

    `kept`: the response to keep for repeats; then the call of a client that has gone waits for one. Raises
    ClientDisconnect, and `at-capacity` if the response cannot be kept.
    """
    attempt, call_id = started.attempt, started.call.id
    present = not client.is_closed()
    try:
        if not present and kept is None:
            await live.stop(attempt, call_id, HUNG_UP)
            raise ClientDisconnect
        try:
            if present or kept is None:
                given = await live.give(attempt, call_id, kept)
            else:
                given = await live.leave(attempt, call_id, kept)
        except StoreUnavailable:
            given = False
        if not given:
            # A repeat would start another call. If the store kept the response after all, a repeat may collect it.
            await live.withdraw(attempt, call_id, NOT_KEPT)
            raise retry_later("at-capacity", 5, reason="not-kept")
        if present and not await client.poll_is_closed():
            return
        if present:
            await live.withdraw(attempt, call_id, HUNG_UP)
    except asyncio.CancelledError:  # the process ends
        await live.abandon(attempt, call_id)
        raise
    if kept is not None:
        log.warning("client_disconnected", call=call_id, waits=COLLECT_SECONDS)
    raise ClientDisconnect
