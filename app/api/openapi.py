"""The parts of the OpenAPI document that FastAPI cannot infer: texts, examples, headers and logins.

A route lists its problems and describes its successful responses; the rest is added here, when the document is first
requested.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from app.config.settings import Settings
from app.problems import KINDS, MEDIA_TYPE, ProblemDetails, problem_body

JSON = "application/json"
ABOUT = """
The broker stands between browsers and the OneInbox voice API. It keeps the API key on the server, identifies users,
and limits what each of them may spend.

**Start a call** with `POST /session`, and join it with the two fields of the response. `Location` names the call: read,
follow and stop it under that path.

**Users** are identified as the operator chooses: not at all (`anonymous`: limits apply per IP address, and anyone with
a call's `Location` may follow and stop it), by a signed token (`jwt`), or by a proxy that signs them in (`header`).

**Errors** are RFC 9457 problem details. Each has a `type` that leads to a page about it, and a `request_id` that is
also in the broker's log. An unknown path is 404 `not-found`; a method that a path does not take is 405
`method-not-allowed`, with `Allow`. Requests that are not valid HTTP are refused without a body.

**HEAD** is answered like GET, except for events. **OPTIONS** without an Origin gives 204 with `Allow`.

**Limits** are reported in `RateLimit-Policy` and `RateLimit`. Once one is reached, `Retry-After` says how many seconds
to wait.
"""
TAGS = {
    "sessions": "Start a call, and get what a browser needs to join it.",
    "calls": "Read, follow and stop calls. Users see only their own.",
    "webhooks": "Called by OneInbox.",
    "service": "For operators, and for developers who look up an error. Only metrics need a token.",
}

# How users sign in, by mode.
LOGINS: Mapping[str, Mapping[str, Any]] = {
    "token": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "`jwt` mode: the user's token from your own sign-in, never OneInbox's key.",
    },
    "cookie": {
        "type": "apiKey",
        "in": "cookie",
        "name": "BROKER_JWT_COOKIE",
        "description": "`jwt` mode, if the operator names a cookie: the same token, sent by the browser. It cannot be "
        "set here; being signed in is enough.",
    },
    "proxy": {
        "type": "apiKey",
        "in": "header",
        "name": "X-Forwarded-User",
        "description": "`header` mode: the user, as named by the sign-in proxy; accepted only from that proxy.",
    },
}
METRICS_LOGIN = {"type": "http", "scheme": "bearer", "description": "`BROKER_METRICS_TOKEN`, for `/metrics` only."}

# Request headers with the bounds of their values, and response headers with an example.
REQUEST_HEADERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "X-Request-ID": (
        "Your own id for this request; it is returned and logged. 1 to 128 of `A-Z a-z 0-9 . _ -`; any other value is "
        "replaced.",
        {},
    ),
    "Idempotency-Key": (
        "Makes it safe to repeat the request: for 10 minutes the same key with the same body returns the first "
        "response and starts no second call. Use a new random key for each call, such as `crypto.randomUUID()`. 1 to "
        "255 printable characters, at least 16 in anonymous mode.",
        {"minLength": 1, "maxLength": 255},
    ),
    "X-Challenge-Token": ("The bot challenge's token, if the operator requires one. It works once.", {}),
}
RESPONSE_HEADERS: Mapping[str, tuple[str, Any]] = {
    "X-Request-ID": ("Identifies this request in the broker's log.", "3f9c1c2ab7d04e5f"),
    "Location": ("The call's path: read it, follow it at `/events`, hang up at `/stop`.", "/calls/call_abc123"),
    "Idempotency-Replayed": ("`true`: this is the first response again; no new call was started.", "true"),
    "ETag": ("Identifies this state of the call, for `If-None-Match`.", '"5d41402abc4b2a76"'),
    "Retry-After": ("Seconds to wait before trying again.", 12),
    "RateLimit-Policy": (
        "Your limits: `q` requests in `w` seconds each (draft-ietf-httpapi-ratelimit-headers-10).",
        '"user-minute";q=5;w=60, "user-day";q=50;w=86400',
    ),
    "RateLimit": (
        "What is left of them, the closest limit first: `r` requests; one more in `t` seconds. Absent if the request "
        "was refused before it was counted.",
        '"user-minute";r=4;t=60, "user-day";r=49;t=86400',
    ),
    "Accept-Encoding": ("`identity`, if the body had a Content-Encoding.", "identity"),
    "WWW-Authenticate": ("How to sign in: `Bearer` with a token, `ForwardedUser` through the proxy.", "Bearer"),
}
UPSTREAM = (
    *("upstream-busy", "upstream-error", "upstream-unreachable"),
    *("upstream-invalid", "upstream-misconfigured", "upstream-timeout"),
)
"""Problems of a route that asks OneInbox."""
PROBLEM_HEADERS = {
    401: ["WWW-Authenticate"],
    409: ["Retry-After"],
    415: ["Accept-Encoding"],
    429: ["Retry-After"],
    503: ["Retry-After"],
}
PROBLEM_ERRORS = {
    "invalid-request": [{"loc": ["body", "room"], "msg": "Extra inputs are not permitted", "type": "extra_forbidden"}],
    "upstream-rejected": [{"loc": ["body", "variables", "plan"], "msg": "Unknown variable", "type": "value_error"}],
}


def reads(model: type[BaseModel] | None, *headers: str, examples: Mapping[str, Any]) -> dict[str, Any]:
    """`openapi_extra=` for a route that reads its optional JSON body and `headers` (keys of REQUEST_HEADERS) itself.

    `model`: the body's; None: anything is accepted.
    """
    body = {"schema": _ref("schemas", model.__name__) if model else {}, "examples": _named(examples)}
    return {
        "requestBody": {"required": False, "content": {JSON: body}},
        "parameters": [_ref("parameters", name) for name in headers],
    }


def answer(
    description: str, *headers: str, examples: Mapping[str, Any] | None = None, texts: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return a successful response of a route.

    `headers`: keys of RESPONSE_HEADERS. `examples`: JSON by summary. `texts`: an example of each other media type.
    """
    content: dict[str, Any] = {JSON: {"examples": _named(examples)}} if examples else {}
    for media_type, text in (texts or {}).items():
        # Before OpenAPI 3.2 a schema here could describe the stream or each of its events.
        schema = {} if media_type == "text/event-stream" else {"schema": {"type": "string"}}
        content[media_type] = {**schema, "example": text}
    return {"description": description, "headers": _headers(headers)} | ({"content": content} if content else {})


def problems(*slugs: str) -> dict[int | str, dict[str, Any]]:
    """`responses=` for a route: its problems by status, with an example each; `internal-error` is added."""
    by_status: dict[int, list[str]] = {}
    for slug in dict.fromkeys((*slugs, "internal-error")):
        by_status.setdefault(KINDS[slug].status, []).append(slug)
    return {status: _problem_answer(status, each) for status, each in by_status.items()}


def install(app: FastAPI, *models: type[BaseModel]) -> None:
    """Replace FastAPI's OpenAPI document with ours; `models`: schemas that no signature mentions."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=_unwrap(ABOUT),
                license_info={"name": "MIT", "identifier": "MIT"},
                routes=app.routes,
                tags=[{"name": name, "description": text} for name, text in TAGS.items()],
                servers=[{"url": "/"}],
            )
            schema["security"] = [{}, *({name: []} for name in LOGINS)]
            components = schema.setdefault("components", {})
            _add_models(components.setdefault("schemas", {}), (ProblemDetails, *models))
            # No operation exists for a method that its path does not take.
            components["examples"] = {slug: _problem_example(slug) for slug in KINDS if slug != "method-not-allowed"}
            components["headers"] = {name: _header(*about) for name, about in RESPONSE_HEADERS.items()}
            components["parameters"] = {name: _parameter(name, *about) for name, about in REQUEST_HEADERS.items()}
            components["securitySchemes"] = {**LOGINS, "metrics": METRICS_LOGIN}
            for path in schema["paths"].values():
                for operation in path.values():
                    _complete(operation)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def of_broker(document: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the document for one broker: with its prefix, enabled routes and logins."""
    off = {
        "/calls": settings.auth == "anonymous",  # an address is no identity to list by
        "/metrics": not settings.metrics_token,
        "/webhooks/oneinbox/{secret}": not settings.webhook_secret,
    }
    cookie = {**LOGINS["cookie"], "name": settings.jwt_cookie}
    by_mode: dict[str, dict[str, Any]] = {
        "anonymous": {},
        "jwt": {"token": LOGINS["token"], **({"cookie": cookie} if settings.jwt_cookie else {})},
        "header": {"proxy": {**LOGINS["proxy"], "name": settings.user_header}},
    }
    logins = by_mode[settings.auth]
    schemes = {**logins, **({"metrics": METRICS_LOGIN} if settings.metrics_token else {})}
    components = {kind: each for kind, each in document["components"].items() if kind != "securitySchemes"}
    if schemes:  # Swagger UI shows a button even for an empty object
        components["securitySchemes"] = schemes
    paths = {path: item for path, item in document["paths"].items() if not off.get(path)}
    tags = {tag for item in paths.values() for operation in item.values() for tag in operation["tags"]}
    return {
        **document,
        "tags": [each for each in document["tags"] if each["name"] in tags],
        "servers": [{"url": settings.root_path or "/"}],
        "security": [{name: []} for name in logins],
        "paths": paths,
        "components": components,
    }


def _complete(operation: dict[str, Any]) -> None:
    """Add what follows from an operation's responses."""
    answers = operation["responses"]
    operation["description"] = _unwrap(operation["description"])
    for parameter in operation.setdefault("parameters", []):
        if "anyOf" in parameter.get("schema", {}):
            parameter["schema"] = parameter["schema"]["anyOf"][0]  # may be absent, never null
    operation["parameters"].append(_ref("parameters", "X-Request-ID"))
    if "401" not in answers:
        operation["security"] = []
    if JSON in answers.get("422", {}).get("content", {}):
        del answers["422"]  # FastAPI's own error shape, which is never sent
    limited = "rate-limited" in answers.get("429", {}).get("content", {}).get(MEDIA_TYPE, {}).get("examples", {})
    always = ("X-Request-ID", "RateLimit-Policy", "RateLimit") if limited else ("X-Request-ID",)
    for each in answers.values():
        each["headers"] = {**each.get("headers", {}), **_headers(always)}
    for each in (operation.get("requestBody", {}), *answers.values()):
        for example in each.get("content", {}).get(JSON, {}).get("examples", {}).values():
            example["value"] = json.loads(example["value"])


def _add_models(schemas: dict[str, Any], models: Iterable[type[BaseModel]]) -> None:
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own error shape
        schemas.pop(name, None)
    for model in models:
        own = model.model_json_schema(ref_template="#/components/schemas/{model}")
        for each in (*own.pop("$defs", {}).values(), own):
            schemas[each["title"]] = each
            for value in each["properties"].values():
                if value.get("default", ...) is None:
                    del value["default"]  # absent is not null; openapi-typescript requires fields with a default


def _problem_answer(status: int, slugs: list[str]) -> dict[str, Any]:
    about = [f"`{slug}`: {KINDS[slug].title}." for slug in slugs]
    content = {"schema": _ref("schemas", "Problem"), "examples": {slug: _ref("examples", slug) for slug in slugs}}
    return {
        "description": about[0] if len(about) == 1 else "\n".join(f"- {line}" for line in about),
        "headers": _headers(PROBLEM_HEADERS.get(status, ())),
        "content": {MEDIA_TYPE: content},
    }


def _problem_example(slug: str) -> dict[str, Any]:
    value = problem_body(slug, RESPONSE_HEADERS["X-Request-ID"][1])
    if slug in PROBLEM_ERRORS:
        value["errors"] = PROBLEM_ERRORS[slug]
    return {"summary": value["title"], "value": value}


def _parameter(name: str, description: str, bounds: dict[str, Any]) -> dict[str, Any]:
    # No example: the explorer would send it, so everyone would share one key.
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
    # JSON text until FastAPI has passed them on, since it drops every null.
    return {name: {"value": json.dumps(value)} for name, value in examples.items()}


def _ref(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}


def _unwrap(text: str) -> str:
    """Join the lines of each paragraph; Swagger UI would keep a docstring's line breaks."""
    return re.sub(r"(?<!\n)\n(?!\n|- )", " ", text.strip())
