"""`calls list`, `calls stop`, `calls forget` and `pause --hang-up`, on a real store."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from app.cli import calls, operator
from app.cli.operator import Operator, operate
from app.identity import User
from app.identity.keyring import Keyring
from app.limits import CallAttempt
from app.limits import record as records
from app.limits.call_attempt import ALL_CALLS
from app.limits.ledger import UNSTOPPED, Ledger, Moved
from app.limits.record import Step
from app.store.valkey import ValkeyStore
from tests.conftest import OpenBroker
from tests.support.brokers import SECRET
from tests.support.commands import invoke
from tests.support.harness import ENVIRON, Upstream, post_session, settings
from tests.support.processes import PATIENCE, Finished
from tests.support.valkey import Valkey

ANN, BEN = User(mode="anonymous", id="192.0.2.1"), User(mode="anonymous", id="192.0.2.2")
PSEUDONYM_OF = {user.id: Keyring([SECRET]).pseudonym(user) for user in (ANN, BEN)}
HOUR = 3600


@dataclass
class Deployment:
    """A store, the records in it, and commands for it."""

    valkey: Valkey
    store: ValkeyStore
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.store, lease=HOUR, prefix="oib")

    @property
    def environ(self) -> dict[str, str]:
        """Settings of brokers and commands on the store."""
        return {"BROKER_STORE_URL": self.valkey.url, "BROKER_SECRET": SECRET}

    async def command(self, *arguments: str, **changes: str) -> Finished:
        """Run a command."""
        return await asyncio.to_thread(invoke, *arguments, environ={**ENVIRON, **self.environ, **changes})

    async def listed(self, *arguments: str) -> list[dict[str, Any]]:
        """The objects of `calls list`."""
        said = await self.command("calls", "list", "--json", *arguments)
        assert (said.code, said.err) == (0, "")
        found: list[dict[str, Any]] = json.loads(said.out)
        return found

    async def reserved(self, name: str, user: User = ANN, *, agent: str = "default", age: int = 0) -> CallAttempt:
        """A start that OneInbox has not answered yet."""
        owner = PSEUDONYM_OF[user.id]
        attempt = CallAttempt(f"request-of-{name}", int(time.time()) - age, agent, user.store_name, owner)
        await self.move(attempt, records.reserve(attempt))
        return attempt

    async def given(self, name: str, user: User = ANN, *, agent: str = "default", age: int = 0) -> CallAttempt:
        """A running call."""
        attempt = await self.reserved(name, user, agent=agent, age=age)
        await self.move(attempt, records.give(attempt, name, kept=False))
        return attempt

    async def failed(self, name: str, user: User = ANN) -> CallAttempt:
        """A call that could not be stopped."""
        attempt = await self.given(name, user)
        await self.move(attempt, records.condemn("why"), records.fail)
        return attempt

    async def unfound(self, name: str) -> CallAttempt:
        """A call that could not be found."""
        attempt = await self.reserved(name)
        await self.move(attempt, records.give_up)
        return attempt

    async def move(self, attempt: CallAttempt, *steps: Step) -> None:
        """Move a record."""
        for step in steps:
            assert (await self.ledger.move(attempt.request_id, step)).after is not None

    async def state(self, name: str) -> tuple[str, str]:
        """The state of a call's record, and why it must end."""
        found = await self.ledger.find(f"request-of-{name}")
        assert found is not None
        return found.state, found.unwanted

    async def hang_up(self, names: set[str]) -> None:
        """Do what a replica does: end these calls once they are unwanted."""
        async with asyncio.timeout(PATIENCE):
            while names:
                for name in list(names):
                    if (await self.state(name))[0] == "unwanted":
                        await self.ledger.move(f"request-of-{name}", records.end(1))
                        names.remove(name)
                await asyncio.sleep(0.02)  # between questions to the store


@pytest.fixture
async def deployment(valkey: Valkey) -> AsyncIterator[Deployment]:
    async with ValkeyStore(valkey.url) as store:
        yield Deployment(valkey, store)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands wait for a moment only."""
    monkeypatch.setattr(operator, "CONFIRM_SECONDS", 0)
    monkeypatch.setattr(calls, "STOP_SECONDS", 0.3)
    monkeypatch.setattr(calls, "POLL_SECONDS", 0.05)


# --- list ---


async def test_running_calls_are_listed_oldest_first(deployment: Deployment) -> None:
    await deployment.given("c2", BEN, age=60)
    first_call = await deployment.given("c1", ANN, agent="support", age=600)
    await deployment.store.add_member(ALL_CALLS, first_call.key, 2 * HOUR)  # the store's own order is another
    ended = await deployment.given("c0", age=900)
    await deployment.move(ended, records.end(5))

    first, second = await deployment.listed()

    ends_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 600 + HOUR))
    assert abs(first.pop("age_seconds") - 600) <= 5
    assert first.pop("started_at")[:10] in (ends_at[:10], time.strftime("%Y-%m-%d", time.gmtime(time.time() - 600)))
    assert first.pop("ends_at")[:15] == ends_at[:15]
    assert first == {
        "call": "c1",
        "request": "request-of-c1",
        "agent": "support",
        "user": PSEUDONYM_OF[ANN.id][:16],
        "state": "running",
        "could_not_be_stopped": False,
    }
    assert (second["call"], second["user"]) == ("c2", PSEUDONYM_OF[BEN.id][:16])


CHOICES = {
    "address": ("--user", "192.0.2.1"),
    "pseudonym-as-logged": ("--user", PSEUDONYM_OF[ANN.id][:16]),
    "whole-pseudonym": ("--user", PSEUDONYM_OF[ANN.id]),
    "agent": ("--agent", "support"),
    "both": ("--agent", "support", "--user", "192.0.2.1"),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
async def test_a_users_or_an_agents_calls_are_listed_alone(deployment: Deployment, choice: tuple[str, ...]) -> None:
    await deployment.given("c1", ANN, agent="support")
    await deployment.given("c2", BEN)
    assert [call["call"] for call in await deployment.listed(*choice)] == ["c1"]


async def test_what_is_special_about_a_call_is_listed(deployment: Deployment) -> None:
    await deployment.reserved("starting")
    await deployment.failed("failed")
    await deployment.unfound("unfound")
    await deployment.store.add_member(UNSTOPPED, "forgotten", HOUR)

    listed = await deployment.listed()

    assert {(call["call"], call["request"], call["state"], call["could_not_be_stopped"]) for call in listed} == {
        (None, "request-of-starting", "starting", False),
        ("failed", "request-of-failed", "stopping", True),
        (None, "request-of-unfound", "not found", True),
        ("forgotten", None, "unknown", True),
    }


async def test_the_list_is_a_table_for_a_reader(deployment: Deployment) -> None:
    assert (await deployment.command("calls", "list")).out == "No running calls.\n"
    await deployment.given("a-call-with-a-long-name", age=61)
    await deployment.unfound("unfound")

    head, *rows = (await deployment.command("calls", "list", BROKER_MAX_CALL_SECONDS="0")).out.splitlines()

    assert head.split("  ")[0] == "CALL"
    place = head.index("AGENT")
    assert [row[place : place + 9] for row in rows] == ["default  "] * 2
    first, second = ([cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows)
    assert first[:3] == ["a-call-with-a-long-name", "default", PSEUDONYM_OF[ANN.id][:16]]
    assert first[3].startswith("0:01:0")
    assert first[4:] == ["never", "running"]
    assert (second[0], second[-1]) == ("request request-of-unfound", "not found")


# --- stop ---


@pytest.fixture
async def broker(open_broker: OpenBroker, deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> httpx.AsyncClient:
    """A replica on the store that looks for unwanted calls often."""
    for module in ("sweeper", "live_calls"):
        monkeypatch.setattr(f"app.limits.{module}.SWEEP_SECONDS", 1.1, raising=False)
    return await open_broker(deployment.environ, peer="192.0.2.1", BROKER_METRICS_TOKEN="metrics-token-of-the-operator")


async def test_a_call_that_is_stopped_is_hung_up_and_the_others_run_on(
    deployment: Deployment, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    for name in ("call_1", "call_2"):
        upstream.has_call(name)
        assert (await post_session(broker)).status_code == 201

    said = await deployment.command("calls", "stop", "call_1")

    assert (said.code, said.out, said.err) == (0, "call_1: ended\n", "")
    assert [request.url.path for request in upstream.requests if request.url.path.endswith("/stop")] == [
        "/v1/calls/call_1/stop"
    ]
    assert [call["call"] for call in await deployment.listed()] == ["call_2"]
    page = (await broker.get("/metrics", headers={"Authorization": "Bearer metrics-token-of-the-operator"})).text
    assert 'broker_hang_ups_total{reason="operator",result="stopped"} 1.0' in page


async def test_a_pause_may_hang_up_what_runs(
    deployment: Deployment, broker: httpx.AsyncClient, upstream: Upstream
) -> None:
    for name in ("call_1", "call_2"):
        upstream.has_call(name)
        assert (await post_session(broker)).status_code == 201

    said = await deployment.command("pause", "--hang-up", "--reason", "enough")

    assert said.code == 0
    assert said.out.splitlines()[1:] == ["in force on 1 of 1 replicas", "ended 2 of 2 running calls"]
    assert (await post_session(broker)).status_code == 503
    assert await deployment.listed() == []


async def test_a_pause_says_which_calls_did_not_end(deployment: Deployment, hurried: None) -> None:
    await deployment.given("c1")
    said = await deployment.command("pause", "--hang-up")
    assert said.code == 1
    assert said.out.splitlines()[-2:] == ["c1: asked for; not yet ended", "ended 0 of 1 running calls"]


SELECTORS = {
    "ids": (("c1", "c2", "c1"), {"c1", "c2"}),
    "user": (("--user", "192.0.2.1"), {"c1", "c2"}),
    "pseudonym": (("--user", PSEUDONYM_OF[BEN.id][:16]), {"c3"}),
    "agent": (("--agent", "support"), {"c2"}),
    "all": (("--all",), {"c1", "c2", "c3"}),
}


@pytest.mark.parametrize(("selector", "chosen"), SELECTORS.values(), ids=SELECTORS.keys())
async def test_calls_are_chosen_by_id_user_or_agent(
    deployment: Deployment, selector: tuple[str, ...], chosen: set[str]
) -> None:
    await deployment.given("c1", ANN)
    await deployment.given("c2", ANN, agent="support")
    await deployment.given("c3", BEN)

    said, _ = await asyncio.gather(deployment.command("calls", "stop", *selector), deployment.hang_up({*chosen}))

    assert said.code == 0
    summary = [f"ended {len(chosen)} of {len(chosen)} running calls"] if len(chosen) > 1 else []
    assert sorted(said.out.splitlines()) == sorted([*(f"{name}: ended" for name in chosen), *summary])
    for name in ("c1", "c2", "c3"):
        expected = ("ended", "an operator stopped it") if name in chosen else ("given", "")
        assert await deployment.state(name) == expected


async def test_a_call_that_starts_meanwhile_is_stopped_once_it_has_an_id(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = await deployment.reserved("c1")
    asked = asyncio.Event()
    move = Ledger.move

    async def noted(ledger: Ledger, request_id: str, step: Step) -> Moved:
        moved = await move(ledger, request_id, step)
        asked.set()
        return moved

    async def start() -> None:
        await asked.wait()
        await deployment.move(attempt, records.give(attempt, "c1", kept=False))

    async def stop(operator: Operator) -> dict[str, str]:
        found = await calls.running_calls(operator)
        monkeypatch.setattr(Ledger, "move", noted)
        fates, *_ = await asyncio.gather(calls.stop_calls(operator, found), start(), deployment.hang_up({"c1"}))
        return fates

    assert await operate(settings(deployment.environ), stop) == {"request-of-c1": "ended"}


async def test_a_call_that_waits_for_a_repeat_is_given_to_none(deployment: Deployment, hurried: None) -> None:
    attempt = await deployment.reserved("c1")
    await deployment.move(attempt, records.leave(attempt, "c1", time.time() + 30))
    await deployment.command("calls", "stop", "c1")
    assert await deployment.state("c1") == ("unwanted", "an operator stopped it")
    assert (await deployment.ledger.move(attempt.request_id, records.collect("a repeat"))).after is None


async def test_what_did_not_end_is_said_for_each_call(deployment: Deployment, hurried: None) -> None:
    await deployment.given("given")
    await deployment.failed("failed")
    await deployment.reserved("starting")
    await deployment.unfound("unfound")
    await deployment.store.add_member(UNSTOPPED, "forgotten", HOUR)

    said = await deployment.command("calls", "stop", "--all")

    assert said.code == 1
    *lines, summary = said.out.splitlines()
    assert set(lines) == {
        "given: asked for; not yet ended",
        "failed: asked for; not yet ended",
        "request-of-starting: still starting; not stopped",
        "request-of-unfound: not found at OneInbox, so not stopped",
        "forgotten: the store has no record of it, so not stopped",
    }
    assert summary == "ended 0 of 5 running calls"


@pytest.mark.parametrize("name", ["c2", "no such call", "\x1b[2J", "\udcff", "x" * 10_000])
@pytest.mark.parametrize("command", ["stop", "forget"])
async def test_an_unknown_call_is_said_to_be_unknown(deployment: Deployment, command: str, name: str) -> None:
    await deployment.given("c1")
    said = await deployment.command("calls", command, name)
    assert said.code == 1
    assert said.out.endswith(": unknown\n")
    assert "\x1b" not in said.out
    assert len(said.out) < 300
    assert await deployment.state("c1") == ("given", "")


async def test_an_unknown_call_keeps_none_of_the_others(deployment: Deployment) -> None:
    await deployment.given("c1")
    said, _ = await asyncio.gather(deployment.command("calls", "stop", "c1", "c2"), deployment.hang_up({"c1"}))
    assert said.code == 1
    assert sorted(said.out.splitlines()) == ["c1: ended", "c2: unknown", "ended 1 of 2 running calls"]


async def test_a_call_that_has_ended_stays_ended(deployment: Deployment) -> None:
    await deployment.move(await deployment.given("c1"), records.end(5))
    said = await deployment.command("calls", "stop", "c1")
    assert (said.code, said.out) == (0, "c1: ended\n")


async def test_nothing_to_stop_is_fine(deployment: Deployment) -> None:
    said = await deployment.command("calls", "stop", "--all")
    assert (said.code, said.out) == (0, "No running calls.\n")


USAGE = {
    "nothing": ((), "calls stop: takes one of CALL…, --user, --agent and --all"),
    "two": (("--all", "--agent", "support"), "calls stop: takes one of CALL…, --user, --agent and --all"),
    "id-and-all": (("c1", "--all"), "calls stop: takes one of CALL…, --user, --agent and --all"),
    "no-user": (("--user", "ann"), "USER 'ann': is not an address; takes an IPv4 or IPv6 address"),
}


@pytest.mark.parametrize(("arguments", "line"), USAGE.values(), ids=USAGE.keys())
async def test_wrong_usage_is_said_in_a_line(deployment: Deployment, arguments: tuple[str, ...], line: str) -> None:
    said = await deployment.command("calls", "stop", *arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(line)


async def test_on_a_terminal_more_than_one_call_asks_first(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, hurried: None
) -> None:
    monkeypatch.setattr(calls, "is_terminal", lambda: True)
    await deployment.given("c1")
    await deployment.given("c2")

    said = await deployment.command("calls", "stop", "--all")  # stdin is empty, so no one says yes

    assert said.code == 1
    assert said.out.startswith("End 2 calls? [y/N]")
    assert await deployment.state("c1") == await deployment.state("c2") == ("given", "")
    assert "End" not in (await deployment.command("calls", "stop", "c1")).out
    assert "End" not in (await deployment.command("calls", "stop", "--all", "--yes")).out
    assert (await deployment.state("c2"))[0] == "unwanted"


# --- forget ---


async def test_a_call_that_could_not_be_stopped_is_forgotten(deployment: Deployment) -> None:
    await deployment.failed("c1")
    said = await deployment.command("calls", "forget", "c1")
    assert (said.code, said.out) == (0, "c1: forgotten\n")
    assert await deployment.state("c1") == ("ended", "why")
    assert await is_empty(deployment)


async def test_a_call_that_was_not_found_is_forgotten_by_its_request(deployment: Deployment) -> None:
    await deployment.unfound("c1")
    said = await deployment.command("calls", "forget", "request-of-c1")
    assert (said.code, said.out) == (0, "request-of-c1: forgotten\n")
    assert await deployment.state("c1") == ("ended", "")
    assert await is_empty(deployment)


async def test_a_call_without_a_record_is_forgotten(deployment: Deployment) -> None:
    await deployment.failed("c1")
    await deployment.unfound("c2")
    await deployment.store.add_member(UNSTOPPED, "c3", HOUR)
    for name in ("c1", "c2"):
        await deployment.store.delete(f"call:request-of-{name}")
    for name in ("c1", "request-of-c2", "c3"):
        assert (await deployment.command("calls", "forget", name)).out == f"{name}: forgotten\n"
    assert await is_empty(deployment)


async def is_empty(deployment: Deployment) -> bool:
    """No call takes a slot, or is listed as unstopped."""
    store = deployment.store
    return not await store.members(ALL_CALLS) and not await store.members(UNSTOPPED) and not await deployment.listed()


NOT_SETTLED = {"c1": "c1: is running; `calls stop` ends it\n", "c2": "c2: unknown\n", "c3": "c3: unknown\n"}


@pytest.mark.parametrize(("name", "line"), NOT_SETTLED.items())
async def test_what_is_not_known_to_be_settled_is_not_forgotten(deployment: Deployment, name: str, line: str) -> None:
    await deployment.given("c1")
    await deployment.move(await deployment.given("c3"), records.end(5))
    said = await deployment.command("calls", "forget", name)
    assert (said.code, said.out) == (1, line)
    assert await deployment.state("c1") == ("given", "")
