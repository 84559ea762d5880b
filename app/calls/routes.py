"""The routes of a call."""

from typing import Annotated

from fastapi import APIRouter, Header, Path, Request
from starlette.responses import Response

from app.broker import BrokerDep
from app.calls.schemas import ExposedCall
from app.openapi import problems

router = APIRouter(prefix="/calls", tags=["calls"])

CallPath = Annotated[
    str, Path(description="The call, as the last part of POST /session's Location.", examples=["call_abc123"])
]


@router.get(
    "/{call}",
    operation_id="getCall",
    summary="Read a call",
    response_model=ExposedCall,
    responses={
        304: {"description": "Nothing changed since the ETag given."},
        **problems(
            "unauthenticated",
            "forbidden-origin",
            "not-found",
            "rate-limited",
            "at-capacity",
            "upstream-busy",
            "upstream-error",
            "upstream-unreachable",
            "upstream-invalid",
            "upstream-misconfigured",
            "upstream-timeout",
        ),
    },
)
async def get_call(
    call: CallPath,
    request: Request,
    broker: BrokerDep,
    if_none_match: Annotated[str | None, Header(description="An ETag of an earlier answer.")] = None,
) -> Response:
    """Read your own call: its state, its times, and what the operator exposes beyond them."""
    user = await broker.admission.admit(request)
    snapshot = await broker.calls.read(user, call)
    request.scope["state"]["call"] = call.partition(".")[0]
    if if_none_match is not None and _matches(if_none_match, snapshot.etag):
        return Response(status_code=304, headers={"ETag": snapshot.etag})
    return Response(snapshot.body, headers={"ETag": snapshot.etag}, media_type="application/json")


def _matches(if_none_match: str, etag: str) -> bool:
    """RFC 9110, section 13.1.2: any of a list, compared weakly, or `*`."""
    return any(each.strip().removeprefix("W/") in (etag, "*") for each in if_none_match.split(","))
