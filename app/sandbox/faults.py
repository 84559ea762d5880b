"""Faults on demand: each kind is a rule that says when it strikes and how the answer is spoiled."""

import asyncio
import json
import random
import zlib
from functools import lru_cache
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.sandbox.http_exchange import Answer, HttpExchange

Operation = Literal["start", "get", "stop", "list"]

LONGEST = 300.0
"""Seconds after which a fault that has no end by itself cuts the connection."""

_PIECE = 64 * 1024


class Fault(BaseModel):
    """A rule: for which operation, how often, and (in the subclasses) what happens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    operation: Operation
    times: int | None = Field(default=None, ge=1)
    """How often it strikes; None: for ever."""
    probability: float = Field(default=1, ge=0, le=1)
    seed: int | None = None
    """Makes the dice repeatable."""

    needs_socket: ClassVar[bool] = False
    """Whether it is about the connection: an in-process client has none."""

    async def strike(self, exchange: HttpExchange) -> None:
        """Answer the request, or not. Here: OneInbox does what it was asked, then the answer is spoiled."""
        answer = await exchange.run()
        if answer.status >= 400:  # nothing was done, so there is nothing to spoil
            await exchange.answer(answer)
        else:
            await self.spoil(exchange, answer)

    async def spoil(self, exchange: HttpExchange, answer: Answer) -> None:
        """Send `answer` as this fault would have it."""
        raise NotImplementedError


class _Instead(Fault):
    """Something else than OneInbox's answer."""

    takes_effect: bool = False
    """Whether the call exists (was stopped, …) all the same."""

    async def strike(self, exchange: HttpExchange) -> None:
        if self.takes_effect:
            await exchange.run()
        await self.instead(exchange)

    async def instead(self, exchange: HttpExchange) -> None:
        """Answer, or not."""
        raise NotImplementedError


class Latency(Fault):
    """OneInbox does what it was asked at once and answers `seconds` later."""

    kind: Literal["latency"] = "latency"
    seconds: float = Field(ge=0)

    async def spoil(self, exchange: HttpExchange, answer: Answer) -> None:
        if not await exchange.gone_within(self.seconds):
            await exchange.answer(answer)


class Status(_Instead):
    """An error status, in one of the shapes OneInbox's errors have."""

    kind: Literal["status"] = "status"
    status: int = Field(ge=400, le=599)
    detail: Any = None
    """Default: the status' phrase. FastAPI's list for a 422."""
    shape: Literal["detail", "message", "error"] = "detail"
    retry_after: int | str | None = None
    """Retry-After, seconds or a date, or anything a client should survive."""

    async def instead(self, exchange: HttpExchange) -> None:
        detail = HTTPStatus(self.status).phrase if self.detail is None else self.detail
        headers = [] if self.retry_after is None else [(b"retry-after", str(self.retry_after).encode())]
        await exchange.answer(Answer.of(self.status, {self.shape: detail}, headers))


class Drop(_Instead):
    """The connection is cut without a byte of answer."""

    kind: Literal["drop"] = "drop"
    needs_socket = True

    async def instead(self, exchange: HttpExchange) -> None:
        await exchange.drop()


class Hang(_Instead):
    """No answer is ever sent."""

    kind: Literal["hang"] = "hang"

    async def instead(self, exchange: HttpExchange) -> None:
        if not await exchange.gone_within(LONGEST) and exchange.on_socket:
            await exchange.drop()


class Redirect(_Instead):
    """A redirect."""

    kind: Literal["redirect"] = "redirect"
    status: Literal[301, 302, 303, 307, 308] = 307
    location: str

    async def instead(self, exchange: HttpExchange) -> None:
        await exchange.answer(Answer(self.status, [(b"location", self.location.encode())], b""))


class Truncated(Fault):
    """The connection is cut in the middle of the answer."""

    kind: Literal["truncated"] = "truncated"
    needs_socket = True

    async def spoil(self, exchange: HttpExchange, answer: Answer) -> None:
        await exchange.begin(answer, len(answer.body))
        await exchange.write(answer.body[: len(answer.body) // 2])
        # The half answer must be out before the cut, which throws away what is still buffered.
        await exchange.gone_within(0.05)
        await exchange.drop()


class BrokenJson(Fault):
    """The answer's JSON ends too early."""

    kind: Literal["broken_json"] = "broken_json"

    async def spoil(self, exchange: HttpExchange, answer: Answer) -> None:
        await exchange.answer(Answer(answer.status, answer.headers, answer.body[:-2]))


class NotUtf8(Fault):
    """The answer has a string that is not UTF-8."""

    kind: Literal["not_utf8"] = "not_utf8"

    async def spoil(self, exchange: HttpExchange, answer: Answer) -> None:
        await exchange.answer(_padded(answer, b"\xff\xfe\xc3"))


class Fields(Fault):
    """Fields of the answer are set (wrong types, extra ones, a `server_url` that is none) or missing."""

    kind: Literal["fields"] = "fields"
    set: dict[str, Any] = Field(default_factory=dict)
    remove: list[str] = Field(default_factory=list)

    async def spoil(self, exchange: HttpExchange, answer: Answer) -> None:
        content = json.loads(answer.body) | self.set
        kept = {name: value for name, value in content.items() if name not in self.remove}
        await exchange.answer(Answer(answer.status, answer.headers, json.dumps(kept).encode()))


class HeaderFlood(Fault):
    """The right answer under a heap of headers."""

    kind: Literal["header_flood"] = "header_flood"
    count: int = Field(default=1_000, ge=1)
    size: int = Field(default=1_000, ge=0)
    """Bytes of each value."""

    async def spoil(self, exchange: HttpExchange, answer: Answer) -> None:
        flood = [(b"x-flood-%d" % number, b"x" * self.size) for number in range(self.count)]
        await exchange.answer(Answer(answer.status, [*answer.headers, *flood], answer.body))


class BigBody(Fault):
    """The right answer in valid JSON, with a field of `megabytes` more."""

    kind: Literal["big_body"] = "big_body"
    megabytes: int = Field(default=300, ge=1)
    needs_socket = True

    async def spoil(self, exchange: HttpExchange, answer: Answer) -> None:
        head, tail = _padded(answer, b"|").body.split(b"|")
        pieces = self.megabytes * 1024 * 1024 // _PIECE
        await exchange.begin(answer, len(head) + pieces * _PIECE + len(tail))
        await exchange.write(head)
        for _ in range(pieces):
            if await exchange.gone_within(0):
                return
            await exchange.write(b"x" * _PIECE)
        await exchange.write(tail, more=False)


class EndlessBody(Fault):
    """An answer that starts well and does not end."""

    kind: Literal["endless_body"] = "endless_body"
    needs_socket = True

    async def spoil(self, exchange: HttpExchange, answer: Answer) -> None:
        await exchange.begin(answer, None)
        await exchange.write(_padded(answer, b"|").body.split(b"|")[0])
        end = asyncio.get_running_loop().time() + LONGEST
        while asyncio.get_running_loop().time() < end:
            if await exchange.gone_within(0):
                return
            await exchange.write(b"x" * _PIECE)
        await exchange.drop()


class Drip(Fault):
    """The right answer, one byte per `interval` seconds."""

    kind: Literal["drip"] = "drip"
    interval: float = Field(default=1, gt=0)
    needs_socket = True

    async def spoil(self, exchange: HttpExchange, answer: Answer) -> None:
        await exchange.begin(answer, len(answer.body))
        end = asyncio.get_running_loop().time() + LONGEST
        for sent in range(len(answer.body)):
            if await exchange.gone_within(self.interval):
                return
            if asyncio.get_running_loop().time() > end:
                await exchange.drop()
                return
            await exchange.write(answer.body[sent : sent + 1], more=sent + 1 < len(answer.body))


class GzipBomb(Fault):
    """A small gzip body that unpacks to valid JSON of `megabytes`."""

    kind: Literal["gzip_bomb"] = "gzip_bomb"
    megabytes: int = Field(default=300, ge=1)

    async def spoil(self, exchange: HttpExchange, answer: Answer) -> None:
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


class _Armed:
    """A rule with what is left of it."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.left = fault.times
        self._dice = random.Random(fault.seed)  # noqa: S311 - dice, not secrets

    def strikes(self, operation: Operation) -> bool:
        if operation != self.fault.operation or self.left == 0 or self._dice.random() >= self.fault.probability:
            return False
        if self.left is not None:
            self.left -= 1
        return True


class Faults:
    """The rules in force, in the order they were added; the first that strikes is the one."""

    def __init__(self) -> None:
        self._armed: list[_Armed] = []

    def add(self, *faults: Fault) -> None:
        """Put rules behind those in force."""
        self._armed += [_Armed(fault) for fault in faults]

    def clear(self) -> None:
        """Forget all rules."""
        self._armed.clear()

    def draw(self, operation: Operation) -> Fault | None:
        """The fault that strikes this request, if any; counts as one of its times."""
        armed = next((armed for armed in self._armed if armed.strikes(operation)), None)
        if armed is None:
            return None
        if armed.left == 0:
            self._armed.remove(armed)
        return armed.fault


def _padded(answer: Answer, padding: bytes) -> Answer:
    """`answer`, a JSON object, with one more field."""
    body = answer.body.rstrip()[:-1] + b',"padding":"' + padding + b'"}'
    return Answer(answer.status, answer.headers, body)


@lru_cache(maxsize=4)
def _bomb(megabytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    blank = b"x" * (1024 * 1024)
    parts = [packer.compress(b'{"padding":"'), *(packer.compress(blank) for _ in range(megabytes))]
    return b"".join([*parts, packer.compress(b'"}'), packer.flush()])
