"""Requests to a server that may be anything, and answers of which only harmless parts are kept."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

SECONDS = 5.0
"""For one answer."""
MAX_ANSWER = 64 * 1024
AT_ONCE = 6
SLUG = re.compile(r"[a-z-]{1,40}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `status`: 0 where nothing did, and `failure` says why. `body`: its JSON; None: it is none."""

    status: int
    headers: httpx.Headers
    body: Any = None
    failure: str = ""

    @property
    def slug(self) -> str:
        """Which problem it is; empty where it is none of ours."""
        kind = self.body.get("type") if isinstance(self.body, dict) else None
        last = kind.rpartition("/")[2] if isinstance(kind, str) and "/problems/" in kind else ""
        return last if SLUG.fullmatch(last) else ""

    def __str__(self) -> str:
        """Without a word of the server's own, which may be anything."""
        if not self.status:
            return f"no answer ({self.failure})"
        return f"{self.status} {self.slug}".rstrip()


class Asker:
    """Asks one deployment. `base_url`: its public URL, without a slash at the end; nothing is sent anywhere else."""

    def __init__(self, base_url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.base_url = base_url
        self._prefix = urlsplit(base_url).path
        self._client = httpx.AsyncClient(
            transport=transport,
            timeout=SECONDS,
            follow_redirects=False,
            headers={"User-Agent": "oneinbox-broker doctor"},
        )
        self._room = asyncio.Semaphore(AT_ONCE)

    async def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        *,
        chunked: bool = False,
        base_url: str | None = None,
    ) -> Answer:
        """Send one request; `path` goes out as it stands, dots and all. Never raises.

        `chunked`: send the body without saying its length. `base_url`: another one of the same host.
        """
        body = _in_chunks(content) if chunked and content is not None else content
        request = self._client.build_request(
            method,
            base_url or self.base_url,
            headers={"Accept": "application/json", "Accept-Encoding": "identity", **(headers or {})},
            content=body,
            extensions={"target": f"{self._prefix}{path}".encode()},
        )
        try:
            async with self._room, asyncio.timeout(SECONDS):
                response = await self._client.send(request, stream=True)
                try:
                    raw = await _read(response)
                finally:
                    await response.aclose()
        except (httpx.HTTPError, TimeoutError) as error:
            return Answer(0, httpx.Headers(), failure=type(error).__name__)
        finally:
            self._client.cookies.clear()  # no request depends on what an earlier one was given
        return Answer(response.status_code, response.headers, _json(raw))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()


async def _in_chunks(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 4096):
        yield content[start : start + 4096]


async def _read(response: httpx.Response) -> bytes:
    """The body as it came, or its beginning."""
    raw = bytearray()
    async for chunk in response.aiter_raw():
        raw += chunk
        if len(raw) > MAX_ANSWER:
            break
    return bytes(raw)


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None
