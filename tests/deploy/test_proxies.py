"""nginx and Caddy with the files of deploy/, a broker behind them, OneInbox's emulator behind that."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from app.sandbox.faults import Latency
from app.sandbox.server import RunningEmulator, running_emulator
from tests.deploy.proxies import BURST, NAMES, PAGE, Proxy, running
from tests.support.brokers import LONG_CALLS, BrokerProcess, asked, eventually, running_broker_process

PER_USER = 2
METRICS = {"Authorization": "Bearer a-token-of-the-operators"}
BEHIND_PROXY = {
    "BROKER_TRUSTED_PROXIES": "127.0.0.1",
    "BROKER_PUBLIC_URL": "https://localhost",
    "BROKER_METRICS_TOKEN": METRICS["Authorization"].removeprefix("Bearer "),
}
AS_A_CLIENT_MIGHT = [
    {"X-Forwarded-For": "203.0.113.9"},
    {"X-Forwarded-For": "127.0.0.1"},
    {"X-Forwarded-For": "203.0.113.10, 203.0.113.11"},
    {"X_Forwarded_For": "203.0.113.12"},
    {"X-Forwarded_For": "203.0.113.13"},
    {"Forwarded": "for=203.0.113.14"},
    {"X-Real-IP": "203.0.113.15"},
    {"True-Client-IP": "203.0.113.16"},
]

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def oneinbox() -> AsyncIterator[RunningEmulator]:
    async with running_emulator(LONG_CALLS) as emulator:
        yield emulator


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker(oneinbox: RunningEmulator) -> AsyncIterator[BrokerProcess]:
    """It gives each user two sessions a minute."""
    limits = {"BROKER_SESSION_LIMITS": f"{PER_USER}/minute"}
    async with running_broker_process(oneinbox.url, **BEHIND_PROXY, **limits) as process:
        yield process


def url_of(broker: BrokerProcess) -> str:
    """Where it listens."""
    return str(broker.client.base_url).rstrip("/")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=NAMES)
async def proxy(
    broker: BrokerProcess, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Proxy]:
    """Each in turn, as its file has it."""
    async with running(request.param, tmp_path_factory.mktemp(request.param), broker=url_of(broker)) as proxy:
        yield proxy


class Addresses:
    """Loopback addresses that nobody has used yet."""

    used = 1

    def __next__(self) -> str:
        self.used += 1
        return f"127.0.1.{self.used}"


ADDRESSES = Addresses()


def assert_session(response: httpx.Response) -> None:
    """A session, in whatever headers the proxy adds."""
    assert response.status_code == 201, response.text
    assert response.json().keys() == {"server_url", "participant_token"}


def assert_problem(response: httpx.Response, status: int, slug: str) -> None:
    """The broker's own problem, in whatever headers the proxy adds."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert response.json()["type"].rpartition("/")[2] == slug


@asynccontextmanager
async def following(client: httpx.AsyncClient, call: str) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of a call's event stream, as they come."""
    async with asyncio.timeout(60), client.stream("GET", f"{call}/events") as stream:
        assert stream.status_code == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        yield stream.aiter_lines()


async def next_event(lines: AsyncIterator[str]) -> str:
    """The data of the next event."""
    async for line in lines:
        if line.startswith("data: "):
            return line
    raise AssertionError("the stream is over")


async def start_call(client: httpx.AsyncClient) -> str:
    """The path of a new call."""
    response = await client.post("/session")
    assert_session(response)
    return response.headers["location"]


async def test_limits_count_the_real_client(proxy: Proxy) -> None:
    for _ in range(2):
        async with proxy.client(next(ADDRESSES)) as client:
            for _ in range(PER_USER):
                assert_session(await client.post("/session"))
            assert_problem(await client.post("/session"), 429, "rate-limited")


async def test_what_a_client_says_of_its_address_is_not_believed(proxy: Proxy) -> None:
    async with proxy.client(next(ADDRESSES)) as client:
        for _ in range(PER_USER):
            assert_session(await client.post("/session"))
        for headers in AS_A_CLIENT_MIGHT:
            assert_problem(await client.post("/session", headers=headers), 429, "rate-limited")
        doubled = [("X-Forwarded-For", "203.0.113.20"), ("X-Forwarded-For", "203.0.113.21")]
        assert_problem(await client.post("/session", headers=doubled), 429, "rate-limited")


async def test_events_come_as_they_happen(proxy: Proxy) -> None:
    """The first one while the second has not even happened; a proxy that buffers would hold it back for ever."""
    async with proxy.client(next(ADDRESSES)) as client:
        call = await start_call(client)
        async with following(client, call) as lines:
            assert "completed" not in await next_event(lines)
            await client.post(f"{call}/stop")
            assert "completed" in await next_event(lines)


async def test_first_event_comes_within_200_ms(proxy: Proxy) -> None:
    """The fastest of ten: what the proxy adds, and not what a busy machine does."""
    async with proxy.client(next(ADDRESSES)) as client:
        call = await start_call(client)
        fastest = 10.0
        for _ in range(10):
            began = time.perf_counter()
            async with following(client, call) as lines:
                await next_event(lines)
                fastest = min(fastest, time.perf_counter() - began)
    assert fastest < 0.2


async def test_a_caller_who_hangs_up_is_noticed_through_the_proxy(proxy: Proxy, oneinbox: RunningEmulator) -> None:
    stops = len(asked(oneinbox.emulator, "stop"))
    oneinbox.emulator.faults.add(Latency(operation="start", seconds=2, times=1))
    async with proxy.client(next(ADDRESSES)) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/session", timeout=httpx.Timeout(30, read=0.5))

    async def stopped() -> bool:
        return len(asked(oneinbox.emulator, "stop")) > stops

    await eventually(stopped, within=30)


async def test_request_bodies_and_ids_pass_unchanged(proxy: Proxy) -> None:
    async with proxy.client(next(ADDRESSES)) as client:
        response = await client.post("/session", json={"agent": "nobody"}, headers={"X-Request-ID": "mine.1"})
        assert_problem(response, 403, "agent-not-allowed")
        assert response.headers["x-request-id"] == "mine.1"
        assert_problem(await client.post("/session", content=b"x" * 20_000), 413, "body-too-large")


async def test_metrics_are_not_for_the_outside(proxy: Proxy, broker: BrokerProcess) -> None:
    async with proxy.client() as client:
        assert (await client.get("/metrics", headers=METRICS)).status_code == 404
    assert (await broker.client.get("/metrics", headers=METRICS)).status_code == 200


@pytest.mark.parametrize("edit", ["prefix", "stripped prefix"])
@pytest.mark.parametrize("name", NAMES)
async def test_under_a_prefix_stripped_or_not(name: str, edit: str, oneinbox: RunningEmulator, tmp_path: Path) -> None:
    settings = {**BEHIND_PROXY, "BROKER_ROOT_PATH": "/voice", "BROKER_PUBLIC_URL": "https://localhost/voice"}
    async with (
        running_broker_process(oneinbox.url, **settings) as broker,
        running(name, tmp_path, broker=url_of(broker), edit=edit) as proxy,
        proxy.client() as client,
    ):
        response = await client.post("/voice/session")
        assert_session(response)
        call = response.headers["location"]
        assert call.startswith("/voice/calls/")
        assert (await client.get(call)).json()["status"] == "in_progress"
        async with following(client, call) as lines:
            await next_event(lines)
        problem = (await client.get("/voice/calls/nothing")).json()["type"]
        assert problem == "/voice/problems/not-found"
        assert (await client.get(problem)).status_code == 200
        assert (await client.get("/voice/metrics", headers=METRICS)).status_code == 404


@pytest.mark.parametrize("name", NAMES)
async def test_only_the_proxy_says_who_the_user_is(name: str, oneinbox: RunningEmulator, tmp_path: Path) -> None:
    settings = {**BEHIND_PROXY, "BROKER_AUTH": "header"}
    forged = [
        {"X-Forwarded-User": "alice"},
        {"X_Forwarded_User": "alice"},
        {"X-Forwarded_User": "alice"},
        {"x_forwarded-user": "alice"},
    ]
    origin = {"Origin": "https://localhost"}
    (tmp_path / "plain").mkdir()
    (tmp_path / "signed-in").mkdir()
    async with running_broker_process(oneinbox.url, **settings) as broker:
        async with running(name, tmp_path / "plain", broker=url_of(broker)) as proxy, proxy.client() as client:
            for headers in forged:
                assert_problem(await client.post("/session", headers={**origin, **headers}), 401, "unauthenticated")
        async with (
            running(name, tmp_path / "signed-in", broker=url_of(broker), edit="sign-in") as proxy,
            proxy.client(auth=("alice", "secret")) as alice,
            proxy.client(auth=("bob", "secret")) as bob,
        ):
            assert_session(await alice.post("/session", headers=origin))
            assert len((await alice.get("/calls")).json()["items"]) == 1
            for headers in forged:
                answer = await bob.get("/calls", headers=headers)
                assert (answer.status_code, answer.json()) == (200, {"items": []}), headers


def assert_readable(response: httpx.Response, status: int, *, by: str | None) -> None:
    """An answer that a page of this origin can read, and no other; once, as browsers refuse two."""
    assert response.status_code == status, response.text
    allowed = response.headers.get_list("access-control-allow-origin")
    assert allowed == ([] if by is None else [by])
    if by is not None:
        assert response.headers.get_list("vary").count("Origin") == 1
        assert response.headers.get_list("access-control-allow-credentials") in ([], ["true"])


ORIGINS = {
    PAGE: PAGE,
    "https://www.example.com.evil.example": None,
    "http://www.example.com": None,
    "null": None,
    "": None,
}


@pytest.mark.parametrize("name", NAMES)
async def test_pages_can_read_the_proxys_own_errors(name: str, oneinbox: RunningEmulator, tmp_path: Path) -> None:
    async with (
        running_broker_process(oneinbox.url, **BEHIND_PROXY, BROKER_ALLOWED_ORIGINS=PAGE) as broker,
        running(name, tmp_path, broker=url_of(broker), edit="strict" if name == "nginx" else None) as proxy,
        proxy.client(next(ADDRESSES)) as client,
    ):
        page = {"Origin": PAGE}
        assert_readable(await client.get("/healthz", headers=page), 200, by=PAGE)
        assert_readable(await client.post("/session", headers=page), 201, by=PAGE)
        assert_readable(await client.get("/calls/nothing", headers=page), 404, by=PAGE)
        assert_readable(await client.post("/session", headers=page, content=b"x" * 20_000), 413, by=PAGE)
        assert_readable(await client.get("/metrics", headers=page), 404, by=PAGE if name == "nginx" else None)
        if name == "nginx":
            for origin, by in ORIGINS.items():
                large = await client.post("/session", headers={"Origin": origin}, content=b"x" * 2_000_000)
                assert "x-request-id" not in large.headers, "nginx itself"
                assert_readable(large, 413, by=by)
        await broker.process.stop()
        for origin, by in ORIGINS.items():
            assert_readable(await client.get("/calls", headers={"Origin": origin}), 502, by=by)
        if name == "nginx":
            last = [await client.get("/calls", headers=page) for _ in range(BURST)][-1]
            assert_readable(last, 429, by=PAGE)


async def test_quiet_streams_are_not_cut(broker: BrokerProcess, tmp_path: Path) -> None:
    """Both at once, since it takes the 15 s that the broker lets pass between two signs of life."""

    async def outlives(name: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        async with running(name, folder, broker=url_of(broker)) as proxy, proxy.client(next(ADDRESSES)) as client:
            call = await start_call(client)
            async with following(client, call) as lines:
                await next_event(lines)
                assert ": keep-alive" in [line async for line in take(lines, 2)]

    await asyncio.gather(*map(outlives, NAMES))


async def take(lines: AsyncIterator[str], count: int) -> AsyncIterator[str]:
    """The next few."""
    async for line in lines:
        yield line
        count -= 1
        if count == 0:
            return


@pytest.mark.parametrize("name", NAMES)
async def test_logs_hold_no_path_and_so_no_call_key(name: str, oneinbox: RunningEmulator, tmp_path: Path) -> None:
    async with running_broker_process(oneinbox.url, **BEHIND_PROXY) as broker:
        url = url_of(broker)
        async with running(name, tmp_path, broker=url) as proxy, proxy.client() as client:
            call = await start_call(client)
            assert (await client.get(call)).status_code == 200
            await broker.process.stop()
            assert (await client.get(call)).status_code == 502
        assert call.rpartition("/")[2] not in proxy.log
        assert "/calls/" not in proxy.log
        assert "502" in proxy.log
