"""`doctor` against canned answers of OneInbox and of an identity provider."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from app.doctor import checks as module
from app.doctor.checks import diagnose
from app.doctor.findings import DEADLINE, Finding, as_json, fine, within
from app.identity.jwt import NOT_YET_LEEWAY_SECONDS
from app.store.review import weaknesses
from tests.support.harness import API_KEY, ENVIRON, Upstream

NOW = 1_800_000_000.0
JWKS = "https://login.example/jwks.json?token=hush"
OIDC = {
    "BROKER_AUTH": "jwt",
    "BROKER_JWT_JWKS_URL": JWKS,
    "BROKER_JWT_ISSUER": "https://login.example",
    "BROKER_JWT_AUDIENCE": "broker",
}
EVERY_CHECK = [
    *("settings", "agents file", "plans file", "key", "oneinbox", "agents", "allowance", "clock", "store", "logins"),
    *("allowed origins", "trusted proxies", "variables", "limits", "secret", "open files"),
]


async def examine(
    upstream: httpx.AsyncBaseTransport, given: Mapping[str, str] | None = None, **options: Any
) -> dict[str, Finding]:
    """The findings by name; of several under one name the first. None holds the key."""
    findings = await diagnose(
        {**ENVIRON, **(given or {})}, None, transport=upstream, **{"now": lambda: NOW + 0.5, **options}
    )
    assert API_KEY not in as_json(findings)
    assert "hush" not in as_json(findings)
    return {finding.name: finding for finding in reversed(findings)}


def answers(upstream: Upstream, status: int = 200, ahead: float = 0, **more: Any) -> None:
    """Have OneInbox list calls this way, by a clock that is so many seconds ahead."""
    upstream.router.get("/v1/calls").respond(
        status, headers={"Date": formatdate(NOW + ahead, usegmt=True)}, **{"json": {"items": []}, **more}
    )


async def test_all_is_well(upstream: Upstream) -> None:
    answers(upstream)
    found = await diagnose(ENVIRON, None, transport=upstream, now=lambda: NOW)
    assert [finding.name for finding in found] == EVERY_CHECK
    assert all(finding.ok for finding in found)
    assert {finding.name: finding.level for finding in found} | {"open files": "ok"} == dict.fromkeys(
        EVERY_CHECK, "ok"
    ) | dict.fromkeys(["store", "allowed origins", "variables", "secret"], "warning")
    assert all(finding.remedy for finding in found if finding.level != "ok")


async def test_it_only_reads(upstream: Upstream) -> None:
    await examine(upstream)
    asked = sorted((request.method, request.url.path) for request in upstream.requests)
    assert asked == [("GET", "/v1/agents/agt_test"), ("GET", "/v1/calls")]


async def test_wrong_settings_are_findings(upstream: Upstream) -> None:
    environ = {"ONEINBOX_API_KEY": "oi_pk_hush", "BROKER_SESSION_LIMTS": "5/minute"}
    found = await diagnose(environ, None, transport=upstream)
    assert [(finding.name, finding.level) for finding in found] == [
        *[("settings", "error")] * 3,
        ("the rest", "warning"),
    ]
    assert {finding.detail.partition(":")[0] for finding in found[:3]} == {
        "ONEINBOX_API_KEY",
        "ONEINBOX_AGENT_ID",
        "BROKER_SESSION_LIMTS",
    }
    assert any("the nearest is BROKER_SESSION_LIMITS" in finding.detail for finding in found)
    assert "hush" not in as_json(found)
    assert upstream.requests == []


async def test_settings_come_from_the_environment_and_env_file(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONEINBOX_API_KEY", API_KEY)
    (tmp_path / ".env").write_text("ONEINBOX_AGENT_ID=agt_test\n")
    found = await diagnose(transport=upstream)
    assert found[0] == fine("settings", "all valid")


async def test_agents_file_and_keys_are_checked_both(upstream: Upstream, tmp_path: Path) -> None:
    file = tmp_path / "agents.toml"
    file.write_text('[agents.support]\nagent_id = "agt_1"\ncolour = "red"\n')
    environ = {
        "ONEINBOX_API_KEY": API_KEY,
        "BROKER_AGENTS_FILE": str(file),
        "BROKER_AUTH": "jwt",
        "BROKER_JWT_PUBLIC_KEY": "no key",
    }
    found = {finding.name: finding for finding in reversed(await diagnose(environ, None, transport=upstream))}
    assert not found["agents file"].ok
    assert "colour" in found["agents file"].detail
    assert found["agents"].detail == "not checked: the agents file cannot be read"
    wrong = [finding for finding in await diagnose(environ, None, transport=upstream) if not finding.ok]
    assert any("BROKER_JWT_PUBLIC_KEY" in finding.detail for finding in wrong)


async def test_agents_file_is_told(upstream: Upstream, tmp_path: Path) -> None:
    file = tmp_path / "agents.toml"
    file.write_text("".join(f'[agents.a{number}]\nagent_id = "agt_{number}"\n' for number in range(12)))
    given = {"ONEINBOX_AGENT_ID": "", "BROKER_AGENTS_FILE": str(file)}
    found = await examine(upstream, given)
    assert found["agents file"].detail.endswith("a9 and 2 more")


PLANS = """
claim = "plan"
default = "free"
[plans.free]
[plans.pro]
session_limits = "9/minute"
[organizations]
claim = "/o/id"
"""


async def test_plans_file_is_told(upstream: Upstream, tmp_path: Path) -> None:
    file = tmp_path / "plans.toml"
    file.write_text(PLANS)
    given = {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": "s" * 32, "BROKER_PLANS_FILE": str(file)}
    found = await examine(upstream, given)
    assert found["plans file"] == fine(
        "plans file", "plans free, pro (claim plan, default free); organizations (claim /o/id)"
    )
    file.write_text(PLANS.partition("[org")[0])
    found = await examine(upstream, given)
    assert found["plans file"] == fine("plans file", "plans free, pro (claim plan, default free)")
    assert (await examine(upstream))["plans file"] == fine("plans file", "not used")


async def test_each_mistake_in_the_plans_file_is_told(upstream: Upstream, tmp_path: Path) -> None:
    file = tmp_path / "plans.toml"
    file.write_text(PLANS.replace("9/minute", "plenty").replace('claim = "plan"', 'clam = "plan"'))
    environ = {**ENVIRON, "BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": "s" * 32, "BROKER_PLANS_FILE": str(file)}
    found = [finding for finding in await diagnose(environ, None, transport=upstream) if not finding.ok]
    assert {finding.name for finding in found} == {"plans file"}
    assert [finding.detail.partition(": is ")[0].removeprefix("BROKER_PLANS_FILE: ") for finding in found] == [
        "claim",
        "plans.pro.session_limits",
        "clam",
    ]


async def test_a_key_of_another_shape(upstream: Upstream) -> None:
    found = await examine(upstream, {"ONEINBOX_API_KEY": "sk_live_7"})
    assert found["key"].level == "warning"


@pytest.mark.parametrize(
    ("status", "level", "words"),
    [
        (401, "error", "ONEINBOX_API_KEY"),
        (402, "error", "top up the account"),
        (403, "error", "full access"),
        (404, "error", "ONEINBOX_BASE_URL"),
        (307, "error", "try again"),
        (500, "error", "try again"),
        (429, "warning", "try again in 5 s"),
    ],
)
async def test_what_oneinbox_refuses(upstream: Upstream, status: int, level: str, words: str) -> None:
    answers(upstream, status, json={"detail": f"Bearer {API_KEY}"})
    found = await examine(upstream)
    assert found["oneinbox"].level == level
    assert words in found["oneinbox"].remedy
    for name in ("agents", "allowance"):
        assert found[name].detail == "not checked: OneInbox did not list calls"
    assert found["clock"].level == "ok"


async def test_an_answer_that_is_no_list(upstream: Upstream) -> None:
    answers(upstream, json={"hello": API_KEY})
    assert not (await examine(upstream))["oneinbox"].ok


@pytest.mark.parametrize(
    ("ahead", "level", "words"),
    [
        (0, "ok", "agrees"),
        (20, "ok", "20 s behind"),
        (-20, "ok", "20 s ahead of"),
        (NOT_YET_LEEWAY_SECONDS, "ok", "30 s behind"),  # what a new token's iat and nbf may be ahead
        (NOT_YET_LEEWAY_SECONDS + 1, "error", "31 s behind"),
        (-3600, "error", "3600 s ahead of"),
    ],
)
async def test_clock(upstream: Upstream, ahead: float, level: str, words: str) -> None:
    answers(upstream, ahead=ahead)
    finding = (await examine(upstream))["clock"]
    assert finding.level == level
    assert words in finding.detail


ALLOWANCES: dict[str, tuple[int, Any, str, str]] = {
    "plenty": (200, {"max_calls_per_day": 200, "calls_remaining_today": 20}, "ok", "20 of 200 calls are left"),
    "few": (200, {"max_calls_per_day": 200, "calls_remaining_today": 19}, "warning", "19 of 200 calls are left"),
    "none": (200, {"max_calls_per_day": 200, "calls_remaining_today": 0}, "error", "every session is refused"),
    "no-cap": (200, {"max_calls_per_day": 0, "calls_remaining_today": 0}, "ok", "no cap on the calls of a day"),
    "unknown": (200, {"max_calls_per_day": 200, "calls_remaining_today": "many"}, "ok", "not watched"),
    "no-route": (404, {"detail": "Not Found"}, "ok", "not watched"),
    "other-shape": (200, [], "ok", "not watched"),
    "broken": (500, {}, "warning", "not checked: OneInbox answered 500"),
}


@pytest.mark.parametrize(("status", "usage", "level", "words"), ALLOWANCES.values(), ids=ALLOWANCES.keys())
async def test_what_is_left_of_the_calls_of_the_day(
    upstream: Upstream, status: int, usage: Any, level: str, words: str
) -> None:
    answers(upstream)
    upstream.usage.respond(status, json=usage)
    finding = (await examine(upstream))["allowance"]
    assert finding.level == level
    assert words in finding.detail
    assert bool(finding.remedy) == (level != "ok")
    assert {call.request.method for call in upstream.router.calls} == {"GET"}


@pytest.mark.parametrize("date", [None, "yesterday"])
async def test_no_time_to_compare(upstream: Upstream, date: str | None) -> None:
    upstream.router.get("/v1/calls").respond(json={"items": []}, headers={"Date": date} if date else {})
    assert (await examine(upstream))["clock"].level == "warning"


MAX_SECONDS = "BROKER_MAX_CALL_SECONDS"
AGENT_ANSWERS: dict[str, tuple[int, Any, dict[str, str], str, str]] = {
    "longer than ours": (200, {"max_duration_seconds": 3601}, {}, "ok", "OneInbox has default"),
    "as long as ours": (200, {"max_duration_seconds": 3600}, {}, "ok", "OneInbox has default"),
    "shorter than ours": (
        200,
        {"max_duration_seconds": 600},
        {},
        "warning",
        "after 600 s, before BROKER_MAX_CALL_SECONDS",
    ),
    "bounded where we set no bound": (200, {"max_duration_seconds": 600}, {MAX_SECONDS: "0"}, "warning", "(none)"),
    "no bound of its own": (200, {"max_duration_seconds": None}, {}, "ok", "OneInbox has default"),
    "another shape": (200, {"max_duration_seconds": "ten minutes"}, {}, "ok", "OneInbox has default"),
    "not there": (404, {"detail": "Agent not found"}, {}, "error", "no agent default (agt_test): it answered 404"),
    "an id of another form": (422, {"detail": []}, {}, "error", "no agent default (agt_test)"),
    "a bad id": (400, {}, {}, "error", "no agent default (agt_test)"),
    "not for this key": (403, {}, {}, "warning", "default (agt_test) was not checked: OneInbox answered 403"),
    "an edition without that method": (405, {}, {}, "warning", "was not checked"),
    "busy": (429, {}, {}, "warning", "was not checked"),
    "broken": (500, {}, {}, "warning", "was not checked"),
    "no object": (200, [], {}, "warning", "was not checked"),
}


@pytest.mark.parametrize(
    ("status", "answer", "given", "level", "words"), AGENT_ANSWERS.values(), ids=AGENT_ANSWERS.keys()
)
async def test_an_agent(
    upstream: Upstream, *, status: int, answer: Any, given: dict[str, str], level: str, words: str
) -> None:
    upstream.agent.respond(status, json=answer)
    finding = (await examine(upstream, given))["agents"]
    assert (finding.level, bool(finding.remedy)) == (level, level != "ok")
    assert words in finding.detail
    assert level != "error" or finding.remedy.startswith("correct ONEINBOX_AGENT_ID")


async def test_each_agent_of_the_file_is_asked_for(upstream: Upstream, tmp_path: Path) -> None:
    file = tmp_path / "agents.toml"
    names = [f"a{number}" for number in range(30)]
    file.write_text("".join(f'[agents.{name}]\nagent_id = "agt_{name}"\n' for name in names))
    file.write_text(file.read_text() + "max_call_seconds = 300\n")  # the last one's
    upstream.router.get("/v1/agents/agt_a7").respond(404)
    upstream.router.get("/v1/agents/agt_a29").respond(json={"max_duration_seconds": 200})
    # The more particular routes first.
    upstream.router.routes._routes.sort(key=lambda route: "agt_a" not in str(route.pattern))
    given = {**ENVIRON, "ONEINBOX_AGENT_ID": "", "BROKER_AGENTS_FILE": str(file)}
    found = [each for each in await diagnose(given, None, transport=upstream) if each.name == "agents"]
    assert [each.level for each in found] == ["error", "warning", "ok"]
    assert found[0].remedy.startswith("correct BROKER_AGENTS_FILE: agents.a7.agent_id")
    assert "after 200 s, before its max_call_seconds (300)" in found[1].detail
    assert found[2].detail.endswith("a8, a9, a10 and 18 more")
    asked = {request.url.path.rpartition("/")[2] for request in upstream.requests if "/agents/" in request.url.path}
    assert asked == {f"agt_{name}" for name in names}


class Broken(httpx.AsyncBaseTransport):
    """Fails in a way of its own."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        raise self.error


async def test_a_failure_that_nothing_explains_keeps_its_name() -> None:
    finding = (await examine(Broken(httpx.ConnectError(API_KEY))))["oneinbox"]
    assert finding.detail == "cannot be reached (ConnectError)"
    assert "ONEINBOX_BASE_URL" in finding.remedy


async def test_a_check_that_fails_itself_says_so_without_its_message() -> None:
    found = await examine(Broken(RuntimeError(API_KEY)))
    for name in ("oneinbox", "agents", "allowance", "clock"):
        assert found[name].detail == "the check itself failed (RuntimeError)"
    assert found["store"].level == "warning"


async def test_it_comes_to_an_end() -> None:
    class Silent(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await asyncio.Event().wait()
            raise AssertionError

    found = await examine(Silent(), deadline=0.05)
    for name in ("oneinbox", "agents", "allowance", "clock"):
        assert found[name].detail.startswith("no result within")
    assert found["oneinbox"].remedy
    found = await examine(Silent(), {"ONEINBOX_TIMEOUT": "0.05"})
    assert found["oneinbox"].detail == "did not answer in time"


async def test_checks_that_do_not_depend_run_at_once() -> None:
    met: list[str] = []
    both = asyncio.Event()

    async def work(name: str) -> list[Finding]:
        met.append(name)
        if len(met) == 2:
            both.set()
        await both.wait()
        return [fine(name, "")]

    await asyncio.gather(within(5, lambda: work("a"), ["a"]), within(5, lambda: work("b"), ["b"]))
    assert met == ["a", "b"]


def test_time_in_all() -> None:
    """Two answers of OneInbox in a row, or a key set, or the store."""
    assert 2 * module.LONGEST_ANSWER < DEADLINE < 20


# Logins


@pytest.fixture
def issuer() -> Iterator[respx.MockRouter]:
    with respx.mock as router:
        yield router


def key(**changes: Any) -> dict[str, Any]:
    """A published key."""
    made: dict[str, Any] = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True)
    return made | changes


async def test_keys_of_the_issuer(upstream: Upstream, issuer: respx.MockRouter) -> None:
    answers(upstream)
    route = issuer.get(JWKS).respond(json={"keys": [key(), key(kty="oct"), key(use="enc")]})
    found = await examine(upstream, OIDC)
    assert found["logins"] == fine("logins", "1 usable key at BROKER_JWT_JWKS_URL, for ES256")
    assert route.call_count == 1
    issuer.get(JWKS).respond(json={"keys": [key(), key()]})
    assert (await examine(upstream, OIDC))["logins"].detail.startswith("2 usable keys")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (httpx.Response(404, text="hush"), "returns no keys: status 404"),
        (httpx.Response(302, headers={"Location": "https://evil.example/hush"}), "returns no keys: status 302"),
        (httpx.Response(200, text="<html>hush"), "does not return JSON"),
        (httpx.Response(200, json={"keys": [key(kty="oct", k="hush")]}), "returns no keys: no usable key"),
        (httpx.ConnectError("hush"), "cannot be read (ConnectError)"),
        (httpx.ReadTimeout("hush"), "cannot be read (ReadTimeout)"),
        (TimeoutError("hush"), "no answer within 5 s"),
    ],
)
async def test_no_keys_of_the_issuer(
    upstream: Upstream, issuer: respx.MockRouter, answer: httpx.Response | Exception, words: str
) -> None:
    answers(upstream)
    route = issuer.get(JWKS)
    if isinstance(answer, Exception):
        route.mock(side_effect=answer)
    else:
        route.mock(return_value=answer)
    finding = (await examine(upstream, OIDC))["logins"]
    assert not finding.ok
    assert words in finding.detail
    assert "BROKER_JWT_JWKS_URL" in finding.remedy


async def test_algorithms_that_do_not_fit(upstream: Upstream) -> None:
    environ = ENVIRON | OIDC | {"BROKER_JWT_ALGORITHMS": "HS256"}
    found = await diagnose(environ, None, transport=upstream)
    assert [finding.level for finding in found if finding.name == "logins"] == ["warning"]
    assert any("HS256" in finding.detail for finding in found if not finding.ok)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "per address"),
        ({"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": "hush" * 8}, "configured key"),
        ({"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "10.0.0.0/8"}, "X-Forwarded-User"),
    ],
)
async def test_logins_without_an_issuer(upstream: Upstream, changes: dict[str, str], words: str) -> None:
    finding = (await examine(upstream, changes))["logins"]
    assert finding.level == "ok"
    assert words in finding.detail


# The store


@pytest.mark.parametrize(
    ("about", "level", "words"),
    [
        ({"valkey_version": "9.1.0", "redis_version": "7.2.4"}, "ok", "Valkey 9.1.0, reads"),
        ({"redis_version": "6.2.0", "redis_mode": "standalone"}, "ok", "Redis 6.2.0, reads"),
        ({"redis_version": "5.0.14"}, "error", "too old"),
        ({"redis_version": "unstable"}, "ok", "Redis unstable"),
        ({}, "ok", "version unknown"),
    ],
)
def test_what_the_store_says_of_itself(about: dict[str, str], level: str, words: str) -> None:
    finding = module._server("store", about, 0.4)
    assert finding.level == level
    assert words in finding.detail


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"aof_enabled": "0", "save": "3600 1"}, []),
        ({"aof_enabled": "1", "save": "", "maxmemory": "0", "used_memory": "9"}, []),
        ({"aof_enabled": "0"}, []),  # its save points are unknown
        ({"aof_enabled": "0", "save": ""}, ["keeps nothing on disk"]),
        ({"maxmemory_policy": "allkeys-lru"}, ["allkeys-lru"]),
        ({"maxmemory": "100", "used_memory": "80"}, ["80% of its maxmemory"]),
        ({"maxmemory": "100", "used_memory": "79"}, []),
        ({}, ["INFO"]),
    ],
)
def test_weaknesses_of_a_store(about: dict[str, str], words: list[str]) -> None:
    found = weaknesses(about)
    assert len(found) == len(words)
    assert all(word in weakness.detail for word, weakness in zip(words, found, strict=True))


async def test_a_store_address_that_is_none(upstream: Upstream) -> None:
    given = {"BROKER_STORE_URL": "redis://:hush@host:port", "BROKER_SECRET": "s" * 32}
    finding = (await examine(upstream, given))["store"]
    assert not finding.ok
    assert "BROKER_STORE_URL" in finding.detail


async def test_json_of_a_whole_examination(upstream: Upstream) -> None:
    found = await diagnose(ENVIRON, None, transport=upstream)
    document = json.loads(as_json(found))
    assert document["ok"] is True
    assert all(check.keys() == {"name", "ok", "level", "detail", "remedy"} for check in document["checks"])
