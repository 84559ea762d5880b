"""The parts of one running broker, as routes see them."""

from dataclasses import dataclass

from pydantic import SecretStr

from app.broker.gauges import Gauges
from app.broker.secret_reload import SecretReloader
from app.broker.shutdown import Shutdown
from app.calls.ownership import Ownership
from app.calls.refresh_queue import RefreshQueue
from app.calls.service import Calls
from app.identity import Identity
from app.identity.keyring import Keyring
from app.limits import KillSwitch, Limits
from app.sessions.service import Sessions
from app.store import Store
from app.telemetry.metrics import Metrics
from app.telemetry.traces import Traces


@dataclass(frozen=True, slots=True)
class Broker:
    """Everything a route may need."""

    identity: Identity
    """Who is asking."""
    limits: Limits
    """How often they may ask."""
    keyring: Keyring
    """Names users by a pseudonym."""
    kill_switch: KillSwitch
    """What the operator has paused or blocked."""
    ownership: Ownership
    """Names calls, and knows whose they are."""
    sessions: Sessions
    """Starts calls."""
    calls: Calls
    """Reads, follows and stops calls."""
    store: Store
    """The shared store, for the readiness check."""
    refresh_queue: RefreshQueue
    """Looks up calls that a webhook named."""
    secret_reloader: SecretReloader
    """The secrets in force."""
    shutdown: Shutdown
    """Whether the process is about to end."""
    metrics: Metrics
    """What was counted."""
    gauges: Gauges
    """What is true now, for the metrics."""
    traces: Traces | None
    """None where no traces are wanted."""
    root_path: str
    """Prefix of every path in an answer."""

    @property
    def webhook_secret(self) -> SecretStr | None:
        """The secret part of the webhook's path."""
        return self.secret_reloader.settings.webhook_secret

    @property
    def metrics_token(self) -> SecretStr | None:
        """The bearer token of /metrics."""
        return self.secret_reloader.settings.metrics_token
