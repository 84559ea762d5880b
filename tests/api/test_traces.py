"""Traces: FastAPI makes its own once OpenTelemetry is configured. They hold no call key either."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN_CONTEXT, NonRecordingSpan, Span

from tests.conftest import Logs, OpenBroker
from tests.support.harness import Upstream, post_session, start_call


class Recorder(NonRecordingSpan, trace.Tracer, trace.TracerProvider):
    """Provider, tracer and span in one, which keeps everything."""

    def __init__(self) -> None:
        super().__init__(INVALID_SPAN_CONTEXT)
        self.told: list[Any] = []

    def get_tracer(self, *arguments: Any, **options: Any) -> trace.Tracer:
        return self

    def start_span(self, *arguments: Any, **options: Any) -> Span:
        self.told.append((arguments, options))
        return self

    @contextmanager
    def start_as_current_span(self, *arguments: Any, **options: Any) -> Iterator[Span]:  # type: ignore[override]
        self.told.append((arguments, options))
        yield self

    def is_recording(self) -> bool:
        return True

    def set_attribute(self, key: str, value: Any) -> None:
        self.told.append((key, value))

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        self.told.append(dict(attributes))

    def update_name(self, name: str) -> None:
        self.told.append(name)

    def record_exception(self, exception: BaseException, *arguments: Any, **options: Any) -> None:
        self.told.append((exception, arguments, options))


async def test_a_trace_holds_no_call_key(
    open_broker: OpenBroker, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: recorder)
    broker = await open_broker()
    path = await start_call(broker)
    upstream.has_call("call_1")

    await broker.get(path, params={"token": "QUERY"})
    upstream.start.mock(side_effect=RuntimeError("BUG"))
    await post_session(broker, {"variables": {"name": "VALUE"}})

    for secret in (path.rpartition(".")[2], "QUERY", "VALUE", "BUG"):
        assert secret not in repr(recorder.told)


async def test_without_the_extra_there_are_no_traces_and_the_log_says_how_to_get_them(
    open_broker: OpenBroker, monkeypatch: pytest.MonkeyPatch, logs: Logs
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("app.telemetry.traces.find_spec", lambda name: None)

    broker = await open_broker()

    assert (await post_session(broker)).status_code == 201
    assert ["oneinbox-broker[otel]" in entry["why"] for entry in logs if entry["event"] == "tracing_disabled"] == [True]
