"""GET /problems/{slug}: a page that explains an error, to which the `type` of a problem leads."""

import re
from dataclasses import asdict
from html import escape
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel
from starlette.responses import HTMLResponse, JSONResponse, Response

from app.api.openapi import answer, problems
from app.problems import KINDS, Problem, plain

router = APIRouter(tags=["service"])


class ProblemPage(BaseModel):
    """An error's meaning, and what to do about it."""

    slug: str
    status: int
    title: str
    meaning: str
    remedy: str


def _explained(slug: str) -> dict[str, Any]:
    kind = KINDS[slug]
    about = {"slug": slug, "status": kind.status, "title": kind.title}
    return about | {"meaning": plain(kind.meaning), "remedy": plain(kind.remedy)}


@router.get(
    "/problems/{slug}",
    operation_id="explainProblem",
    summary="Explain an error",
    response_model=ProblemPage,
    responses={
        200: answer(
            "The error's meaning.",
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
    """Explain an error and what to do about it: as a page if Accept names HTML, else as JSON."""
    if slug not in KINDS:
        raise Problem("not-found")
    if "text/html" in request.headers.get("accept", ""):
        texts = {"slug": slug} | {name: _html(str(value)) for name, value in asdict(KINDS[slug]).items()}
        return HTMLResponse(_PAGE.format(**texts), headers={"Content-Security-Policy": _PAGE_CSP})
    return JSONResponse(_explained(slug))


def _html(text: str) -> str:
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(text))


_PAGE_CSP = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} ({slug})</title>
<style>:root{{color-scheme:light dark}}
body{{font:1.1rem/1.6 system-ui,sans-serif;max-width:40rem;margin:4rem auto;padding:0 1rem}}</style></head>
<body><main><p><code>{status} {slug}</code></p><h1>{title}</h1><p>{meaning}</p>
<h2>What to do</h2><p>{remedy}</p></main></body></html>
"""
