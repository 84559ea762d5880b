"""Prometheus metrics of one broker: counted where things happen, read by `GET /metrics`.

No label holds what a stranger can make up: unknown routes are `unmatched`, unknown methods `_OTHER`, and the rest are
words of ours.
"""

import os
import platform
from collections.abc import Collection, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from app import __version__

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that has prometheus_client count in files, so that any of several workers can answer for all."""

DURATIONS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Buckets in seconds (OpenTelemetry's semantic conventions for HTTP metrics, `http.server.request.duration`)."""
METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
STATUSES = frozenset({*range(200, 209), *range(300, 309), *range(400, 418), 422, 425, 429, 451, *range(500, 505)})
"""Statuses of OneInbox that are told apart: it might make up any number."""
OTHER = "_OTHER"
"""What OpenTelemetry calls a value outside a list."""

PAUSES = ("asked-for", "no-answers")
ORPHANS = ("lost", "found", "stopped", "not-found", "given-up")

M = TypeVar("M", bound=MetricWrapperBase)


class Children(dict[tuple[str | int, ...], M], Generic[M]):
    """A metric's children by their labels' values, each made once: a look into a dict is all that counting costs."""

    def __init__(self, metric: M) -> None:
        super().__init__()
        self._metric = metric

    def __missing__(self, values: tuple[str | int, ...]) -> M:
        child = self[values] = self._metric.labels(*values)
        return child


class Metrics:
    """All metrics of one broker. `outcomes`: of sessions; those that are known start at 0, so that a first one shows.

    With several workers (`DIRECTORY` is set) each writes a file for all of them: counters and histograms are added up,
    each gauge says below how.
    """

    def __init__(self, outcomes: Iterable[str] = ()) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which files do not keep either
        self._registry = registry = CollectorRegistry()
        self.shared = DIRECTORY in os.environ
        """Whether other processes answer for this one, and read its gauges from where it last wrote them."""
        self._requests = Children(
            Histogram(
                "http_server_request_duration_seconds",
                "Requests answered, streams to their end.",
                ("http_request_method", "http_route", "http_response_status_code"),
                buckets=DURATIONS,
                registry=registry,
            )
        )
        self._exchanges = Children(
            Histogram(
                "http_client_request_duration_seconds",
                "Requests to OneInbox, by operation; without an answer there is no status, and an error.type.",
                (
                    "http_request_method",
                    "url_template",
                    "http_response_status_code",
                    "error_type",
                    "server_address",
                    "server_port",
                ),
                buckets=DURATIONS,
                registry=registry,
            )
        )
        self._sessions = Children(
            Counter(
                "broker_sessions",
                "Requests for a session, by what became of them: `started`, `replayed`, `hung-up`, or an error's slug.",
                ("outcome",),
                registry=registry,
            )
        )
        self._refused = Children(
            Counter(
                "broker_limits_refused",
                "Refusals, by the limits that had no room; not enforced: BROKER_LIMITS_MODE is `observe`.",
                ("limit", "enforced"),
                registry=registry,
            )
        )
        self._pauses = Children(
            Counter(
                "broker_oneinbox_pauses",
                "Times that OneInbox was left alone: `asked-for` (its 429), `no-answers`.",
                ("reason",),
                registry=registry,
            )
        )
        self._orphans = Children(
            Counter(
                "broker_orphans",
                "Calls whose answer was lost: `lost`; `found` and `stopped`; `not-found`, there is none; `given-up`.",
                ("fate",),
                registry=registry,
            )
        )
        self._hang_ups = Children(
            Counter(
                "broker_hang_ups",
                "Calls that the broker hung up, by reason; one that fails is tried, and counted, again.",
                ("reason", "result"),
                registry=registry,
            )
        )

        def gauge(name: str, meaning: str, together: str, labels: Collection[str] = ()) -> Gauge:
            return Gauge(name, meaning, labels, multiprocess_mode=together, registry=registry)  # type: ignore[arg-type]

        self.waiting = gauge("broker_waiting_sessions", "Sessions that wait for OneInbox.", "livesum")
        self.streams = gauge("broker_streams", "Open event streams.", "livesum")
        self.watched = gauge("broker_watched_calls", "Calls that streams follow, in each process.", "livesum")
        self.cooldown = gauge("broker_oneinbox_cooldown_seconds", "Seconds until OneInbox is asked again.", "livemax")
        self.store_up = gauge("broker_store_up", "1 while the store answers.", "livemin")
        self.live_calls = gauge("broker_live_calls", "Calls that run, of all replicas.", "livemostrecent")
        self.unstopped = gauge(
            "broker_unstopped_calls", "Calls that could not be stopped, as `status` lists them.", "livemostrecent"
        )
        self._used = Children(
            gauge("broker_global_limit_used_ratio", "Used share of each global limit.", "livemostrecent", ("limit",))
        )
        gauge("broker_build_info", "Version of the broker.", "livemax", ("version", "python")).labels(
            __version__, platform.python_version()
        ).set(1)
        if not self.shared:
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
            GCCollector(registry=registry)
        for outcome in outcomes:
            self._sessions[(outcome,)]
        for reason in PAUSES:
            self._pauses[(reason,)]
        for fate in ORPHANS:
            self._orphans[(fate,)]

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request. `route`: a template of ours, or `unmatched`."""
        self._requests[method if method in METHODS else OTHER, route, status].observe(seconds)

    def session(self, outcome: str) -> None:
        """Count a request for a session."""
        self._sessions[(outcome,)].inc()

    def exchanged(
        self, method: str, template: str, status: int | None, error: str, *, server: tuple[str, int], seconds: float
    ) -> None:
        """Count a request to OneInbox. `template`: its path, with names for what varies. `error`: a class' name.

        `server`: where OneInbox is, host and port.
        """
        if status is not None and status not in STATUSES:
            shown: str | int = OTHER
        else:
            shown = "" if status is None else status
        if status is not None and status >= 400:
            error = str(shown)  # as OpenTelemetry has it
        self._exchanges[method, template, shown, error, *server].observe(seconds)

    def refused(self, limits: Iterable[str], *, enforced: bool = True) -> None:
        """Count a refusal by each of these limits."""
        for limit in limits:
            self._refused[limit, "true" if enforced else "false"].inc()

    def paused(self, reason: str) -> None:
        """Count the beginning of a cool-down."""
        self._pauses[(reason,)].inc()

    def orphan(self, fate: str) -> None:
        """Count what became of a call whose answer was lost; one of ORPHANS."""
        self._orphans[(fate,)].inc()

    def hung_up(self, reason: str, *, done: bool) -> None:
        """Count a try to hang up."""
        self._hang_ups[reason, "stopped" if done else "failed"].inc()

    def used(self, limit: str, share: float) -> None:
        """Note how much of a global limit is used up."""
        self._used[(limit,)].set(share)

    def text(self, accept: str) -> tuple[bytes, str]:
        """All of it in Prometheus' text format, or OpenMetrics where `accept` asks for it, and the media type."""
        registry = self._registry
        if self.shared:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            registry.register(_Workers())
        try:
            encode, media_type = choose_encoder(accept)
        except TypeError:  # a version that is none
            encode, media_type = choose_encoder("")
        return encode(registry), media_type


def count_together() -> TemporaryDirectory[str]:
    """Have the processes that this one starts count together, in a directory of their own; to be cleaned up at the end.

    In memory where there is a place for files in memory; that one is there, too, where nothing else can be written
    (a container with a read-only root). Raises OSError.
    """
    memory = "/dev/shm"  # noqa: S108 - the directory made in there has a random name, and is its owner's alone
    place = memory if os.access(memory, os.W_OK | os.X_OK) else None
    directory = TemporaryDirectory(prefix="oneinbox-broker-", dir=place)
    os.environ[DIRECTORY] = directory.name
    return directory


def forget_all_but(pids: Collection[int | None]) -> None:
    """Drop what dead workers said of themselves, which nobody will mend; what they counted has happened, and stays."""
    if DIRECTORY in os.environ:
        for pid in _pids() - set(pids):
            mark_process_dead(pid)  # type: ignore[no-untyped-call]


def _pids() -> set[int]:
    """The processes that said something of themselves."""
    files = Path(os.environ[DIRECTORY]).glob("gauge_live*_*.db")
    return {int(file.stem.rpartition("_")[2]) for file in files}


class _Workers(Collector):
    """Memory, processor time and files of each worker: by process id, as what one has used ends with it."""

    def collect(self) -> Iterable[Metric]:
        together: dict[str, Metric] = {}
        for pid in sorted(_pids()):
            for one in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():  # type: ignore[misc]
                metric = together.setdefault(one.name, Metric(one.name, one.documentation, one.type))
                for sample in one.samples:
                    metric.add_sample(sample.name, {"pid": str(pid)}, sample.value)
        return together.values()
