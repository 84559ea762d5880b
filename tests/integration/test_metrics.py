"""GET /metrics of real processes: of one, of several workers together, and while their store is gone."""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.sandbox.faults import Drop
from app.sandbox.server import running_emulator
from tests.support.brokers import LONG_CALLS, BrokerProcess, eventually, post_many, running_broker_process
from tests.support.processes import PATIENCE
from tests.support.valkey import Valkey, running_valkey

pytestmark = pytest.mark.process

TOKEN = "metrics-token-of-the-operator"
METRICS = {"BROKER_METRICS_TOKEN": TOKEN, "BROKER_SESSION_LIMITS": "10/hour"}
STARTED = ("broker_sessions_total", "started")
REFUSED = ("broker_sessions_total", "rate-limited")

Samples = dict[tuple[str, ...], float]


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with running_valkey() as server:
        yield server


async def scrape(broker: BrokerProcess) -> Samples:
    """Return every sample by name and label values, over a new connection, which any worker may take."""
    async with httpx.AsyncClient(base_url=broker.client.base_url, timeout=PATIENCE) as client:
        response = await client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    assert response.status_code == 200
    families = text_string_to_metric_families(response.text)
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def exchanges(samples: Samples) -> float:
    """Calls that OneInbox started."""
    name = "http_client_request_duration_seconds_count"
    [count] = [value for names, value in samples.items() if names[0] == name and "/v1/calls/web" in names]
    return count


def workers_of(samples: Samples) -> set[int]:
    return {int(names[1]) for names in samples if names[0] == "process_resident_memory_bytes"}


def counts_of(pid: int) -> list[Path]:
    """The files in which a worker counts."""
    places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    return [file for place in places for file in place.glob(f"oneinbox-broker-*/*_{pid}.db")]


async def test_two_workers_are_counted_together(valkey: Valkey) -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, "--workers", "2", BROKER_STORE_URL=valkey.url, **METRICS) as broker,
    ):
        # `listening` is said before the workers are there.
        await eventually(lambda: both_are_there(broker), within=PATIENCE)
        await post_many([broker], 40)

        for _ in range(6):
            samples = await scrape(broker)
            assert (samples[STARTED], samples[REFUSED]) == (10, 30)
            assert samples["broker_limits_refused_total", "true", "user-hour"] == 30
            assert exchanges(samples) == 10
            assert samples["broker_live_calls",] == 10
            assert samples["broker_store_up",] == 1
            assert sum(name[0] == "broker_build_info" for name in samples) == 1

        # What one has counted outlives it; what it was does not.
        killed = min(workers_of(samples))
        os.kill(killed, signal.SIGKILL)
        await eventually(lambda: has_successor(broker, killed), within=PATIENCE)
        assert not [file for file in counts_of(killed) if file.name.startswith("gauge_live")]
        await post_many([broker], 1)
        samples = await scrape(broker)
        assert (samples[STARTED], samples[REFUSED]) == (10, 31)
        [directory] = {file.parent for pid in workers_of(samples) for file in counts_of(pid)}
        assert directory.stat().st_mode & 0o777 == 0o700
    assert not directory.exists()


async def both_are_there(broker: BrokerProcess) -> bool:
    return len(workers_of(await scrape(broker))) == 2


async def has_successor(broker: BrokerProcess, killed: int) -> bool:
    try:
        workers = workers_of(await scrape(broker))
    except httpx.TransportError:
        return False  # it fell to the one that was just killed
    return len(workers) == 2 and killed not in workers


async def test_one_process_makes_no_files() -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, running_broker_process(oneinbox.url, **METRICS) as broker:
        await post_many([broker], 12)

        samples = await scrape(broker)

        assert (samples[STARTED], samples[REFUSED]) == (10, 2)
        assert samples["process_resident_memory_bytes",] > 1e7
        assert counts_of(broker.process.pid) == []


async def test_a_frozen_store_holds_no_scrape_up(valkey: Valkey) -> None:
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, BROKER_STORE_URL=valkey.url, **METRICS) as broker,
    ):
        await post_many([broker], 3)
        valkey.freeze()

        began = time.monotonic()
        samples = [await scrape(broker) for _ in range(5)]
        took = time.monotonic() - began

        assert took < 2
        assert samples[-1]["broker_store_up",] == 0
        assert samples[-1]["broker_live_calls",] == 3
        assert samples[-1][STARTED] == 3

        valkey.thaw()
        await eventually(lambda: store_is_up(broker), within=PATIENCE)


async def store_is_up(broker: BrokerProcess) -> bool:
    return (await scrape(broker))["broker_store_up",] == 1


async def test_a_lost_call_is_counted_until_it_is_stopped() -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, running_broker_process(oneinbox.url, **METRICS) as broker:
        oneinbox.emulator.faults.add(Drop(operation="start", takes_effect=True, times=1))
        await post_many([broker], 1)

        await eventually(lambda: has_stopped_one(broker), within=PATIENCE)

        samples = await scrape(broker)
        assert [samples["broker_orphans_total", fate] for fate in ("lost", "found", "given-up")] == [1, 1, 0]
        assert samples["broker_hang_ups_total", "lost-answer", "stopped"] == 1
        assert samples["broker_live_calls",] == 0


async def has_stopped_one(broker: BrokerProcess) -> bool:
    return (await scrape(broker))["broker_orphans_total", "stopped"] == 1


async def test_streams_and_watched_calls_are_counted_while_they_last() -> None:
    async with running_emulator(LONG_CALLS) as oneinbox, running_broker_process(oneinbox.url, **METRICS) as broker:
        [answer] = await post_many([broker], 1)
        events = f"{answer.headers['location']}/events"
        async with broker.client.stream("GET", events) as one, broker.client.stream("GET", events) as two:
            assert one.status_code == two.status_code == 200
            samples = await scrape(broker)
            assert (samples["broker_streams",], samples["broker_watched_calls",]) == (2, 1)
        await eventually(lambda: nothing_is_watched(broker), within=PATIENCE)


async def nothing_is_watched(broker: BrokerProcess) -> bool:
    samples = await scrape(broker)
    return samples["broker_streams",] == samples["broker_watched_calls",] == 0


async def test_a_new_token_is_taken_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("another-token-at-first")
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, BROKER_METRICS_TOKEN_FILE=str(file)) as broker,
    ):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert (await broker.client.get("/metrics", headers=headers)).status_code == 401
        file.write_text(TOKEN)

        async def is_taken() -> bool:
            return (await broker.client.get("/metrics", headers=headers)).status_code == 200

        await eventually(is_taken, within=PATIENCE)
