"""The emulator's options."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorOptions:
    """The emulated account, its voice service and its calls. Durations are in seconds."""

    api_key: str = "oi_sk_sandbox"
    """The bearer token every `/v1` request must carry."""

    agents: tuple[str, ...] = ("agt_sandbox",)
    """Ids of the account's agents; any other is a 404."""

    max_duration_seconds: float = 600
    """The agents' longest time `in_progress`."""

    silence_timeout_seconds: float = 10
    """Time without a sound from the caller, after which the agent ends the call; with `voice="agent"` only."""

    server_url: str = "ws://127.0.0.1:7880"
    """The address participants connect to; by default LiveKit's development address."""

    livekit_key: str = "devkey"
    """Issuer of participant tokens; the default is the key of `livekit-server --dev`."""

    livekit_secret: str = "secret"  # noqa: S105 - the published secret of `livekit-server --dev`
    """Secret that signs participant tokens (HS256)."""

    token_ttl: float = 900
    """Lifetime of a participant token."""

    queued: float = 1
    """Time a call stays `queued`."""

    initiated: float = 1
    """Time it then stays `initiated`."""

    in_progress: float = 8
    """Time it then stays `in_progress`, unless it is stopped."""

    voice: Literal["none", "rooms", "agent"] = "none"
    """`rooms`: make each call's room on the LiveKit server at `server_url`, and delete it when the call ends.
    `agent`: also send an agent there, which needs the extra `voice`. A call's status then follows from who is in the
    room, not from the three times above."""

    join_timeout: float = 60
    """Time for the caller to join, after which the call has failed; with `voice="agent"` only."""

    max_calls_per_day: int | None = None
    """The account's daily cap, which `/v1/usage` tells; None: no cap. Calls beyond it are started all the same."""

    transcript_delay: float = 2.5
    """Time from a call's end until its transcript, messages, recording, analysis and summary are filled in."""

    list_metadata: bool = True
    """Include `metadata` in lists of calls."""

    edition: Literal["reference", "guide"] = "reference"
    """`reference`: UUID ids, all fields. `guide`: `call_…` ids, only the older fields, the transcript as an array."""

    now: Callable[[], float] = time.time
    """The clock, in seconds since the epoch; a call's status follows from it."""
