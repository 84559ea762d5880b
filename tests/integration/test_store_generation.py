"""A store that has lost data: what a replica notices, and how the running calls come back."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import cast

import pytest
from structlog.testing import capture_logs

from app.broker.deployment import Deployment
from app.broker.replicas import REPLICAS, Reporter, read_reports
from app.config.agents import load_agents
from app.config.settings import SettingsError
from app.identity import User
from app.identity.keyring import Keyring
from app.limits import CallAttempt, KillSwitch, LiveCalls
from app.limits.call_attempt import ALL_CALLS
from app.limits.ledger import Ledger
from app.limits.restorer import Restorer
from app.limits.running_calls import TRIES
from app.oneinbox import OneInbox
from app.oneinbox.errors import OneInboxError
from app.oneinbox.models import CallPage, CallRecord
from app.store.failover import FailoverStore
from app.store.generation import Generation
from app.store.memory import MemoryStore
from app.store.valkey import ValkeyStore
from tests.support.brokers import eventually
from tests.support.harness import settings
from tests.support.valkey import Valkey, running_valkey

KEYRING = Keyring(["s" * 32])
ANN = User(mode="jwt", id="ann")
NOW = 1_800_000_000


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with running_valkey() as server:
        yield server


@pytest.fixture
async def store(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FailoverStore]:
    monkeypatch.setattr("app.store.failover.PROBE_SECONDS", 0.05)
    async with FailoverStore(ValkeyStore(valkey.url), MemoryStore()) as opened:
        yield opened


async def test_what_a_replica_notices(valkey: Valkey) -> None:
    async with ValkeyStore(valkey.url) as store:
        first, second = Generation(store), Generation(store)
        assert [await first.check(), await second.check()] == ["new", "same"]
        assert first.incomplete
        assert second.incomplete
        assert await second.complete()
        assert [await first.check(), await first.check()] == ["same", "same"]
        assert not first.incomplete
        with valkey.client() as client:
            kept = {key: cast("bytes", client.get(key)) for key in client.keys("oib:v:*")}
            await first.check()
            await second.check()
            for key, value in kept.items():  # an older state
                client.set(key, value)
            assert [await first.check(), await second.check()] == ["set-back", "set-back"]
            assert first.incomplete
            assert await first.complete()
            client.flushall()
        assert await first.check() == "emptied"
        assert not await second.complete(), "of a generation that is gone"
        assert await second.check() == "emptied"
        assert await Generation(store).check() == "same", "a replica that has just started"
        assert second.incomplete


async def test_the_store_says_that_it_was_emptied(store: FailoverStore, valkey: Valkey) -> None:
    async def is_incomplete() -> None:
        async with asyncio.timeout(2):
            while not store.incomplete:
                await asyncio.sleep(0.01)

    await is_incomplete()
    assert await store.complete()
    assert (store.incomplete, store.losses) == (False, 0)
    with capture_logs() as logs, valkey.client() as client:
        client.flushall()
        await is_incomplete()
    assert store.losses == 1
    assert [entry["log_level"] for entry in logs if entry["event"] == "store_emptied"] == ["error"]


async def test_a_value_that_cannot_be_read_does_not_end_the_probing(store: FailoverStore, valkey: Valkey) -> None:
    async def has_begun() -> bool:
        return store.incomplete

    async def has_failed() -> bool:
        return any(entry["event"] == "store_probe_failed" for entry in logs)

    async def has_seen_the_loss() -> bool:
        return store.losses == 1

    await eventually(has_begun, within=2)
    with valkey.client() as client:
        with capture_logs() as logs:
            client.set("oib:v:generation", b"\xff")
            await eventually(has_failed, within=2)
        client.flushall()
        await eventually(has_seen_the_loss, within=2)


def attempt_of(number: int, user: User = ANN) -> CallAttempt:
    return CallAttempt(f"{number:032}", NOW - number, "default", user.store_name, KEYRING.pseudonym(user))


def record_of(number: int, **changes: object) -> CallRecord:
    attempt = attempt_of(number)
    metadata = {
        "broker_user": attempt.owner,
        "broker_request_id": attempt.request_id,
        "broker_call": KEYRING.seal(attempt.unwritten, f" {attempt.request_id}"),
    }
    return CallRecord(id=f"call_{number}", status="in_progress", metadata=metadata).model_copy(update=changes)


@dataclass
class Account:
    """OneInbox's lists. `failures`: lists that fail first. `in_lists`: metadata is in lists."""

    records: list[CallRecord]
    failures: int = 0
    in_lists: bool = True
    fetched: int = 0

    async def list_calls(self, *, agent_id: str, status: str, limit: int, offset: int) -> CallPage:
        if self.failures:
            self.failures -= 1
            raise OneInboxError("answered 503", may_have_acted=True, status=503)
        found = [record for record in self.records if record.status == status]
        page = found[offset : offset + limit]
        if not self.in_lists:
            page = [record.model_copy(update={"metadata": None}) for record in page]
        return CallPage.model_construct(items=page, listed=len(page))

    async def get_call(self, call_id: str) -> CallRecord:
        self.fetched += 1
        return next(record for record in self.records if record.id == call_id)


def restorer_of(store: FailoverStore, account: Account) -> Restorer:
    oneinbox = cast("OneInbox", account)
    ledger = Ledger(store, lease=900, now=lambda: NOW)
    live = LiveCalls(store, oneinbox, ledger, max_seconds=600, join_timeout=0, now=lambda: NOW)
    return Restorer(store, oneinbox, live, KEYRING, agent_ids=["agt_1"], timeout=0, now=lambda: NOW)


@pytest.mark.parametrize("in_lists", [True, False])
async def test_running_calls_come_back(store: FailoverStore, *, in_lists: bool) -> None:
    """Over several pages; only the broker's own; each in its user's slot, with its age."""
    foreign = CallRecord(id="call_foreign", status="in_progress", metadata={"broker_user": "x"})
    account = Account([*(record_of(number) for number in range(230)), foreign], in_lists=in_lists)
    await restorer_of(store, account).restore()
    attempts = [attempt_of(number) for number in range(230)]
    for name in attempts[0].sets:
        members = await store.members(name)
        assert members.keys() == {attempt.key for attempt in attempts}
        assert members[attempts[100].key] == pytest.approx(800, abs=5)
    assert not store.incomplete
    restorer = restorer_of(store, account)
    assert await restorer._restore_all() == 0, "they are known"


async def test_an_organizations_calls_come_back(store: FailoverStore) -> None:
    attempt = attempt_of(1)._replace(organization="shop")
    record = record_of(1)
    sealed = KEYRING.seal(attempt.unwritten, f" {attempt.request_id}")
    account = Account([record.model_copy(update={"metadata": {**(record.metadata or {}), "broker_call": sealed}})])
    await restorer_of(store, account).restore()
    assert "live:org:shop" in attempt.sets
    for name in attempt.sets:
        assert list(await store.members(name)) == [attempt.key]


async def test_calls_of_others_are_left_alone(store: FailoverStore) -> None:
    """Without the sealed part, or with one that another deployment wrote, or with one of another call."""
    first, second, third, fourth = (record_of(number) for number in (1, 2, 3, 4))
    old = {name: value for name, value in (first.metadata or {}).items() if name != "broker_call"}
    swapped = {**(second.metadata or {}), "broker_call": third.sealed_attempt}
    odd = {**(third.metadata or {}), "broker_call": KEYRING.seal("nonsense", f" {third.request_id}")}
    foreign = KEYRING.seal(attempt_of(4).unwritten, f"staging {fourth.request_id}")
    account = Account(
        [
            first.model_copy(update={"metadata": old}),
            second.model_copy(update={"metadata": swapped}),
            third.model_copy(update={"metadata": odd}),
            fourth.model_copy(update={"metadata": {**(fourth.metadata or {}), "broker_call": foreign}}),
        ]
    )
    await restorer_of(store, account).restore()
    assert await store.members(ALL_CALLS) == {}


async def test_one_replica_restores_and_a_failure_is_repeated(
    store: FailoverStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.limits.restorer.RETRY_SECONDS", 0.05)
    account = Account([record_of(1)], failures=TRIES)
    one, other = restorer_of(store, account), restorer_of(store, account)
    running = [asyncio.create_task(each.run()) for each in (one, other)]
    with capture_logs() as logs:
        async with asyncio.timeout(10):
            while not [entry for entry in logs if entry["event"] == "calls_restored"]:
                await asyncio.sleep(0.01)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    events = [entry["event"] for entry in logs if entry["event"].startswith("calls_")]
    assert events == ["calls_not_restored", "calls_restored"]
    assert not store.incomplete


def deployment_of(store: FailoverStore, **changes: str) -> Deployment:
    made = settings({"BROKER_STORE_URL": "redis://127.0.0.1:1", "BROKER_SECRET": "s" * 32, **changes})
    return Deployment(store, load_agents(made), lambda: made)


async def test_whose_store_it_is(store: FailoverStore) -> None:
    await deployment_of(store).claim()
    await deployment_of(store, ONEINBOX_API_KEY="oi_sk_rotated").claim()
    await deployment_of(store, BROKER_SECRET=f"{'n' * 32}\n{'s' * 32}").claim()
    await deployment_of(store, BROKER_SECRET="n" * 32).claim()
    for changes, words in (
        ({"BROKER_SECRET": "s" * 32}, "another BROKER_SECRET"),
        (
            {"BROKER_SECRET": "n" * 32, "ONEINBOX_API_KEY": "oi_sk_other", "ONEINBOX_AGENT_ID": "agt_other"},
            "another OneInbox account",
        ),
    ):
        with pytest.raises(SettingsError, match=words):
            await deployment_of(store, **changes).claim()


@pytest.mark.parametrize("record", [b"", b"\xff", b"[]", b'{"v": 2}', b'{"accounts": 1, "secrets": []}'])
async def test_a_record_of_another_version_is_skipped(store: FailoverStore, record: bytes) -> None:
    await store.set("deployment", record, 60)
    await deployment_of(store).claim()
    await store.set("replica:other", record, 60)
    await store.add_member(REPLICAS, "other", 60)
    (report,) = await read_reports(store)
    assert (report.id, report.version, report.stale) == ("other", "", False)


async def test_what_a_replica_reports(store: FailoverStore) -> None:
    switch = KillSwitch(store)
    await switch.pause(60)
    await switch.block(ANN.store_name, 60)
    controls = await switch.announce()
    await switch.refresh()
    reporter = Reporter(store, switch)
    await reporter.report()
    (report,) = await read_reports(store)
    assert (report.id, report.controls, report.paused, report.blocked) == (reporter.id, controls, True, 1)
    assert not report.stale
    assert replace(report, left=45).stale
    with_more = b'{"v": 2, "version": "9", "tomorrow": 1}'
    await store.set(f"replica:{reporter.id}", with_more, 60)
    assert [each.version for each in await read_reports(store)] == ["9"]
    await reporter.aclose()
    assert await read_reports(store) == []
