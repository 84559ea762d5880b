"""Client of OneInbox's API, as far as the broker uses it."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, TypeVar
from urllib.parse import urlencode

import httpx
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import from_json, to_json

from app.clock import SYSTEM_CLOCK, Clock
from app.oneinbox.circuit_breaker import CircuitBreaker, parse_date, parse_retry_after
from app.oneinbox.errors import (
    Busy,
    Failed,
    Invalid,
    Misconfigured,
    NoSuchCall,
    OneInboxError,
    Rejected,
    TimedOut,
    Unreachable,
)
from app.oneinbox.models import CALL_ID, AgentRecord, CallPage, CallRecord, Usage, WebCall, Webhook, WebhookList
from app.oneinbox.transport import Answer, HttpxUpstream, Outgoing, PooledTransport, Upstream, header_lines
from app.telemetry.metrics import Metrics
from app.telemetry.traces import Traces

M = TypeVar("M", bound=BaseModel)

ENDED_ALREADY = (400, 409, 422)
"""How OneInbox may refuse to stop a call that has just ended."""
MAX_ANSWER = 2 * 1024 * 1024
"""Most bytes of an answer: enough for a long call's record with all its messages."""
MAX_STARTED = 256 * 1024
"""The same for a started call: a thousand of these may be pending at once."""
MAX_TOKEN = 16 * 1024
TOKEN = re.compile(r"[!-~]+")
READS_AT_ONCE = 200
OTHERS_AT_ONCE = 300
"""Most requests under way that are neither reads nor starts: stops, above all."""
BESIDE_STARTS = READS_AT_ONCE + OTHERS_AT_ONCE
"""Connections to have beside those for starts, so that a start never waits for another request."""

FREE = nullcontext()

# Paths as metrics and traces name them.
START, CALL, STOP, CALLS = "/v1/calls/web", "/v1/calls/{call}", "/v1/calls/{call}/stop", "/v1/calls"
AGENT, WEBHOOKS, WEBHOOK, USAGE = "/v1/agents/{agent}", "/v1/webhooks", "/v1/webhooks/{webhook}", "/v1/usage"


class OneInbox:
    """Client of one OneInbox account, with one connection pool for the whole process.

    Every method raises OneInboxError. A request is sent once; again only after a 401, if the key has changed.
    """

    ahead: float | None = None
    """Seconds that OneInbox's clock is ahead of this machine's, at least, by the last list's Date; None: unknown."""

    def __init__(
        self,
        base_url: str,
        api_key: SecretStr,
        transport: httpx.AsyncBaseTransport,
        *,
        timeout: float,
        connect_timeout: float,
        insecure_media: bool = False,
        reread_key: Callable[[], Awaitable[None]] | None = None,
        breaker: CircuitBreaker | None = None,
        metrics: Metrics | None = None,
        traces: Traces | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Create a client.

        `timeout`: seconds for a whole answer, connecting included. `connect_timeout`: seconds for connecting.
        `insecure_media`: accept `ws://` server URLs too (only if OneInbox itself is on loopback). `reread_key`: passes
        a changed key to `use_key`, if there is one. `breaker`: guards starting calls; reads neither open it nor are
        refused by it.
        """
        self._metrics = metrics or Metrics()
        self._traces = traces
        self._clock = clock
        self.breaker = breaker or CircuitBreaker(clock.monotonic, self._metrics)
        url = httpx.URL(base_url)
        self._host = url.netloc
        self._prefix = url.path.rstrip("/")
        self._server = (url.host, url.port or (443 if url.scheme == "https" else 80))
        origin = f"{url.scheme}://{url.netloc.decode()}"
        self._upstream: Upstream = (
            transport if isinstance(transport, PooledTransport) else HttpxUpstream(origin, transport)
        )
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._reads = asyncio.Semaphore(READS_AT_ONCE)
        self._others = asyncio.Semaphore(OTHERS_AT_ONCE)
        self._media_url = re.compile(rf"wss{'?' if insecure_media else ''}://[A-Za-z0-9\[][!-~]{{0,2048}}")
        self.use_key(api_key)
        self._reread_key = reread_key

    def use_key(self, api_key: SecretStr) -> None:
        """Use another key from the next request on. Requests under way keep theirs."""
        fields = [
            (b"host", self._host),
            (b"authorization", b"Bearer " + api_key.get_secret_value().encode()),
            (b"accept", b"application/json"),
            # A compressed answer could unpack to any size, so none is accepted.
            (b"accept-encoding", b"identity"),
            (b"user-agent", b"oneinbox-broker"),
        ]
        # Made once, not for each request.
        self._fields = header_lines(fields)
        self._fields_with_body = header_lines([*fields, (b"content-type", b"application/json")])

    async def start_web_call(
        self,
        *,
        agent_id: str,
        variables: Mapping[str, Any],
        overrides: Mapping[str, Any],
        metadata: Mapping[str, Any],
        before_sending: Callable[[], None] | None = None,
    ) -> WebCall:
        """Start a billable call. After an error, `may_have_acted` says whether the call may exist anyway.

        `before_sending`: called right before the request is written, each time it is; if it raises, it is not sent. The
        caller bounds how many are under way.
        """
        body: dict[str, Any] = {"agent_id": agent_id, "metadata": metadata}
        if variables:
            body["variables"] = variables
        if overrides:
            body["overrides"] = overrides
        with self.breaker.guard():
            status, answer = await self._send(
                "POST", START, START, body, limit=MAX_STARTED, before_sending=before_sending
            )
        _raise_for_status(status, answer)
        call_id = answer.get("id") if isinstance(answer, dict) else None
        if not isinstance(call_id, str) or not CALL_ID.fullmatch(call_id):
            raise _unusable("id", status)
        url, token = answer.get("server_url"), answer.get("participant_token")
        if not isinstance(url, str) or not self._media_url.fullmatch(url):
            raise _unusable("server_url", status, call_id)
        if not isinstance(token, str) or len(token) > MAX_TOKEN or not TOKEN.fullmatch(token):
            raise _unusable("participant_token", status, call_id)
        return WebCall(call_id, url, token)

    async def get_call(self, call_id: str) -> CallRecord:
        """Return one call. Raises NoSuchCall. `call_id` must match CALL_ID."""
        return await self._call("GET", CALL, call_id)

    async def stop_call(self, call_id: str) -> CallRecord:
        """Hang up; return the call. Raises NoSuchCall. `call_id` must match CALL_ID.

        After a refusal or a lost answer the call is asked for: it may have ended all the same.
        """
        try:
            return await self._call("POST", STOP, call_id)
        except OneInboxError as error:
            if not error.may_have_acted and error.status not in ENDED_ALREADY:
                raise
            try:
                record = await self.get_call(call_id)
            except NoSuchCall:
                raise
            except OneInboxError:
                raise error from None
            if record.ended:
                return record
            raise

    async def list_calls(
        self, *, agent_id: str | None = None, status: str | None = None, limit: int = 20, offset: int = 0
    ) -> CallPage:
        """Return a page of the account's calls, newest first. `limit`: 1 to 100."""
        filters = {"agent_id": agent_id, "status": status, "limit": limit, "offset": offset}
        query = urlencode({name: value for name, value in filters.items() if value is not None})
        code, answer = await self._send("GET", CALLS, f"{CALLS}?{query}")
        _raise_for_status(code, answer)
        return _model(CallPage, answer, code)

    async def get_agent(self, agent_id: str) -> AgentRecord:
        """Return one agent. Raises Misconfigured with status 404 if there is none."""
        status, answer = await self._send("GET", AGENT, AGENT.format(agent=agent_id))
        _raise_for_status(status, answer)
        return _model(AgentRecord, answer, status)

    async def usage(self) -> Usage:
        """Return how many calls the account has started today, of how many it may. Raises Invalid for another shape."""
        status, answer = await self._send("GET", USAGE, USAGE)
        _raise_for_status(status, answer)
        return _model(Usage, answer, status)

    async def register_webhook(self, *, name: str, url: str, events: Sequence[str]) -> Webhook:
        """Have events delivered to a URL."""
        body = {"name": name, "url": url, "events": list(events)}
        status, answer = await self._send("POST", WEBHOOKS, WEBHOOKS, body)
        _raise_for_status(status, answer)
        return _model(Webhook, answer, status)

    async def list_webhooks(self) -> list[Webhook]:
        """Return all webhooks of the account. The route is undocumented; the answer may be a list or a page."""
        status, answer = await self._send("GET", WEBHOOKS, WEBHOOKS)
        _raise_for_status(status, answer)
        return _model(WebhookList, {"items": answer} if isinstance(answer, list) else answer, status).items

    async def remove_webhook(self, webhook_id: str) -> None:
        """Remove a webhook. The route is undocumented. Raises Misconfigured for a 404 and an invalid id."""
        if not CALL_ID.fullmatch(webhook_id):
            raise _misconfigured(404)  # such as `..`, which would lead to another route
        status, answer = await self._send("DELETE", WEBHOOK, WEBHOOK.format(webhook=webhook_id))
        _raise_for_status(status, answer)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._upstream.aclose()

    async def _call(self, method: str, path: str, call_id: str) -> CallRecord:
        status, answer = await self._send(method, path, path.format(call=call_id))
        _raise_for_status(status, answer, NoSuchCall)
        record = _model(CallRecord, answer, status)
        if record.id != call_id:
            raise Invalid("sent another call", may_have_acted=True, status=status)
        return record

    async def _send(
        self,
        method: str,
        path: str,
        target: str,
        body: Mapping[str, Any] | None = None,
        *,
        limit: int = MAX_ANSWER,
        before_sending: Callable[[], None] | None = None,
    ) -> tuple[int, Any]:
        """Return the answer's status and JSON (None if it is not JSON), bounded in time and size.

        `target`: path and query. `path`: the path with placeholders, as metrics and traces name it.
        """
        content = None if body is None else to_json(body)
        fields = self._fields
        request = self._request(method, target, content, before_sending)
        try:
            async with asyncio.timeout(self._timeout), self._place(method, path):
                answer = await self._exchange(request, path, limit)
                if answer.status == 401:
                    request.sent = False  # it was refused, so a POST started no call
                    if await self._has_another_key(fields):
                        request = self._request(method, target, content, before_sending)
                        answer = await self._exchange(request, path, limit)
        except TimeoutError:
            raise TimedOut("did not answer in time", may_have_acted=request.sent) from None
        except httpx.TransportError as error:
            if not request.sent:
                raise Unreachable(f"cannot be reached ({type(error).__name__})", may_have_acted=False) from error
            if isinstance(error, (httpx.ReadTimeout, httpx.WriteTimeout)):
                raise TimedOut("did not answer in time", may_have_acted=True) from error
            raise Failed(f"connection lost ({type(error).__name__})", may_have_acted=True) from error
        if path == CALLS:
            date = parse_date(answer.field(b"date"))
            self.ahead = None if date is None else date - self._clock.now()
        if answer.status == 429:
            raise Busy(parse_retry_after(answer.field(b"retry-after"), self._clock.now()))
        return answer.status, _parse(answer.body)

    def _place(self, method: str, path: str) -> AbstractAsyncContextManager[None]:
        """Return what to hold while a request is under way, so that no kind of request takes the places of starts."""
        if path == START:
            return FREE
        return self._reads if method == "GET" else self._others

    def _request(
        self, method: str, target: str, content: bytes | None, before_sending: Callable[[], None] | None
    ) -> Outgoing:
        fields = self._fields if content is None else self._fields_with_body
        return Outgoing(method, self._prefix + target, fields, content, self._connect_timeout, before_sending)

    async def _exchange(self, request: Outgoing, path: str, limit: int) -> Answer:
        begun = time.perf_counter()
        status, failure = None, ""
        span = None
        if self._traces is not None:
            span, fields = self._traces.begin_exchange(request.method, path, self._server)
            request.fields += header_lines((name.encode(), value.encode()) for name, value in fields.items())
        try:
            answer = await self._upstream.exchange(request, limit)
            status = answer.status
            return answer
        except BaseException as error:
            # That is how asyncio.timeout ends what takes too long.
            failure = "TimeoutError" if isinstance(error, asyncio.CancelledError) else type(error).__name__
            raise
        finally:
            seconds = time.perf_counter() - begun
            self._metrics.count_upstream(request.method, path, status, failure, server=self._server, seconds=seconds)
            if span is not None:
                Traces.end_exchange(span, status, failure)

    async def _has_another_key(self, fields: bytes) -> bool:
        """Return whether the key has changed since a request with these header fields was made."""
        if fields is self._fields and self._reread_key is not None:
            await self._reread_key()
        return fields is not self._fields


def _parse(raw: bytes) -> Any:
    """Return an answer's JSON, None if it is not JSON. Half an emoji, as in a text cut to a length, becomes `?`."""
    with contextlib.suppress(ValueError):
        return from_json(raw, cache_strings="keys")
    # RFC 8259, section 8.2, leaves lone surrogates to the reader; one odd text must not hide a whole list of calls.
    with contextlib.suppress(ValueError, RecursionError):
        text = json.dumps(json.loads(raw), ensure_ascii=False)
        return from_json(text.encode(errors="replace"), cache_strings="keys")
    return None


def _model(model: type[M], answer: Any, status: int) -> M:
    try:
        return model.model_validate(answer)
    except ValidationError:
        raise Invalid(f"sent no valid {model.__name__}", may_have_acted=True, status=status) from None


def _raise_for_status(status: int, answer: Any, not_found: type[OneInboxError] | None = None) -> None:
    """Raise for any status but a 2xx. `not_found`: the error for a 404 if it is not the operator's to fix."""
    if 200 <= status < 300:
        return
    if status == 404 and not_found is not None:
        raise not_found
    if status in (401, 402, 403, 404):
        raise _misconfigured(status)
    if status == 422:
        errors = answer.get("detail") if isinstance(answer, dict) else None
        listed = errors if isinstance(errors, list) else []
        # If one cannot be read, none are passed on: it may be about anything.
        raise Rejected(listed if all(isinstance(each, dict) for each in listed) else [])
    refused = 400 <= status < 500 and status != 408
    raise Failed(f"answered {status}", may_have_acted=not refused, status=status)


def _unusable(field: str, status: int, call_id: str | None = None) -> Invalid:
    return Invalid(f"started a call without a usable {field}", may_have_acted=True, status=status, call_id=call_id)


def _misconfigured(status: int) -> Misconfigured:
    return Misconfigured(f"answered {status}", may_have_acted=False, status=status)
