"""Faults on demand: each kind is a rule that says when it applies and how it changes the answer."""

import asyncio
import json
import random
import zlib
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.sandbox.http_exchange import Answer, HttpExchange

Operation = Literal["start", "get", "stop", "list", "usage", "agent"]

LONGEST_SECONDS = 300.0
"""Seconds until an endless fault cuts the connection."""

_CHUNK = 64 * 1024


class Fault(BaseModel):
    """A rule: which operation, how often, and (in the subclasses) what happens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    operation: Operation
    times: int | None = Field(default=None, ge=1)
    """How often it applies; None: always."""
    probability: float = Field(default=1, ge=0, le=1)
    seed: int | None = None
    """Makes `probability` repeatable."""

    needs_socket: ClassVar[bool] = False
    """True if it needs a real connection; an in-process client has none."""

    async def apply(self, exchange: HttpExchange) -> None:
        """Handle the request. Default: OneInbox handles it, and the fault alters its answer unless that is an error."""
        answer = await exchange.run()
        if answer.status >= 400:
            await exchange.answer(answer)
        else:
            await self.alter(exchange, answer)

    async def alter(self, exchange: HttpExchange, answer: Answer) -> None:
        """Send `answer`, altered."""
        raise NotImplementedError


class _Replacement(Fault):
    """A fault that replaces OneInbox's answer."""

    takes_effect: bool = False
    """If true, OneInbox still handles the request: the call exists, was stopped, and so on."""

    async def apply(self, exchange: HttpExchange) -> None:
        if self.takes_effect:
            await exchange.run()
        await self.replace(exchange)

    async def replace(self, exchange: HttpExchange) -> None:
        """Send another answer, or none."""
        raise NotImplementedError


class Latency(Fault):
    """An answer `seconds` late; OneInbox handles the request at once."""

    kind: Literal["latency"] = "latency"
    seconds: float = Field(ge=0)

    async def alter(self, exchange: HttpExchange, answer: Answer) -> None:
        if not await exchange.disconnected_within(self.seconds):
            await exchange.answer(answer)


class Status(_Replacement):
    """An error status, in one of the shapes of OneInbox's errors."""

    kind: Literal["status"] = "status"
    status: int = Field(ge=400, le=599)
    detail: Any = None
    """Default: the status's phrase. For a 422, pass FastAPI's list."""
    shape: Literal["detail", "message", "error"] = "detail"
    retry_after: int | str | None = None
    """Retry-After: seconds, a date, or anything else a client should survive."""

    async def replace(self, exchange: HttpExchange) -> None:
        detail = HTTPStatus(self.status).phrase if self.detail is None else self.detail
        headers = [] if self.retry_after is None else [(b"retry-after", str(self.retry_after).encode())]
        await exchange.answer(Answer.of(self.status, {self.shape: detail}, headers))


class Drop(_Replacement):
    """A connection cut before any answer."""

    kind: Literal["drop"] = "drop"
    needs_socket = True

    async def replace(self, exchange: HttpExchange) -> None:
        await exchange.drop()


class Hang(_Replacement):
    """No answer, ever."""

    kind: Literal["hang"] = "hang"

    async def replace(self, exchange: HttpExchange) -> None:
        if not await exchange.disconnected_within(LONGEST_SECONDS) and exchange.on_socket:
            await exchange.drop()


class Redirect(_Replacement):
    """A redirect."""

    kind: Literal["redirect"] = "redirect"
    status: Literal[301, 302, 303, 307, 308] = 307
    location: str

    async def replace(self, exchange: HttpExchange) -> None:
        await exchange.answer(Answer(self.status, [(b"location", self.location.encode())], b""))


class Truncated(Fault):
    """A connection cut in the middle of the answer."""

    kind: Literal["truncated"] = "truncated"
    needs_socket = True

    async def alter(self, exchange: HttpExchange, answer: Answer) -> None:
        await exchange.begin(answer, len(answer.body))
        await exchange.write(answer.body[: len(answer.body) // 2])
        # Let the half answer out first: the cut discards what is still buffered.
        await exchange.disconnected_within(0.05)
        await exchange.drop()


class BrokenJson(Fault):
    """An answer whose JSON ends early."""

    kind: Literal["broken_json"] = "broken_json"

    async def alter(self, exchange: HttpExchange, answer: Answer) -> None:
        await exchange.answer(Answer(answer.status, answer.headers, answer.body[:-2]))


class NotUtf8(Fault):
    """An answer with a string that is not UTF-8."""

    kind: Literal["not_utf8"] = "not_utf8"

    async def alter(self, exchange: HttpExchange, answer: Answer) -> None:
        await exchange.answer(_padded(answer, b"\xff\xfe\xc3"))


class Fields(Fault):
    """An answer with fields set (wrong types, extra fields, an invalid `server_url`) or removed."""

    kind: Literal["fields"] = "fields"
    set: dict[str, Any] = Field(default_factory=dict)
    remove: list[str] = Field(default_factory=list)

    async def alter(self, exchange: HttpExchange, answer: Answer) -> None:
        content = json.loads(answer.body) | self.set
        kept = {name: value for name, value in content.items() if name not in self.remove}
        await exchange.answer(Answer(answer.status, answer.headers, json.dumps(kept).encode()))


class HeaderFlood(Fault):
    """The right answer with `count` more headers."""

    kind: Literal["header_flood"] = "header_flood"
    count: int = Field(default=1_000, ge=1)
    size: int = Field(default=1_000, ge=0)
    """Bytes of each value."""

    async def alter(self, exchange: HttpExchange, answer: Answer) -> None:
        flood = [(b"x-flood-%d" % number, b"x" * self.size) for number in range(self.count)]
        await exchange.answer(Answer(answer.status, [*answer.headers, *flood], answer.body))


class BigBody(Fault):
    """The right answer in valid JSON, with one more field of `megabytes`."""

    kind: Literal["big_body"] = "big_body"
    megabytes: int = Field(default=300, ge=1)
    needs_socket = True

    async def alter(self, exchange: HttpExchange, answer: Answer) -> None:
        head, tail = _padded(answer, b"|").body.split(b"|")
        chunks = self.megabytes * 1024 * 1024 // _CHUNK
        await exchange.begin(answer, len(head) + chunks * _CHUNK + len(tail))
        await exchange.write(head)
        for _ in range(chunks):
            if await exchange.disconnected_within(0):
                return
            await exchange.write(b"x" * _CHUNK)
        await exchange.write(tail, more=False)


class EndlessBody(Fault):
    """An answer that starts well and never ends."""

    kind: Literal["endless_body"] = "endless_body"
    needs_socket = True

    async def alter(self, exchange: HttpExchange, answer: Answer) -> None:
        await exchange.begin(answer, None)
        await exchange.write(_padded(answer, b"|").body.split(b"|")[0])
        end = asyncio.get_running_loop().time() + LONGEST_SECONDS
        while asyncio.get_running_loop().time() < end:
            if await exchange.disconnected_within(0):
                return
            await exchange.write(b"x" * _CHUNK)
        await exchange.drop()


class Drip(Fault):
    """The right answer, one byte every `interval` seconds."""

    kind: Literal["drip"] = "drip"
    interval: float = Field(default=1, gt=0)
    needs_socket = True

    async def alter(self, exchange: HttpExchange, answer: Answer) -> None:
        await exchange.begin(answer, len(answer.body))
        end = asyncio.get_running_loop().time() + LONGEST_SECONDS
        for sent in range(len(answer.body)):
            if await exchange.disconnected_within(self.interval):
                return
            if asyncio.get_running_loop().time() > end:
                await exchange.drop()
                return
            await exchange.write(answer.body[sent : sent + 1], more=sent + 1 < len(answer.body))


class GzipBomb(Fault):
    """A small gzip body that unpacks to valid JSON of `megabytes`."""

    kind: Literal["gzip_bomb"] = "gzip_bomb"
    megabytes: int = Field(default=300, ge=1)

    async def alter(self, exchange: HttpExchange, answer: Answer) -> None:
        bomb = await asyncio.to_thread(_bomb, self.megabytes)
        await exchange.answer(Answer(answer.status, [*answer.headers, (b"content-encoding", b"gzip")], bomb))


AnyFault = Annotated[
    Latency
    | Status
    | Drop
    | Hang
    | Redirect
    | Truncated
    | BrokenJson
    | NotUtf8
    | Fields
    | HeaderFlood
    | BigBody
    | EndlessBody
    | Drip
    | GzipBomb,
    Field(discriminator="kind"),
]


@dataclass(slots=True)
class _ActiveRule:
    fault: Fault
    left: int | None
    dice: random.Random

    def applies(self, operation: Operation) -> bool:
        if operation != self.fault.operation or self.dice.random() >= self.fault.probability:
            return False
        if self.left is not None:
            self.left -= 1
        return True


class Faults:
    """The active rules, in the order they were added; the first that applies wins."""

    def __init__(self) -> None:
        self._rules: list[_ActiveRule] = []

    def add(self, *faults: Fault) -> None:
        """Append rules."""
        self._rules += [_ActiveRule(fault, fault.times, random.Random(fault.seed)) for fault in faults]  # noqa: S311

    def clear(self) -> None:
        """Remove all rules."""
        self._rules.clear()

    def take(self, operation: Operation) -> Fault | None:
        """Return the fault for this request, if any, and count it as one of the rule's times."""
        rule = next((rule for rule in self._rules if rule.applies(operation)), None)
        if rule is None:
            return None
        if rule.left == 0:
            self._rules.remove(rule)
        return rule.fault


def _padded(answer: Answer, padding: bytes) -> Answer:
    """Return `answer`, a JSON object, with one more field."""
    body = answer.body.rstrip()[:-1] + b',"padding":"' + padding + b'"}'
    return Answer(answer.status, answer.headers, body)


@lru_cache(maxsize=4)
def _bomb(megabytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    blank = b"x" * (1024 * 1024)
    parts = [packer.compress(b'{"padding":"'), *(packer.compress(blank) for _ in range(megabytes))]
    return b"".join([*parts, packer.compress(b'"}'), packer.flush()])
