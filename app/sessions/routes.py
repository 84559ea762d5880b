"""POST /session."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import Response

from app.bodies import check_declared, read_json
from app.broker import BrokerDep
from app.openapi import json_body, problems
from app.problems import invalid_request
from app.sessions.schemas import MAX_BODY, Session, SessionRequest

router = APIRouter(tags=["sessions"])


@router.post(
    "/session",
    operation_id="createSession",
    summary="Start a call",
    status_code=201,
    response_model=Session,
    openapi_extra={"requestBody": json_body(SessionRequest)},
    responses=problems(
        "malformed-json",
        "forbidden-origin",
        "variable-not-allowed",
        "override-not-allowed",
        "agent-not-allowed",
        "identity-mismatch",
        "body-too-large",
        "unsupported-media-type",
        "invalid-request",
        "upstream-rejected",
        "rate-limited",
        "upstream-error",
        "upstream-unreachable",
        "upstream-invalid",
        "upstream-misconfigured",
        "upstream-busy",
        "upstream-timeout",
    ),
)
async def create_session(request: Request, broker: BrokerDep) -> Response:
    """Start a call and get what the browser needs to join it: `server_url` and `participant_token`, nothing else.

    The body may be empty, hold the broker's own fields, or be LiveKit's standard token request. `Location` names the
    call, for following it.
    """
    state = request.scope["state"]
    check_declared(request, MAX_BODY)
    user = await broker.identity.identify(request)
    state["user"] = broker.ownership.pseudonym(user)[:16]
    asked = _parse(await read_json(request, MAX_BODY))
    call = await broker.sessions.start(user, asked, state["limit_headers"])
    state["call"] = call.id
    location = f"{broker.root_path}/calls/{broker.ownership.public_id(call.id, user)}"
    body = to_json({"server_url": call.server_url, "participant_token": call.participant_token})
    return Response(body, 201, {"Location": location}, "application/json")


def _parse(body: Any) -> SessionRequest:
    try:
        return SessionRequest.model_validate(body)
    except ValidationError as error:
        places = error.errors(include_url=False, include_context=False, include_input=False)
        raise invalid_request([{**each, "loc": ("body", *each["loc"])} for each in places]) from None
