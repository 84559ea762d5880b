"""/problems/{slug}: what an error means, so that the `type` of an answer is a page a developer can read."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel
from starlette.responses import HTMLResponse, JSONResponse, Response

from app.api.openapi import answer, problems
from app.problems import KINDS, Problem

router = APIRouter(tags=["service"])


class ProblemPage(BaseModel):
    """What an error means and what to do about it."""

    slug: str
    status: int
    title: str
    meaning: str
    remedy: str


def _explained(slug: str) -> dict[str, Any]:
    kind = KINDS[slug]
    return {"slug": slug, "status": kind.status, "title": kind.title, "meaning": kind.meaning, "remedy": kind.remedy}


@router.get(
    "/problems/{slug}",
    operation_id="explainProblem",
    summary="Explain an error",
    response_model=ProblemPage,
    responses={
        200: answer(
            "What the error means.",
            examples={slug: _explained(slug) for slug in KINDS},
            texts={"text/html": "<!doctype html>…"},
        ),
        **problems("not-found", "forbidden-origin"),
    },
)
async def explain_problem(
    slug: Annotated[str, Path(description="Last part of a problem's `type`.", json_schema_extra={"enum": [*KINDS]})],
    request: Request,
) -> Response:
    """Say what an error means and what to do: a page where HTML is asked for, JSON otherwise."""
    if slug not in KINDS:
        raise Problem("not-found")
    explained = _explained(slug)
    if "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(_PAGE.format(**explained), headers={"Content-Security-Policy": _PAGE_CSP})
    return JSONResponse(explained)


_PAGE_CSP = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} ({slug})</title>
<style>:root{{color-scheme:light dark}}
body{{font:1.1rem/1.6 system-ui,sans-serif;max-width:40rem;margin:4rem auto;padding:0 1rem}}</style></head>
<body><main><p><code>{status} {slug}</code></p><h1>{title}</h1><p>{meaning}</p>
<h2>What to do</h2><p>{remedy}</p></main></body></html>
"""
