"""Every error the broker answers: RFC 9457 problem details, one exception class, one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table: a slug's status and title, what it means and what to do about it."""

    status: int
    title: str
    meaning: str
    remedy: str


KINDS: Mapping[str, Kind] = {
    "malformed-json": Kind(
        400,
        "The body is not JSON",
        "The body could not be read as JSON: broken syntax, NaN or Infinity, a lone surrogate, not UTF-8, or more than "
        "32 levels deep.",
        "Send what JSON.stringify makes of an object, in UTF-8.",
    ),
    "body-too-large": Kind(
        413,
        "The body is too large",
        "The body is larger than 16 KiB.",
        "Send less: variables and metadata are for short facts.",
    ),
    "unsupported-media-type": Kind(
        415,
        "The body's type is not JSON",
        "Content-Type names something other than JSON.",
        "Send Content-Type: application/json, or leave it out when there is no body.",
    ),
    "invalid-request": Kind(
        422,
        "The request is not valid",
        "The body or a header is not what this route takes. `errors` names each place.",
        "Mend the places that `errors` names; the API documentation shows what is taken.",
    ),
    "unauthenticated": Kind(
        401,
        "Nobody is signed in",
        "The request carries no identity, or one that is not valid (any more).",
        "Sign in again and send the fresh token.",
    ),
    "forbidden-origin": Kind(
        403,
        "This site may not use the broker",
        "The request comes from a browser origin that is not allowed here.",
        "The operator adds the site's origin to BROKER_ALLOWED_ORIGINS.",
    ),
    "variable-not-allowed": Kind(
        403,
        "A variable may not be set",
        "The request sets a variable that browsers may not set.",
        "Leave it out, or have the operator allow it in BROKER_ALLOWED_VARIABLES.",
    ),
    "override-not-allowed": Kind(
        403,
        "An override may not be set",
        "The request overrides a part of the agent that browsers may not override. `detail` names the paths.",
        "Leave it out, or have the operator allow the path in BROKER_ALLOWED_OVERRIDES.",
    ),
    "agent-not-allowed": Kind(
        403,
        "This agent is not available",
        "The request names an agent that is not configured here, or not for this user.",
        "Name a configured agent, or none for the default.",
    ),
    "identity-mismatch": Kind(
        403,
        "The participant identity is not yours",
        "`participant_identity` differs from the signed-in user.",
        "Leave it out; the broker knows who is asking.",
    ),
    "challenge-failed": Kind(
        403,
        "The bot challenge was not passed",
        "The challenge's answer is missing, wrong, used already, or from another site.",
        "Solve the challenge and send its answer as X-Challenge-Token; each answer works once.",
    ),
    "blocked": Kind(
        403,
        "You are blocked",
        "The operator has blocked this user.",
        "Ask the operator; waiting may help, trying does not.",
    ),
    "in-progress": Kind(
        409,
        "The first request is still running",
        "A request with this Idempotency-Key is still running.",
        "Wait as many seconds as Retry-After says, then send the same request with the same key.",
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
        "No such route or call, or the call is somebody else's, or its key is wrong: the answers do not differ.",
        "Use the Location that POST /session gave.",
    ),
    "method-not-allowed": Kind(
        405, "Method not allowed", "The route exists, but not for this method.", "Use one of the methods in `Allow`."
    ),
    "rate-limited": Kind(
        429,
        "Too many requests",
        "You asked more often than your limit allows.",
        "Wait as many seconds as Retry-After says, then try once.",
    ),
    "too-many-live-calls": Kind(
        429,
        "Too many calls at once",
        "As many of your calls are running as you may have at once.",
        "Hang one up, or wait until it ends.",
    ),
    "talk-time-used-up": Kind(
        429,
        "Your talk time is used up",
        "Your calls of the last 24 hours took as many minutes as you may have.",
        "Wait as many seconds as Retry-After says, then try once.",
    ),
    "too-many-streams": Kind(
        429,
        "Too many event streams",
        "As many of your event streams are open as you may have at once.",
        "Close one, or share one among your pages.",
    ),
    "at-capacity": Kind(
        503,
        "The service is at capacity",
        "The broker takes no further sessions right now: a limit of all users together, a pause, or a part it needs is "
        "down. It is not about you.",
        "Wait as many seconds as Retry-After says, then try once.",
    ),
    "upstream-busy": Kind(
        503,
        "The voice service is busy",
        "OneInbox asks for a pause.",
        "Wait as many seconds as Retry-After says, then try once.",
    ),
    "upstream-rejected": Kind(
        422,
        "The voice service rejected the request",
        "OneInbox does not take something that the request itself set. `errors` names it.",
        "Mend the places that `errors` names.",
    ),
    "upstream-misconfigured": Kind(
        502,
        "The service is not set up correctly",
        "OneInbox refused the broker's key, agent or account. Trying again does not help.",
        "The operator finds the cause in the broker's log under this request id.",
    ),
    "upstream-error": Kind(
        502, "The voice service failed", "OneInbox answered with an error.", "Try again in a moment."
    ),
    "upstream-unreachable": Kind(
        502, "The voice service is unreachable", "No connection to OneInbox could be made.", "Try again in a moment."
    ),
    "upstream-invalid": Kind(
        502,
        "The voice service answered nonsense",
        "OneInbox's answer was not what its documentation says.",
        "Try again in a moment; if it stays, tell the operator the request id.",
    ),
    "upstream-timeout": Kind(
        504, "The voice service took too long", "OneInbox did not answer in time.", "Try again in a moment."
    ),
    "internal-error": Kind(
        500, "Internal error", "A bug in the broker.", "Tell the operator the request id; the log has the rest."
    ),
}


class FieldError(BaseModel):
    """One place of a request that is not valid; the value itself is never repeated."""

    loc: list[str | int] = Field(
        description="Path of the value, from the outside in.", examples=[["body", "variables"]]
    )
    msg: str = Field(description="What is wrong with it.")
    type: str = Field(description="A short machine-readable name of the error.")


class ProblemDetails(BaseModel):
    """An error, as RFC 9457 problem details."""

    model_config = ConfigDict(title="Problem")

    type: str = Field(
        description="Which error: a path of this broker that explains it.", examples=["/problems/rate-limited"]
    )
    title: str = Field(description="The error in a few words; the same for every occurrence.")
    status: int = Field(description="The HTTP status, again.")
    detail: str = Field(description="What happened this time, and what to do.")
    request_id: str = Field(description="Names this request in the broker's log.")
    errors: list[FieldError] | None = Field(default=None, description="On 422: each invalid place.")


@dataclass(slots=True)
class Problem(Exception):
    """Raised anywhere in a request, answered as problem details.

    `slug`: a key of KINDS. `detail`: for the browser's developer; never holds an input value or a secret.
    `headers`: extra headers of the answer. `errors`: the invalid places of a 422.
    """

    slug: str
    detail: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    errors: Sequence[Mapping[str, Any]] = ()

    def __str__(self) -> str:
        return f"{self.slug}: {self.detail}"


def invalid_request(errors: Sequence[Mapping[str, Any]], detail: str = "") -> Problem:
    """A 422 out of pydantic's error list: places and reasons, never values; the first twenty."""
    places = [{"loc": list(each["loc"]), "msg": each["msg"], "type": each["type"]} for each in errors[:20]]
    return Problem("invalid-request", detail, errors=places)
