"""Planted bugs: each breaks one promise, and an invariant must find it."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from tests.simulation.scenario import Options


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug. `kind`: the violation that shows it. `apply`: patches the app for a while. `options`: of the runs."""

    kind: str
    apply: Callable[[], AbstractContextManager[object]]
    options: Options = field(default_factory=Options)


PLANTS: dict[str, Plant] = {}


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Plant a bug for a while; None: none."""
    with PLANTS[name].apply() if name is not None else contextlib.nullcontext():
        yield
