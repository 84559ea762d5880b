"""The routes of a call."""

from typing import Annotated

from fastapi import APIRouter, Header, Path, Request
from starlette.responses import Response

from app.api.authentication import authenticate
from app.api.dependencies import BrokerDep
from app.api.openapi import answer, problems
from app.api.routing import FastRoute
from app.broker.context import Broker
from app.calls.schemas import CALLS, ENDED, EVENTS, Call, CallList
from app.identity import User

router = APIRouter(prefix="/calls", tags=["calls"], route_class=FastRoute)

CallPath = Annotated[str, Path(description="The call: the last part of the Location that POST /session answered.")]
FOR_EVERYBODY = ("unauthenticated", "forbidden-origin", "not-found", "rate-limited", "at-capacity")
FROM_ONEINBOX = (
    "upstream-busy",
    "upstream-error",
    "upstream-unreachable",
    "upstream-invalid",
    "upstream-misconfigured",
    "upstream-timeout",
)


@router.get(
    "",
    operation_id="listCalls",
    summary="List your calls",
    response_model=CallList,
    responses={
        200: answer("Your calls.", examples={"One": {"items": [CALLS[ENDED]]}, "None": {"items": []}}),
        **problems(*FOR_EVERYBODY, *FROM_ONEINBOX),
    },
)
async def list_calls(request: Request, broker: BrokerDep) -> Response:
    """List your own calls of the last day, the newest first, at most 50; where nobody signs in there is no list."""
    user = await authenticate(request, broker)
    bodies = await broker.calls.list(user)
    return Response(b'{"items":[' + b",".join(bodies) + b"]}", media_type="application/json")


@router.get(
    "/{call}",
    operation_id="getCall",
    summary="Read a call",
    response_model=Call,
    responses={
        200: answer("The call as it is now.", "ETag", examples=CALLS),
        304: answer("Nothing changed since the ETag that you sent.", "ETag"),
        **problems(*FOR_EVERYBODY, *FROM_ONEINBOX),
    },
)
async def get_call(
    call: CallPath,
    request: Request,
    broker: BrokerDep,
    if_none_match: Annotated[
        str | None, Header(alias="If-None-Match", description="The ETag of an earlier answer; unchanged: 304.")
    ] = None,
) -> Response:
    """Read your own call: its state, its times, and what the operator exposes beyond them.

    Somebody else's call, a wrong key and a call that does not exist are the same 404.
    """
    user = await _admit(request, broker, call)
    _, snapshot = await broker.calls.read(user, call)
    if if_none_match is not None and _matches(if_none_match, snapshot.etag):
        return Response(status_code=304, headers={"ETag": snapshot.etag})
    return Response(snapshot.body(call), headers={"ETag": snapshot.etag}, media_type="application/json")


@router.get(
    "/{call}/events",
    operation_id="followCall",
    summary="Follow a call",
    response_class=Response,
    responses={
        200: answer("Events, for as long as the call lasts.", texts={"text/event-stream": EVENTS}),
        204: answer("You have seen the last event; an EventSource does not come back after this."),
        **problems(*FOR_EVERYBODY, "too-many-streams", *FROM_ONEINBOX),
    },
)
async def follow_call(
    call: CallPath,
    request: Request,
    broker: BrokerDep,
    last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", description="The last event's id; an EventSource sends it.")
    ] = None,
) -> Response:
    """Follow your own call as Server-Sent Events: its state at once, then each new one, then `end`.

    - `call`: the call as `GET /calls/{call}` answers it; its id is the ETag.
    - `end`: nothing more will come.

    A comment every 15 seconds keeps the connection alive. It closes without `end` after an hour, at the end of the
    token you signed in with, and when the broker stops: an EventSource then connects again by itself.
    """
    user = await _admit(request, broker, call)
    stream = await broker.calls.follow(user, call, last_event_id)
    return Response(status_code=204) if stream is None else stream


@router.post(
    "/{call}/stop",
    operation_id="stopCall",
    summary="Hang up",
    response_model=Call,
    responses={
        200: answer("The call, which has ended.", "ETag", examples={ENDED: CALLS[ENDED]}),
        **problems(*FOR_EVERYBODY, *FROM_ONEINBOX),
    },
)
async def stop_call(call: CallPath, request: Request, broker: BrokerDep) -> Response:
    """End your own call. One that has ended already is answered all the same, so asking twice does no harm."""
    user = await _admit(request, broker, call)
    snapshot = await broker.calls.stop(user, call)
    return Response(snapshot.body(call), headers={"ETag": snapshot.etag}, media_type="application/json")


async def _admit(request: Request, broker: Broker, call: str) -> User:
    user = await authenticate(request, broker)
    if (call_id := broker.ownership.call_id(call, user)) is not None:
        request.scope["state"]["call"] = call_id
    return user


def _matches(if_none_match: str, etag: str) -> bool:
    """RFC 9110, section 13.1.2: any of a list, compared weakly, or `*`."""
    return any(each.strip().removeprefix("W/") in (etag, "*") for each in if_none_match.split(","))
