"""The head of each response, which several middlewares add to."""

from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import Scope

RawHeaders = list[tuple[bytes, bytes]]


@dataclass(slots=True, eq=False)
class ResponseHead:
    """A response's head as far as it is known, and what is still to be done to it.

    `status`: None until the response begins. `edits`: called with its header fields then, in this order. The outermost
    middleware keeps it in `scope["state"]`, so that `send` is wrapped once and not by each middleware.
    """

    status: int | None = None
    edits: list[Callable[[RawHeaders], None]] = field(default_factory=list)


def head_of(scope: Scope) -> ResponseHead:
    """Return the head of the response to a request."""
    head: ResponseHead = scope["state"]["head"]
    return head
