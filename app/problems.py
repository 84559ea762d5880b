"""Every error response of the broker: RFC 9457 problem details, one exception class, one table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table: the status and title of a slug, what it means and what to do about it."""

    status: int
    title: str
    meaning: str
    remedy: str


WAIT = "Wait the number of seconds in Retry-After, then try again."
RETRY = "Try again in a moment."

KINDS: Mapping[str, Kind] = {
    "malformed-json": Kind(
        400,
        "The body is not JSON",
        "The body cannot be read as JSON: broken syntax, NaN or Infinity, a lone surrogate, not UTF-8, or more than "
        "32 levels deep.",
        "Send an object as JSON.stringify writes it, in UTF-8.",
    ),
    "body-too-large": Kind(
        413,
        "The body is too large",
        "The body is larger than 16 KiB (a webhook's: 1 MB).",
        "Send less: variables and metadata are meant for short values.",
    ),
    "unsupported-media-type": Kind(
        415,
        "The body's type is not JSON",
        "Content-Type names something other than JSON, or is missing; or the body has a Content-Encoding.",
        "Send Content-Type: application/json and no Content-Encoding, or leave both out when there is no body.",
    ),
    "invalid-request": Kind(
        422,
        "The request is not valid",
        "The body or a header is not what this route accepts. `errors` lists each invalid field.",
        "Correct the fields in `errors`; the API documentation shows what is accepted.",
    ),
    "unauthenticated": Kind(
        401,
        "Not signed in",
        "The request carries no login, or one that is invalid or has expired.",
        "Sign in again and send the new token.",
    ),
    "forbidden-origin": Kind(
        403,
        "This site may not use the broker",
        "The request comes from a browser origin that is not allowed here, or lacks the origin it needs.",
        "Ask the operator to add the site's origin to BROKER_ALLOWED_ORIGINS.",
    ),
    "variable-not-allowed": Kind(
        403,
        "A variable is not allowed",
        "The request sets a variable that browsers may not set. `detail` lists the names.",
        "Leave it out, or ask the operator to allow it in BROKER_ALLOWED_VARIABLES.",
    ),
    "override-not-allowed": Kind(
        403,
        "An override is not allowed",
        "The request overrides a part of the agent that browsers may not override. `detail` lists the paths.",
        "Leave it out, or ask the operator to allow the path in BROKER_ALLOWED_OVERRIDES.",
    ),
    "agent-not-allowed": Kind(
        403,
        "This agent is not available",
        "The request names an agent that is not configured here, or not available to this user.",
        "Name a configured agent, or none to get the default.",
    ),
    "identity-mismatch": Kind(
        403,
        "The participant identity is not yours",
        "`participant_identity` differs from the id of the signed-in user.",
        "Leave it out; the broker knows the user.",
    ),
    "challenge-failed": Kind(
        403,
        "The bot challenge was not passed",
        "The challenge token is missing, wrong, already used, or from another site.",
        "Solve the challenge and send its token as X-Challenge-Token; each token works once.",
    ),
    "blocked": Kind(
        403,
        "You are blocked",
        "The operator has blocked this user.",
        "Ask the operator. A block may expire; retrying does not help.",
    ),
    "in-progress": Kind(
        409,
        "The first request is still running",
        "A request with this Idempotency-Key is still running.",
        "Wait the number of seconds in Retry-After, then send the same request with the same key.",
    ),
    "idempotency-mismatch": Kind(
        422,
        "The key belongs to another request",
        "This Idempotency-Key was used with a different body.",
        "Use a new key for a new request.",
    ),
    "not-found": Kind(
        404,
        "Not found",
        "The route or call does not exist, the call belongs to another user, or its key is wrong. The response is the "
        "same for all of these.",
        "Use the Location that POST /session returned.",
    ),
    "method-not-allowed": Kind(
        405, "Method not allowed", "The route does not take this method.", "Use one of the methods in `Allow`."
    ),
    "rate-limited": Kind(429, "Too many requests", "You sent more requests than your limit allows.", WAIT),
    "too-many-live-calls": Kind(
        429,
        "Too many calls at once",
        "You have as many running calls as you may have at once.",
        "Hang one up, or wait until it ends.",
    ),
    "talk-time-used-up": Kind(
        429, "Your talk time is used up", "Your calls of the last 24 hours took all the minutes you may have.", WAIT
    ),
    "too-many-streams": Kind(
        429,
        "Too many event streams",
        "You have as many open event streams as you may have at once.",
        "Close one, or share one between your pages.",
    ),
    "at-capacity": Kind(
        503,
        "The service is at capacity",
        "The broker cannot serve this request now: a limit on all users together is reached, it is paused, or "
        "something it needs is down. The cause is not on your side.",
        WAIT,
    ),
    "upstream-busy": Kind(
        503, "The voice service is busy", "OneInbox asked for a pause, or failed many times in a row.", WAIT
    ),
    "upstream-rejected": Kind(
        422,
        "The voice service rejected the request",
        "OneInbox does not accept a value that the request set. `errors` lists each invalid field.",
        "Correct the fields in `errors`.",
    ),
    "upstream-misconfigured": Kind(
        502,
        "The service is not set up correctly",
        "OneInbox refused the broker's key, agent or account, or a configured value. Retrying does not help.",
        "Ask the operator: the broker's log has the cause under this request id.",
    ),
    "upstream-error": Kind(502, "The voice service failed", "OneInbox answered with an error.", RETRY),
    "upstream-unreachable": Kind(
        502, "The voice service is unreachable", "The broker could not connect to OneInbox.", RETRY
    ),
    "upstream-invalid": Kind(
        502,
        "The voice service sent an invalid answer",
        "OneInbox's answer does not match its documentation.",
        "Try again in a moment; if the error persists, give the operator the request id.",
    ),
    "upstream-timeout": Kind(504, "The voice service took too long", "OneInbox did not answer in time.", RETRY),
    "internal-error": Kind(
        500, "Internal error", "A bug in the broker.", "Give the operator the request id; the log has the details."
    ),
}


def plain(text: str) -> str:
    """Return a text of KINDS for JSON, where nothing turns its backticks into code."""
    return text.replace("`", "'")


def problem_body(slug: str, request_id: str, *, detail: str = "", prefix: str = "") -> dict[str, Any]:
    """Return the members of a problem. `detail`: default: the meaning. `prefix`: of the broker's paths."""
    kind = KINDS[slug]
    return {
        "type": f"{prefix}/problems/{slug}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail or plain(kind.meaning),
        "request_id": request_id,
    }


class FieldError(BaseModel):
    """One invalid field of a request; its value is never repeated."""

    loc: list[str | int] = Field(
        description="Path of the field, outermost part first.", examples=[["body", "variables"]]
    )
    msg: str = Field(description="What is wrong with it.")
    type: str = Field(description="Machine-readable name of the error.")


class ProblemDetails(BaseModel):
    """An error, as RFC 9457 problem details."""

    model_config = ConfigDict(title="Problem")

    type: str = Field(
        description="The kind of error: a path of this broker that explains it.", examples=["/problems/rate-limited"]
    )
    title: str = Field(description="The kind of error in a few words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What went wrong this time.")
    request_id: str = Field(description="Identifies this request in the broker's log.")
    errors: list[FieldError] | None = Field(default=None, description="On 422: each invalid field.")


@dataclass(slots=True)
class Problem(Exception):
    """An error response: raised anywhere in a request, sent as problem details.

    `slug`: a key of KINDS. `detail`: for the browser's developer; never an input value or a secret. `headers`: extra
    response headers. `errors`: the invalid fields of a 422. `reason`: for the log alone: the limits that refused, as
    `broker_limits_refused_total` names them, or what else did.
    """

    slug: str
    detail: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    errors: Sequence[Mapping[str, Any]] = ()
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.slug}: {self.detail}"


def retry_later(
    slug: str, seconds: float, detail: str = "", headers: Mapping[str, str] | None = None, reason: str = ""
) -> Problem:
    """Return a problem with Retry-After: whole seconds, rounded up, at least 1."""
    headers = {**(headers or {}), "Retry-After": str(max(1, math.ceil(seconds)))}
    return Problem(slug, detail, headers, reason=reason)


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """Return a 422 for pydantic's error list: places and reasons, never values; the first twenty."""
    places = [{"loc": list(each["loc"]), "msg": each["msg"], "type": each["type"]} for each in errors[:20]]
    return Problem("invalid-request", errors=places)
