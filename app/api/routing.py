"""Routes that call their endpoint directly, and the way to them."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.dependencies import broker_of
from app.api.middleware.root_path import route_path


class FastRoute(APIRoute):
    """A route that is declared and documented as usual, but skips FastAPI's work for each request.

    FastAPI resolves an endpoint's parameters for each request, inside three exit stacks, which costs as much as
    checking all limits. Endpoints here take `request`, `broker`, and strings from the path and headers, and return a
    Response. Raises TypeError, when declared, for an endpoint that takes anything else.
    """

    def __init__(self, path: str, endpoint: Callable[..., Coroutine[Any, Any, Response]], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        takes = self.dependant
        if takes.query_params or takes.cookie_params or takes.body_params:
            raise TypeError(f"{endpoint.__name__} takes more than path and headers")
        if [each.call for each in takes.dependencies] != [broker_of] or takes.request_param_name != "request":
            raise TypeError(f"{endpoint.__name__} takes dependencies other than request and broker")
        names = [(field.name, field.alias) for field in takes.path_params]
        headers = [(field.name, field.alias) for field in takes.header_params]

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope, receive, send)
            given: dict[str, str | None] = {name: scope["path_params"][alias] for name, alias in names}
            for name, alias in headers:
                # A repeated header is one list (RFC 9110, section 5.3).
                given[name] = ", ".join(request.headers.getlist(alias)) or None
            response = await endpoint(request=request, broker=scope["state"]["broker"], **given)
            await response(scope, receive, send)

        self.app = app


class Routes:
    """Hand each request to its route: to the fast ones directly, to the others through FastAPI's router."""

    def __init__(self, router: APIRouter) -> None:
        routes = [route for route in router.routes if isinstance(route, FastRoute)]
        self._fixed = {
            (method, route.path): route
            for route in routes
            if not route.param_convertors
            for method in route.methods or ()
        }
        self._patterns = [
            (method, route.path_regex, route)
            for route in routes
            if route.param_convertors
            for method in route.methods or ()
        ]
        self._router = AsyncExitStackMiddleware(router)  # FastAPI's own routes need it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method, path = scope["method"], route_path(scope)
            if route := self._fixed.get((method, path)):
                scope["route"], scope["path_params"] = route, {}
                return await route.app(scope, receive, send)
            for taken, pattern, route in self._patterns:
                if taken == method and (match := pattern.match(path)):
                    scope["route"], scope["path_params"] = route, match.groupdict()
                    return await route.app(scope, receive, send)
        return await self._router(scope, receive, send)
