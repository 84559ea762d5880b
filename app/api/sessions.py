"""POST /session."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import Response

from app.api.authentication import authenticate
from app.api.dependencies import BrokerDep
from app.api.openapi import answer, problems, reads
from app.api.request_body import check_declared, read_json
from app.api.routing import FastRoute
from app.problems import KINDS, invalid_request
from app.server.protocol import DISCONNECTED
from app.sessions.disconnect import ClientConnection
from app.sessions.schemas import ANSWERS, MAX_BODY, REQUESTS, Session, SessionRequest
from app.sessions.service import SessionInput

OTHER_ROUTES_PROBLEMS = ("not-found", "method-not-allowed", "too-many-streams")

router = APIRouter(tags=["sessions"], route_class=FastRoute)


@router.post(
    "/session",
    operation_id="createSession",
    summary="Start a call",
    status_code=201,
    response_model=Session,
    openapi_extra=reads(SessionRequest, "Idempotency-Key", "X-Challenge-Token", examples=REQUESTS),
    responses={
        201: answer("The call has started.", "Location", "Idempotency-Replayed", examples=ANSWERS),
        **problems(*(slug for slug in KINDS if slug not in OTHER_ROUTES_PROBLEMS)),
    },
)
async def create_session(request: Request, broker: BrokerDep) -> Response:
    """Start a call and get what the browser needs to join it: `server_url` and `participant_token`, nothing else.

    Pass both to OneInbox's Web SDK or to a LiveKit client. The body may be empty, hold the broker's own fields, or be
    LiveKit's standard token request. `Location` names the call, for following it and hanging up.

    Send an `Idempotency-Key` if you may repeat the request, so that one click never starts two calls.
    """
    state = request.scope["state"]
    check_declared(request, MAX_BODY)
    user = await authenticate(request, broker)
    entitlement = broker.plans.of(user.claims)
    state["plan"] = entitlement.plan
    broker.kill_switch.check(user, state["user"])
    body = await read_json(request, MAX_BODY)
    session_input = SessionInput(
        request=_parse(body),
        body=body,
        keys=request.headers.getlist("idempotency-key"),
        challenge_token=request.headers.get("x-challenge-token"),
        client=ClientConnection(request.receive, request.scope.get("extensions", {}).get(DISCONNECTED)),
        answer_headers=state["limit_headers"],
        entitlement=entitlement,
    )
    call, replayed = await broker.sessions.start(user, session_input)
    state["call"] = call.id
    state["outcome"] = "replayed" if replayed else "started"
    headers = {"Location": f"{broker.settings.root_path}/calls/{broker.ownership.public_id(call.id, user)}"}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    answer = to_json({"server_url": call.server_url, "participant_token": call.participant_token})
    return Response(answer, 201, headers, "application/json")


def _parse(body: Any) -> SessionRequest:
    try:
        return SessionRequest.model_validate(body)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        for each in errors:
            if each["type"] in ("model_type", "dict_type"):  # pydantic's words name its classes
                each["msg"] = "Input should be an object"
        raise invalid_request(errors) from None
