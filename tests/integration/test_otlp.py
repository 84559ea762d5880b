"""Traces as a receiver of OTLP gets them from a real process, and OneInbox' part in them."""

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from app.sandbox import faults
from app.sandbox.server import running_emulator
from tests.support.brokers import LONG_CALLS, SECRET, eventually, post_many, running_broker_process

pytestmark = pytest.mark.process

TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-0[13]")
"""W3C's header of a sampled trace; 2 says that its id is random (Trace Context Level 2, section 3.2.2.5.2)."""
MARKER = "PLANTED"
THEIRS = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
"""A trace of the client's own, not sampled."""


@dataclass
class Receiver:
    """An OTLP receiver: what it got, as bytes and as spans."""

    url: str
    bodies: list[bytes] = field(default_factory=list)

    @property
    def requests(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(body) for body in list(self.bodies)]

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@contextmanager
def receiving(*, answers: bool = True) -> Iterator[Receiver]:
    """A receiver on loopback; one that does not answer keeps its connections open."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if not answers:
                over.wait(30)
                return
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/x-protobuf"
            made.bodies.append(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        made = Receiver(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield made
        finally:
            over.set()
            server.shutdown()
            thread.join()


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A receiver, named in the environment that processes inherit."""
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield receiver


async def test_a_session_is_a_trace_that_goes_on_at_oneinbox(receiver: Receiver) -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, running_broker_process(oneinbox.url) as broker:
        [answer] = await post_many([broker], 1)
        assert answer.status_code == 201
        await eventually(lambda: has(receiver, "POST /session"), within=20)
        [start] = [each for each in oneinbox.emulator.requests if each.operation == "start"]
        logged = [entry for entry in broker.logs if entry.get("route") == "/session"]

    [session] = receiver.named("POST /session")
    [exchange] = receiver.named("POST /v1/calls/web")
    assert session.kind == Span.SPAN_KIND_SERVER
    assert session.parent_span_id == b""
    assert attributes(session) == {
        "http.request.method": "POST",
        "http.route": "/session",
        "http.response.status_code": 201,
    }
    assert exchange.kind == Span.SPAN_KIND_CLIENT
    assert (exchange.trace_id, exchange.parent_span_id) == (session.trace_id, session.span_id)
    assert attributes(exchange) == {
        "http.request.method": "POST",
        "url.template": "/v1/calls/web",
        "server.address": "127.0.0.1",
        "server.port": int(oneinbox.url.rpartition(":")[2]),
        "http.response.status_code": 201,
    }
    match = TRACEPARENT.fullmatch(start.headers["traceparent"])
    assert match is not None
    assert (bytes.fromhex(match[1]), bytes.fromhex(match[2])) == (exchange.trace_id, exchange.span_id)
    assert [entry["trace"] for entry in logged] == [session.trace_id.hex()]
    resource = {
        each.key: each.value.string_value for each in receiver.requests[0].resource_spans[0].resource.attributes
    }
    assert resource["service.name"] == "oneinbox-broker"
    assert resource["service.version"]


async def test_a_clients_trace_is_not_continued(receiver: Receiver) -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, running_broker_process(oneinbox.url) as broker:
        headers = {"traceparent": THEIRS, "tracestate": f"x={MARKER}", "baggage": f"x={MARKER}"}
        await post_many([broker], 1, headers)
        await eventually(lambda: has(receiver, "POST /session"), within=20)
        [start] = [each for each in oneinbox.emulator.requests if each.operation == "start"]

    assert THEIRS.split("-")[1] not in {span.trace_id.hex() for span in receiver.spans}
    assert THEIRS.split("-")[1] not in start.headers["traceparent"]
    assert TRACEPARENT.fullmatch(start.headers["traceparent"])
    assert not {"tracestate", "baggage"} & set(map(str.lower, start.headers.keys()))


async def test_failures_are_marked_and_say_nothing(receiver: Receiver) -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, running_broker_process(oneinbox.url) as broker:
        oneinbox.emulator.faults.add(
            faults.Drop(operation="start", times=1), faults.Status(operation="start", status=401, detail=MARKER)
        )
        await post_many([broker], 1)
        await post_many([broker], 1)
        await broker.client.get(f"/{MARKER}?{MARKER}")
        await eventually(lambda: has(receiver, "POST /session", 2), within=20)
        await eventually(lambda: has(receiver, "GET"), within=20)

    failed = receiver.named("POST /session") + receiver.named("POST /v1/calls/web")
    assert all(span.status.code == Status.STATUS_CODE_ERROR and not span.status.message for span in failed)
    assert {attributes(span).get("broker.problem") for span in receiver.named("POST /session")} == {
        "upstream-error",
        "upstream-misconfigured",
    }
    assert "401" in {attributes(span)["error.type"] for span in receiver.named("POST /v1/calls/web")}
    [unmatched] = [span for span in receiver.named("GET") if attributes(span).get("broker.problem") == "not-found"]
    assert attributes(unmatched)["http.response.status_code"] == 404


async def test_no_secret_and_no_path_is_in_a_trace(receiver: Receiver) -> None:
    changes = {
        "BROKER_WEBHOOK_SECRET": "w" * 30,
        "BROKER_METRICS_TOKEN": "m" * 30,
        "BROKER_TRUSTED_PROXIES": "127.0.0.0/8",
        "BROKER_EXPOSE": "transcript,summary",
    }
    async with running_emulator(LONG_CALLS) as oneinbox, running_broker_process(oneinbox.url, **changes) as broker:
        user = {"X-Forwarded-For": "198.51.100.77", "X-Request-ID": MARKER, "User-Agent": MARKER, "Cookie": MARKER}
        answer = await broker.client.post("/session", json={"variables": {"name": MARKER}}, headers=user)
        call = answer.headers["location"]
        await broker.client.get(call, headers=user, params={"q": MARKER})
        await broker.client.post(f"{call}/stop", headers=user)
        await broker.client.get(f"{call}/events", headers=user)
        await broker.client.post(f"/webhooks/oneinbox/{'w' * 30}", content=b"{}")
        await broker.client.get("/metrics", headers={"Authorization": f"Bearer {'m' * 30}"})
        await broker.client.post("/session", content=MARKER, headers={"Authorization": f"Bearer {MARKER}"})
        await eventually(lambda: has(receiver, "GET /metrics"), within=20)
        await eventually(lambda: has(receiver, "GET /calls/{call}/events"), within=20)

    call_id, key = call.removeprefix("/calls/").split(".")
    assert {span.name for span in receiver.spans} >= {
        "GET /calls/{call}",
        "POST /calls/{call}/stop",
        "GET /v1/calls/{call}",
        "POST /v1/calls/{call}/stop",
        "POST /webhooks/oneinbox/{secret}",
    }
    everything = b"".join(receiver.bodies)
    for secret in (
        *(LONG_CALLS.api_key, SECRET, "w" * 30, "m" * 30, MARKER),
        *(answer.json()["participant_token"], call_id, key, "198.51.100.77"),
    ):
        assert secret.encode() not in everything


async def test_a_receiver_that_never_answers_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving(answers=False) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{receiver.url}/v1/traces")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        async with running_emulator(LONG_CALLS) as oneinbox, running_broker_process(oneinbox.url) as broker:
            answers = [await post_many([broker], 1) for _ in range(20)]
            assert all(answer.status_code == 201 for [answer] in answers)
            await asyncio.sleep(0.2)

            began = time.monotonic()
            code = await broker.process.stop()

            assert code == 0
            assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_SDK_DISABLED", "true"),
        ("OTEL_TRACES_EXPORTER", "none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1"),
    ],
)
async def test_what_switches_traces_off(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    async with running_emulator(LONG_CALLS) as oneinbox, running_broker_process(oneinbox.url) as broker:
        [answer] = await post_many([broker], 1)
        [start] = [each for each in oneinbox.emulator.requests if each.operation == "start"]

    assert answer.status_code == 201
    assert "traceparent" not in start.headers
    assert receiver.bodies == []
    assert not [entry for entry in broker.logs if "exception" in entry]


async def has(receiver: Receiver, name: str, count: int = 1) -> bool:
    return len(receiver.named(name)) >= count
