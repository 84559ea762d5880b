"""BROKER_ROOT_PATH: the prefix under which a proxy serves the broker, whether it strips it or not."""

from starlette.types import ASGIApp, Receive, Scope, Send


class RootPath:
    """Names the prefix in every request's scope; Starlette's routing takes it off a path that still has it.

    `prefix`: without a slash at its end; empty for none.
    """

    def __init__(self, app: ASGIApp, *, prefix: str) -> None:
        self.app = app
        self.prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.prefix:
            scope["root_path"] = self.prefix
        await self.app(scope, receive, send)
