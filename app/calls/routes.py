"""The routes of a call."""

import secrets
from typing import Annotated

from fastapi import APIRouter, Header, Path, Request
from pydantic_core import from_json
from starlette.responses import Response

from app.bodies import read_body
from app.broker import Broker, BrokerDep
from app.calls.schemas import Call, CallList
from app.identity import User
from app.oneinbox.models import CALL_ID
from app.openapi import problems
from app.problems import Problem

MAX_WEBHOOK = 1_000_000

router = APIRouter(prefix="/calls", tags=["calls"])
webhooks = APIRouter(tags=["webhooks"])

CallPath = Annotated[
    str, Path(description="The call, as the last part of POST /session's Location.", examples=["call_abc123"])
]
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
    responses=problems(*FOR_EVERYBODY, *FROM_ONEINBOX),
)
async def list_calls(request: Request, broker: BrokerDep) -> Response:
    """List your own calls of the last day, the newest first, at most 50; where nobody signs in there is no list."""
    user = await broker.admission.admit(request)
    bodies = await broker.calls.list(user)
    return Response(b'{"items":[' + b",".join(bodies) + b"]}", media_type="application/json")


@router.get(
    "/{call}",
    operation_id="getCall",
    summary="Read a call",
    response_model=Call,
    responses={
        304: {"description": "Nothing changed since the ETag given."},
        **problems(*FOR_EVERYBODY, *FROM_ONEINBOX),
    },
)
async def get_call(
    call: CallPath,
    request: Request,
    broker: BrokerDep,
    if_none_match: Annotated[str | None, Header(description="An ETag of an earlier answer.")] = None,
) -> Response:
    """Read your own call: its state, its times, and what the operator exposes beyond them."""
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
        200: {
            "description": "`call` events, each with the call as data, then `end`.",
            "content": {"text/event-stream": {}},
        },
        204: {"description": "Nothing will come after the event that Last-Event-ID names."},
        **problems(*FOR_EVERYBODY, "too-many-streams", *FROM_ONEINBOX),
    },
)
async def follow_call(
    call: CallPath,
    request: Request,
    broker: BrokerDep,
    last_event_id: Annotated[str | None, Header(description="Id of the last event seen; EventSource sends it.")] = None,
) -> Response:
    """Follow your own call as Server-Sent Events: its state at once, then each new one, then `end`."""
    user = await _admit(request, broker, call)
    stream = await broker.calls.follow(user, call, last_event_id)
    return Response(status_code=204) if stream is None else stream


@router.post(
    "/{call}/stop",
    operation_id="stopCall",
    summary="Hang up",
    response_model=Call,
    responses=problems(*FOR_EVERYBODY, *FROM_ONEINBOX),
)
async def stop_call(call: CallPath, request: Request, broker: BrokerDep) -> Response:
    """End your own call; one that has ended already is answered all the same."""
    user = await _admit(request, broker, call)
    snapshot = await broker.calls.stop(user, call)
    return Response(snapshot.body(call), headers={"ETag": snapshot.etag}, media_type="application/json")


@webhooks.post(
    "/webhooks/oneinbox/{secret}",
    operation_id="receiveWebhook",
    summary="Take an event of OneInbox",
    status_code=204,
    responses=problems("not-found", "body-too-large"),
)
async def receive_webhook(
    secret: Annotated[str, Path(description="BROKER_WEBHOOK_SECRET.")], request: Request, broker: BrokerDep
) -> Response:
    """Take an event as a hint: where the call matters here, the broker looks it up itself.

    For OneInbox only. The secret in the path is its one check; any body that is not an event is taken and ignored.
    """
    known = broker.webhook_secret
    if known is None or not secrets.compare_digest(secret.encode(), known.get_secret_value().encode()):
        raise Problem("not-found")
    body = await read_body(request, MAX_WEBHOOK)
    try:
        event = from_json(body)
    except ValueError:
        event = None
    call_id = event.get("call_id") if isinstance(event, dict) else None
    if isinstance(call_id, str) and CALL_ID.fullmatch(call_id):
        broker.hints.add(call_id)
    return Response(status_code=204)


async def _admit(request: Request, broker: Broker, call: str) -> User:
    user = await broker.admission.admit(request)
    if (call_id := broker.ownership.call_id(call, user)) is not None:
        request.scope["state"]["call"] = call_id
    return user


def _matches(if_none_match: str, etag: str) -> bool:
    """RFC 9110, section 13.1.2: any of a list, compared weakly, or `*`."""
    return any(each.strip().removeprefix("W/") in (etag, "*") for each in if_none_match.split(","))
