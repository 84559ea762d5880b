"""The plans file: what it takes, which limits a token's claims choose, and that each mistake gets an error line."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.broker.build import check
from app.config.agents import Agent
from app.config.plans import Entitlement, OrganizationLimits, Plans, load_plans, read_plans
from app.config.settings import SettingsError
from tests.documents import ROOT
from tests.support.harness import settings

CONTRACT = """\
claim = "plan"                       # the verified token's claim that names the plan
default = "free"                     # without the claim, or with a value that is no plan here
max_call_seconds_claim = "voice_seconds"  # optional: the token itself may say how long this call may last

[plans.free]
session_limits = "3/hour;10/day"     # each replaces the broker's own setting for these users
max_live_calls = 1
talk_minutes = 10
max_call_seconds = 300

[plans.pro]
talk_minutes = 600

[organizations]
claim = "org_id"                     # users with the same value share these, besides their own
session_limits = "200/day"
max_live_calls = 10
talk_minutes = 3000
"""
OWN = Entitlement("5/minute;50/day", 2, None, 3600)
FREE = Entitlement("3/hour;10/day", 1, 10, 300, "free", plan_bounds=True)
PRO = Entitlement("5/minute;50/day", 2, 600, 3600, "pro")
SHARED = OrganizationLimits("200/day", 10, 3000)
JWT = {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": "a secret shared with the issuer, long enough"}

TAKES_CLAIM = "takes a claim's name, or a JSON pointer such as /o/id"
TAKES_LIMITS = "takes limits such as 3/hour;10/day, one per period"
TAKES_COUNT = "takes a whole number from 1 to 1,000,000"
TAKES_TABLES = "takes a table [plans.NAME] for each plan; NAME has 1 to 64 characters"


def read(text: str = CONTRACT, issuer: str = "") -> Plans:
    return read_plans(text, OWN, issuer)


def agent(max_call_seconds: int | None = None) -> Agent:
    return Agent("main", "agt_1", None, frozenset(), max_call_seconds=max_call_seconds)


# --- the file ---


@pytest.mark.parametrize("text", [CONTRACT, CONTRACT.replace("\n", "\r\n"), "\ufeff" + CONTRACT])
def test_the_contracts_example(text: str) -> None:
    plans = read(text)
    assert plans.by_name == {"free": FREE, "pro": PRO}
    assert plans.default == FREE
    assert plans.organization_limits == SHARED


def test_the_operators_example() -> None:
    document = (ROOT / "deploy" / "README.md").read_text()
    [example] = re.findall(r"```toml\n(claim = .*?)```", document, re.DOTALL)
    plans = read(example)
    assert (plans.by_name, plans.default, plans.organization_limits) == ({"free": FREE, "pro": PRO}, FREE, SHARED)
    assert plans.of({"voice_seconds": 20}).bound(agent()) == 20


def test_the_least_file() -> None:
    plans = read('claim = "/o/plan"\ndefault = "all of us"\n[plans."all of us"]')
    assert plans.of({"o": {"plan": "all of us"}}) == OWN._replace(plan="all of us")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [f"claim: is required; {TAKES_CLAIM}", f"plans: is required; {TAKES_TABLES}",
              "default: is required; takes the name of one of the plans"]),
        ('claim = "plan"\ndefault = "free"\nplans = {}', [f"plans: is empty; {TAKES_TABLES}"]),
        (CONTRACT.replace('default = "free"', 'default = "fre"'),
         ["default: is no plan of this file; the nearest is free; takes the name of one of the plans"]),
        (CONTRACT.replace('default = "free"', 'default = "gold"'),
         ["default: is no plan of this file; takes the name of one of the plans"]),
        (CONTRACT.replace("max_call_seconds_claim", "max_seconds_claim"),
         ["max_seconds_claim: is not a known key; the nearest is max_call_seconds_claim; "
          "takes claim, max_call_seconds_claim, plans, default, organizations"]),
        (CONTRACT.replace("[plans.pro]", "[plans.pro]\nsession_limit = '1/day'"),
         ["plans.pro.session_limit: is not a known key; the nearest is session_limits; "
          "takes session_limits, max_live_calls, talk_minutes, max_call_seconds"]),
        (CONTRACT.replace("3/hour;10/day", "plenty"),
         [f"plans.free.session_limits: is not a list of limits; {TAKES_LIMITS}"]),
        (CONTRACT.replace("3/hour;10/day", "3/hour;0/day"),
         [f"plans.free.session_limits: is not a list of limits; {TAKES_LIMITS}"]),
        (CONTRACT.replace("200/day", "1/day;2/24 hours"),
         [f"organizations.session_limits: has two limits for one period; {TAKES_LIMITS}"]),
        (CONTRACT.replace("= 1\n", "= 0\n"), [f"plans.free.max_live_calls: is not valid; {TAKES_COUNT}"]),
        (CONTRACT.replace("= 600", "= 0.5"), [f"plans.pro.talk_minutes: is not valid; {TAKES_COUNT}"]),
        (CONTRACT.replace("= 300\n", "= -1\n"),
         ["plans.free.max_call_seconds: is not valid; takes seconds, 0 to 604800"]),
        (CONTRACT.replace("= 300\n", "= inf\n"),
         ["plans.free.max_call_seconds: is not valid; takes seconds, 0 to 604800"]),
        (CONTRACT.replace("= 3000", "= true"), [f"organizations.talk_minutes: is not valid; {TAKES_COUNT}"]),
        (CONTRACT.replace('claim = "org_id"', ""), [f"organizations.claim: is required; {TAKES_CLAIM}"]),
        (CONTRACT.replace('claim = "org_id"', 'claims = "org_id"'),
         [f"organizations.claim: is required; {TAKES_CLAIM}",
          "organizations.claims: is not a known key; the nearest is claim; "
          "takes claim, session_limits, max_live_calls, talk_minutes"]),
        (CONTRACT.replace('"org_id"', '"/o~id"'),
         [f"organizations.claim: is no JSON pointer: ~ is written ~0, and / in a name ~1; {TAKES_CLAIM}"]),
        (CONTRACT.replace('"plan" ', '"" '), [f"claim: is empty; {TAKES_CLAIM}"]),
        (CONTRACT.replace('"voice_seconds"', "7"), [f"max_call_seconds_claim: is not valid; {TAKES_CLAIM}"]),
        (CONTRACT + "[plans.'']", [f'plans."": is not a valid name; {TAKES_TABLES}']),
        ('organizations = 1\n' + CONTRACT.partition("[org")[0],
         ["organizations: is not valid; takes a table with the claim and what the users share"]),
        ("plans = [", ["is not TOML: Invalid value (at end of document); takes TOML, see https://toml.io/en/v1.0.0"]),
    ],
)  # fmt: skip
def test_each_mistake_has_its_line(text: str, lines: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        read(text)
    assert caught.value.lines == [f"BROKER_PLANS_FILE: {line}" for line in lines]


PIECES = st.text(max_size=4) | st.sampled_from(
    ["[plans.a]", "\n", " = ", '"', "plans", "organizations", "{}", "1", "1e400", "nan", "[[plans]]", "0x" + "f" * 5000]
)


@given(st.integers(0, len(CONTRACT)), st.integers(0, 30), st.lists(PIECES, max_size=3).map("".join))
def test_any_slip_in_a_file_is_read_or_refused(start: int, cut: int, put: str) -> None:
    lines: list[str] = []
    try:
        plans = read(CONTRACT[:start] + put + CONTRACT[start + cut :])
    except SettingsError as error:
        lines = error.lines
    else:
        assert plans.default == plans.by_name[plans.default.plan]
    for line in lines:
        assert re.fullmatch(r"BROKER_PLANS_FILE: [^\r\n]{1,400}; takes [^\r\n]{1,400}", line), line


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff")
    for name, reason in {"none": "No such file or directory", "binary": "it is not UTF-8 text"}.items():
        given = settings({**JWT, "BROKER_PLANS_FILE": str(tmp_path / name)})
        with pytest.raises(SettingsError) as caught:
            check(given)
        line = f"BROKER_PLANS_FILE: cannot be read ({reason}); takes the path of a TOML file"
        assert caught.value.lines == [line]


@pytest.mark.parametrize("auth", ["anonymous", "header"])
def test_plans_need_tokens(auth: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings({"BROKER_AUTH": auth, "BROKER_TRUSTED_PROXIES": "10.0.0.0/8", "BROKER_PLANS_FILE": "plans.toml"})
    line = "BROKER_PLANS_FILE: is set, but BROKER_AUTH is not jwt; takes the path of a TOML file"
    assert caught.value.lines == [line]


def test_a_plan_replaces_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "plans.toml"
    file.write_text(CONTRACT)
    given = {"BROKER_SESSION_LIMITS": "7/day", "BROKER_MAX_LIVE_CALLS": "3", "BROKER_MAX_CALL_SECONDS": "60"}
    plans = load_plans(settings({**JWT, **given, "BROKER_TALK_MINUTES": "5", "BROKER_PLANS_FILE": str(file)}))
    assert plans.of({}) == FREE
    assert plans.of({"plan": "pro"}) == Entitlement("7/day", 3, 600, 60, "pro")


def test_without_a_file_everyone_has_the_settings_limits() -> None:
    plans = load_plans(settings({"BROKER_SESSION_LIMITS": "7/day", "BROKER_MAX_LIVE_CALLS": "3"}))
    assert plans.of({}) is plans.of({"plan": "pro", "org_id": "shop"})
    assert plans.of({}) == Entitlement("7/day", 3, None, 3600)


# --- which limits a user has ---

NO_PLAN: dict[str, Any] = {
    "absent": ...,
    "null": None,
    "unknown": "gold",
    "another-case": "Pro",
    "empty": "",
    "a-list": ["pro"],
    "an-object": {"pro": True},
    "true": True,
    "a-number": 7,
}


@pytest.mark.parametrize("value", NO_PLAN.values(), ids=NO_PLAN.keys())
def test_a_claim_that_names_no_plan(value: Any) -> None:
    assert read().of({} if value is ... else {"plan": value}) == FREE


def test_users_of_one_organization_have_one_name() -> None:
    plans = read()
    shop = plans.of({"org_id": "shop"})
    assert shop == FREE._replace(organization=shop.organization, organization_limits=SHARED)
    assert shop.organization not in ("", "shop")
    assert " " not in shop.organization
    assert plans.of({"org_id": "shop", "plan": "pro"}).organization == shop.organization
    assert plans.of({"org_id": "bank"}).organization != shop.organization
    assert read(issuer="https://login.example").of({"org_id": "shop"}).organization != shop.organization
    assert plans.of({"org_id": 7}).organization == plans.of({"org_id": "7"}).organization != ""
    assert plans.of({"org_id": 0}).organization


@pytest.mark.parametrize("value", [None, "", True, False, [], ["shop"], {}, {"id": "shop"}, math.nan, math.inf])
def test_what_is_no_organization(value: Any) -> None:
    assert read().of({"org_id": value}) == FREE


SECONDS: dict[str, tuple[Any, int | None]] = {
    "whole": (90, 90),
    "rounded-down": (90.9, 90),
    "at-least-one": (0.25, 1),
    "a-week-at-most": (10**400, 604800),
    "zero": (0, None),
    "minus-zero": (-0.0, None),
    "negative": (-90, None),
    "very-negative": (-(10**400), None),
    "infinite": (math.inf, None),
    "minus-infinite": (-math.inf, None),
    "nan": (math.nan, None),
    "true": (True, None),
    "text": ("90", None),
    "a-list": ([90], None),
    "null": (None, None),
}


@pytest.mark.parametrize(("value", "seconds"), SECONDS.values(), ids=SECONDS.keys())
def test_seconds_of_a_token(value: Any, seconds: int | None) -> None:
    entitlement = read().of({"voice_seconds": value, "plan": "pro"})
    assert entitlement.token_seconds == seconds
    assert entitlement.bound(agent()) == min(3600, seconds or 3600)


def test_what_is_odd_is_logged_once_and_not_repeated() -> None:
    plans = read()
    odd: list[dict[str, Any]] = [
        {"plan": 7},
        {"plan": "MARKER"},
        {"org_id": ["MARKER"]},
        {"voice_seconds": "MARKER"},
    ]
    with capture_logs() as logs:
        for _ in range(3):
            for claims in odd:
                plans.of(claims)
        plans.of({"plan": "pro", "org_id": "shop", "voice_seconds": 7})
        plans.of({})
    assert [(entry["event"], entry["log_level"], entry["claim"], entry["reason"]) for entry in logs] == [
        ("plan_claim_ignored", "warning", "plan", "is not a string"),
        ("plan_claim_ignored", "warning", "plan", "names no plan"),
        ("plan_claim_ignored", "warning", "org_id", "is not a name or a number"),
        ("plan_claim_ignored", "warning", "voice_seconds", "is not a positive number of seconds"),
    ]
    assert "MARKER" not in str(logs)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8) | st.just("pro"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(st.fixed_dictionaries({}, optional={"plan": values, "org_id": values, "voice_seconds": values, "more": values}))
def test_any_claims_give_limits(claims: dict[str, Any]) -> None:
    plans = read()
    entitlement = plans.of(claims)
    assert entitlement.plan == ("pro" if claims.get("plan") == "pro" else "free")
    assert entitlement._replace(token_seconds=None, organization="", organization_limits=OrganizationLimits()) in (
        FREE,
        PRO,
    )
    assert bool(entitlement.organization) == (entitlement.organization_limits == SHARED)
    assert 1 <= entitlement.bound(agent()) <= 3600
    assert isinstance(entitlement.bound(agent()), int)
    assert plans.of(dict(claims)) is entitlement, "made once"


def test_half_an_emoji_is_a_name() -> None:
    assert read().of({"org_id": "\ud83d"}).organization


# --- how long a call may last ---


@pytest.mark.parametrize(
    ("setting", "of_plan", "of_agent", "of_token", "bound"),
    [
        (3600, None, None, None, 3600),
        (0, None, None, None, 0),
        (0, None, None, 60, 60),
        (3600, None, None, 60, 60),
        (3600, None, None, 7200, 3600),
        (3600, None, 600, None, 600),
        (3600, None, 7200, None, 7200),  # instead of the setting
        (0, None, 600, None, 600),
        (3600, 300, None, None, 300),
        (300, 7200, None, None, 7200),  # replaces the setting
        (3600, 0, None, None, 0),
        (3600, 0, 600, None, 600),
        (3600, 300, 600, None, 300),
        (3600, 600, 300, None, 300),
        (3600, 600, 300, 60, 60),
        (3600, 600, 300, 900, 300),
    ],
)
def test_the_smallest_bound_counts(
    setting: int, of_plan: int | None, of_agent: int | None, of_token: int | None, bound: int
) -> None:
    line = "" if of_plan is None else f"max_call_seconds = {of_plan}"
    text = f'claim = "plan"\ndefault = "a"\nmax_call_seconds_claim = "s"\n[plans.a]\n{line}'
    plans = read_plans(text, OWN._replace(max_call_seconds=setting))
    assert plans.of({} if of_token is None else {"s": of_token}).bound(agent(of_agent)) == bound
