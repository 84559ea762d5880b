"""The configured agents: one from ONEINBOX_AGENT_ID, or several from the TOML of BROKER_AGENTS_FILE."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, Field, StringConstraints, ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from app.config.claims import ClaimName, claim_of
from app.config.loading import parse_toml, read_file
from app.config.overrides import OVERRIDE_LEAVES, OverridePath, is_leaf_value, leaves_of, no_leaf
from app.config.settings import Settings, SettingsError, takes
from app.config.validation import (
    AGENT_ID,
    MAX_CALL_SECONDS,
    MAX_VARIABLES,
    AllowedVariable,
    Table,
    VariableName,
    VariableValue,
    check_limits,
    dotted,
    file_mistakes,
    taking,
)

FILE = "BROKER_AGENTS_FILE"
ANY_VARIABLE = "*"

AgentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Claim: TypeAlias = str | int | bool


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent that browsers may ask for.

    `name`: what browsers call it. `agent_id`: what OneInbox calls it. `set_in`: where the operator wrote that id.
    `variables`: names a browser may set; None: any but the fixed ones. `overrides`: dotted paths of leaves a browser
    may override. `fixed_variables`, `fixed_overrides` (nested): every call gets them, whatever the browser asks.
    `session_limits`: per user, on top of those of all agents. `max_live_calls`: of all users. `max_call_seconds`:
    instead of BROKER_MAX_CALL_SECONDS, if given. `require_claims`: claims the user's token must have (names
    or JSON pointers), each with the accepted values.
    """

    name: str
    agent_id: str
    variables: frozenset[str] | None
    overrides: frozenset[str]
    fixed_variables: Mapping[str, VariableValue] = field(default_factory=dict)
    fixed_overrides: Mapping[str, Any] = field(default_factory=dict)
    session_limits: str | None = None
    max_live_calls: int | None = None
    max_call_seconds: int | None = None
    require_claims: Mapping[str, tuple[Claim, ...]] = field(default_factory=dict)
    set_in: str = field(default="ONEINBOX_AGENT_ID", compare=False)

    @property
    def table(self) -> str:
        """The place where the operator wrote what is particular to this agent."""
        return self.set_in.removesuffix(".agent_id")

    def admits(self, claims: Mapping[str, Any]) -> bool:
        """Return whether a token's claims meet `require_claims`; of a claim that is a list, one item is enough."""
        return all(_is_among(claim_of(claims, name), accepted) for name, accepted in self.require_claims.items())


def _is_among(claim: Any, accepted: tuple[Claim, ...]) -> bool:
    # Types count: in Python True == 1 == 1.0, in a token they say different things.
    given = claim if isinstance(claim, list) else [claim]
    return any(type(one) is type(other) and one == other for one in given for other in accepted)


class Agents:
    """The configured agents, by the name browsers use and by OneInbox's id.

    `default`: used when a request names none; None: a request must name one.
    """

    def __init__(self, agents: Iterable[Agent], default: Agent | None) -> None:
        self.by_name: Mapping[str, Agent] = {agent.name: agent for agent in agents}
        self.by_id: Mapping[str, Agent] = {agent.agent_id: agent for agent in self.by_name.values()}
        self.default = default


def _fixed_overrides(table: dict[str, Any]) -> dict[str, Any]:
    wrong = [
        InitErrorDetails(type=PydanticCustomError("value_error", wrong), loc=path, input=None)
        for path, wrong in _wrong_leaves(table)
    ]
    if wrong:
        raise ValidationError.from_exception_data("fixed_overrides", wrong)
    return table


def _wrong_leaves(table: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in table.items():
        path = (*above, key)
        dotted = ".".join(path)
        if isinstance(value, dict) and value and any(leaf.startswith(f"{dotted}.") for leaf in OVERRIDE_LEAVES):
            yield from _wrong_leaves(value, path)
        elif "." in key or dotted not in OVERRIDE_LEAVES:
            yield path, no_leaf(dotted)
        elif not is_leaf_value(OVERRIDE_LEAVES[dotted], value):
            yield path, "is not a number" if OVERRIDE_LEAVES[dotted] is float else "is not a string"


FixedOverrides = Annotated[dict[str, Any], AfterValidator(_fixed_overrides)]


class AgentTable(Table):
    """One agent of the file."""

    agent_id: str = taking("an agent's id, agt_… or a UUID", pattern=AGENT_ID)
    default: bool = taking("true or false", False)
    fixed_variables: dict[VariableName, VariableValue] = taking(
        f"a table of at most {MAX_VARIABLES} variables: names of up to 64 letters, digits and _, no digit first; "
        "values are strings, numbers or booleans of at most 1,000 characters, without {{, }} and control characters",
        {},
        max_length=MAX_VARIABLES,
    )
    fixed_overrides: FixedOverrides = taking(f"nested tables of {', '.join(OVERRIDE_LEAVES)}", {})
    variables: list[AllowedVariable] | None = taking(
        'a list of names (up to 64 letters, digits and _, no digit first), or ["*"] for any', None
    )
    overrides: list[OverridePath] | None = taking(f"a list of paths out of {', '.join(OVERRIDE_LEAVES)}", None)
    session_limits: Annotated[str, AfterValidator(check_limits)] | None = taking(
        "limits such as 3/minute;20/day, one per period", None
    )
    max_live_calls: int | None = taking("a whole number from 1 to 1,000,000", None, ge=1, le=1_000_000)
    max_call_seconds: int | None = taking(f"seconds, 1 to {MAX_CALL_SECONDS}", None, ge=1, le=MAX_CALL_SECONDS)
    require_claims: dict[ClaimName, Annotated[list[Claim], Field(min_length=1)]] = taking(
        'claims, each with a list of strings, whole numbers or booleans: { plan = ["pro", "team"] }', {}
    )

    @field_validator("variables", "overrides")
    @classmethod
    def _not_fixed(cls, names: list[str] | None, info: ValidationInfo) -> list[str] | None:
        key = f"fixed_{info.field_name}"
        if both := sorted(leaves_of(info.data.get(key, {})).keys() & set(names or [])):
            raise ValueError(f"holds {', '.join(both[:10])}, set by {key} too")
        return names

    @field_validator("require_claims", mode="before")
    @classmethod
    def _needs_tokens(cls, claims: Any, info: ValidationInfo) -> Any:
        if info.context is not None and not info.context["jwt"]:
            raise ValueError("is set, but users have no claims, as BROKER_AUTH is not jwt")
        return claims


class AgentsFile(Table):
    """The file."""

    agents: dict[AgentName, AgentTable] = taking(
        "a table [agents.NAME] for each agent; NAME has 1 to 64 letters, digits, - and _", min_length=1
    )


def load_agents(settings: Settings) -> Agents:
    """Return the configured agents. Raises SettingsError, with a line for each mistake in the agents file."""
    variables = None if ANY_VARIABLE in settings.allowed_variables else frozenset(settings.allowed_variables)
    overrides = frozenset(settings.allowed_overrides)
    if settings.agents_file is None:
        assert settings.oneinbox_agent_id is not None  # noqa: S101 - load_settings requires one of the two
        return single_agent(settings.oneinbox_agent_id, variables, overrides)
    text = read_file(FILE, settings.agents_file, takes(FILE))
    return read_agents(text, variables=variables, overrides=overrides, jwt=settings.auth == "jwt")


def single_agent(agent_id: str, variables: frozenset[str] | None, overrides: frozenset[str]) -> Agents:
    """Return the one agent of ONEINBOX_AGENT_ID. `variables` (None: any), `overrides`: what browsers may set."""
    agent = Agent("default", agent_id, variables, overrides)
    return Agents([agent], agent)


def read_agents(text: str, *, variables: frozenset[str] | None, overrides: frozenset[str], jwt: bool) -> Agents:
    """Read an agents file.

    `variables` (None: any) and `overrides`: what browsers may set where a table does not say. `jwt`: users have claims.
    Raises SettingsError, with a line for each mistake: dotted path, what is wrong, what it takes.
    """
    document = parse_toml(FILE, text)
    lines = list(_repeats(document.get("agents")))
    try:
        tables = AgentsFile.model_validate(document, context={"jwt": jwt}).agents
    except ValidationError as error:
        lines = [*file_mistakes(error, AgentsFile), *lines]
    if lines:
        raise SettingsError([f"{FILE}: {line}" for line in lines])
    agents = {name: _agent(name, table, variables, overrides) for name, table in tables.items()}
    return Agents(agents.values(), next((agents[name] for name, table in tables.items() if table.default), None))


def _agent(name: str, table: AgentTable, variables: frozenset[str] | None, overrides: frozenset[str]) -> Agent:
    if table.variables is not None:
        variables = None if ANY_VARIABLE in table.variables else frozenset(table.variables)
    return Agent(
        name=name,
        agent_id=table.agent_id,
        variables=variables,
        overrides=overrides if table.overrides is None else frozenset(table.overrides),
        fixed_variables=table.fixed_variables,
        fixed_overrides=table.fixed_overrides,
        session_limits=table.session_limits,
        max_live_calls=table.max_live_calls,
        max_call_seconds=table.max_call_seconds,
        require_claims={claim: tuple(accepted) for claim, accepted in table.require_claims.items()},
        set_in=f"{FILE}: {dotted(('agents', name, 'agent_id'))}",
    )


def _repeats(tables: Any) -> Iterator[str]:
    """Yield a line for each id, and each `default = true`, that an agent before has too."""
    first: dict[str | bool, str] = {}
    for name, table in tables.items() if isinstance(tables, dict) else ():
        for key, kind, instead in (
            ("agent_id", str, "an id that no other agent has"),
            ("default", bool, "true for one agent only"),
        ):
            value = isinstance(table, dict) and table.get(key)
            if value and isinstance(value, kind) and (other := first.setdefault(value, name)) != name:
                yield f"{dotted(('agents', name, key))}: is the same as in {dotted(('agents', other))}; takes {instead}"
