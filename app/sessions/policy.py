"""Rules for session requests: what is not allowed is refused, except for fields that LiveKit always sends."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from app.config.agents import Agent, Agents
from app.config.claims import claim_of
from app.config.overrides import OVERRIDE_LEAVES, is_leaf_value, leaves_of
from app.config.validation import MAX_VARIABLES, VariableValue, check_variable_value
from app.identity import User
from app.problems import Problem, invalid_request
from app.sessions.schemas import SessionRequest

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CallSpec:
    """A session request that passed the policy, as OneInbox gets it.

    `own_variables`: set by the browser itself; `variables` includes the trusted and fixed ones.
    """

    agent: Agent
    own_variables: Mapping[str, VariableValue]
    variables: Mapping[str, VariableValue]
    overrides: Mapping[str, Any]
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Policy:
    """The configured agents and what requests may set. `claims`: the token claim of each trusted variable."""

    agents: Agents
    claims: Mapping[str, str]

    def decide(self, user: User, request: SessionRequest) -> CallSpec:
        """Check a request and return the call to start. Raises 403 and 422 problems."""
        agent = self._agent(user, request)
        if user.mode != "anonymous" and request.participant_identity not in (None, user.id):
            raise Problem("identity-mismatch")
        own = self._own_variables(agent, request)
        fixed = leaves_of(agent.fixed_overrides)
        allowed = agent.overrides - fixed.keys()
        refused = sorted(set(_refused_leaves(request.overrides or {}, allowed)))
        if refused:
            shown = ", ".join(path[:64] for path in refused[:10])
            raise Problem("override-not-allowed", f"Not allowed, or of the wrong type: {shown}.")
        return CallSpec(
            agent=agent,
            own_variables=own,
            variables={**own, **self._trusted_variables(user), **agent.fixed_variables},
            overrides=_merged(request.overrides or {}, agent.fixed_overrides),
            metadata=request.all_metadata,
        )

    def _agent(self, user: User, request: SessionRequest) -> Agent:
        name, agent_id = request.agent_name, request.agent_id
        by_name = self.agents.by_name.get(name) if name is not None else None
        by_id = self.agents.by_id.get(agent_id) if agent_id is not None else None
        if (name is not None and by_name is None) or (agent_id is not None and by_id is None):
            raise Problem("agent-not-allowed")
        if by_name is not None and by_id is not None and by_name is not by_id:
            raise _invalid("agent_id", "Differs from the named agent", "contradiction")
        agent = by_name or by_id or self.agents.default
        if agent is None:
            raise _invalid("agent", "There is no default agent: name one", "missing")
        if not agent.admits(user.claims):
            raise Problem("agent-not-allowed")
        return agent

    def _own_variables(self, agent: Agent, request: SessionRequest) -> dict[str, VariableValue]:
        def allows(name: str) -> bool:
            taken = name in self.claims or name in agent.fixed_variables
            return not taken and (agent.variables is None or name in agent.variables)

        variables = request.all_variables
        refused = sorted(name for name in variables if not allows(name))
        if refused:
            raise Problem("variable-not-allowed", f"Not allowed: {', '.join(refused)}.")
        # LiveKit's clients always send it, so it is dropped rather than refused.
        if request.participant_name is not None and allows("participant_name"):
            try:
                variables.setdefault("participant_name", check_variable_value(request.participant_name))
            except ValueError as error:
                raise _invalid("participant_name", str(error), "variable") from None
        if len(variables) > MAX_VARIABLES:
            raise _invalid("participant_name", "At most 32 variables are allowed, including this one", "too_long")
        return variables

    def _trusted_variables(self, user: User) -> dict[str, VariableValue]:
        trusted: dict[str, VariableValue] = {}
        for name, claim in self.claims.items():
            value = claim_of(user.claims, claim)
            try:
                if not isinstance(value, (str, int, float, bool)):
                    raise TypeError
                trusted[name] = check_variable_value(value)
            except (ValueError, TypeError):
                log.warning("claim_left_out", variable=name, claim=claim)
        return trusted


def _invalid(field: str, message: str, kind: str) -> Problem:
    return invalid_request([{"loc": ("body", field), "msg": message, "type": kind}])


def _refused_leaves(value: Mapping[str, Any], allowed: frozenset[str], prefix: str = "") -> Iterator[str]:
    for key, each in value.items():
        path = f"{prefix}{key}"
        if isinstance(each, dict) and each and path not in OVERRIDE_LEAVES:
            yield from _refused_leaves(each, allowed, f"{path}.")
        elif "." in key or path not in allowed or not is_leaf_value(OVERRIDE_LEAVES[path], each):
            yield path


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return two nested mappings merged into a new one; `above` wins."""
    merged = dict(below)
    for key, each in above.items():
        under = merged.get(key)
        merged[key] = _merged(under, each) if isinstance(each, Mapping) and isinstance(under, Mapping) else each
    return merged
