"""What stands in deploy/monitoring: checked by Prometheus' own tool, and against what a broker really says."""

import json
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
import pytest_asyncio
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from app.sandbox.faults import Drop, Fields
from app.sandbox.server import running_emulator
from app.telemetry.metrics import Metrics
from tests.documents import ROOT
from tests.support.brokers import LONG_CALLS, eventually, running_broker_process
from tests.support.needs import program
from tests.support.processes import PATIENCE

pytestmark = pytest.mark.process

MONITORING = ROOT / "deploy" / "monitoring"
ALERTS = MONITORING / "alerts.yaml"
CASES = ROOT / "tests" / "deploy" / "alerts.test.yaml"
JOB = "oneinbox-broker"
TOKEN = "metrics-token-of-the-operator"
LOGIN_SECRET = "a secret shared with the issuer, long enough"

RULES = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]
ALERT_NAMES = {rule["alert"] for rule in RULES}
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))

NAME = re.compile(r"\b(?:broker|process|python|http_server|http_client)_[a-z0-9_]+")
"""Of a metric; labels begin with `http_request` and `http_response`."""
METRIC = re.compile(rf"({NAME.pattern})\{{([^}}]*)\}}")
MATCHER = re.compile(r'([a-z_]+)(?:=|!=|=~|!~)"([^"]*)"')
GROUPING = re.compile(r"\bby \(([^)]*)\)")
ADDED = {"job", "instance", "le"}
"""Labels that Prometheus adds, and a histogram's own."""


def promtool(*arguments: str, given: str | None = None) -> str:
    """What promtool says; it must be content."""
    command = [program("promtool", "prometheus"), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression of the alerts and of the dashboard, with what it is for."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$job", JOB).replace("$__rate_interval", "1m")


@dataclass(frozen=True)
class Said:
    """What a broker said of itself after an eventful minute: the page, and each sample's labels by its name."""

    page: str
    samples: dict[str, list[dict[str, str]]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def said(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Said]:
    plans = tmp_path_factory.mktemp("plans") / "plans.toml"
    plans.write_text('claim = "plan"\ndefault = "free"\n[plans.free]\nsession_limits = "3/minute"\n')
    environ = {
        "BROKER_METRICS_TOKEN": TOKEN,
        "BROKER_MAX_LIVE_CALLS_TOTAL": "9",
        "BROKER_AUTH": "jwt",
        "BROKER_JWT_SECRET": LOGIN_SECRET,
        "BROKER_PLANS_FILE": str(plans),
    }
    login = jwt.encode({"sub": "ann", "exp": 4_000_000_000}, LOGIN_SECRET, "HS256")
    async with (
        running_emulator(LONG_CALLS) as oneinbox,
        running_broker_process(oneinbox.url, **environ) as broker,
    ):
        broker.client.headers["Authorization"] = f"Bearer {login}"
        oneinbox.emulator.faults.add(
            Drop(operation="start", takes_effect=True, times=1),
            Fields(operation="start", set={"server_url": "ftp://nowhere"}, times=1),
        )
        for _ in range(4):
            await broker.client.post("/session", json={})

        async def page() -> str:
            response = await broker.client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
            assert response.status_code == 200
            return response.text

        async def the_lost_call_is_stopped() -> bool:
            return 'reason="lost-answer",result="stopped"' in await page()

        await eventually(the_lost_call_is_stopped, within=PATIENCE)
        text = await page()
    samples: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(dict(sample.labels))
    yield Said(text, samples)


@pytest.mark.asyncio(loop_scope="module")
async def test_prometheus_likes_our_names_and_help_texts(said: Said) -> None:
    assert promtool("check", "metrics", given=said.page) == ""


@pytest.mark.asyncio(loop_scope="module")
async def test_alerts_and_panels_ask_for_what_there_is(said: Said) -> None:
    for about, expression in expressions():
        if about.startswith("Valkey"):
            continue  # redis_exporter's metrics, not ours
        metrics = METRIC.findall(expression)
        assert len(metrics) == len(NAME.findall(expression)), f"{about}: a metric without its job"
        assert metrics or "up{" in expression, f"{about} asks for no metric"
        for name, matchers in metrics:
            assert name in said.samples, f"{about}: there is no {name}"
            labels = {label for sample in said.samples[name] for label in sample}
            asked = dict(MATCHER.findall(matchers))
            assert asked.pop("job") == JOB
            assert asked.keys() <= labels, f"{about}: {name} has {labels}"
            grouped = {label.strip() for group in GROUPING.findall(expression) for label in group.split(",")}
            assert grouped <= labels | ADDED, f"{about}: {name} has {labels}"


@pytest.mark.asyncio(loop_scope="module")
async def test_values_that_alerts_and_panels_name_are_told(said: Said) -> None:
    told = {value for samples in said.samples.values() for labels in samples for value in labels.values()}
    for about, expression in expressions():
        for label, value in MATCHER.findall(expression):
            if label != "job" and re.fullmatch(r"[A-Za-z0-9/-]+", value):
                assert value in told, f"{about}: nothing has {label}={value}"


def test_rules_are_valid() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", str(ALERTS))


def test_alerts_fire_when_they_should() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(CASES))


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    checks = [check for case in yaml.safe_load(CASES.read_text())["tests"] for check in case["promql_expr_test"]]
    names = [re.findall(r'alertname="(\w+)"', check["expr"])[0] for check in checks]

    assert {name for name, check in zip(names, checks, strict=True) if check["exp_samples"]} == ALERT_NAMES
    assert {name for name, check in zip(names, checks, strict=True) if not check["exp_samples"]} == ALERT_NAMES


def test_alerts_say_what_to_do() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "action", "runbook"}
        assert rule["annotations"]["runbook"] == f"deploy/runbooks.md#{rule['alert'].lower()}"


def test_scrape_configuration_is_valid() -> None:
    promtool("check", "config", "--syntax-only", str(MONITORING / "prometheus.yaml"))


def test_scrape_configuration_names_the_job_and_a_file_with_the_token() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    [scrape] = config["scrape_configs"]

    assert config["rule_files"] == [ALERTS.name]
    assert scrape["job_name"] == JOB
    assert scrape["authorization"].keys() == {"type", "credentials_file"}


def test_dashboard_is_what_grafana_knows() -> None:
    """Grafana's own model of dashboards loses nothing of it: no field is misspelt or in the wrong place."""
    register_default_plugins()

    known = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(DASHBOARD)))

    assert list(lost(DASHBOARD, known, "dashboard")) == []


def lost(whole: Any, part: Any, place: str) -> Iterator[str]:
    """Places of `whole` that are missing in `part`, or differ."""
    if isinstance(whole, dict) and isinstance(part, dict):
        for name, value in whole.items():
            yield from lost(value, part.get(name), f"{place}.{name}")
    elif isinstance(whole, list) and isinstance(part, list) and len(whole) == len(part):
        for number, (value, other) in enumerate(zip(whole, part, strict=True)):
            yield from lost(value, other, f"{place}[{number}]")
    elif whole != part:
        yield place


def test_panels_have_each_a_place_of_their_own() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_panels_ask_in_promql(tmp_path: Path) -> None:
    rules = [{"record": "panel", "expr": expression, "labels": {"about": about}} for about, expression in expressions()]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))

    promtool("check", "rules", "--lint=none", str(file))


def test_every_metric_of_ours_is_on_the_dashboard_or_in_an_alert() -> None:
    named = {name for _, expression in expressions() for name, _ in METRIC.findall(expression)}
    families = text_string_to_metric_families(Metrics().text("")[0].decode())
    ours = [family.name for family in families if family.name.startswith(("broker_", "http_"))]
    assert len(ours) > 10
    assert [name for name in ours if not any(each.startswith(name) for each in named)] == []
