"""GET /metrics: who may read it, and what it counts."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Logs, OpenBroker
from tests.shapes import assert_problem

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
async def test_without_the_token_nothing_is_told(open_broker: OpenBroker, authorization: str | None) -> None:
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
