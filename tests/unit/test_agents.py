"""The agents file: what it takes, and that every mistake is told with its line."""

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.config.agents import Agent, Agents, AgentsError, read_agents, single_agent
from app.config.overrides import OVERRIDE_LEAVES, is_leaf_value

LEAVES = ", ".join(OVERRIDE_LEAVES)
KEYS = (
    "agent_id, default, variables, overrides, fixed_variables, fixed_overrides, session_limits, max_live_calls, "
    "require_claims"
)
TAKES_ID = "takes an agent's id, agt_… or a UUID"
TAKES_NAMES = 'takes a list of names (letters, digits and _), or ["*"] for any'
TAKES_VALUE = "takes a string, number or boolean of at most 1,000 characters, without {{, }} and control characters"
TAKES_LIMITS = "takes limits such as 3/minute;20/day, each of another period"
TAKES_CLAIMS = 'takes claims, each with a list of strings, whole numbers or booleans: { plan = ["pro", "team"] }'
TAKES_TABLES = "takes a table [agents.NAME] for each agent"
TAKES_TOML = "takes TOML, see https://toml.io/en/v1.0.0"

CONTRACT = """\
[agents.support]                # name that browsers use
agent_id = "agt_abc123"
default = true                  # used when none is named
variables = ["order_id"]        # browser may set; replaces BROKER_ALLOWED_VARIABLES
overrides = ["first_message"]   # browser may override; replaces BROKER_ALLOWED_OVERRIDES
fixed_variables = { tier = "gold" }
fixed_overrides = { tts = { speed = 1.1 } }
session_limits = "3/minute"     # per user and agent, on top of BROKER_SESSION_LIMITS
max_live_calls = 20             # of this agent, all users; beyond: 503 at-capacity
require_claims = { plan = ["pro", "team"] }   # jwt mode; else 403 agent-not-allowed
"""
SUPPORT = Agent(
    name="support",
    agent_id="agt_abc123",
    variables=frozenset({"order_id"}),
    overrides=frozenset({"first_message"}),
    fixed_variables={"tier": "gold"},
    fixed_overrides={"tts": {"speed": 1.1}},
    session_limits="3/minute",
    max_live_calls=20,
    require_claims={"plan": ("pro", "team")},
)


def read(
    text: str,
    *,
    variables: frozenset[str] | None = None,
    overrides: frozenset[str] = frozenset({"tts.speed"}),
    jwt: bool = True,
) -> Agents:
    return read_agents(text, variables=variables, overrides=overrides, jwt=jwt)


def mistakes(text: str, *, jwt: bool = True) -> list[str]:
    with pytest.raises(AgentsError) as caught:
        read(text, jwt=jwt)
    assert str(caught.value) == "; ".join(caught.value.lines)
    return caught.value.lines


def support(*lines: str) -> str:
    """An entry whose lines given begin at line 3."""
    return "\n".join(["[agents.support]", 'agent_id = "a1"', *lines, ""])


@pytest.mark.parametrize("text", [CONTRACT, CONTRACT.replace("\n", "\r\n"), "\ufeff" + CONTRACT])
def test_the_contracts_example(text: str) -> None:
    agents = read(text)
    assert agents.by_name == {"support": SUPPORT}
    assert agents.by_id == {"agt_abc123": SUPPORT}
    assert agents.default == SUPPORT


def test_what_an_entry_leaves_out() -> None:
    names = frozenset({"a"})
    agents = read('[agents]\na = { agent_id = "1" }\nb.agent_id = "2"', variables=names)
    assert agents.by_name == {
        "a": Agent("a", "1", names, frozenset({"tts.speed"})),
        "b": Agent("b", "2", names, frozenset({"tts.speed"})),
    }
    assert agents.default is None


@pytest.mark.parametrize(
    ("lines", "field", "value"),
    [
        ("", "variables", frozenset({"inherited"})),
        ("variables = []", "variables", frozenset()),
        ('variables = ["*"]', "variables", None),
        ('variables = ["a", "*"]', "variables", None),
        ("", "overrides", frozenset({"tts.speed"})),
        ("overrides = []", "overrides", frozenset()),
        ('overrides = ["tts.voice_id", "first_message"]', "overrides", frozenset({"tts.voice_id", "first_message"})),
        ('fixed_variables = { a = "x", b = 1 }', "fixed_variables", {"a": "x", "b": 1}),
        ("fixed_variables = { a = 1.5, b = true }", "fixed_variables", {"a": 1.5, "b": True}),
        ('fixed_variables = { a = """\nx\t""" }', "fixed_variables", {"a": "x\t"}),
        (f'fixed_variables = {{ a = "{"x" * 1000}" }}', "fixed_variables", {"a": "x" * 1000}),
        ("fixed_overrides = {}", "fixed_overrides", {}),
        (
            'fixed_overrides = { tts = { speed = 1 }, first_message = "Hi" }',
            "fixed_overrides",
            {"tts": {"speed": 1}, "first_message": "Hi"},
        ),
        ('[agents.support.fixed_overrides.llm]\nmodel = "m"', "fixed_overrides", {"llm": {"model": "m"}}),
        ('session_limits = "3/minute;50 per 2 hours"', "session_limits", "3/minute;50 per 2 hours"),
        ("max_live_calls = 1", "max_live_calls", 1),
        ("max_live_calls = 1_000_000", "max_live_calls", 1_000_000),
        ("require_claims = {}", "require_claims", {}),
        (
            '[agents.support.require_claims]\n"https://a.example/n" = [1, true]',
            "require_claims",
            {"https://a.example/n": (1, True)},
        ),
    ],
)
def test_what_an_entry_says(lines: str, field: str, value: Any) -> None:
    agent = read(support(lines), variables=frozenset({"inherited"})).by_name["support"]
    assert getattr(agent, field) == value


@pytest.mark.parametrize(
    ("lines", "line", "wrong"),
    [
        ('default = "yes"', 3, "default: is not true or false; takes true or false"),
        ("session_limit = 1", 3, "session_limit: is not a key of an agent (the nearest is session_limits); "
         f"takes {KEYS}"),
        ("zzz = 1", 3, f"zzz: is not a key of an agent; takes {KEYS}"),
        ('"a.b c" = 1', 3, f'"a.b c": is not a key of an agent; takes {KEYS}'),
        ('"\\u0007é" = 1', 3, f'"\\u0007\\u00e9": is not a key of an agent; takes {KEYS}'),
        ('"größe" = 1', 3, f'"größe": is not a key of an agent; takes {KEYS}'),
        ("\n[agents.support.fixed_variable]\na = 1", 4, "fixed_variable: is not a key of an agent (the nearest is "
         f"fixed_variables); takes {KEYS}"),
        ('variables = "a"', 3, f"variables: is not a list of strings; {TAKES_NAMES}"),
        ("variables = [1]", 3, f"variables: is not a list of strings; {TAKES_NAMES}"),
        ('variables = [\n  "a",\n  "b-c",\n]', 3,
         f'variables: holds "b-c", which is not a name of a variable; {TAKES_NAMES}'),
        ('variables = ["a", "b"]\nfixed_variables.b = 1', 3,
         'variables: holds "b", which is in fixed_variables too; takes other names'),
        ("overrides = {}", 3, f"overrides: is not a list of strings; takes a list of paths out of {LEAVES}"),
        ('overrides = ["tts"]', 3, 'overrides: holds "tts", which is not a single leaf (the nearest is tts.speed); '
         f"takes a list of paths out of {LEAVES}"),
        ('overrides = ["tts.voiceid"]', 3, 'overrides: holds "tts.voiceid", which is not a single leaf (the nearest is '
         f"tts.voice_id); takes a list of paths out of {LEAVES}"),
        ('fixed_overrides.tts.speed = 2\noverrides = ["tts.speed"]', 4,
         'overrides: holds "tts.speed", which is in fixed_overrides too; takes other paths'),
        ("fixed_variables = 1", 3, "fixed_variables: is not a table; takes a table of names and values"),
        ("fixed_variables = { a-b = 1 }", 3, "fixed_variables.a-b: is not a name of a variable; "
         "takes up to 64 letters, digits and _, no digit first"),
        *[
            (f"\n[agents.support.fixed_variables]\n# why\na = {value}", 6,
             f"fixed_variables.a: is not a value for a variable; {TAKES_VALUE}")
            for value in (
                '"{{x}}"', '"a }}"', '"\\u0000"', '"\\r"', f'"{"x" * 1001}"', "0x" + "f" * 5000, "inf", "nan", "1e999",
                "[]", "{}", "2020-01-01", "10:00:00",
            )
        ],
        ("[agents.support.fixed_variables]\n" + "\n".join(f"v{n} = 1" for n in range(33)), 3,
         "fixed_variables: has too many names; takes at most 32"),
        ("fixed_overrides = []", 3, f"fixed_overrides: is not a table; takes a table of {LEAVES}"),
        ("fixed_overrides.tts = 1", 3, "fixed_overrides.tts: is not a single leaf (the nearest is tts.speed); "
         f"takes values of {LEAVES}"),
        ("fixed_overrides.tts = {}", 3, "fixed_overrides.tts: is not a single leaf (the nearest is tts.speed); "
         f"takes values of {LEAVES}"),
        ("fixed_overrides.tts.sped = 1", 3, "fixed_overrides.tts.sped: is not a single leaf (the nearest is "
         f"tts.speed); takes values of {LEAVES}"),
        ('fixed_overrides = { "tts.speed" = 1 }', 3,
         'fixed_overrides."tts.speed": is not a single leaf (the nearest is '
         f"tts.speed); takes values of {LEAVES}"),
        ("fixed_overrides.tts.speed.x = 1", 3, "fixed_overrides.tts.speed: is not a number; takes a number"),
        ("[agents.support.fixed_overrides]\n[agents.support.fixed_overrides.tts]\nspeed = true", 5,
         "fixed_overrides.tts.speed: is not a number; takes a number"),
        ("fixed_overrides.tts.speed = nan", 3, "fixed_overrides.tts.speed: is not a number; takes a number"),
        ("fixed_overrides = { tts = { voice_id = 1 } }", 3,
         "fixed_overrides.tts.voice_id: is not a string; takes a string"),
        *[
            (f"session_limits = {value}", 3, f"session_limits: is not a list of limits; {TAKES_LIMITS}")
            for value in ('"often"', "3", '["3/minute"]', '"0/minute"', '"1/day;0/minute"', '"3/minute;5/60 second"')
        ],
        *[
            (f"max_live_calls = {value}", 3, "max_live_calls: is not a number of calls; "
             "takes a whole number from 1 to 1,000,000")
            for value in ("0", "-1", "true", "1.0", '"1"', "1_000_001")
        ],
        ("require_claims = 1", 3, f"require_claims: is not a table; {TAKES_CLAIMS}"),
        ('require_claims = { plan = "pro" }', 3, f"require_claims.plan: is not a list of values; {TAKES_CLAIMS}"),
        ("require_claims.plan = [1.5]", 3, f"require_claims.plan: is not a list of values; {TAKES_CLAIMS}"),
        ("require_claims.plan = [[]]", 3, f"require_claims.plan: is not a list of values; {TAKES_CLAIMS}"),
        ("require_claims.plan = []", 3,
         f"require_claims.plan: is empty, so that nobody would be admitted; {TAKES_CLAIMS}"),
        ('require_claims.a.b = ["x"]', 3, f"require_claims.a: is not a list of values; {TAKES_CLAIMS}"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_entry(lines: str, line: int, wrong: str) -> None:
    assert mistakes(support(lines)) == [f"line {line}: agents.support.{wrong}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [f"line 1: agents: names no agent; {TAKES_TABLES}"]),
        ("\n\n[agents]\n", [f"line 3: agents: names no agent; {TAKES_TABLES}"]),
        ("\nagents = 1", [f"line 2: agents: is not a table; {TAKES_TABLES}"]),
        ('x = 1\n[[agents]]\nname = "a"\n[[agents]]', [
            "line 1: x: is not a key of the agents file; takes agents.NAME tables",
            f"line 2: agents: is not a table; {TAKES_TABLES}",
        ]),
        ("\n[agent.support]", [
            f"line 1: agents: names no agent; {TAKES_TABLES}",
            "line 2: agent: is not a key of the agents file (the nearest is agents); takes agents.NAME tables",
        ]),
        ("[agents]\na = 1", [f"line 2: agents.a: is not a table; takes a table with {KEYS}"]),
        ("[[agents.a]]\nagent_id = 'x'", [f"line 1: agents.a: is not a table; takes a table with {KEYS}"]),
        ("\n[agents.a]", [f"line 2: agents.a.agent_id: is required; {TAKES_ID}"]),
        ("[agents.a.require_claims]\n[agents.a]\ndefault = true",
         [f"line 2: agents.a.agent_id: is required; {TAKES_ID}"]),
        *[
            (f"[agents.a]\nagent_id = {value}", [f"line 2: agents.a.agent_id: is not an agent's id; {TAKES_ID}"])
            for value in ('""', '"a b"', '"a\\n"', "1", f'"{"x" * 129}"')
        ],
        *[
            (f"[agents.{name}]\nagent_id = 'x'", [
                f"line 1: agents.{shown}: is not a name for an agent; takes 1 to 64 letters, digits, - and _"
            ])
            for name, shown in (
                ('"a b"', '"a b"'), ('""', '""'), ("'ü'", '"ü"'), ("a" * 65, "a" * 65),
                ('"=#[\\u005D"', '"=#[]"'), (f'"{" " * 99}"', f'"{" " * 64}"'),
            )
        ],
        ('[agents.a]\nagent_id = "x"\n\n[agents.b]\n\nagent_id = "x"', [
            "line 6: agents.b.agent_id: is the id of agents.a (line 1) too; takes an id that no other agent has"
        ]),
        ("[agents]\na = { agent_id = '1', default = true }\nb.agent_id = '2'\n"
         "[agents.c]\nagent_id = '3'\ndefault = true", [
            "line 6: agents.c.default: is true, as for agents.a (line 2); takes true for one agent only"
        ]),
        ("a = 1\na = 2\n", [f"line 2: is not TOML: Cannot overwrite a value; {TAKES_TOML}"]),
        ("a = 1\r\n\r\n[b", [f"line 3: is not TOML: Expected ']' at the end of a table declaration; {TAKES_TOML}"]),
        ('x = """\n\n', [f"line 2: is not TOML: Unterminated string; {TAKES_TOML}"]),
        ("a = " + "1" * 5000, [
            f"line 1: from here on: has a number of too many digits, or brackets too deep; {TAKES_TOML}"
        ]),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file(text: str, expected: list[str]) -> None:
    assert mistakes(text) == expected


def test_claims_need_tokens() -> None:
    assert mistakes(CONTRACT, jwt=False) == [
        "line 10: agents.support.require_claims: is set, but users have no claims; "
        "takes BROKER_AUTH=jwt, or leave it out"
    ]


def test_all_mistakes_at_once_in_the_files_order() -> None:
    lines = mistakes(
        """
        [agents.a]
        max_live_calls = 0
        session_limits = '''
        often
        ''' # [agents.a.overrides] = 1
        overrides = [ # ]
            "x", # = {
        ]
        "agent\\u005Fid" = 7

        [ agents . "a" . 'fixed_variables' ]
        "s" = \"\"\"
        b = 1 \"\"\"\"\"
        t = "{{"
        [other]
        """
    )
    assert [line.split(": ")[:2] for line in lines] == [
        ["line 3", "agents.a.max_live_calls"],
        ["line 4", "agents.a.session_limits"],
        ["line 7", "agents.a.overrides"],
        ["line 10", "agents.a.agent_id"],
        ["line 15", "agents.a.fixed_variables.t"],
        ["line 16", "other"],
    ]


def test_a_value_is_not_repeated() -> None:
    lines = mistakes(support('fixed_variables.a = "{{hush}}"', 'session_limits = "hush"', "require_claims.a = 'hush'"))
    assert len(lines) == 3
    assert "hush" not in "".join(lines)


def test_a_single_agent() -> None:
    agents = single_agent("agt_1", None, frozenset({"first_message"}))
    assert agents.default == Agent("default", "agt_1", None, frozenset({"first_message"}))
    assert agents.by_name == {"default": agents.default}
    assert agents.by_id == {"agt_1": agents.default}
    assert agents.default.admits({})


@pytest.mark.parametrize(
    ("required", "claims", "admitted"),
    [
        ({}, {}, True),
        ({"plan": ("pro", "team")}, {"plan": "team"}, True),
        ({"plan": ("pro", "team")}, {"plan": "free"}, False),
        ({"plan": ("pro", "team")}, {"plan": "PRO"}, False),
        ({"plan": ("pro", "team")}, {}, False),
        ({"plan": ("pro", "team")}, {"plan": None}, False),
        ({"plan": ("pro", "team")}, {"plan": ["free", "pro"]}, True),
        ({"plan": ("pro", "team")}, {"plan": ["free"]}, False),
        ({"plan": ("pro", "team")}, {"plan": []}, False),
        ({"plan": ("pro", "team")}, {"plan": [["pro"]]}, False),
        ({"plan": ("pro", "team")}, {"plan": {"pro": "pro"}}, False),
        ({"plan": ("pro",), "beta": (True,)}, {"plan": "pro", "beta": True}, True),
        ({"plan": ("pro",), "beta": (True,)}, {"plan": "pro", "beta": False}, False),
        ({"plan": ("pro",), "beta": (True,)}, {"plan": "pro"}, False),
        ({"beta": (True,)}, {"beta": 1}, False),
        ({"beta": (True,)}, {"beta": "true"}, False),
        ({"level": (1, 0)}, {"level": True}, False),
        ({"level": (1, 0)}, {"level": [False, 2]}, False),
        ({"level": (1,)}, {"level": 1.0}, False),
        ({"level": (1,)}, {"level": [2, 1]}, True),
    ],
)
def test_who_is_admitted(required: dict[str, tuple[Any, ...]], claims: dict[str, Any], admitted: bool) -> None:
    agent = Agent("a", "1", None, frozenset(), require_claims=required)
    assert agent.admits(claims) is admitted


@pytest.mark.parametrize(
    ("leaf", "value", "fits"),
    [
        (str, "", True),
        (str, 1, False),
        (float, 1, True),
        (float, -0.5, True),
        (float, 10**400, False),
        (float, float("inf"), False),
        (float, float("nan"), False),
        (float, True, False),
        (float, "1", False),
    ],
)
def test_leaf_values(leaf: type, value: Any, fits: bool) -> None:
    assert is_leaf_value(leaf, value) is fits


def refusal(text: str) -> list[str]:
    """The lines that refuse a text; none when it is taken."""
    try:
        agents = read(text)
    except AgentsError as error:
        return error.lines
    assert agents.by_name
    assert len(agents.by_id) == len(agents.by_name)
    return []


def check(text: str) -> None:
    """A text is taken, or refused by lines that each name a line of it."""
    last = max(1, text.count("\n") + (not text.endswith("\n")))
    for line in refusal(text):
        match = re.match(r"line ([0-9]+): .+; takes .+\Z", line)
        assert match is not None, line
        assert 1 <= int(match[1]) <= last
        assert len(line) < 1000


FRAGMENTS = st.sampled_from(
    [
        *re.findall(r'"[^"]*"|\w+|\s|.', CONTRACT),
        *(
            "[[",
            "]]",
            '"""',
            "'''",
            "'",
            "\\",
            "\r\n",
            "\n",
            "{}",
            "[]",
            "inf",
            "nan",
            "1e999",
            "0x" + "f" * 5000,
            "[" * 2000,
        ),
        *(
            "[agents.a]\n",
            "[agents.b.fixed_overrides.tts]\n",
            "agent_id",
            "fixed_variables",
            "\ufeff",
            "\x00",
            "é",
            "{{",
        ),
    ]
)


@given(st.text())
@example("a = '''\n\n")
def test_any_text_is_read_or_refused(text: str) -> None:
    check(text)


@given(st.lists(FRAGMENTS).map("".join))
def test_any_mixture_of_fragments_is_read_or_refused(text: str) -> None:
    check(text)


@given(st.integers(0, len(CONTRACT)), st.integers(0, 30), st.lists(FRAGMENTS, max_size=3).map("".join))
def test_any_slip_in_a_file_is_read_or_refused(start: int, cut: int, put: str) -> None:
    check(CONTRACT[:start] + put + CONTRACT[start + cut :])


def written(word: str) -> st.SearchStrategy[str]:
    """A key in TOML's three ways to write it."""
    return st.sampled_from([word, json.dumps(word), f"'{word}'"])


VALUES = st.recursive(
    st.sampled_from(
        ["1", "true", '"x"', '"#="', "'['", '"\\""', '"""\n\\"""]\n= """', '"""a"""""', "'''\n[a]\n''''", "1979-05-27"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda each: f"[ # ]\n{','.join(each)}\n]")
        | inner.map(lambda each: f"{{ k = {each} }}")
    ),
    max_leaves=5,
)
BLANKS = st.sampled_from(["", "\n", "# [agents.a]\n", "  \n\t", "# '''\n"])


@given(st.data())
def test_the_line_of_every_unknown_key_is_found(data: st.DataObject) -> None:
    """Files whose lines are known by construction, with strings and brackets that look like something else."""
    text, expected = "", []
    for number in range(data.draw(st.integers(1, 4))):
        name = f"n{number}"
        text += data.draw(BLANKS)
        text += f"[ {data.draw(written('agents'))} . {data.draw(written(name))} ] # =\n"
        text += f'agent_id = "{name}"\n'
        for index in range(data.draw(st.integers(0, 4))):
            text += data.draw(BLANKS)
            expected.append(f"line {text.count(chr(10)) + 1}: agents.{name}.x{index}")
            key = data.draw(written(f"x{index}"))
            key += data.draw(st.sampled_from(["", '."y=#"', " . z . 'a.b'"]))
            text += f"{key} = {data.draw(VALUES)}\n"
    assert [line.split(": is not")[0] for line in refusal(text)] == expected
