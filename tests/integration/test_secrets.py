"""Promise 1: what is secret stays so, whatever is asked and whatever OneInbox does.

Plants recognisable secrets, drives every route and every fault of the emulator through a real process that logs all it
can, then searches everything that came out of it.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, get_args

import httpx
import pytest
import pytest_asyncio

from app.sandbox import faults
from app.sandbox.emulator import EmulatorOptions
from app.sandbox.faults import AnyFault, Fault
from app.sandbox.server import RunningEmulator, running_emulator
from tests.support.harness import JSON, ROOMY
from tests.support.processes import Process, serving

KEY = "oi_sk_PLANTEDKEY_b3f1"
TOKEN = "PLANTEDTOKEN.c0ffee.d00d"
SECRET = "PLANTEDSECRET-of-more-than-thirty-two-characters"
METRICS_TOKEN = "PLANTEDSECRET-of-whoever-reads-metrics"
MARKER = "PLANTEDBODY"
USER = "198.51.100."
TIMEOUT = "1"

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]


def struck(operation: Any) -> dict[str, list[Fault]]:
    """Every kind of fault, for one operation, by its kind."""
    redirect = faults.Redirect(operation=operation, location=f"https://evil.example/?{MARKER}")
    status = [
        faults.Status(operation=operation, status=code, detail=f"{MARKER} Bearer {KEY}")
        for code in (400, 401, 402, 403, 404, 408, 418, 422, 500, 503)
    ]
    invalid = [
        faults.Fields(operation=operation, set={"id": 7}),
        faults.Fields(operation=operation, set={"server_url": f"http://{MARKER}"}),
        faults.Fields(operation=operation, remove=["participant_token"]),
    ]
    return {
        "latency": [faults.Latency(operation=operation, seconds=0.01)],
        "status": [*status, faults.Status(operation=operation, status=422, detail=[{"loc": ["body"], "msg": KEY}])],
        "drop": [faults.Drop(operation=operation)],
        "hang": [faults.Hang(operation=operation)],
        "redirect": [redirect],
        "truncated": [faults.Truncated(operation=operation)],
        "broken_json": [faults.BrokenJson(operation=operation)],
        "not_utf8": [faults.NotUtf8(operation=operation)],
        "fields": list(invalid),
        "header_flood": [faults.HeaderFlood(operation=operation, count=200)],
        "big_body": [faults.BigBody(operation=operation, megabytes=9)],
        "endless_body": [faults.EndlessBody(operation=operation)],
        "drip": [faults.Drip(operation=operation, interval=0.1)],
        "gzip_bomb": [faults.GzipBomb(operation=operation, megabytes=1)],
        # Last: it starts the broker's pause.
        "busy": [faults.Status(operation=operation, status=429, retry_after=1)],
    }


@dataclass
class LeakSearch:
    """Everything that came out of the broker."""

    responses: list[httpx.Response] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    struck: dict[str, int] = field(default_factory=dict)
    process: Process | None = None
    metrics: httpx.Response | None = None

    @property
    def call_keys(self) -> list[str]:
        return [location.rpartition(".")[2] for location in self.locations]

    @property
    def printed(self) -> str:
        assert self.process is not None
        return "\n".join(self.process.out + self.process.err)


class Driver:
    """Asks the broker, each time from another address, and keeps every answer."""

    def __init__(self, client: httpx.AsyncClient, found: LeakSearch) -> None:
        self.client, self.found = client, found
        self.asked = 0

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        self.asked += 1
        headers = {"X-Forwarded-For": f"{USER}{self.asked % 250}", **options.pop("headers", {})}
        async with self.client.stream(method, path, headers=headers, **options) as stream:
            body = b""
            async for chunk in stream.aiter_bytes():
                body += chunk
                if stream.headers.get("content-type", "").startswith("text/event-stream"):
                    break  # the first event says it all
        response = httpx.Response(stream.status_code, headers=stream.headers.raw, content=body, request=stream.request)
        self.found.responses.append(response)
        if "location" in response.headers:
            self.found.locations.append(response.headers["location"])
        return response

    async def start(self) -> httpx.Response:
        body = {"variables": {"name": MARKER}, "metadata": {"note": MARKER}, "participant_name": MARKER}
        return await self.ask("POST", "/session", json=body)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def found(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LeakSearch]:
    options = EmulatorOptions(api_key=KEY)
    found = LeakSearch()
    async with running_emulator(options) as oneinbox:
        environ = {
            "ONEINBOX_API_KEY": KEY,
            "ONEINBOX_BASE_URL": oneinbox.url,
            "ONEINBOX_AGENT_ID": options.agents[0],
            "ONEINBOX_TIMEOUT": TIMEOUT,
            "BROKER_SECRET": SECRET,
            "BROKER_METRICS_TOKEN": METRICS_TOKEN,
            "BROKER_TRUSTED_PROXIES": "127.0.0.0/8",
            "BROKER_LOG_LEVEL": "debug",
            "BROKER_GLOBAL_SESSION_LIMITS": "10000/minute",
            **ROOMY,
        }
        with serving(tmp_path_factory.mktemp("secrets"), environ) as (process, url):
            found.process = process
            async with httpx.AsyncClient(base_url=url, timeout=10) as client:
                driver = Driver(client, found)
                await drive(driver, oneinbox)
                found.metrics = await driver.ask(
                    "GET", "/metrics", headers={"Authorization": f"Bearer {METRICS_TOKEN}"}
                )
            assert await asyncio.to_thread(process.terminate) == 0
    yield found


async def drive(driver: Driver, oneinbox: RunningEmulator) -> None:
    """Every route, then every fault."""
    plant = faults.Fields(operation="start", set={"participant_token": TOKEN})
    oneinbox.emulator.faults.add(plant)
    await every_route(driver)
    for operation in ("get", "start"):
        for kind, rules in struck(operation).items():
            for rule in rules:
                path = (await driver.start()).headers.get("location", "/calls/none")
                before = len(oneinbox.emulator.requests)
                oneinbox.emulator.faults.clear()
                oneinbox.emulator.faults.add(rule, plant)
                await (driver.start() if operation == "start" else driver.ask("GET", path))
                oneinbox.emulator.faults.clear()
                oneinbox.emulator.faults.add(plant)
                asked = [each for each in list(oneinbox.emulator.requests)[before:] if each.operation == operation]
                driver.found.struck[f"{operation}-{kind}"] = len(asked)


async def every_route(driver: Driver) -> None:
    """All that is documented, and what is wrong in a few ways."""
    document = (await driver.ask("GET", "/openapi.json")).json()
    path = (await driver.start()).headers["location"]
    for template, operations in document["paths"].items():
        for method in operations:
            for name in (path.removeprefix("/calls/"), f"{path.removeprefix('/calls/')}x", "not-found", MARKER):
                await driver.ask(method.upper(), template.replace("{call}", name).replace("{slug}", name))
    for body in (MARKER, f'{{"{MARKER}": 1}}', f'{{"variables": {{"a": "{{{{{MARKER}"}}}}', f'["{MARKER}"]'):
        await driver.ask("POST", "/session", content=body, headers=JSON)
    await driver.ask("POST", "/session", content=MARKER * 2000, headers=JSON)
    await driver.ask("POST", "/session", content=MARKER, headers={"Content-Type": f"text/{MARKER}"})
    await driver.ask("POST", "/session", json={"agent": MARKER})
    await driver.ask("POST", "/session", headers={"Origin": f"https://{MARKER}.example"})
    await driver.ask("GET", f"/{MARKER}?{MARKER}", headers={"Authorization": f"Bearer {MARKER}"})
    await driver.ask("GET", path, headers={"X-Request-ID": f"{MARKER} "[:-1] + "!"})
    for page in ("/docs", "/problems/not-found"):
        await driver.ask("GET", page, headers={"Accept": "text/html"})


async def test_every_kind_of_fault_has_struck(found: LeakSearch) -> None:
    kinds = {fault.model_fields["kind"].default for fault in get_args(get_args(AnyFault)[0])}

    for operation in ("start", "get"):
        assert {f"{operation}-{kind}" for kind in kinds} <= found.struck.keys()
    assert all(found.struck.values()), found.struck
    statuses = {response.status_code for response in found.responses}
    assert {200, 201, 400, 403, 404, 413, 415, 422, 502, 503, 504} <= statuses
    assert 500 not in statuses


async def test_the_key_and_the_secret_are_nowhere(found: LeakSearch) -> None:
    for secret in (KEY, SECRET, "PLANTEDKEY", "PLANTEDSECRET"):
        assert not [place for place in places(found) if secret in place]


async def test_a_participant_token_is_in_its_201_only(found: LeakSearch) -> None:
    holders = [response for response in found.responses if TOKEN in everything(response)]

    assert holders
    for response in holders:
        assert response.status_code == 201
        assert TOKEN not in str(response.headers.raw)
    assert TOKEN not in found.printed


async def test_only_its_owner_gets_a_call_key(found: LeakSearch) -> None:
    assert len(found.call_keys) > 10
    for key in found.call_keys:
        assert key not in found.printed
        for response in found.responses:
            if key in everything(response):
                new = response.status_code == 201 and key not in response.text
                known = response.status_code in (200, 304) and key in response.request.url.path
                assert new or known, response.request.url


async def test_the_users_address_is_in_no_log_and_no_answer(found: LeakSearch) -> None:
    assert not [place for place in places(found) if USER in place]


async def test_what_a_browser_sent_is_in_no_log_and_no_answer(found: LeakSearch) -> None:
    assert MARKER not in found.printed
    # A place that is wrong is named; a value never is.
    told = [response for response in found.responses if MARKER in response.text]
    assert all(MARKER in json.dumps([error["loc"] for error in response.json()["errors"]]) for response in told)
    assert all(MARKER not in json.dumps([error["msg"] for error in response.json()["errors"]]) for response in told)


async def test_metrics_counted_all_of_it_and_name_no_user(found: LeakSearch) -> None:
    assert found.metrics is not None
    text = found.metrics.text

    assert 'broker_sessions_total{outcome="started"} ' in text
    assert 'url_template="/v1/calls/{call}"' in text
    for told in (*found.call_keys, *(location.partition(".")[0].rpartition("/")[2] for location in found.locations)):
        assert told not in text
    for told in (KEY, SECRET, METRICS_TOKEN, TOKEN, MARKER, USER, "PLANTED"):
        assert told not in text


async def test_the_log_has_no_traceback_and_is_whole(found: LeakSearch) -> None:
    assert found.process is not None
    records = found.process.records

    assert not [record for record in records if "exception" in record]
    assert sum(record["event"] == "request" for record in records) == len(found.responses)


def everything(response: httpx.Response) -> str:
    """An answer, head and body."""
    return f"{response.headers.raw} {response.text}"


def places(found: LeakSearch) -> list[str]:
    """All places where something could have leaked to."""
    return [*map(everything, found.responses), found.printed]
