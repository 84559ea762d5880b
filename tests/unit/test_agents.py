"""The agents file: what it takes, and that each mistake gets an error line."""

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.config.agents import Agent, Agents, read_agents, single_agent
from app.config.overrides import OVERRIDE_LEAVES, is_leaf_value
from app.config.settings import SettingsError

LEAVES = ", ".join(OVERRIDE_LEAVES)
KEYS = (
    "agent_id, default, fixed_variables, fixed_overrides, variables, overrides, session_limits, max_live_calls, "
    "max_call_seconds, require_claims"
)
TAKES_ID = "takes an agent's id, agt_… or a UUID"
TAKES_NAMES = 'takes a list of names (up to 64 letters, digits and _, no digit first), or ["*"] for any'
TAKES_PATHS = f"takes a list of paths out of {LEAVES}"
TAKES_VARIABLES = (
    "takes a table of at most 32 variables: names of up to 64 letters, digits and _, no digit first; values are "
    "strings, numbers or booleans of at most 1,000 characters, without {{, }} and control characters"
)
TAKES_LEAVES = f"takes nested tables of {LEAVES}"
TAKES_LIMITS = "takes limits such as 3/minute;20/day, one per period"
TAKES_CLAIMS = 'takes claims, each with a list of strings, whole numbers or booleans: { plan = ["pro", "team"] }'
TAKES_TABLES = "takes a table [agents.NAME] for each agent; NAME has 1 to 64 letters, digits, - and _"
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
max_call_seconds = 600          # instead of BROKER_MAX_CALL_SECONDS
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
    max_call_seconds=600,
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
    """Return the error lines about a text, without the variable that each begins with."""
    with pytest.raises(SettingsError) as caught:
        read(text, jwt=jwt)
    return without_variable(caught.value.lines)


def without_variable(lines: list[str]) -> list[str]:
    assert all(line.startswith("BROKER_AGENTS_FILE: ") for line in lines)
    return [line.removeprefix("BROKER_AGENTS_FILE: ") for line in lines]


def support(*lines: str) -> str:
    """A file with one agent."""
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
        ("max_call_seconds = 604_800", "max_call_seconds", 604_800),
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
    ("lines", "wrong"),
    [
        ('default = "yes"', "default: is not valid; takes true or false"),
        ("session_limit = 1", f"session_limit: is not a known key; the nearest is session_limits; takes {KEYS}"),
        ("zzz = 1", f"zzz: is not a known key; takes {KEYS}"),
        ('"a.b c" = 1', f'"a.b c": is not a known key; takes {KEYS}'),
        ('"\\u0007é" = 1', f'"\\u0007\\u00e9": is not a known key; takes {KEYS}'),
        ('"größe" = 1', f'"größe": is not a known key; takes {KEYS}'),
        ("\n[agents.support.fixed_variable]\na = 1",
         f"fixed_variable: is not a known key; the nearest is fixed_variables; takes {KEYS}"),
        ('variables = "a"', f"variables: is not valid; {TAKES_NAMES}"),
        ("variables = [1]", f"variables[0]: is not valid; {TAKES_NAMES}"),
        ('variables = [\n  "a",\n  "b-c",\n]', f"variables[1]: is not valid; {TAKES_NAMES}"),
        ('variables = ["a", "b"]\nfixed_variables.b = 1',
         f"variables: holds b, set by fixed_variables too; {TAKES_NAMES}"),
        ("overrides = {}", f"overrides: is not valid; {TAKES_PATHS}"),
        ('overrides = ["tts"]', f"overrides[0]: is not a single leaf; the nearest is tts.speed; {TAKES_PATHS}"),
        ('overrides = ["tts.speed", "tts.voiceid"]',
         f"overrides[1]: is not a single leaf; the nearest is tts.voice_id; {TAKES_PATHS}"),
        ('fixed_overrides.tts.speed = 2\noverrides = ["tts.speed"]',
         f"overrides: holds tts.speed, set by fixed_overrides too; {TAKES_PATHS}"),
        ("fixed_variables = 1", f"fixed_variables: is not valid; {TAKES_VARIABLES}"),
        ("fixed_variables = { a-b = 1 }", f"fixed_variables.a-b: is not a valid name; {TAKES_VARIABLES}"),
        *[
            (f"\n[agents.support.fixed_variables]\n# why\na = {value}",
             f"fixed_variables.a: is not valid; {TAKES_VARIABLES}")
            for value in (
                '"{{x}}"', '"a }}"', '"\\u0000"', '"\\r"', f'"{"x" * 1001}"', "0x" + "f" * 5000, "inf", "nan", "1e999",
                "[]", "{}", "2020-01-01", "10:00:00",
            )
        ],
        ("[agents.support.fixed_variables]\n" + "\n".join(f"v{n} = 1" for n in range(33)),
         f"fixed_variables: is not valid; {TAKES_VARIABLES}"),
        ("fixed_overrides = []", f"fixed_overrides: is not valid; {TAKES_LEAVES}"),
        *[
            (f"fixed_overrides.{given}", f"fixed_overrides.{path}: is not a single leaf; the nearest is tts.speed; "
             f"{TAKES_LEAVES}")
            for given, path in (
                ("tts = 1", "tts"), ("tts = {}", "tts"), ("tts.sped = 1", "tts.sped"),
                ('"tts.speed" = 1', '"tts.speed"'),
            )
        ],
        (f"fixed_overrides.{'x.' * 2000}x = 1", f"fixed_overrides.x: is not a single leaf; {TAKES_LEAVES}"),
        ("fixed_overrides.tts.speed.x = 1", f"fixed_overrides.tts.speed: is not a number; {TAKES_LEAVES}"),
        ("[agents.support.fixed_overrides]\n[agents.support.fixed_overrides.tts]\nspeed = true",
         f"fixed_overrides.tts.speed: is not a number; {TAKES_LEAVES}"),
        ("fixed_overrides.tts.speed = nan", f"fixed_overrides.tts.speed: is not a number; {TAKES_LEAVES}"),
        ("fixed_overrides = { tts = { voice_id = 1 } }",
         f"fixed_overrides.tts.voice_id: is not a string; {TAKES_LEAVES}"),
        *[
            (f"session_limits = {value}", f"session_limits: is not a list of limits; {TAKES_LIMITS}")
            for value in ('"often"', '"0/minute"', '"1/day;0/minute"')
        ],
        *[
            (f"session_limits = {value}", f"session_limits: is not valid; {TAKES_LIMITS}")
            for value in ("3", '["3/minute"]')
        ],
        ('session_limits = "3/minute;5/60 second"', f"session_limits: has two limits for one period; {TAKES_LIMITS}"),
        *[
            (f"max_live_calls = {value}", "max_live_calls: is not valid; takes a whole number from 1 to 1,000,000")
            for value in ("0", "-1", "true", "1.0", '"1"', "1_000_001")
        ],
        *[
            (f"max_call_seconds = {value}", "max_call_seconds: is not valid; takes seconds, 1 to 604800")
            for value in ("0", "-1", "true", "1.5", '"1"', "604_801", "inf")
        ],
        ('require_claims."/o~id" = ["x"]',
         f'require_claims."/o~id": is no JSON pointer: ~ is written ~0, and / in a name ~1; {TAKES_CLAIMS}'),
        ("require_claims = 1", f"require_claims: is not valid; {TAKES_CLAIMS}"),
        ('require_claims = { plan = "pro" }', f"require_claims.plan: is not valid; {TAKES_CLAIMS}"),
        ("require_claims.plan = [1.5]", f"require_claims.plan[0]: is not valid; {TAKES_CLAIMS}"),
        ('require_claims.plan = ["pro", []]', f"require_claims.plan[1]: is not valid; {TAKES_CLAIMS}"),
        ("require_claims.plan = []", f"require_claims.plan: is empty; {TAKES_CLAIMS}"),
        ('require_claims.a.b = ["x"]', f"require_claims.a: is not valid; {TAKES_CLAIMS}"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_entry(lines: str, wrong: str) -> None:
    assert mistakes(support(lines)) == [f"agents.support.{wrong}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [f"agents: is required; {TAKES_TABLES}"]),
        ("\n\n[agents]\n", [f"agents: is empty; {TAKES_TABLES}"]),
        ("\nagents = 1", [f"agents: is not valid; {TAKES_TABLES}"]),
        ('x = 1\n[[agents]]\nname = "a"\n[[agents]]', [
            f"agents: is not valid; {TAKES_TABLES}",
            "x: is not a known key; takes agents",
        ]),
        ("\n[agent.support]", [
            f"agents: is required; {TAKES_TABLES}",
            "agent: is not a known key; the nearest is agents; takes agents",
        ]),
        ("[agents]\na = 1", [f"agents.a: is not valid; {TAKES_TABLES}"]),
        ("[[agents.a]]\nagent_id = 'x'", [f"agents.a: is not valid; {TAKES_TABLES}"]),
        ("\n[agents.a]", [f"agents.a.agent_id: is required; {TAKES_ID}"]),
        ("[agents.a.require_claims]\n[agents.a]\ndefault = true", [f"agents.a.agent_id: is required; {TAKES_ID}"]),
        *[
            (f"[agents.a]\nagent_id = {value}", [f"agents.a.agent_id: is not valid; {TAKES_ID}"])
            for value in ('""', '"a b"', '"a\\n"', "1", f'"{"x" * 129}"')
        ],
        *[
            (f"[agents.{name}]\nagent_id = 'x'", [f"agents.{shown}: is not a valid name; {TAKES_TABLES}"])
            for name, shown in (
                ('"a b"', '"a b"'), ('""', '""'), ("'ü'", '"ü"'), ("a" * 65, "a" * 65),
                ('"=#[\\u005D"', '"=#[]"'), (f'"{" " * 99}"', f'"{" " * 64}"'),
            )
        ],
        ('[agents.a]\nagent_id = "x"\n\n[agents.b]\n\nagent_id = "x"', [
            "agents.b.agent_id: is the same as in agents.a; takes an id that no other agent has"
        ]),
        ("[agents]\na = { agent_id = '1', default = true }\nb.agent_id = '2'\n"
         "[agents.c]\nagent_id = '3'\ndefault = true", [
            "agents.c.default: is the same as in agents.a; takes true for one agent only"
        ]),
        ("a = 1\na = 2\n", [f"is not TOML: Cannot overwrite a value (at line 2, column 6); {TAKES_TOML}"]),
        ("a = 1\r\n\r\n[b", [
            f"is not TOML: Expected ']' at the end of a table declaration (at end of document); {TAKES_TOML}"
        ]),
        ('x = """\n\n', [f"is not TOML: Unterminated string (at end of document); {TAKES_TOML}"]),
        *[
            (text, [f"is not TOML: a number has too many digits, or brackets are nested too deep; {TAKES_TOML}"])
            for text in ("a = " + "1" * 5000, "a = " + "[" * 2000)
        ],
    ],
)  # fmt: skip
def test_a_mistake_in_the_file(text: str, expected: list[str]) -> None:
    assert mistakes(text) == expected


@pytest.mark.parametrize("claims", ["{}", '{ plan = ["pro"] }', "1"])
def test_claims_need_tokens(claims: str) -> None:
    assert mistakes(support(f"require_claims = {claims}"), jwt=False) == [
        "agents.support.require_claims: is set, but users have no claims, as BROKER_AUTH is not jwt; " + TAKES_CLAIMS
    ]


def test_all_mistakes_at_once() -> None:
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
        [agents.b]
        agent_id = "1"
        default = true
        [agents.c]
        agent_id = "1"
        default = true
        fixed_overrides = { tts = { speed = "", sped = 1 } }
        [other]
        """
    )
    assert sorted(line.partition(": ")[0] for line in lines) == [
        "agents.a.agent_id",
        "agents.a.fixed_variables.t",
        "agents.a.max_live_calls",
        "agents.a.overrides[0]",
        "agents.a.session_limits",
        "agents.c.agent_id",
        "agents.c.default",
        "agents.c.fixed_overrides.tts.sped",
        "agents.c.fixed_overrides.tts.speed",
        "other",
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
        ({"/o/plan": ("pro",)}, {"o": {"plan": ["free", "pro"]}}, True),
        ({"/o/plan": ("pro",)}, {"o": {"plan": "free"}, "/o/plan": "pro"}, False),
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
    """Return the lines that refuse a text; none when it is taken."""
    try:
        agents = read(text)
    except SettingsError as error:
        return without_variable(error.lines)
    assert agents.by_name
    assert len(agents.by_id) == len(agents.by_name)
    return []


def check(text: str) -> None:
    """A text is taken, or refused in bounded lines that say what is taken."""
    for line in refusal(text):
        assert re.fullmatch(r".+; takes .+", line)
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
def test_every_unknown_key_is_found(data: st.DataObject) -> None:
    """In files with strings and brackets that look like something else."""
    text, expected = "", []
    for number in range(data.draw(st.integers(1, 4))):
        name = f"n{number}"
        text += data.draw(BLANKS)
        text += f"[ {data.draw(written('agents'))} . {data.draw(written(name))} ] # =\n"
        text += f'agent_id = "{name}"\n'
        for index in range(data.draw(st.integers(0, 4))):
            text += data.draw(BLANKS)
            expected.append(f"agents.{name}.x{index}")
            key = data.draw(written(f"x{index}"))
            key += data.draw(st.sampled_from(["", '."y=#"', " . z . 'a.b'"]))
            text += f"{key} = {data.draw(VALUES)}\n"
    assert [line.split(": is not")[0] for line in refusal(text)] == expected
