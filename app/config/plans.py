"""Plans and organizations: limits out of BROKER_PLANS_FILE, chosen by the claims of a user's token."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, TypeGuard

import structlog
from pydantic import AfterValidator, StringConstraints, ValidationError, ValidationInfo, field_validator

from app.config.agents import Agent
from app.config.claims import ClaimName, claim_of
from app.config.loading import parse_toml, read_file
from app.config.settings import Settings, SettingsError, takes
from app.config.validation import MAX_CALL_SECONDS, Table, check_limits, file_mistakes, nearest, taking

FILE = "BROKER_PLANS_FILE"

CACHED_ENTITLEMENTS = 4096

PlanName = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,64}$")]

log = structlog.get_logger(__name__)


class OrganizationLimits(NamedTuple):
    """Limits that the users of an organization share; None: no limit. `talk_minutes`: in any 24 h."""

    session_limits: str | None = None
    max_live_calls: int | None = None
    talk_minutes: int | None = None


NOTHING_SHARED = OrganizationLimits()


class Entitlement(NamedTuple):
    """The limits of one user's session: the broker's settings, or what the user's plan has instead.

    `talk_minutes`: in any 24 h; None: no limit. `max_call_seconds`: 0: never. `plan`: its name; empty without a file.
    `plan_bounds`: `max_call_seconds` is the plan's own. `token_seconds`: the bound that the token gives, if it does.
    `organization`: its name in the store, a hash; empty for a user who is in none.
    """

    session_limits: str
    max_live_calls: int
    talk_minutes: int | None
    max_call_seconds: int
    plan: str = ""
    plan_bounds: bool = False
    token_seconds: int | None = None
    organization: str = ""
    organization_limits: OrganizationLimits = NOTHING_SHARED

    def bound(self, agent: Agent) -> int:
        """Return the seconds that a call of this agent may last; 0: it is never hung up.

        The agent's own bound replaces the broker's setting. Of those of plan, agent and token the smallest counts.
        """
        replaced = agent.max_call_seconds is not None and not self.plan_bounds
        bounds = (0 if replaced else self.max_call_seconds, agent.max_call_seconds, self.token_seconds)
        return min((seconds for seconds in bounds if seconds), default=0)


@dataclass(repr=False, eq=False)
class Plans:
    """The plans, and which one a token names.

    `default`: of users whose token names no plan, and of all users without a file. `claim`, `seconds_claim`,
    `organization_claim`: names or JSON pointers; None: not read. `issuer`: of the tokens; its organizations are not
    another issuer's.
    """

    default: Entitlement
    by_name: Mapping[str, Entitlement] = field(default_factory=dict)
    claim: str = ""
    seconds_claim: str | None = None
    organization_claim: str | None = None
    organization_limits: OrganizationLimits = NOTHING_SHARED
    issuer: str = ""
    _told: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        # Made once per plan, organization and seconds: the limits that are cached by it find the same object.
        self._made = lru_cache(CACHED_ENTITLEMENTS)(self._make)

    @property
    def has_minutes(self) -> bool:
        """True when the minutes of any user or organization are limited."""
        minutes = [each.talk_minutes for each in (self.default, *self.by_name.values())]
        return any(each is not None for each in (*minutes, self.organization_limits.talk_minutes))

    def of(self, claims: Mapping[str, Any]) -> Entitlement:
        """Return the limits of a user. A claim that cannot be used counts as absent, and is logged once per kind."""
        if not self.by_name:
            return self.default
        return self._made(self._plan(claims), self._organization(claims), self._seconds(claims))

    def _plan(self, claims: Mapping[str, Any]) -> str:
        value = claim_of(claims, self.claim)
        if isinstance(value, str) and value in self.by_name:
            return value
        if value is not None:
            self._tell(self.claim, "names no plan" if isinstance(value, str) else "is not a string")
        return self.default.plan

    def _organization(self, claims: Mapping[str, Any]) -> str:
        if self.organization_claim is None:
            return ""
        value = claim_of(claims, self.organization_claim)
        if value is None:
            return ""
        if value == "" or not (isinstance(value, str) or _is_number(value)):
            self._tell(self.organization_claim, "is not a name or a number")
            return ""
        # Lone surrogates, which JSON can hold, are no UTF-8.
        canonical = "\x1f".join(("organization", self.issuer, str(value))).encode("utf-8", "surrogatepass")
        return hashlib.sha256(canonical).hexdigest()[:32]

    def _seconds(self, claims: Mapping[str, Any]) -> int | None:
        if self.seconds_claim is None:
            return None
        value = claim_of(claims, self.seconds_claim)
        if _is_number(value) and value > 0:
            return max(1, math.floor(min(value, MAX_CALL_SECONDS)))
        if value is not None:
            self._tell(self.seconds_claim, "is not a positive number of seconds")
        return None

    def _tell(self, claim: str, wrong: str) -> None:
        kind = f"{claim} {wrong}"
        if kind not in self._told:
            self._told.add(kind)
            log.warning("plan_claim_ignored", claim=claim, reason=wrong)

    def _make(self, plan: str, organization: str, seconds: int | None) -> Entitlement:
        entitlement = self.by_name[plan]._replace(token_seconds=seconds)
        if not organization:
            return entitlement
        return entitlement._replace(organization=organization, organization_limits=self.organization_limits)


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a claim is a finite number."""
    # A boolean is an int in Python, too; and an int may be too large for `isfinite`.
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


_SESSION_LIMITS = "limits such as 3/hour;10/day, one per period"
_COUNT = "a whole number from 1 to 1,000,000"
_CLAIM = "a claim's name, or a JSON pointer such as /o/id"


class PlanTable(Table):
    """One plan of the file. What it does not say is the broker's own setting."""

    session_limits: Annotated[str, AfterValidator(check_limits)] | None = taking(_SESSION_LIMITS, None)
    max_live_calls: int | None = taking(_COUNT, None, ge=1, le=1_000_000)
    talk_minutes: int | None = taking(_COUNT, None, ge=1, le=1_000_000)
    max_call_seconds: int | None = taking(f"seconds, 0 to {MAX_CALL_SECONDS}", None, ge=0, le=MAX_CALL_SECONDS)


class OrganizationsTable(Table):
    """Limits that the users of each organization share."""

    claim: ClaimName = taking(_CLAIM)
    session_limits: Annotated[str, AfterValidator(check_limits)] | None = taking(_SESSION_LIMITS, None)
    max_live_calls: int | None = taking(_COUNT, None, ge=1, le=1_000_000)
    talk_minutes: int | None = taking(_COUNT, None, ge=1, le=1_000_000)


class PlansFile(Table):
    """The file."""

    claim: ClaimName = taking(_CLAIM)
    max_call_seconds_claim: ClaimName | None = taking(_CLAIM, None)
    plans: dict[PlanName, PlanTable] = taking(
        "a table [plans.NAME] for each plan; NAME has 1 to 64 characters", min_length=1
    )
    default: str = taking("the name of one of the plans")  # after them, so that it can be compared
    organizations: OrganizationsTable | None = taking("a table with the claim and what the users share", None)

    @field_validator("default")
    @classmethod
    def _is_a_plan(cls, name: str, info: ValidationInfo) -> str:
        plans = info.data.get("plans", {name: None})
        if name not in plans:
            raise ValueError(f"is no plan of this file{nearest(name, plans)}")
        return name


def load_plans(settings: Settings) -> Plans:
    """Return the plans; without a file everyone has the settings' limits. Raises SettingsError, a line per mistake."""
    own = Entitlement(
        settings.session_limits, settings.max_live_calls, settings.talk_minutes, settings.max_call_seconds
    )
    if settings.plans_file is None:
        return Plans(own)
    return read_plans(read_file(FILE, settings.plans_file, takes(FILE)), own, settings.jwt_issuer or "")


def read_plans(text: str, own: Entitlement, issuer: str = "") -> Plans:
    """Read a plans file.

    `own`: the settings' limits, for what a plan does not say. Raises SettingsError, with a line for each mistake:
    dotted path, what is wrong, what it takes.
    """
    document = parse_toml(FILE, text)
    try:
        file = PlansFile.model_validate(document)
    except ValidationError as error:
        raise SettingsError([f"{FILE}: {line}" for line in file_mistakes(error, PlansFile)]) from None
    plans = {
        name: own._replace(
            plan=name, plan_bounds=table.max_call_seconds is not None, **table.model_dump(exclude_none=True)
        )
        for name, table in file.plans.items()
    }
    organizations = file.organizations
    shared = organizations.model_dump(exclude={"claim"}) if organizations else {}
    return Plans(
        default=plans[file.default],
        by_name=plans,
        claim=file.claim,
        seconds_claim=file.max_call_seconds_claim,
        organization_claim=organizations.claim if organizations else None,
        organization_limits=OrganizationLimits(**shared),
        issuer=issuer,
    )
