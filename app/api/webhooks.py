"""POST /webhooks/oneinbox/{secret}."""

import secrets
from typing import Annotated

from fastapi import APIRouter, Path, Request
from pydantic_core import from_json
from starlette.responses import Response

from app.api.dependencies import BrokerDep
from app.api.openapi import answer, problems, reads
from app.api.request_body import read_body
from app.api.routing import FastRoute
from app.oneinbox.models import CALL_ID
from app.problems import Problem

MAX_WEBHOOK = 1_000_000

router = APIRouter(tags=["webhooks"], route_class=FastRoute)


@router.post(
    "/webhooks/oneinbox/{secret}",
    operation_id="receiveWebhook",
    summary="Receive an event from OneInbox",
    status_code=204,
    openapi_extra=reads(None, examples={"A call has ended": {"event": "call.ended", "call_id": "call_abc123"}}),
    responses={204: answer("Received."), **problems("not-found", "body-too-large")},
)
async def receive_webhook(
    secret: Annotated[str, Path(description="BROKER_WEBHOOK_SECRET.")], request: Request, broker: BrokerDep
) -> Response:
    """Receive an event as a hint: if the broker tracks the call, it fetches the call's state from OneInbox.

    For OneInbox only. The secret in the path is the only check; a body that is not an event is ignored.
    """
    known = broker.settings.webhook_secret
    if known is None or not secrets.compare_digest(secret.encode(), known.get_secret_value().encode()):
        raise Problem("not-found")
    body = await read_body(request, MAX_WEBHOOK)
    try:
        event = from_json(body)
    except ValueError:
        event = None
    call_id = event.get("call_id") if isinstance(event, dict) else None
    if isinstance(call_id, str) and CALL_ID.fullmatch(call_id):
        broker.refresh_queue.add(call_id)
    return Response(status_code=204)
