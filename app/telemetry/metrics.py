"""Prometheus metrics of one broker, read by `GET /metrics`.

No label holds text that a client can choose: unknown routes are `unmatched`, unknown methods `_OTHER`, and all other
values are the broker's own.
"""

import os
import platform
from collections.abc import Collection, Iterable
from math import nan
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
"""Makes prometheus_client count in this directory's files, so that any of several workers can answer for all."""

DURATIONS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Buckets in seconds (OpenTelemetry's semantic conventions for HTTP metrics, `http.server.request.duration`)."""
METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
STATUSES = frozenset({*range(200, 209), *range(300, 309), *range(400, 418), 422, 425, 429, 451, *range(500, 505)})
"""OneInbox's statuses that get a label of their own: the list is bounded, what it may send is not."""
OTHER = "_OTHER"
"""OpenTelemetry's name for a value outside a list."""

PAUSES = ("asked-for", "no-answers")
ORPHANS = ("lost", "found", "stopped", "not-found", "given-up")

M = TypeVar("M", bound=MetricWrapperBase)


class Children(dict[tuple[str | int, ...], M], Generic[M]):
    """A metric's children by label values, each made once, so that counting costs one dict look-up."""

    def __init__(self, metric: M) -> None:
        super().__init__()
        self._metric = metric

    def __missing__(self, values: tuple[str | int, ...]) -> M:
        child = self[values] = self._metric.labels(*values)
        return child


class Metrics:
    """All metrics of one broker. `outcomes`: of sessions; each starts at 0, so that the first one shows as an increase.

    With several workers (`DIRECTORY` is set) each writes its own file. Counters and histograms are added up; each gauge
    says how it is combined.
    """

    def __init__(self, outcomes: Iterable[str] = ()) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the series, and files do not keep them
        self._registry = registry = CollectorRegistry()
        self.shared = DIRECTORY in os.environ
        """True when other processes may answer for this one, from the gauges it last wrote."""

        def histogram(name: str, meaning: str, *labels: str) -> Children[Histogram]:
            return Children(Histogram(name, meaning, labels, buckets=DURATIONS, registry=registry))

        def counter(name: str, meaning: str, *labels: str) -> Children[Counter]:
            return Children(Counter(name, meaning, labels, registry=registry))

        def gauge(name: str, meaning: str, together: str, *labels: str) -> Gauge:
            return Gauge(name, meaning, labels, multiprocess_mode=together, registry=registry)  # type: ignore[arg-type]

        self._requests = histogram(
            "http_server_request_duration_seconds",
            "Seconds to answer a request, for streams until their end.",
            *("http_request_method", "http_route", "http_response_status_code"),
        )
        self._upstream = histogram(
            "http_client_request_duration_seconds",
            "Seconds that a request to OneInbox took; without an answer, error_type replaces the status.",
            *("http_request_method", "url_template", "http_response_status_code", "error_type"),
            *("server_address", "server_port"),
        )
        self._sessions = counter(
            "broker_sessions",
            "Requests for a session, by outcome: `started`, `replayed`, `hung-up`, or an error's slug.",
            "outcome",
        )
        self._plan_sessions = counter(
            "broker_plan_sessions",
            "Requests for a session by users with a plan, by plan and outcome; only with BROKER_PLANS_FILE.",
            *("plan", "outcome"),
        )
        self._refused = counter(
            "broker_limits_refused",
            "Refusals, by the limit reached; enforced is false when BROKER_LIMITS_MODE is `observe`.",
            *("limit", "enforced"),
        )
        self._handshakes = Counter(
            "broker_oneinbox_handshakes",
            "Connections to OneInbox that were begun, to keep one ready or for a request.",
            registry=registry,
        )
        self._cold_posts = Counter(
            "broker_oneinbox_cold_posts",
            "POSTs to OneInbox that had to wait for a new connection.",
            registry=registry,
        )
        self._pauses = counter(
            "broker_oneinbox_pauses",
            "Times the broker started no calls for a while: `asked-for` (its 429) or `no-answers`.",
            "reason",
        )
        self._orphans = counter(
            "broker_orphans",
            "Calls whose answer was lost: `lost`; `found` and `stopped`; `not-found` (no such call); `given-up`.",
            "fate",
        )
        self._hang_ups = counter(
            "broker_hang_ups",
            "Attempts to hang up a call, by reason; a failed one is repeated, and counted again.",
            *("reason", "result"),
        )
        self.waiting = gauge("broker_waiting_sessions", "Sessions waiting for OneInbox.", "livesum")
        self.streams = gauge("broker_streams", "Open event streams.", "livesum")
        self.followed = gauge("broker_watched_calls", "Calls followed by event streams, per process.", "livesum")
        self.cooldown = gauge("broker_oneinbox_cooldown_seconds", "Seconds until calls are started again.", "livemax")
        self._calls_remaining = gauge(
            "broker_oneinbox_calls_remaining",
            "Calls that OneInbox still allows the account today; NaN if it tells none or has no cap.",
            "livemostrecent",
        )
        self._calls_per_day = gauge(
            "broker_oneinbox_calls_per_day",
            "Calls that OneInbox allows the account in a day; NaN if it tells none or has no cap.",
            "livemostrecent",
        )
        self.set_allowance(None, None)
        self.store_up = gauge("broker_store_up", "1 while the store answers.", "livemin")
        self.paused = gauge("broker_paused", "1 while an operator's pause is in force.", "livemax")
        self.blocks = gauge("broker_blocks", "Operators' blocks in force.", "livemax")
        self._store_losses = Counter(
            "broker_store_losses",
            "Times the shared store was found emptied or set back.",
            registry=registry,
        )
        self.live_calls = gauge("broker_live_calls", "Running calls of all replicas.", "livemostrecent")
        self.unstopped = gauge(
            "broker_unstopped_calls", "Calls that could not be stopped, as `status` lists them.", "livemostrecent"
        )
        self._used = Children(
            gauge("broker_global_limit_used_ratio", "Used share of each global limit.", "livemostrecent", "limit")
        )
        gauge("broker_build_info", "The broker's version.", "livemax", "version", "python").labels(
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

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request. `route`: its template, or `unmatched`."""
        self._requests[method if method in METHODS else OTHER, route, status].observe(seconds)

    def count_session(self, outcome: str, plan: str | None = None) -> None:
        """Count a request for a session. `plan`: its user's; None or empty if there is none, or it is not known."""
        self._sessions[(outcome,)].inc()
        if plan:
            self._plan_sessions[plan, outcome].inc()

    def count_upstream(
        self, method: str, template: str, status: int | None, error: str, *, server: tuple[str, int], seconds: float
    ) -> None:
        """Count a request to OneInbox.

        `template`: its path with placeholders. `error`: an exception's class name. `server`: its host and port.
        """
        if status is not None and status not in STATUSES:
            shown: str | int = OTHER
        else:
            shown = "" if status is None else status
        if status is not None and status >= 400:
            error = str(shown)  # as in OpenTelemetry's conventions
        self._upstream[method, template, shown, error, *server].observe(seconds)

    def count_refusal(self, limits: Iterable[str], *, enforced: bool = True) -> None:
        """Count a refusal by each of these limits."""
        for limit in limits:
            self._refused[limit, "true" if enforced else "false"].inc()

    def count_handshake(self) -> None:
        """Count the beginning of a connection to OneInbox."""
        self._handshakes.inc()

    def count_cold_post(self) -> None:
        """Count a POST to OneInbox that no open connection was ready for."""
        self._cold_posts.inc()

    def count_pause(self, reason: str) -> None:
        """Count the start of a cool-down."""
        self._pauses[(reason,)].inc()

    def count_orphan(self, fate: str) -> None:
        """Count the fate of a call whose answer was lost; one of ORPHANS."""
        self._orphans[(fate,)].inc()

    def count_hang_up(self, reason: str, *, done: bool) -> None:
        """Count an attempt to hang up."""
        self._hang_ups[reason, "stopped" if done else "failed"].inc()

    def count_store_loss(self) -> None:
        """Count that the shared store has lost data."""
        self._store_losses.inc()

    def set_used(self, limit: str, share: float) -> None:
        """Set the used share of a global limit."""
        self._used[(limit,)].set(share)

    def set_allowance(self, left: int | None, cap: int | None) -> None:
        """Set the calls that OneInbox still allows today, and in a whole day; None: not known, or no cap."""
        self._calls_remaining.set(nan if left is None else left)
        self._calls_per_day.set(nan if cap is None else cap)

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics and their media type: Prometheus' text format, or OpenMetrics if `accept` asks for it."""
        registry = self._registry
        if self.shared:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            registry.register(_Workers())
        try:
            encode, media_type = choose_encoder(accept)
        except TypeError:  # a malformed version
            encode, media_type = choose_encoder("")
        return encode(registry), media_type


def use_shared_directory() -> TemporaryDirectory[str]:
    """Make the processes that this one starts count together in a new directory, which the caller cleans up.

    It is in memory where that is possible, also in a container with a read-only root. Raises OSError.
    """
    memory = "/dev/shm"  # noqa: S108 - the new directory has a random name and only its owner may use it
    place = memory if os.access(memory, os.W_OK | os.X_OK) else None
    directory = TemporaryDirectory(prefix="oneinbox-broker-", dir=place)
    os.environ[DIRECTORY] = directory.name
    return directory


def drop_dead_gauges(pids: Collection[int | None]) -> None:
    """Drop the gauges of dead workers, which would stay as they are. Their counts remain."""
    if DIRECTORY in os.environ:
        for pid in _pids() - set(pids):
            mark_process_dead(pid)  # type: ignore[no-untyped-call]


def _pids() -> set[int]:
    """Return the processes that have written gauges."""
    files = Path(os.environ[DIRECTORY]).glob("gauge_live*_*.db")
    return {int(file.stem.rpartition("_")[2]) for file in files}


class _Workers(Collector):
    """Memory, processor time and files of each worker, by process id: sums would fall when one ends."""

    def collect(self) -> Iterable[Metric]:
        together: dict[str, Metric] = {}
        for pid in sorted(_pids()):
            for one in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():  # type: ignore[misc]
                metric = together.setdefault(one.name, Metric(one.name, one.documentation, one.type))
                for sample in one.samples:
                    metric.add_sample(sample.name, {"pid": str(pid)}, sample.value)
        return together.values()
