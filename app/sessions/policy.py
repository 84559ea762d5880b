"""What a browser may ask of an agent: everything not allowed is refused, but for what LiveKit sends by itself."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app.identity import User
from app.oneinbox.overrides import OVERRIDE_LEAVES
from app.problems import Problem, invalid_request
from app.sessions.schemas import SessionRequest


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent that browsers may ask for.

    `name`: what browsers call it. `agent_id`: what OneInbox calls it. `variables`: names a browser may set; None: any.
    `overrides`: dotted paths a browser may override.
    """

    name: str
    agent_id: str
    variables: frozenset[str] | None
    overrides: frozenset[str]


@dataclass(frozen=True, slots=True)
class Order:
    """A session request that passed the policy: what OneInbox is asked for."""

    agent: Agent
    variables: Mapping[str, str | float | bool]
    overrides: Mapping[str, Any]
    metadata: Mapping[str, Any]


class Policy:
    """The configured agents and what may be asked of each."""

    def __init__(self, agents: Mapping[str, Agent], default: str | None) -> None:
        """`default`: name of the agent used when none is named; None: a request must name one."""
        self._agents = agents
        self._default = default
        self._by_id = {agent.agent_id: agent for agent in agents.values()}

    def decide(self, user: User, request: SessionRequest) -> Order:
        """Raises 403 and 422 problems."""
        agent = self._agent(request)
        if (
            request.participant_identity is not None
            and user.mode != "anonymous"
            and request.participant_identity != user.id
        ):
            raise Problem("identity-mismatch")
        variables = request.all_variables
        refused = [name for name in variables if not _allows(agent, name)]
        if refused:
            raise Problem("variable-not-allowed", f"Not allowed: {', '.join(sorted(refused))}.")
        # LiveKit's clients send it by themselves: dropping it beats refusing every one of them.
        if request.participant_name is not None and _allows(agent, "participant_name"):
            variables.setdefault("participant_name", request.participant_name)
        refused = sorted(set(_refused_leaves(request.overrides or {}, agent.overrides)))
        if refused:
            shown = [path[:64] for path in refused[:10]]
            raise Problem("override-not-allowed", f"Not allowed, or not of the type it takes: {', '.join(shown)}.")
        return Order(agent, variables, request.overrides or {}, request.all_metadata)

    def _agent(self, request: SessionRequest) -> Agent:
        name = request.agent_name or (None if request.agent_id else self._default)
        if name is None and request.agent_id is None:
            error = {"loc": ("body", "agent"), "msg": "There is no default agent: name one", "type": "missing"}
            raise invalid_request([error])
        named = self._agents.get(name) if name is not None else self._by_id.get(request.agent_id or "")
        if named is None or (request.agent_id is not None and request.agent_id not in self._by_id):
            raise Problem("agent-not-allowed")
        if request.agent_id not in (None, named.agent_id):
            error = {
                "loc": ("body", "agent_id"),
                "msg": "Differs from the agent that is named",
                "type": "contradiction",
            }
            raise invalid_request([error])
        return named


def _allows(agent: Agent, variable: str) -> bool:
    return agent.variables is None or variable in agent.variables


def _refused_leaves(value: Mapping[str, Any], allowed: frozenset[str], prefix: str = "") -> Iterator[str]:
    for key, each in value.items():
        path = f"{prefix}{key}"
        if isinstance(each, dict) and each and path not in OVERRIDE_LEAVES:
            yield from _refused_leaves(each, allowed, f"{path}.")
        elif "." in key or path not in allowed or not _is_a(OVERRIDE_LEAVES[path], each):
            yield path


def _is_a(leaf: type, value: Any) -> bool:
    if leaf is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, leaf)
