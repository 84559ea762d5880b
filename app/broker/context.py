"""The parts of one running broker, for the routes."""

from dataclasses import dataclass

from app.broker.gauges import Gauges
from app.broker.secret_reload import SecretReloader
from app.broker.shutdown import Shutdown
from app.calls.ownership import Ownership
from app.calls.refresh_queue import RefreshQueue
from app.calls.service import Calls
from app.config.plans import Plans
from app.config.settings import Settings
from app.identity.base import Identity
from app.identity.keyring import Keyring
from app.limits import KillSwitch, Limits
from app.sessions.service import Sessions
from app.store import Store
from app.telemetry.metrics import Metrics
from app.telemetry.traces import Traces


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Broker:
    """Everything a route may need."""

    identity: Identity
    """Identifies the user of a request."""
    limits: Limits
    """Rates and live-call slots."""
    plans: Plans
    """Says which limits a user has."""
    keyring: Keyring
    """Makes pseudonyms of users, for logs."""
    kill_switch: KillSwitch
    """The operator's pauses and blocks."""
    ownership: Ownership
    """Makes the public ids of calls, and checks who owns one."""
    sessions: Sessions
    """Starts calls."""
    calls: Calls
    """Reads, follows and stops calls."""
    store: Store
    """The shared store, for the readiness check."""
    refresh_queue: RefreshQueue
    """Fetches calls that a webhook named."""
    secret_reloader: SecretReloader
    """Holds the settings in force."""
    shutdown: Shutdown
    """Knows when the process is shutting down."""
    metrics: Metrics
    """Counters and histograms."""
    gauges: Gauges
    """Current values, for the metrics."""
    traces: Traces | None
    """None if tracing is off."""

    @property
    def settings(self) -> Settings:
        """The settings in force; secrets may change."""
        return self.secret_reloader.settings
