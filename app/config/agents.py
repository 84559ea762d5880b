"""The configured agents: one from ONEINBOX_AGENT_ID, or several from the TOML of BROKER_AGENTS_FILE.

The file is read by the standard library's tomllib, which tells no line numbers of what it read. They are found by a
second look at the text, for the error lines only; nothing that is configured depends on it.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from app.config.overrides import OVERRIDE_LEAVES, is_leaf_value
from app.config.settings import Settings, SettingsError
from app.config.validation import MAX_VARIABLES, VariableName, VariableValue, check_limits

AGENT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
AGENT_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
ANY_VARIABLE = "*"
MOST_LIVE_CALLS = 1_000_000

Claim: TypeAlias = str | int | bool
KeyPath: TypeAlias = tuple[str, ...]

TABLE = "agents"
KEYS = (
    "agent_id",
    "default",
    "variables",
    "overrides",
    "fixed_variables",
    "fixed_overrides",
    "session_limits",
    "max_live_calls",
    "require_claims",
)
LEAVES: Mapping[KeyPath, type] = {tuple(path.split(".")): leaf for path, leaf in OVERRIDE_LEAVES.items()}
LEAF_NAMES = ", ".join(OVERRIDE_LEAVES)

_variable_name: TypeAdapter[str] = TypeAdapter(VariableName)
_variable_value: TypeAdapter[VariableValue] = TypeAdapter(VariableValue)


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent that browsers may ask for.

    `name`: what browsers call it. `agent_id`: what OneInbox calls it. `variables`: names a browser may set; None: any
    but the fixed ones. `overrides`: dotted paths of leaves a browser may override. `fixed_variables`,
    `fixed_overrides` (nested): what every call gets, whatever the browser asks. `session_limits`: per user, on top of
    those of all agents. `max_live_calls`: of all users. `require_claims`: what the user's token must say, each claim
    with the values that will do.
    """

    name: str
    agent_id: str
    variables: frozenset[str] | None
    overrides: frozenset[str]
    fixed_variables: Mapping[str, VariableValue] = field(default_factory=dict)
    fixed_overrides: Mapping[str, Any] = field(default_factory=dict)
    session_limits: str | None = None
    max_live_calls: int | None = None
    require_claims: Mapping[str, tuple[Claim, ...]] = field(default_factory=dict)

    def admits(self, claims: Mapping[str, Any]) -> bool:
        """Whether a token's claims have all that this agent requires; of a claim that is a list, one item will do."""
        return all(_is_among(claims.get(name), accepted) for name, accepted in self.require_claims.items())


def _is_among(claim: Any, accepted: tuple[Claim, ...]) -> bool:
    # Types count: in Python True == 1 == 1.0, in a token they say different things.
    given = claim if isinstance(claim, list) else [claim]
    return any(type(one) is type(other) and one == other for one in given for other in accepted)


class Agents:
    """The configured agents, by what browsers call them and by what OneInbox calls them.

    `default`: used when a request names none; None: a request must name one.
    """

    def __init__(self, agents: Iterable[Agent], default: Agent | None) -> None:
        self.by_name: Mapping[str, Agent] = {agent.name: agent for agent in agents}
        self.by_id: Mapping[str, Agent] = {agent.agent_id: agent for agent in self.by_name.values()}
        self.default = default


def load_agents(settings: Settings) -> Agents:
    """The configured agents. Raises SettingsError, a line for each wrong place of the agents file."""
    variables = None if "*" in settings.allowed_variables else frozenset(settings.allowed_variables)
    overrides = frozenset(settings.allowed_overrides)
    if settings.agents_file is None:
        assert settings.oneinbox_agent_id is not None  # noqa: S101 - load_settings requires one of the two
        return single_agent(settings.oneinbox_agent_id, variables, overrides)
    try:
        text = settings.agents_file.read_text(encoding="utf-8")
        return read_agents(text, variables=variables, overrides=overrides, jwt=settings.auth == "jwt")
    except OSError as error:
        lines = [f"cannot be read ({error.strerror}); takes the path of a TOML file"]
    except UnicodeDecodeError:
        lines = ["is not UTF-8 text; takes the path of a TOML file"]
    except AgentsError as error:
        lines = error.lines
    raise SettingsError([f"BROKER_AGENTS_FILE: {line}" for line in lines])


class AgentsError(Exception):
    """An agents file that cannot be used. `lines`: one per mistake: where it is, what is wrong, and what it takes."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        super().__init__("; ".join(lines))


def single_agent(agent_id: str, variables: frozenset[str] | None, overrides: frozenset[str]) -> Agents:
    """The one agent of ONEINBOX_AGENT_ID. `variables`, `overrides`: what browsers may set; variables None: any."""
    agent = Agent("default", agent_id, variables, overrides)
    return Agents([agent], agent)


def read_agents(text: str, *, variables: frozenset[str] | None, overrides: frozenset[str], jwt: bool) -> Agents:
    """Read an agents file.

    `variables` (None: any) and `overrides`: what browsers may set where an entry does not say. `jwt`: whether users
    have claims. Raises AgentsError with every mistake at once.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise AgentsError([_syntax_line(error, text)]) from None
    findings = _Findings(_key_lines(text))
    for key in document.keys() - {TABLE}:
        findings.add((key,), f"is not a key of the agents file{_nearest(key, [TABLE])}", f"{TABLE}.NAME tables")
    tables = document.get(TABLE, {})
    if not isinstance(tables, dict):
        findings.add((TABLE,), "is not a table", "a table [agents.NAME] for each agent")
    elif not tables:
        findings.add((TABLE,), "names no agent", "a table [agents.NAME] for each agent")
    else:
        entries = [_Entry(findings, name, table, jwt=jwt) for name, table in tables.items()]
        agents = [entry.agent(variables, overrides) for entry in entries]
        _check_together(entries, findings)
        if not findings:
            return Agents(agents, next((agent for agent in agents if tables[agent.name].get("default")), None))
    raise AgentsError(findings.lines())


class _Findings:
    """What is wrong with a file so far. `lines_of`: where its tables and keys are."""

    def __init__(self, lines_of: Mapping[KeyPath, int]) -> None:
        self._lines_of = lines_of
        self._found: list[tuple[int, str]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, path: KeyPath, wrong: str, takes: str) -> None:
        """Note a mistake in the value at `path`. The words repeat names and paths, but no values."""
        line = self.line(path)
        self._found.append((line, f"line {line}: {_dotted(path)}: {wrong}; takes {takes}"))

    def line(self, path: KeyPath) -> int:
        """The line of a key; of what encloses it, for a key of an inline table or one that is missing."""
        while path and path not in self._lines_of:
            path = path[:-1]
        return self._lines_of.get(path, 1)

    def lines(self) -> list[str]:
        """The error lines, in the order of the file."""
        return [text for _, text in sorted(self._found)]


class _Entry:
    """One table of the file. Each reader notes what is wrong and goes on with something harmless."""

    def __init__(self, findings: _Findings, name: str, table: Any, *, jwt: bool) -> None:
        self._findings = findings
        self._jwt = jwt
        self.name = name
        self.path: KeyPath = (TABLE, name)
        self.values: Mapping[str, Any] = table if isinstance(table, dict) else {}
        self.is_table = isinstance(table, dict)

    def agent(self, variables: frozenset[str] | None, overrides: frozenset[str]) -> Agent:
        """The agent, to be used only when nothing was found wrong."""
        if not AGENT_NAME.fullmatch(self.name):
            self._findings.add(self.path, "is not a name for an agent", "1 to 64 letters, digits, - and _")
        if not self.is_table:
            self._findings.add(self.path, "is not a table", f"a table with {', '.join(KEYS)}")
        for key in self.values.keys() - set(KEYS):
            self._wrong((key,), f"is not a key of an agent{_nearest(key, KEYS)}", ", ".join(KEYS))
        if not isinstance(self.values.get("default", False), bool):
            self._wrong(("default",), "is not true or false", "true or false")
        fixed_variables, fixed_overrides = self._fixed_variables(), self._fixed_overrides()
        return Agent(
            name=self.name,
            agent_id=self._agent_id(),
            variables=self._variables(variables, fixed_variables),
            overrides=self._overrides(overrides, fixed_overrides),
            fixed_variables=fixed_variables,
            fixed_overrides=fixed_overrides,
            session_limits=self._session_limits(),
            max_live_calls=self._max_live_calls(),
            require_claims=self._require_claims(),
        )

    def _wrong(self, path: KeyPath, wrong: str, takes: str) -> None:
        self._findings.add(self.path + path, wrong, takes)

    def _agent_id(self) -> str:
        value = self.values.get("agent_id")
        if isinstance(value, str) and AGENT_ID.fullmatch(value):
            return value
        if self.is_table:
            wrong = "is required" if value is None else "is not an agent's id"
            self._wrong(("agent_id",), wrong, "an agent's id, agt_… or a UUID")
        return ""

    def _variables(self, inherited: frozenset[str] | None, fixed: Mapping[str, Any]) -> frozenset[str] | None:
        takes = 'a list of names (letters, digits and _), or ["*"] for any'
        given = self._texts("variables", takes)
        if given is None:
            return inherited
        for name in given:
            if name != ANY_VARIABLE and not _is_valid(_variable_name, name):
                self._wrong(("variables",), f"holds {_shown(name)}, which is not a name of a variable", takes)
        for name in sorted(set(given) & fixed.keys()):
            self._wrong(("variables",), f"holds {_shown(name)}, which is in fixed_variables too", "other names")
        return None if ANY_VARIABLE in given else frozenset(given)

    def _overrides(self, inherited: frozenset[str], fixed: Mapping[str, Any]) -> frozenset[str]:
        takes = f"a list of paths out of {LEAF_NAMES}"
        given = self._texts("overrides", takes)
        if given is None:
            return inherited
        for path in given:
            if path not in OVERRIDE_LEAVES:
                near = _nearest(path, OVERRIDE_LEAVES)
                self._wrong(("overrides",), f"holds {_shown(path)}, which is not a single leaf{near}", takes)
        for path in sorted({".".join(path) for path, _ in _leaves(fixed)}.intersection(given)):
            self._wrong(("overrides",), f"holds {_shown(path)}, which is in fixed_overrides too", "other paths")
        return frozenset(given)

    def _fixed_variables(self) -> Mapping[str, VariableValue]:
        given = self._table("fixed_variables", "a table of names and values")
        if len(given) > MAX_VARIABLES:
            self._wrong(("fixed_variables",), "has too many names", f"at most {MAX_VARIABLES}")
        for name, value in given.items():
            path = ("fixed_variables", name)
            if not _is_valid(_variable_name, name):
                self._wrong(path, "is not a name of a variable", "up to 64 letters, digits and _, no digit first")
            if not _is_valid(_variable_value, value) or (isinstance(value, float) and not is_leaf_value(float, value)):
                self._wrong(
                    path,
                    "is not a value for a variable",
                    "a string, number or boolean of at most 1,000 characters, without {{, }} and control characters",
                )
        return given

    def _fixed_overrides(self) -> Mapping[str, Any]:
        given = self._table("fixed_overrides", f"a table of {LEAF_NAMES}")
        for path, value in _leaves(given):
            leaf = LEAVES.get(path)
            if leaf is None:
                near = _nearest(".".join(path), OVERRIDE_LEAVES)
                self._wrong(("fixed_overrides", *path), f"is not a single leaf{near}", f"values of {LEAF_NAMES}")
            elif not is_leaf_value(leaf, value):
                kind = "number" if leaf is float else "string"
                self._wrong(("fixed_overrides", *path), f"is not a {kind}", f"a {kind}")
        return given

    def _session_limits(self) -> str | None:
        value = self.values.get("session_limits")
        if value is None or (isinstance(value, str) and _are_limits(value)):
            return value
        self._wrong(
            ("session_limits",), "is not a list of limits", "limits such as 3/minute;20/day, each of another period"
        )
        return None

    def _max_live_calls(self) -> int | None:
        value = self.values.get("max_live_calls")
        if value is None or (type(value) is int and 1 <= value <= MOST_LIVE_CALLS):
            return value
        self._wrong(("max_live_calls",), "is not a number of calls", f"a whole number from 1 to {MOST_LIVE_CALLS:,}")
        return None

    def _require_claims(self) -> Mapping[str, tuple[Claim, ...]]:
        if "require_claims" in self.values and not self._jwt:
            self._wrong(("require_claims",), "is set, but users have no claims", "BROKER_AUTH=jwt, or leave it out")
            return {}
        takes = 'claims, each with a list of strings, whole numbers or booleans: { plan = ["pro", "team"] }'
        given = self._table("require_claims", takes)
        for name, accepted in given.items():
            if not isinstance(accepted, list) or not all(type(one) in (str, int, bool) for one in accepted):
                self._wrong(("require_claims", name), "is not a list of values", takes)
            elif not accepted:
                self._wrong(("require_claims", name), "is empty, so that nobody would be admitted", takes)
        return {name: tuple(accepted) for name, accepted in given.items() if isinstance(accepted, list)}

    def _table(self, key: str, takes: str) -> Mapping[str, Any]:
        value = self.values.get(key, {})
        if isinstance(value, dict):
            return value
        self._wrong((key,), "is not a table", takes)
        return {}

    def _texts(self, key: str, takes: str) -> list[str] | None:
        """A list of strings; None where the entry has none."""
        value = self.values.get(key)
        if value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            return value
        self._wrong((key,), "is not a list of strings", takes)
        return []


def _check_together(entries: Iterable[_Entry], findings: _Findings) -> None:
    """Rules between entries: each id once, one default at most."""
    ids: dict[str, _Entry] = {}
    default: _Entry | None = None
    for entry in entries:
        agent_id = entry.values.get("agent_id")
        first = ids.setdefault(agent_id, entry) if isinstance(agent_id, str) else entry
        if first is not entry:
            also = f"{_dotted(first.path)} (line {findings.line(first.path)})"
            findings.add((*entry.path, "agent_id"), f"is the id of {also} too", "an id that no other agent has")
        if entry.values.get("default") is not True:
            continue
        if default is None:
            default = entry
        else:
            also = f"{_dotted(default.path)} (line {findings.line(default.path)})"
            findings.add((*entry.path, "default"), f"is true, as for {also}", "true for one agent only")


def _is_valid(adapter: TypeAdapter[Any], value: Any) -> bool:
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _are_limits(text: str) -> bool:
    try:
        check_limits(text)
    except ValueError:
        return False
    return True


def _leaves(table: Mapping[str, Any], prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Paths and values of a nested table. Goes no deeper than there are leaves, and not into an empty table."""
    for key, value in table.items():
        path = (*prefix, key)
        group = any(leaf[: len(path)] == path and leaf != path for leaf in LEAVES)
        if group and isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (the nearest is {close[0]})" if close else ""


def _dotted(path: KeyPath) -> str:
    """A path as TOML writes it."""
    return ".".join(key if AGENT_ID.fullmatch(key) else _shown(key) for key in path)


def _shown(text: str) -> str:
    """A text of the file in quotes: one line, of bounded length."""
    return json.dumps(text[:64], ensure_ascii=not text.isprintable())


def _syntax_line(error: Exception, text: str) -> str:
    takes = "TOML, see https://toml.io/en/v1.0.0"
    if not isinstance(error, tomllib.TOMLDecodeError):  # tomllib says neither what nor where
        return f"line 1: from here on: has a number of too many digits, or brackets too deep; takes {takes}"
    what, _, where = str(error).rpartition(" (at ")
    found = re.match(r"line (\d+),", where)
    line = int(found[1]) if found else max(1, len(text.removesuffix("\n").split("\n")))
    return f"line {line}: is not TOML: {what[:200]}; takes {takes}"


# Of TOML that tomllib has read, so that every string ends. A string of three quotes may end in five, two its own.
_PIECE = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'"
    r"|\#[^\n]*"
    r"|[\[\]{}=\n]"
    r"|[^\[\]{}=\n\"'\#]+",
    re.DOTALL,
)


def _key_lines(text: str) -> dict[KeyPath, int]:
    """The line of each table and key in valid TOML, but for keys in inline tables.

    A name's line is where it first stands by itself; if it never does, where it first is part of a longer one.
    """
    by_itself: dict[KeyPath, int] = {}
    in_passing: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for line, head in _heads(text):
        if head.startswith("["):
            path = table = _path(head)
        else:
            path = table + _path(f"{head} = 0")
        by_itself.setdefault(path, line)
        for length in range(1, len(path)):
            in_passing.setdefault(path[:length], line)
    return {**in_passing, **by_itself}


def _heads(text: str) -> Iterator[tuple[int, str]]:
    """Each `[table]` and each key before its `=`, as written, with its line."""
    line, began, depth, head, in_value = 1, 1, 0, "", False
    for piece in _PIECE.findall(f"{text}\n"):
        line += piece.count("\n")
        depth += (piece in ("[", "{")) - (piece in ("]", "}"))
        if piece == "\n" and depth == 0:
            if head.strip():
                yield began, head.strip()
            began, head, in_value = line, "", False
        elif piece == "=" and depth == 0:
            in_value = True
        elif not in_value and not piece.startswith("#"):
            head += piece


def _path(head: str) -> KeyPath:
    """The path that a line of TOML with one header or one key sets; tomllib knows about quotes and escapes."""
    path: list[str] = []
    value: Any = tomllib.loads(head)
    while isinstance(value, dict) and value:
        ((key, value),) = value.items()
        path.append(key)
        if isinstance(value, list):  # [[path]]
            (value,) = value
    return tuple(path)
