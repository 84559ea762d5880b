"""/docs: the OpenAPI explorer. Swagger UI comes from an installed package: no internet, no inline scripts."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from app.api.dependencies import BrokerDep
from app.api.openapi import of_broker
from app.problems import Problem

router = APIRouter(include_in_schema=False)

# Swagger UI needs inline styles, and data URLs for its icons; scripts come from files only.
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HERE = Path(__file__).parent
OWN = {"explorer.js": "text/javascript", "explorer.css": "text/css"}
ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon.png": "image/png"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>OneInbox token broker: API</title><link rel="icon" href="{prefix}/docs/favicon.png">
<link rel="stylesheet" href="{prefix}/docs/swagger-ui.css">
<link rel="stylesheet" href="{prefix}/docs/explorer.css"></head>
<body>{home}<div id="explorer" data-document="{prefix}/openapi.json"></div>
<script src="{prefix}/docs/swagger-ui-bundle.js"></script>
<script src="{prefix}/docs/explorer.js"></script></body></html>
"""
HOME = '<nav class="home" aria-label="Other pages"><a href="{}">← Back to the call</a></nav>'


@router.get("/docs")
async def explorer(request: Request) -> Response:
    """Return the page. The prefix needs no escaping: it is a validated setting.

    `app.state.home`: a page to go back to, as the sandbox has one.
    """
    home = getattr(request.app.state, "home", None)
    page = PAGE.format(prefix=request.scope.get("root_path", ""), home=HOME.format(home) if home else "")
    return HTMLResponse(page, headers={"Content-Security-Policy": CSP})


@router.get("/openapi.json")
async def document(request: Request, broker: BrokerDep) -> Response:
    """Return the OpenAPI document for this broker, generated once."""
    state = request.app.state
    if not hasattr(state, "document"):
        state.document = to_json(of_broker(request.app.openapi(), broker.settings))
    return Response(state.document, media_type="application/json")


@router.get("/docs/{asset}")
async def explorer_asset(asset: str) -> Response:
    """Return a file of Swagger UI or of our own."""
    if asset in OWN:
        return WholeFile(HERE / asset, media_type=OWN[asset])
    if asset not in ASSETS:
        raise Problem("not-found")
    return WholeFile(_assets() / asset, media_type=ASSETS[asset])


class WholeFile(FileResponse):
    """A file without ranges (RFC 9110, section 14.2): a hundred of them cost more than the file."""

    def __init__(self, path: Path, media_type: str) -> None:
        super().__init__(path, headers={"Accept-Ranges": "none"}, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole file, whatever was asked for."""
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


@cache
def _assets() -> Path:
    """Return fastapi-offline's folder of Swagger UI files, without importing the package."""
    spec = find_spec("fastapi_offline")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("fastapi-offline is not installed")
    return Path(spec.submodule_search_locations[0]) / "static"
