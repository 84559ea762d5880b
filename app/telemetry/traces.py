"""OpenTelemetry traces over OTLP, if the extra `otel` is installed and OpenTelemetry's own variables name a receiver
(https://opentelemetry.io/docs/specs/otel/protocol/exporter/). Otherwise they cost nothing.

A span holds names of routes, methods, statuses and errors, and nothing else: no path, no header, no exception message.
Every trace begins here. A client's own trace header is ignored, so that strangers decide neither what is sampled nor
whose trace they are in.
"""

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import structlog
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
FLUSH_SECONDS = 3
"""How long sending the last spans may take at shutdown."""

log = structlog.get_logger(__name__)


def traces_enabled() -> bool:
    """Return whether OpenTelemetry's variables ask for traces."""
    return (
        any(os.environ.get(name) for name in ENDPOINTS)
        and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"
        and os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp"
    )


def open_traces() -> "Traces | None":
    """Start sending traces. None if none are wanted, or if none can be sent, which is logged."""
    if not traces_enabled():
        return None
    protocol = next(filter(None, map(os.environ.get, PROTOCOLS)), PROTOCOL)
    if protocol != PROTOCOL:
        log.warning("tracing_disabled", why=f"the only protocol is {PROTOCOL}; set {PROTOCOLS[1]} to it")
        return None
    if find_spec("opentelemetry.sdk") is None or find_spec("opentelemetry.exporter") is None:
        log.warning("tracing_disabled", why="the extra is not installed: pip install 'oneinbox-broker[otel]'")
        return None
    # These imports take half a second.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    ours = Resource({"service.name": "oneinbox-broker", "service.version": __version__})
    try:
        resource = Resource.create().merge(ours).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError:  # its message may repeat a header's secret
        log.error("tracing_disabled", why="one of OpenTelemetry's OTEL_… variables has a wrong value")
        return None
    return Traces(provider)


class Traces:
    """Make the spans of one broker. Its provider is private, so that no library adds spans."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("oneinbox-broker", __version__)
        self._w3c = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, method: str) -> Iterator[Span]:
        """Open the span of a request, which begins a trace; spans made inside it become part of it."""
        with self._tracer.start_as_current_span(
            method,
            context=Context(),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method},
            record_exception=False,  # its message may hold anything
            set_status_on_exception=False,
        ) as span:
            yield span

    def begin_exchange(self, method: str, path: str, server: tuple[str, int]) -> tuple[Span, dict[str, str]]:
        """Begin the span of a request to OneInbox; return it, and the header fields that tell its id.

        `path`: with placeholders. `server`: OneInbox's host and port.
        """
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "url.template": path,
            "server.address": server[0],
            "server.port": server[1],
        }
        span = self._tracer.start_span(f"{method} {path}", kind=SpanKind.CLIENT, attributes=attributes)
        fields: dict[str, str] = {}
        self._w3c.inject(fields, set_span_in_context(span))
        return span, fields

    @staticmethod
    def end_exchange(span: Span, status: int | None, error: str) -> None:
        """End a span. `error`: an exception's class name, if there was no answer."""
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        if error or (status is not None and status >= 400):
            span.set_attribute("error.type", error or str(status))
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    async def aclose(self) -> None:
        """Send what is left, for FLUSH_SECONDS at most, so that an unresponsive receiver cannot block the exit."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        await asyncio.to_thread(last.join, FLUSH_SECONDS)
