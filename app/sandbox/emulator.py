"""The OneInbox emulator: an offline OneInbox for tests, with faults on demand.

`/v1` is OneInbox's API; `/_emulator` is the control surface, for loopback peers only.
"""

import asyncio
import base64
import binascii
import secrets
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import islice
from typing import Annotated, Any, cast

from fastapi import APIRouter, Body, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse

from app.sandbox.calls import Call, Calls, record, timestamp, usage
from app.sandbox.faults import AnyFault, Faults
from app.sandbox.middleware import CONTROL, MAX_REQUESTS, RecordedRequest, RecordingMiddleware
from app.sandbox.options import EmulatorOptions
from app.sandbox.rooms import Rooms
from app.sandbox.schemas import CallOverride, RegisterWebhook, StartCall
from app.sandbox.tokens import participant_token
from app.sandbox.webhooks import EVENTS, GUIDE_EVENTS, Webhooks, is_loopback_address

__all__ = ["Emulator", "EmulatorOptions", "create_emulator"]


class Emulator:
    """The emulated account's state, at `app.state.emulator`."""

    def __init__(self, options: EmulatorOptions) -> None:
        self.options = options
        self.calls = Calls(options)
        self.webhooks = Webhooks(options, self.calls)
        self.rooms = None if options.voice == "none" else Rooms(options, self.calls, self.webhooks.follow)
        self.faults = Faults()
        self.requests: deque[RecordedRequest] = deque(maxlen=MAX_REQUESTS)

    def record(self, call: Call, *, listed: bool = False) -> dict[str, Any]:
        """Return the call's record as OneInbox answers it now."""
        answer = record(call, self.calls.state(call), self.options)
        if listed and not self.options.list_metadata:
            answer.pop("metadata", None)
        return answer

    def changed(self, call: Call) -> None:
        """Let a new state of a call take effect outside."""
        self.webhooks.follow(call)
        if self.rooms is not None:
            self.rooms.follow(call)

    def override(self, call: Call, change: CallOverride) -> None:
        """Change a call by hand: its status, or what its record shows."""
        if "status" in change.model_fields_set:
            self.calls.force(call, change.status)
            self.changed(call)
        call.extra |= change.set
        call.removed = (call.removed - change.set.keys()) | set(change.remove)


def create_emulator(options: EmulatorOptions = EmulatorOptions()) -> FastAPI:  # noqa: B008 - frozen
    """Return the emulator as an ASGI app, with its state at `app.state.emulator`.

    Faults that cut connections need the server of `app.sandbox.server`; webhooks need the lifespan.
    """
    emulator = Emulator(options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        deliveries = asyncio.create_task(emulator.webhooks.run())
        yield
        if emulator.rooms is not None:
            await emulator.rooms.aclose()
        deliveries.cancel()
        with suppress(asyncio.CancelledError):
            await deliveries

    app = FastAPI(title="OneInbox emulator", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.emulator = emulator
    app.add_middleware(RecordingMiddleware, faults=emulator.faults, requests=emulator.requests, now=options.now)
    app.include_router(_api)
    app.include_router(_control)
    return app


# Dependencies are coroutines because FastAPI runs plain functions in a thread.


async def _state(request: Request) -> Emulator:
    return cast("Emulator", request.app.state.emulator)


State = Annotated[Emulator, Depends(_state)]


async def _authenticated(request: Request, emulator: State) -> None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    right = secrets.compare_digest(token.strip().encode(), emulator.options.api_key.encode())
    if scheme.lower() != "bearer" or not right:
        raise HTTPException(401, "Invalid API key", {"WWW-Authenticate": "Bearer"})


async def _from_loopback(request: Request) -> None:
    if request.client is None or not is_loopback_address(request.client.host):
        raise HTTPException(403, "The control surface is for loopback peers only")


async def _known_call(call_id: str, emulator: State) -> Call:
    call = emulator.calls.get(call_id)
    if call is None:
        raise HTTPException(404, "Call not found")
    return call


KnownCall = Annotated[Call, Depends(_known_call)]
Limit = Annotated[int, Query(ge=1, le=100)]

_api = APIRouter(prefix="/v1", dependencies=[Depends(_authenticated)])
_control = APIRouter(prefix=CONTROL, dependencies=[Depends(_from_loopback)])


@_api.post("/calls/web")
async def start_call(body: StartCall, emulator: State) -> JSONResponse:
    """Start a web call."""
    options = emulator.options
    if body.agent_id not in options.agents:
        raise HTTPException(404, "Agent not found")
    if emulator.rooms is not None and emulator.rooms.full:
        raise HTTPException(429, "Too many calls")
    call = emulator.calls.start(body)
    emulator.webhooks.follow(call)
    if emulator.rooms is not None:
        await emulator.rooms.open(call)
    answer: dict[str, Any] = {
        "id": call.id,
        "server_url": options.server_url,
        "participant_token": participant_token(options, call.room_name, call.created_at),
    }
    if options.edition == "reference":
        answer |= {
            "agent_id": call.agent_id,
            "type": "web",
            "status": emulator.calls.state(call).status,
            "room_name": call.room_name,
            "created_at": timestamp(call.created_at),
        }
    return JSONResponse(answer, 201)


@_api.get("/calls")
async def list_calls(
    emulator: State,
    limit: Limit = 20,
    offset: Annotated[int, Query(ge=0)] = 0,
    agent_id: str | None = None,
    status: str | None = None,
) -> JSONResponse:
    """List calls, newest first, by offset."""
    found = list(_find(emulator, agent_id, status))
    items = [emulator.record(call, listed=True) for call in found[offset : offset + limit]]
    return JSONResponse({"items": items, "total": len(found), "limit": limit, "offset": offset})


@_api.get("/calls/cursor")
async def list_calls_by_cursor(
    emulator: State,
    limit: Limit = 20,
    cursor: str | None = None,
    agent_id: str | None = None,
    status: str | None = None,
) -> JSONResponse:
    """List calls, newest first, by cursor."""
    before = None if cursor is None else _decode_cursor(cursor)
    found = (call for call in _find(emulator, agent_id, status) if before is None or call.number < before)
    page = list(islice(found, limit + 1))
    more = len(page) > limit
    items = [emulator.record(call, listed=True) for call in page[:limit]]
    next_cursor = _encode_cursor(page[limit - 1].number) if more else None
    return JSONResponse({"items": items, "next_cursor": next_cursor, "has_more": more, "limit": limit})


@_api.get("/calls/{call_id}")
async def get_call(call: KnownCall, emulator: State) -> JSONResponse:
    """Return one call."""
    return JSONResponse(emulator.record(call))


@_api.post("/calls/{call_id}/stop")
async def stop_call(call: KnownCall, emulator: State) -> JSONResponse:
    """End a running call."""
    emulator.calls.stop(call)
    emulator.changed(call)
    return JSONResponse(emulator.record(call))


@_api.delete("/calls/{call_id}", status_code=204)
async def delete_call(call: KnownCall, emulator: State) -> Response:
    """Remove a call's record."""
    emulator.calls.delete(call)
    emulator.changed(call)
    return Response(status_code=204)


@_api.get("/agents/{agent_id}")
async def get_agent(agent_id: str, emulator: State) -> JSONResponse:
    """Return one agent."""
    if agent_id not in emulator.options.agents:
        raise HTTPException(404, "Agent not found")
    return JSONResponse(
        {
            "id": agent_id,
            "name": agent_id,
            "max_duration_seconds": emulator.options.max_duration_seconds,
            "silence_timeout_seconds": emulator.options.silence_timeout_seconds,
            "enable_recording": True,
            "language": "en",
            "first_message": None,
        }
    )


@_api.get("/usage")
async def get_usage(emulator: State) -> JSONResponse:
    """Return the calls of the day and the month."""
    return JSONResponse(usage(emulator.calls, emulator.options))


@_api.post("/webhooks")
async def register_webhook(body: RegisterWebhook, emulator: State) -> JSONResponse:
    """Register a webhook."""
    known = GUIDE_EVENTS if emulator.options.edition == "guide" else EVENTS
    if wrong := [
        {"type": "enum", "loc": ["body", "events", place], "msg": f"Input should be one of {', '.join(sorted(known))}"}
        for place, event in enumerate(body.events)
        if event not in known
    ]:
        return JSONResponse({"detail": wrong}, 422)
    webhook = emulator.webhooks.register(body)
    return JSONResponse(webhook.to_json() | {"secret": webhook.secret}, 201)


@_api.get("/webhooks")
async def list_webhooks(emulator: State) -> JSONResponse:
    """List all webhooks."""
    items = [webhook.to_json() for webhook in emulator.webhooks]
    return JSONResponse({"items": items, "total": len(items)})


@_api.delete("/webhooks/{webhook_id}", status_code=204)
async def remove_webhook(webhook_id: str, emulator: State) -> Response:
    """Remove a webhook."""
    if not emulator.webhooks.remove(webhook_id):
        raise HTTPException(404, "Webhook not found")
    return Response(status_code=204)


@_control.post("/faults")
async def add_faults(rules: Annotated[list[AnyFault], Body()], emulator: State) -> JSONResponse:
    """Append fault rules."""
    emulator.faults.add(*rules)
    return JSONResponse([rule.model_dump() for rule in rules], 201)


@_control.delete("/faults", status_code=204)
async def clear_faults(emulator: State) -> Response:
    """Remove all fault rules."""
    emulator.faults.clear()
    return Response(status_code=204)


@_control.get("/requests")
async def list_requests(emulator: State) -> JSONResponse:
    """List the requests received, except those to the control surface, oldest first."""
    return JSONResponse([request.to_json() for request in emulator.requests])


@_control.delete("/requests", status_code=204)
async def clear_requests(emulator: State) -> Response:
    """Clear the list of requests."""
    emulator.requests.clear()
    return Response(status_code=204)


@_control.get("/calls")
async def inspect_calls(emulator: State) -> JSONResponse:
    """List all calls, newest first, with the same fields in both editions."""
    return JSONResponse([_inspected(emulator, call) for call in emulator.calls])


@_control.post("/calls/{call_id}")
async def override_call(call: KnownCall, change: CallOverride, emulator: State) -> JSONResponse:
    """Change a call by hand."""
    emulator.override(call, change)
    return JSONResponse(_inspected(emulator, call))


def _inspected(emulator: Emulator, call: Call) -> dict[str, Any]:
    state = emulator.calls.state(call)
    return {
        "id": call.id,
        "agent_id": call.agent_id,
        "room_name": call.room_name,
        "created_at": timestamp(call.created_at),
        "status": state.status,
        "running": state.running,
        "end_reason": state.end_reason,
        "variables": call.variables,
        "overrides": call.overrides,
        "metadata": call.metadata,
    }


def _find(emulator: Emulator, agent_id: str | None, status: str | None) -> Iterator[Call]:
    for call in emulator.calls:
        if agent_id not in (None, call.agent_id):
            continue
        if status is None or emulator.calls.state(call).status == status:
            yield call


def _encode_cursor(number: int) -> str:
    return base64.urlsafe_b64encode(str(number).encode()).decode()


def _decode_cursor(cursor: str) -> int:
    try:
        return int(base64.urlsafe_b64decode(cursor))
    except (binascii.Error, ValueError):
        raise HTTPException(400, "Invalid cursor") from None
