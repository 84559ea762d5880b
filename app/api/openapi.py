"""The OpenAPI document, where FastAPI cannot read it off a signature: words, examples, headers and logins.

A route says which problems it answers and shows its good answers; what follows from that is added here, when the
document is first asked for.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from app.config.settings import Settings
from app.problems import KINDS, MEDIA_TYPE, ProblemDetails

JSON = "application/json"
ABOUT = """
The broker stands between a browser and the OneInbox voice API. It keeps the API key on the server, knows who is
calling, and bounds what each of them may spend.

**Start a call** with `POST /session`, and join it with the two fields of the answer. `Location` names the call; under
that path it can be read, followed and stopped.

**Who is calling** is for the operator to choose: everybody (`anonymous`: limits go by address, and whoever holds a
call's `Location` may follow and stop it), users with a signed token (`jwt`), or users whom a proxy has signed in
(`header`).

**Errors** are RFC 9457 problem details, each with a `type` that leads to a page about it, and a `request_id` that the
operator finds in the log. A method that a path does not take is 405 `method-not-allowed`, with `Allow`; a path that
does not exist is 404 `not-found`. What is not HTTP at all is refused without a body.

**Limits** are told in `RateLimit-Policy` and `RateLimit`. Who meets one gets `Retry-After`, in seconds.
"""
TAGS = {
    "sessions": "Start a call, and get what a browser needs to join it.",
    "calls": "A call after it has started: read it, follow it, hang up. Each caller sees their own calls only.",
    "webhooks": "For OneInbox itself.",
    "service": "For whoever runs the broker, and whoever reads its errors. No identity is needed.",
}

# How callers say who they are, in the modes that ask for it.
LOGINS: Mapping[str, Mapping[str, Any]] = {
    "token": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "`jwt` mode: the user's token, from your own sign-in. Never OneInbox's key.",
    },
    "cookie": {
        "type": "apiKey",
        "in": "cookie",
        "name": "BROKER_JWT_COOKIE",
        "description": "`jwt` mode, where the operator names a cookie: the same token, which the browser sends by "
        "itself. It cannot be set here; being signed in is enough.",
    },
    "proxy": {
        "type": "apiKey",
        "in": "header",
        "name": "X-Forwarded-User",
        "description": "`header` mode: the user, as the proxy in front names them. It counts from that proxy alone.",
    },
}
METRICS_LOGIN = {
    "type": "http",
    "scheme": "bearer",
    "description": "For `/metrics` alone: `BROKER_METRICS_TOKEN`.",
}

# What headers mean: of requests, with the bounds of their values, and of answers, with an example.
ASKED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "X-Request-ID": (
        "Your own name for this request; it comes back and stands in the log. 1 to 128 of `A-Z a-z 0-9 . _ -`, "
        "anything else is ignored and one is made up.",
        {},
    ),
    "Idempotency-Key": (
        "Makes it safe to send the request again: for 10 minutes the same key with the same body gets the first "
        "answer, and no second call. Take a new random one for each call, such as `crypto.randomUUID()`. 1 to 255 "
        "printable characters, at least 16 where nobody signs in.",
        {"minLength": 1, "maxLength": 255},
    ),
    "X-Challenge-Token": ("The answer to the bot challenge, where the operator asks for one. It works once.", {}),
}
ANSWERED: Mapping[str, tuple[str, Any]] = {
    "X-Request-ID": ("Names this request in the broker's log.", "3f9c1c2ab7d04e5f"),
    "Location": ("The path of the call: read it, follow it at `/events`, hang up at `/stop`.", "/calls/call_abc123"),
    "Idempotency-Replayed": ("`true`: this is the first answer again, no new call was started.", "true"),
    "ETag": ("Names this state of the call, for `If-None-Match`.", '"5d41402abc4b2a76"'),
    "Retry-After": ("Seconds to wait before trying once more.", 12),
    "RateLimit-Policy": (
        "Your limits: `q` times in `w` seconds each (draft-ietf-httpapi-ratelimit-headers-10).",
        '"user-minute";q=5;w=60, "user-day";q=50;w=86400',
    ),
    "RateLimit": (
        "What is left of them, the closest first: `r` times, and in `t` seconds the first of the used ones is free "
        "again. Absent where a request is refused before it is counted.",
        '"user-minute";r=4;t=60, "user-day";r=49;t=86400',
    ),
    "WWW-Authenticate": (
        "How to sign in: `Bearer`, with a token; `ForwardedUser`, through the proxy in front.",
        "Bearer",
    ),
}
PROBLEM_HEADERS = {401: ["WWW-Authenticate"], 409: ["Retry-After"], 429: ["Retry-After"], 503: ["Retry-After"]}
PROBLEM_ERRORS = {
    "invalid-request": [{"loc": ["body", "room"], "msg": "Extra inputs are not permitted", "type": "extra_forbidden"}],
    "upstream-rejected": [{"loc": ["body", "variables", "plan"], "msg": "Unknown variable", "type": "value_error"}],
}


def reads(model: type[BaseModel] | None, *headers: str, examples: Mapping[str, Any]) -> dict[str, Any]:
    """`openapi_extra=` of a route that reads its optional JSON body and `headers` (names out of ASKED) by itself.

    `model`: of the body; None: it may be anything.
    """
    body = {"schema": _ref("schemas", model.__name__) if model else {}, "examples": _named(examples)}
    return {
        "requestBody": {"required": False, "content": {JSON: body}},
        "parameters": [_ref("parameters", name) for name in headers],
    }


def answer(
    description: str,
    *headers: str,
    examples: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One of a route's good answers.

    `headers`: names out of ANSWERED. `examples`: of the JSON, by what they show. `texts`: an example for each other
    media type.
    """
    content: dict[str, Any] = {JSON: {"examples": _named(examples)}} if examples else {}
    for media_type, text in (texts or {}).items():
        # Before OpenAPI 3.2 it is nobody's to say whether a schema here is of a stream or of each of its events.
        schema = {} if media_type == "text/event-stream" else {"schema": {"type": "string"}}
        content[media_type] = {**schema, "example": text}
    return {"description": description, "headers": _headers(headers)} | ({"content": content} if content else {})


def problems(*slugs: str) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: each problem by status, with an example. Any route may meet a bug."""
    by_status: dict[int, list[str]] = {}
    for slug in (*slugs, "internal-error"):
        by_status.setdefault(KINDS[slug].status, []).append(slug)
    return {status: _problem_answer(status, each) for status, each in by_status.items()}


def install(app: FastAPI, *models: type[BaseModel]) -> None:
    """Give the app a document that also holds models which no signature names."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=_flowing(ABOUT),
                license_info={"name": "MIT", "identifier": "MIT"},
                routes=app.routes,
                tags=[{"name": name, "description": text} for name, text in TAGS.items()],
                servers=[{"url": "/"}],
            )
            schema["security"] = [{}, *({name: []} for name in LOGINS)]
            components = schema.setdefault("components", {})
            _add_models(components.setdefault("schemas", {}), (ProblemDetails, *models))
            # A method that a path does not take has no operation whose answer it could be.
            components["examples"] = {slug: _problem_example(slug) for slug in KINDS if slug != "method-not-allowed"}
            components["headers"] = {name: _header(*about) for name, about in ANSWERED.items()}
            components["parameters"] = {name: _parameter(name, *about) for name, about in ASKED.items()}
            components["securitySchemes"] = {**LOGINS, "metrics": METRICS_LOGIN}
            for path in schema["paths"].values():
                for operation in path.values():
                    _complete(operation)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def of_broker(document: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The document as one broker serves it: its prefix, the routes that are switched on, the logins that it takes."""
    off = {"/metrics": not settings.metrics_token, "/webhooks/oneinbox/{secret}": not settings.webhook_secret}
    cookie = {**LOGINS["cookie"], "name": settings.jwt_cookie}
    by_mode: dict[str, dict[str, Any]] = {
        "anonymous": {},
        "jwt": {"token": LOGINS["token"], **({"cookie": cookie} if settings.jwt_cookie else {})},
        "header": {"proxy": {**LOGINS["proxy"], "name": settings.user_header}},
    }
    logins = by_mode[settings.auth]
    schemes = {**logins, **({"metrics": METRICS_LOGIN} if settings.metrics_token else {})}
    # Without any, Swagger UI would still have a button for them.
    others = {kind: each for kind, each in document["components"].items() if kind != "securitySchemes"}
    paths = {path: item for path, item in document["paths"].items() if not off.get(path)}
    tags = {tag for item in paths.values() for operation in item.values() for tag in operation["tags"]}
    return {
        **document,
        "tags": [each for each in document["tags"] if each["name"] in tags],
        "servers": [{"url": settings.root_path or "/"}],
        "security": [{name: []} for name in logins],
        "paths": paths,
        "components": {**others, **({"securitySchemes": schemes} if schemes else {})},
    }


def _complete(operation: dict[str, Any]) -> None:
    """Add what follows from an operation's answers."""
    answers = operation["responses"]
    operation["description"] = _flowing(operation["description"])
    for parameter in operation.setdefault("parameters", []):
        if "anyOf" in parameter.get("schema", {}):
            parameter["schema"] = parameter["schema"]["anyOf"][0]  # absent it may be, null it is never
    operation["parameters"].append(_ref("parameters", "X-Request-ID"))
    if "401" not in answers:
        operation["security"] = []
    if JSON in answers.get("422", {}).get("content", {}):
        del answers["422"]  # an error shape of FastAPI's own, which is never answered
    limited = "rate-limited" in answers.get("429", {}).get("content", {}).get(MEDIA_TYPE, {}).get("examples", {})
    always = ("X-Request-ID", "RateLimit-Policy", "RateLimit") if limited else ("X-Request-ID",)
    for each in answers.values():
        each["headers"] = {**each.get("headers", {}), **_headers(always)}
    for each in (operation.get("requestBody", {}), *answers.values()):
        for example in each.get("content", {}).get(JSON, {}).get("examples", {}).values():
            example["value"] = json.loads(example["value"])


def _add_models(schemas: dict[str, Any], models: Iterable[type[BaseModel]]) -> None:
    for name in ("HTTPValidationError", "ValidationError"):  # of FastAPI's own error shape
        schemas.pop(name, None)
    for model in models:
        own = model.model_json_schema(ref_template="#/components/schemas/{model}")
        for each in (*own.pop("$defs", {}).values(), own):
            schemas[each["title"]] = each
            for value in each["properties"].values():
                if value.get("default", ...) is None:
                    del value["default"]  # absent is not null: to openapi-typescript, what has a default is required


def _problem_answer(status: int, slugs: list[str]) -> dict[str, Any]:
    about = [f"`{slug}`: {KINDS[slug].title}." for slug in slugs]
    content = {"schema": _ref("schemas", "Problem"), "examples": {slug: _ref("examples", slug) for slug in slugs}}
    return {
        "description": about[0] if len(about) == 1 else "\n".join(f"- {line}" for line in about),
        "headers": _headers(PROBLEM_HEADERS.get(status, ())),
        "content": {MEDIA_TYPE: content},
    }


def _problem_example(slug: str) -> dict[str, Any]:
    kind = KINDS[slug]
    value: dict[str, Any] = {
        "type": f"/problems/{slug}",
        "title": kind.title,
        "status": kind.status,
        "detail": kind.meaning,
        "request_id": ANSWERED["X-Request-ID"][1],
    }
    if slug in PROBLEM_ERRORS:
        value["errors"] = PROBLEM_ERRORS[slug]
    return {"summary": kind.title, "value": value}


def _parameter(name: str, description: str, bounds: dict[str, Any]) -> dict[str, Any]:
    # No example: the explorer would send it, and one key for everybody's calls is no key.
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string", **bounds}}


def _header(description: str, example: Any) -> dict[str, Any]:
    return {
        "description": description,
        "schema": {"type": "integer" if isinstance(example, int) else "string"},
        "example": example,
    }


def _headers(names: Iterable[str]) -> dict[str, Any]:
    return {name: _ref("headers", name) for name in names}


def _named(examples: Mapping[str, Any]) -> dict[str, Any]:
    # As JSON until FastAPI has passed them on: it drops every null.
    return {name: {"value": json.dumps(value)} for name, value in examples.items()}


def _ref(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}


def _flowing(text: str) -> str:
    """Paragraphs on one line each: Swagger UI keeps the line breaks of a docstring."""
    return re.sub(r"(?<!\n)\n(?!\n|- )", " ", text.strip())
