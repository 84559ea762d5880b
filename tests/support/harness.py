"""A broker in process, in front of a canned OneInbox."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import respx
from starlette.types import Receive, Scope, Send

from app.api.app import create_app
from app.clock import SYSTEM_CLOCK, Clock
from app.config.loading import load_settings
from app.config.settings import Settings
from tests.support.shapes import assert_documented

API_KEY = "oi_sk_test_5d1f0c9a77e34b22"
AGENT_ID = "agt_test"
ONEINBOX = "https://api.oneinbox.ai"
BROKER = "https://broker.example"
CLIENT = "203.0.113.7"
TOKEN = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJ0ZXN0In0.c2lnbmF0dXJl"
JSON = {"Content-Type": "application/json"}

# Bounds that a test about something else must not run into.
ROOMY = {"BROKER_MAX_LIVE_CALLS": "1000", "BROKER_REQUEST_LIMITS": "100000/minute"}
ENVIRON = {
    "ONEINBOX_API_KEY": API_KEY,
    "ONEINBOX_AGENT_ID": AGENT_ID,
    **ROOMY,
}


def settings(environ: Mapping[str, str] | None = None) -> Settings:
    """The least settings that work, with changes."""
    return load_settings({**ENVIRON, **(environ or {})}, env_file=None)


def started(**changes: Any) -> dict[str, Any]:
    """OneInbox's answer to a started call, with changes; a field set to None is null."""
    return {"id": "call_1", "server_url": "wss://voice.oneinbox.ai", "participant_token": TOKEN, **changes}


def without(answer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An answer that lacks a field."""
    return {key: value for key, value in answer.items() if key != name}


class Upstream(httpx.AsyncBaseTransport):
    """A canned OneInbox on a respx router, as the broker's transport. Starts `call_1`, `call_2`, … unless told."""

    def __init__(self, base_url: str = ONEINBOX) -> None:
        self.router = respx.Router(base_url=base_url, assert_all_called=False)
        self.start = self.router.post("/v1/calls/web")
        self.start.mock(side_effect=self._start)
        self._calls = 0
        self.stop = self.router.post(path__regex=r"^/v1/calls/[^/]+/stop$")
        self.stop.mock(side_effect=self._stop)
        self.router.get("/v1/calls").respond(json={"items": [], "total": 0, "limit": 20, "offset": 0})
        self.agent = self.router.get(path__regex=r"^/v1/agents/[^/]+$")
        self.agent.respond(json={"id": AGENT_ID, "max_duration_seconds": 3600})
        self.usage = self.router.get("/v1/usage").respond(json={"max_calls_per_day": None})

    @staticmethod
    def _stop(request: httpx.Request) -> httpx.Response:
        call_id = request.url.path.split("/")[-2]
        return httpx.Response(200, json={"id": call_id, "agent_id": AGENT_ID, "status": "completed"})

    def _start(self, _: httpx.Request) -> httpx.Response:
        self._calls += 1
        return httpx.Response(201, json=started(id=f"call_{self._calls}"))

    def works_again(self) -> None:
        """Start calls, whatever was told before."""
        self.start.mock(side_effect=self._start)

    def has_call(self, call_id: str, **record: Any) -> respx.Route:
        """Know a call by its id."""
        answer = {"id": call_id, "agent_id": AGENT_ID, "status": "in_progress", **record}
        return self.router.get(f"/v1/calls/{call_id}").respond(json=answer)

    @property
    def requests(self) -> list[httpx.Request]:
        """The requests that arrived, in order, but those that every broker makes in the background."""
        asked = [call.request for call in self.router.calls]
        return [request for request in asked if not request.url.path.endswith("/v1/usage")]

    @property
    def asked(self) -> Any:
        """The body of the last request to start a call."""
        return json.loads(self.start.calls.last.request.content)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer as a real transport does: with a body still to be read, as it came over the wire."""
        await request.aread()
        if (before_sending := request.extensions.get("before_sending")) is not None:
            before_sending()
        canned = await self.router.async_handler(request)
        return httpx.Response(canned.status_code, headers=canned.headers, stream=canned.stream)


@asynccontextmanager
async def running_broker(
    settings: Settings,
    transport: httpx.AsyncBaseTransport,
    *,
    peer: str = CLIENT,
    base_url: str = BROKER,
    clock: Clock = SYSTEM_CLOCK,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a broker whose lifespan runs. `peer`: address that the client seems to connect from."""
    app = create_app(settings, transport, clock=clock)
    up: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def lifespan() -> None:
        try:
            async with app.router.lifespan_context(app) as state:
                up.set_result(state or {})
                await over.wait()
        except BaseException as error:
            if not up.done():
                up.set_exception(error)
            raise

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = dict(await up)
        await app(scope, receive, send)

    living = asyncio.create_task(lifespan())
    await up
    asgi = httpx.ASGITransport(with_state, client=(peer, 50000))
    try:
        # Whatever a test is about: every answer has to be a documented one.
        hooks = {"response": [assert_documented]}
        async with httpx.AsyncClient(transport=asgi, base_url=base_url, event_hooks=hooks) as client:
            yield client
    finally:
        over.set()
        await living


async def post_session(broker: httpx.AsyncClient, body: Any = None, **headers: str) -> httpx.Response:
    """POST /session with a JSON body; None: no body at all. Underscores in header names stand for dashes."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is None:
        return await broker.post("/session", headers=given)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await broker.post("/session", content=content, headers={**JSON, **given})


async def start_call(broker: httpx.AsyncClient) -> str:
    """Start a call; the path it can be followed under."""
    response = await post_session(broker)
    assert response.status_code == 201, response.text
    return response.headers["location"]
