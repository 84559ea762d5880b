"""What an emulated OneInbox is like."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorOptions:
    """How the emulated account, its voice service and its calls behave. All durations are in seconds."""

    api_key: str = "oi_sk_sandbox"
    """The bearer token every `/v1` request must carry."""

    agents: tuple[str, ...] = ("agt_sandbox",)
    """Ids of the agents of the account; any other is a 404."""

    server_url: str = "ws://127.0.0.1:7880"
    """Where a participant connects to: LiveKit's own development address by default."""

    livekit_key: str = "devkey"
    """Issuer of participant tokens; `livekit-server --dev` knows this one."""

    livekit_secret: str = "secret"  # noqa: S105 - the published secret of `livekit-server --dev`
    """Signs participant tokens (HS256)."""

    token_ttl: float = 900
    """Life of a participant token."""

    queued: float = 1
    """How long a call stays `queued`."""

    initiated: float = 1
    """How long it then stays `initiated`."""

    in_progress: float = 8
    """How long it then stays `in_progress`, unless it is stopped."""

    transcript_delay: float = 2.5
    """How long after the end transcript, messages, recording, analysis and summary are filled in."""

    list_metadata: bool = True
    """Whether the items of a list carry `metadata`."""

    edition: Literal["reference", "guide"] = "reference"
    """`reference`: UUID ids and all fields. `guide`: `call_…` ids, the older fields only, the transcript an array."""

    now: Callable[[], float] = time.time
    """The clock: seconds since the epoch. A call's status is a pure function of it."""
