"""Pieces of the OpenAPI document that FastAPI cannot read off a signature."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from app.problems import KINDS, MEDIA_TYPE, ProblemDetails

_REF = "#/components/schemas/{model}"


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """An optional JSON body of a model's shape, for a route that reads and parses its body itself."""
    return {"required": False, "content": {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}}


def problems(*slugs: str) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: each problem by status, with an example."""
    responses: dict[int | str, dict[str, Any]] = {}
    for slug in slugs:
        kind = KINDS[slug]
        entry = responses.setdefault(
            kind.status,
            {
                "description": "",
                "content": {MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="Problem")}, "examples": {}}},
            },
        )
        entry["description"] = "; ".join(filter(None, [entry["description"], kind.title]))
        entry["content"][MEDIA_TYPE]["examples"][slug] = {
            "summary": kind.title,
            "value": {
                "type": f"/problems/{slug}",
                "title": kind.title,
                "status": kind.status,
                "detail": kind.meaning,
                "request_id": "3f9c1c2ab7d04e5f",
            },
        }
    return responses


def install(app: FastAPI, *models: type[BaseModel]) -> None:
    """Give the app a document that also holds models which no signature names."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
                servers=app.servers,
            )
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            every: tuple[type[BaseModel], ...] = (ProblemDetails, *models)
            for model in every:
                own = model.model_json_schema(ref_template=_REF)
                schemas.update(own.pop("$defs", {}))
                schemas[own.get("title", model.__name__)] = own
            _drop_frameworks_errors(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _drop_frameworks_errors(schema: dict[str, Any]) -> None:
    """FastAPI documents an error shape of its own, which is never answered."""
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    for path in schema["paths"].values():
        for operation in path.values():
            content = operation["responses"].get("422", {}).get("content", {})
            if "application/json" in content:
                del operation["responses"]["422"]
