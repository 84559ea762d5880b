"""The routes of a call."""

import re
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Header, Path, Request
from starlette.responses import Response

from app.api.authentication import authenticate
from app.api.dependencies import BrokerDep
from app.api.etags import matches
from app.api.openapi import UPSTREAM, answer, problems
from app.api.routing import FastRoute
from app.broker.context import Broker
from app.calls.schemas import CALLS, ENDED, EVENTS, Call, CallList
from app.calls.snapshots import Snapshot
from app.identity import User
from app.problems import Problem, invalid_request

router = APIRouter(prefix="/calls", tags=["calls"], route_class=FastRoute)

CallPath = Annotated[str, Path(description="The call: the last part of the Location that POST /session returned.")]
MOST_AFTER = 30
AFTER = {
    "name": "after",
    "in": "query",
    "required": False,
    "description": "Seconds from now at which to hang up.",
    "schema": {"type": "integer", "minimum": 1, "maximum": MOST_AFTER},
}
PROBLEMS = ("unauthenticated", "forbidden-origin", "not-found", "rate-limited", "at-capacity", *UPSTREAM)


@router.get(
    "",
    operation_id="listCalls",
    summary="List your calls",
    response_model=CallList,
    responses={
        200: answer("Your calls.", examples={"One": {"items": [CALLS[ENDED]]}, "None": {"items": []}}),
        **problems(*PROBLEMS),
    },
)
async def list_calls(request: Request, broker: BrokerDep) -> Response:
    """List your own calls of the last day, newest first, at most 50. In anonymous mode there is no list (404)."""
    user = await authenticate(request, broker)
    bodies = await broker.calls.list(user)
    return Response(b'{"items":[' + b",".join(bodies) + b"]}", media_type="application/json")


@router.get(
    "/{call}",
    operation_id="getCall",
    summary="Read a call",
    response_model=Call,
    responses={
        200: answer("The call's current state.", "ETag", examples=CALLS),
        304: answer("Unchanged since the ETag that you sent.", "ETag"),
        **problems(*PROBLEMS),
    },
)
async def get_call(
    call: CallPath,
    request: Request,
    broker: BrokerDep,
    if_none_match: Annotated[
        str | None, Header(alias="If-None-Match", description="The ETag of an earlier response; 304 if unchanged.")
    ] = None,
) -> Response:
    """Read your own call: its state, its times, and whatever else the operator exposes.

    Another user's call, a wrong key and a call that does not exist give the same 404.
    """
    snapshot = await broker.calls.read(*await _authenticate(request, broker, call))
    if if_none_match is not None and matches(if_none_match, snapshot.etag):
        return Response(status_code=304, headers={"ETag": snapshot.etag})
    return _response(snapshot, call)


@router.get(
    "/{call}/events",
    operation_id="followCall",
    summary="Follow a call",
    response_class=Response,
    responses={
        200: answer("Events, as long as the call lasts.", texts={"text/event-stream": EVENTS}),
        204: answer("You have seen the last event; an EventSource does not reconnect after this."),
        **problems(*PROBLEMS, "too-many-streams"),
    },
)
async def follow_call(
    call: CallPath,
    request: Request,
    broker: BrokerDep,
    last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", description="The last event's id; sent by an EventSource.")
    ] = None,
) -> Response:
    """Follow your own call as Server-Sent Events: its current state, each new state, then `end`.

    - `call`: the call as `GET /calls/{call}` returns it; the event's id is the ETag.
    - `ending`: the broker will end the call at `ends_at`, in `seconds_left`; `reason` says why.
    - `end`: no more events will come.

    `ending` comes once, BROKER_WARN_SECONDS before the end, or at once if less is left; again only if the end comes
    nearer by more than 10 s.

    A comment every 15 seconds keeps the connection alive. It closes without `end` after an hour, when your token
    expires, and when the broker stops; an EventSource then reconnects by itself.
    """
    stream = await broker.calls.follow(*await _authenticate(request, broker, call), last_event_id)
    return Response(status_code=204) if stream is None else stream


@router.post(
    "/{call}/stop",
    operation_id="stopCall",
    summary="Hang up",
    response_model=Call,
    responses={
        200: answer("The ended call; with `after` its current state.", "ETag", examples={ENDED: CALLS[ENDED]}),
        **problems(*PROBLEMS, "invalid-request"),
    },
    openapi_extra={"parameters": [AFTER]},
)
async def stop_call(call: CallPath, request: Request, broker: BrokerDep) -> Response:
    """End your own call. A call that has already ended gives the same response, so it is safe to repeat.

    With `after` it ends that many seconds from now, unless you read or follow it before: for a page that is being
    closed or reloaded.
    """
    user, call_id = await _authenticate(request, broker, call)
    after = _seconds(request.query_params.getlist("after"))
    stopped = broker.calls.stop(user, call_id) if after is None else broker.calls.stop_later(user, call_id, after)
    return _response(await stopped, call)


async def _authenticate(request: Request, broker: Broker, call: str) -> tuple[User, str]:
    """Return the user, and OneInbox's id of the call, which is logged.

    Raises `not-found` for a malformed id and a wrong key, without asking OneInbox.
    """
    user = await authenticate(request, broker)
    call_id = broker.ownership.call_id(call, user)
    if call_id is None:
        raise Problem("not-found")
    request.scope["state"]["call"] = call_id
    return user, call_id


def _seconds(given: Sequence[str]) -> int | None:
    """Return the seconds of `after`; None without it. Raises `invalid-request`."""
    if not given:
        return None
    if len(given) == 1 and re.fullmatch("[0-9]{1,2}", given[0]) and 1 <= int(given[0]) <= MOST_AFTER:
        return int(given[0])
    message = f"Input should be one whole number, 1 to {MOST_AFTER}"
    raise invalid_request([{"loc": ("query", "after"), "msg": message, "type": "int_parsing"}])


def _response(snapshot: Snapshot, call: str) -> Response:
    return Response(snapshot.body(call), headers={"ETag": snapshot.etag}, media_type="application/json")
