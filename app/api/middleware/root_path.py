"""BROKER_ROOT_PATH: the prefix under which a proxy serves the broker, whether or not the proxy strips it."""

from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class RootPath:
    """Put the prefix into every request's scope, where Starlette's routing removes it from the path.

    `prefix`: without a slash at its end; empty for none.
    """

    app: ASGIApp
    prefix: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.prefix:
            scope["root_path"] = self.prefix
        await self.app(scope, receive, send)


def route_path(scope: Scope) -> str:
    """Return the path that routes match: without the prefix, if the proxy left it on."""
    path: str = scope["path"]
    rest = path.removeprefix(scope.get("root_path", ""))
    return rest if rest[:1] in ("", "/") else path
