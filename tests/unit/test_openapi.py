"""The OpenAPI document is whole: everything is described, and every example is what its schema says."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema_rs
import pytest

from app.api.middleware.cors import ALLOWED_HEADERS, EXPOSED
from app.api.openapi import of_broker
from app.config.loading import load_settings
from app.problems import KINDS
from app.sessions.schemas import REQUESTS, SessionRequest
from tests.documents import document
from tests.support.shapes import RETRY_LATER

JSON = "application/json"
PROBLEM = "application/problem+json"
DOCUMENT = document()
OPERATIONS: Mapping[str, Any] = {
    operation["operationId"]: operation for path in DOCUMENT["paths"].values() for operation in path.values()
}
ANSWERS: list[tuple[str, str, dict[str, Any]]] = [
    (name, status, answer)
    for name, operation in OPERATIONS.items()
    for status, answer in operation["responses"].items()
]


def resolved(node: Any) -> Any:
    """What a reference leads to; anything else is itself."""
    while isinstance(node, dict) and "$ref" in node:
        place = DOCUMENT
        for part in node["$ref"].removeprefix("#/").split("/"):
            place = place[part]
        node = place
    return node


def examples(content: Mapping[str, Any]) -> list[Any]:
    """The values of a content's examples."""
    return (
        [content["example"]]
        if "example" in content
        else [resolved(each)["value"] for each in content["examples"].values()]
    )


def slugs(answer: Mapping[str, Any]) -> set[str]:
    """The problems of an answer."""
    return set(answer.get("content", {}).get(PROBLEM, {}).get("examples", {}))


def contents() -> Iterator[Any]:
    """Every body of the document."""
    for name, operation in OPERATIONS.items():
        for status, each in (("request", operation.get("requestBody", {})), *operation["responses"].items()):
            for media_type, content in each.get("content", {}).items():
                yield pytest.param(content, id=f"{name}-{status}-{media_type}")


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_described(name: str) -> None:
    operation = OPERATIONS[name]
    assert re.fullmatch(r"[a-z]+[A-Za-z]+", name)
    assert operation["summary"]
    assert len(operation["description"]) > len(operation["summary"])
    assert "\n" not in re.sub(r"\n\n|\n- ", "", operation["description"]), "the explorer shows line breaks"
    [tag] = operation["tags"]
    assert tag in {each["name"] for each in DOCUMENT["tags"] if each["description"]}
    for parameter in map(resolved, operation["parameters"]):
        assert parameter["description"]
        assert parameter["schema"]["type"] in ("string", "integer")


@pytest.mark.parametrize(("name", "status", "answer"), [pytest.param(*each, id="-".join(each[:2])) for each in ANSWERS])
def test_answer_is_described(name: str, status: str, answer: dict[str, Any]) -> None:
    assert answer["description"] not in ("", "Successful Response")
    assert ("content" in answer) == (status not in ("204", "304"))
    for slug in slugs(answer):
        assert KINDS[slug].status == int(status)
        assert slug in answer["description"]


@pytest.mark.parametrize(("name", "status", "answer"), [pytest.param(*each, id="-".join(each[:2])) for each in ANSWERS])
def test_answer_has_its_headers(name: str, status: str, answer: dict[str, Any]) -> None:
    headers = answer["headers"].keys()
    limited = "429" in OPERATIONS[name]["responses"]
    assert "X-Request-ID" in headers
    assert ({"RateLimit", "RateLimit-Policy"} <= headers) == limited
    assert ("Retry-After" in headers) == bool(slugs(answer) & RETRY_LATER)
    assert ("WWW-Authenticate" in headers) == ("unauthenticated" in slugs(answer))
    assert all(resolved(header)["description"] for header in answer["headers"].values())


@pytest.mark.parametrize("content", [*contents()])
def test_examples_match_the_schema(content: dict[str, Any]) -> None:
    schema = {**content.get("schema", {}), "components": DOCUMENT["components"]}  # events have none
    validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    assert examples(content)
    for example in examples(content):
        validator.validate(example)


def test_every_problem_has_an_example_where_it_occurs() -> None:
    found = {slug for _, _, answer in ANSWERS for slug in slugs(answer)}
    # Another method has no operation of its own; its page is among the examples of all pages.
    assert found == KINDS.keys() - {"method-not-allowed"}
    explained = examples(OPERATIONS["explainProblem"]["responses"]["200"]["content"][JSON])
    assert [each["slug"] for each in explained] == [*KINDS]


def test_request_examples_are_requests() -> None:
    given = examples(OPERATIONS["createSession"]["requestBody"]["content"][JSON])
    assert given == [*REQUESTS.values()]
    assert [SessionRequest.model_validate(each).model_dump(exclude_unset=True) for each in given] == given


def test_headers_that_browsers_may_send_and_read_are_described() -> None:
    sent = {resolved(each)["name"].lower() for operation in OPERATIONS.values() for each in operation["parameters"]}
    assert {*ALLOWED_HEADERS.lower().split(", ")} - {"authorization", "content-type"} <= sent
    read = {name for _, _, answer in ANSWERS for name in answer["headers"]}
    assert {*EXPOSED.split(", ")} - {"Date"} <= read  # every answer of a server has a Date


def test_operations_that_need_a_login_say_so() -> None:
    public = {name for name, operation in OPERATIONS.items() if operation.get("security") == []}
    assert {"getHealth", "getReadiness", "explainProblem", "receiveWebhook"} <= public
    assert {"createSession", "getCall", "listCalls", "followCall", "stopCall"}.isdisjoint(public)
    named = {name for each in DOCUMENT["security"] for name in each}
    assert {} in DOCUMENT["security"]
    assert named <= DOCUMENT["components"]["securitySchemes"].keys()


@pytest.mark.parametrize(
    ("environ", "logins"),
    [
        ({}, {}),
        ({"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": "s" * 32}, {"token": "bearer"}),
        (
            {"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": "s" * 32, "BROKER_JWT_COOKIE": "login"},
            {"token": "bearer", "cookie": "login"},
        ),
        (
            {"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "10.0.0.1/32", "BROKER_USER_HEADER": "X-User"},
            {"proxy": "X-User"},
        ),
    ],
    ids=["anonymous", "jwt", "jwt-cookie", "header"],
)
def test_a_broker_offers_the_logins_it_takes(environ: dict[str, str], logins: dict[str, str]) -> None:
    settings = load_settings({"ONEINBOX_API_KEY": "oi_sk_x", "ONEINBOX_AGENT_ID": "a", **environ}, env_file=None)
    served = of_broker(DOCUMENT, settings)
    schemes = served["components"].get("securitySchemes", {})
    assert {name: schemes[name].get("name", schemes[name].get("scheme")) for name in logins} == logins
    assert served["security"] == [{name: []} for name in logins]
    assert schemes.keys() & {"token", "cookie", "proxy"} == logins.keys()
    assert "BROKER_JWT_COOKIE" in str(DOCUMENT["components"]["securitySchemes"]), "the document itself stays as it is"


def test_a_broker_describes_the_routes_that_are_switched_on() -> None:
    required = {"ONEINBOX_API_KEY": "oi_sk_x", "ONEINBOX_AGENT_ID": "a"}
    switched_on = {
        "BROKER_AUTH": "jwt",
        "BROKER_JWT_SECRET": "j" * 32,
        "BROKER_METRICS_TOKEN": "m" * 16,
        "BROKER_WEBHOOK_SECRET": "w" * 22,
    }
    least = of_broker(DOCUMENT, load_settings(required, env_file=None))
    most = of_broker(DOCUMENT, load_settings({**required, **switched_on}, env_file=None))
    assert most["paths"] == DOCUMENT["paths"]
    assert most["paths"].keys() - least["paths"].keys() == {
        "/calls",
        "/metrics",
        "/webhooks/oneinbox/{secret}",
    }
    assert [tag["name"] for tag in least["tags"]] == ["sessions", "calls", "service"]
    assert "securitySchemes" not in least["components"], "the explorer would have an empty dialog"


def test_optional_fields_have_no_default() -> None:
    """openapi-typescript takes a field with a default for one that is always there."""
    assert '"default": null' not in json.dumps(DOCUMENT)
