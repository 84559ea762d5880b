"""Failures of requests to OneInbox. Each class names the problem that a browser gets (`slug`)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class OneInboxError(Exception):
    """Any failure of a request to OneInbox.

    `reason`: continues "OneInbox …". `may_have_acted`: OneInbox may have done what was asked; False only if the request
    was certainly not sent, or was refused (a 4xx other than 408). `status`: OneInbox's, if it answered. `call_id`: of a
    call that an unusable answer named. `log_fields`: what the log line says besides, for the operator.
    """

    slug: ClassVar[str] = "upstream-error"

    def __init__(
        self, reason: str, *, may_have_acted: bool, status: int | None = None, call_id: str | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.may_have_acted = may_have_acted
        self.status = status
        self.call_id = call_id
        self.log_fields: Mapping[str, str] = {}


class Unreachable(OneInboxError):
    """A connection that could not be made; nothing was sent."""

    slug = "upstream-unreachable"


class TimedOut(OneInboxError):
    """An answer that did not arrive completely in time."""

    slug = "upstream-timeout"


class Failed(OneInboxError):
    """A 5xx, a redirect, an unexpected 4xx, or a connection lost after sending."""


class Invalid(OneInboxError):
    """An answer that does not fit the request."""

    slug = "upstream-invalid"


class Busy(OneInboxError):
    """A 429. `retry_after`: seconds, as OneInbox says or 5, at most 60."""

    slug = "upstream-busy"

    def __init__(self, retry_after: int, reason: str = "asks for a pause", status: int | None = 429) -> None:
        super().__init__(reason, may_have_acted=False, status=status)
        self.retry_after = retry_after


class CircuitOpen(Busy):
    """A call not started: the circuit breaker is open. `retry_after`: seconds until one may be."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after, "gets no new calls during a pause", status=None)


class Misconfigured(OneInboxError):
    """A refusal of the key, the account or the agent: 401, 402, 403, 404."""

    slug = "upstream-misconfigured"


class Rejected(OneInboxError):
    """A 422. `errors`: OneInbox's own list, unfiltered, so not for browsers."""

    slug = "upstream-misconfigured"

    def __init__(self, errors: Sequence[Mapping[str, Any]]) -> None:
        super().__init__("rejected the request", may_have_acted=False, status=422)
        self.errors = errors


class NoSuchCall(OneInboxError):
    """A 404 for a call."""

    slug = "not-found"

    def __init__(self) -> None:
        super().__init__("knows no such call", may_have_acted=False, status=404)
