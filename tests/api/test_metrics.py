"""GET /metrics: who may read it, and what it counts."""

import asyncio

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Logs, OpenBroker
from tests.support.harness import Upstream, post_session, start_call, started
from tests.support.shapes import assert_problem

TOKEN = "metrics-token-of-the-operator"
METRICS = {"BROKER_METRICS_TOKEN": TOKEN}


async def scrape(broker: httpx.AsyncClient, **headers: str) -> httpx.Response:
    return await broker.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}", **headers})


async def test_metrics_are_there_for_the_token(open_broker: OpenBroker, logs: Logs) -> None:
    broker = await open_broker(METRICS)

    response = await scrape(broker)

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(response.text))
    assert {"broker_sessions", "process_resident_memory_bytes", "broker_build_info"} <= {each.name for each in families}
    assert all(each.documentation for each in families)
    assert not [entry for entry in logs if entry["event"] == "request" and entry["log_level"] != "debug"]


async def test_prometheus_may_ask_for_openmetrics(open_broker: OpenBroker) -> None:
    broker = await open_broker(METRICS)

    response = await scrape(broker, Accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5")

    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert response.text.endswith("# EOF\n")


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text;version=x", "text/plain;version=9.9;q=", ";;,,", "*/*"]
)
async def test_any_accept_header_is_answered(open_broker: OpenBroker, accept: str) -> None:
    broker = await open_broker(METRICS)

    assert (await scrape(broker, Accept=accept)).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        TOKEN,
        "Bearer",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        "Bearer ü",
        f"Bearer {TOKEN} x",
    ],
)
async def test_without_the_token_there_is_no_answer(open_broker: OpenBroker, authorization: str | None) -> None:
    broker = await open_broker(METRICS)

    headers = {} if authorization is None else {b"Authorization": authorization.encode()}
    response = await broker.get("/metrics", headers=headers)

    assert_problem(response, "unauthenticated")
    assert response.headers["www-authenticate"] == "Bearer"


async def test_two_authorization_headers_are_none(open_broker: OpenBroker) -> None:
    broker = await open_broker(METRICS)

    response = await broker.get("/metrics", headers=[("Authorization", f"Bearer {TOKEN}")] * 2)

    assert_problem(response, "unauthenticated")


async def test_without_the_setting_there_is_no_such_path(broker: httpx.AsyncClient) -> None:
    assert_problem(await scrape(broker), "not-found")


async def samples(broker: httpx.AsyncClient) -> dict[str, float]:
    """Every sample of the broker's own, but zeros and buckets, as `name{label="value"}`."""
    response = await scrape(broker)
    assert response.status_code == 200
    lines = (line.rpartition(" ") for line in response.text.splitlines() if line.startswith(("broker_", "http_")))
    return {name: float(value) for name, _, value in lines if "_bucket" not in name and float(value)}


async def test_sessions_are_counted_by_outcome(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(METRICS, BROKER_SESSION_LIMITS="2/minute")

    await post_session(broker, Idempotency_Key="a-key-of-sixteen")
    await post_session(broker, Idempotency_Key="a-key-of-sixteen")
    upstream.start.respond(401)
    await post_session(broker)
    upstream.works_again()
    await post_session(broker)
    await post_session(broker)
    await post_session(broker, b"{")
    await post_session(broker, Origin="https://elsewhere.example")
    await broker.get("/session")

    found = {name: value for name, value in (await samples(broker)).items() if name.startswith("broker_sessions_total")}
    assert found == {
        'broker_sessions_total{outcome="started"}': 2,
        'broker_sessions_total{outcome="replayed"}': 1,
        'broker_sessions_total{outcome="upstream-misconfigured"}': 1,
        'broker_sessions_total{outcome="rate-limited"}': 1,
        'broker_sessions_total{outcome="malformed-json"}': 1,
        'broker_sessions_total{outcome="forbidden-origin"}': 1,
    }


async def test_requests_are_counted_by_route(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(METRICS, BROKER_ROOT_PATH="/voice")
    upstream.has_call("call_1")
    call = (await broker.post("/session")).headers["location"]

    await broker.get(call)
    await broker.get(f"{call}x")
    await broker.post("/calls/none")

    prefix = "http_server_request_duration_seconds_count"
    assert {name: value for name, value in (await samples(broker)).items() if name.startswith(prefix)} == {
        prefix + '{http_request_method="POST",http_response_status_code="201",http_route="/session"}': 1,
        prefix + '{http_request_method="GET",http_response_status_code="200",http_route="/calls/{call}"}': 1,
        prefix + '{http_request_method="GET",http_response_status_code="404",http_route="/calls/{call}"}': 1,
        prefix + '{http_request_method="POST",http_response_status_code="405",http_route="/calls/{call}"}': 1,
    }


async def test_requests_to_oneinbox_are_counted_by_operation(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(METRICS)
    upstream.has_call("call_1")
    call = await start_call(broker)
    await broker.get(call)
    await broker.post(f"{call}/stop")
    upstream.start.respond(503)
    await post_session(broker)
    upstream.start.respond(799)
    await post_session(broker)
    upstream.start.mock(side_effect=httpx.ReadTimeout)
    await post_session(broker)

    def count(method: str, path: str, status: str, error: str = "") -> str:
        labels = {
            "error_type": error,
            "http_request_method": method,
            "http_response_status_code": status,
            "server_address": "api.oneinbox.ai",
            "server_port": "443",
            "url_template": path,
        }
        shown = ",".join(f'{name}="{value}"' for name, value in labels.items())
        return f"http_client_request_duration_seconds_count{{{shown}}}"

    found = await samples(broker)
    assert {name: value for name, value in found.items() if name.startswith("http_client_") and "_count" in name} == {
        count("GET", "/v1/usage", "200"): 1,
        count("POST", "/v1/calls/web", "201"): 1,
        count("POST", "/v1/calls/web", "503", "503"): 1,
        count("POST", "/v1/calls/web", "_OTHER", "_OTHER"): 1,
        count("POST", "/v1/calls/web", "", "ReadTimeout"): 1,
        count("GET", "/v1/calls/{call}", "200"): 1,
        count("POST", "/v1/calls/{call}/stop", "200"): 1,
    }


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"BROKER_SESSION_LIMITS": "2/minute;9/day"}, {"user-minute"}),
        ({"BROKER_SESSION_LIMITS": "2/90seconds"}, {"user-90s"}),
        ({"BROKER_GLOBAL_SESSION_LIMITS": "2/hour;2/day"}, {"global-hour", "global-day"}),
        ({"BROKER_MAX_LIVE_CALLS": "2"}, {"user-live-calls"}),
        ({"BROKER_MAX_LIVE_CALLS_TOTAL": "2"}, {"global-live-calls"}),
        ({"BROKER_REQUEST_LIMITS": "2/minute"}, {"request-minute"}),
    ],
)
@pytest.mark.parametrize("mode", ["enforce", "observe"])
async def test_refusals_name_the_limit(
    open_broker: OpenBroker, upstream: Upstream, settings: dict[str, str], refused: set[str], mode: str
) -> None:
    broker = await open_broker({**METRICS, **settings}, BROKER_LIMITS_MODE=mode)
    for number in (1, 2, 3):
        upstream.has_call(f"call_{number}")
        await post_session(broker)

    enforced = "true" if mode == "enforce" else "false"
    found = await samples(broker)
    assert {name for name in found if name.startswith("broker_limits_refused_total")} == {
        f'broker_limits_refused_total{{enforced="{enforced}",limit="{limit}"}}' for limit in refused
    }
    assert found['broker_sessions_total{outcome="started"}'] == (2 if mode == "enforce" else 3)


async def test_used_shares_of_global_limits(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(
        METRICS,
        BROKER_GLOBAL_SESSION_LIMITS="4/minute;10/day",
        BROKER_MAX_LIVE_CALLS_TOTAL="8",
        BROKER_GLOBAL_TALK_MINUTES="1000000",
    )
    await post_session(broker)
    call = await start_call(broker)
    upstream.has_call("call_2")
    await broker.post(f"{call}/stop")

    found = await samples(broker)
    assert found['broker_global_limit_used_ratio{limit="global-minute"}'] == 0.5
    assert found['broker_global_limit_used_ratio{limit="global-day"}'] == 0.2
    assert found['broker_global_limit_used_ratio{limit="global-live-calls"}'] == 0.25
    assert 0 < found['broker_global_limit_used_ratio{limit="global-talk-minutes"}'] < 0.01
    assert found["broker_live_calls"] == 2
    assert found["broker_store_up"] == 1


async def test_what_is_true_right_now(open_broker: OpenBroker, upstream: Upstream) -> None:
    async def slow(_: httpx.Request) -> httpx.Response:
        arrived.set()
        await go_on.wait()
        return httpx.Response(429, headers={"Retry-After": "30"})

    arrived, go_on = asyncio.Event(), asyncio.Event()
    broker = await open_broker(METRICS)
    upstream.start.mock(side_effect=slow)
    under_way = asyncio.create_task(post_session(broker))
    await arrived.wait()
    assert (await samples(broker))["broker_waiting_sessions"] == 1

    go_on.set()
    assert_problem(await under_way, "upstream-busy")

    found = await samples(broker)
    assert "broker_waiting_sessions" not in found
    assert 0 < found["broker_oneinbox_cooldown_seconds"] <= 30
    assert found['broker_oneinbox_pauses_total{reason="asked-for"}'] == 1


async def test_hang_ups_say_why(open_broker: OpenBroker, upstream: Upstream) -> None:
    broker = await open_broker(METRICS)
    upstream.start.respond(201, json=started(server_url="http://nowhere.example"))
    await post_session(broker)
    upstream.stop.respond(500)
    upstream.has_call("call_1")
    await post_session(broker)

    found = await samples(broker)
    assert found['broker_hang_ups_total{reason="unusable-answer",result="stopped"}'] == 1
    assert found['broker_hang_ups_total{reason="unusable-answer",result="failed"}'] == 1
    assert found["broker_unstopped_calls"] == 1


async def test_a_stranger_adds_no_series(open_broker: OpenBroker, upstream: Upstream) -> None:
    def series(text: str) -> set[str]:
        return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}

    async def bother(number: int) -> None:
        odd = f"odd{number}"
        headers = {"X-Request-ID": odd, "User-Agent": odd, "Origin": f"https://{odd}.example"}
        for path in (f"/{odd}", f"/calls/{odd}", f"/problems/{odd}", f"/docs/{odd}", f"/webhooks/oneinbox/{odd}"):
            for method in ("GET", "POST", odd.upper()):
                await broker.request(method, path, headers={"X-Request-ID": odd, "Authorization": f"Bearer {odd}"})
        await post_session(broker, {"agent": odd, "variables": {odd: odd}, "metadata": {odd: odd}}, **headers)
        await post_session(broker, {"agent": odd}, Idempotency_Key=f"key-of-sixteen-{odd}")
        await post_session(broker, {odd: odd})

    broker = await open_broker(METRICS, BROKER_SESSION_LIMITS="1000/minute", BROKER_WEBHOOK_SECRET="w" * 22)
    await bother(0)
    await scrape(broker)
    before = series((await scrape(broker)).text)

    for number in range(1, 20):
        await bother(number)

    text = (await scrape(broker)).text
    assert series(text) == before
    assert "odd" not in text.lower()
    assert 'http_request_method="_OTHER"' in text
    assert 'http_route="unmatched"' in text


async def test_brokers_do_not_count_for_each_other(open_broker: OpenBroker) -> None:
    first, second = await open_broker(METRICS), await open_broker(METRICS)

    await post_session(first)

    assert (await samples(first))['broker_sessions_total{outcome="started"}'] == 1
    assert 'broker_sessions_total{outcome="started"}' not in await samples(second)
