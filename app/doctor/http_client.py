"""Requests to a server that may be anything; only harmless parts of its answers are kept."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from app.config.surroundings import open_client

SECONDS = 5.0
"""For one answer."""
MAX_ANSWER = 64 * 1024
AT_ONCE = 6
ALWAYS = (("Accept", "application/json"), ("Accept-Encoding", "identity"))
SLUG = re.compile(r"[a-z-]{1,40}")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. `status`: 0 if there is none, and `failure` says why. `body`: its JSON; None if it is none."""

    status: int
    headers: httpx.Headers
    body: Any = None
    failure: str = ""

    @property
    def slug(self) -> str:
        """The broker's problem type; empty if it is none of ours."""
        kind = self.body.get("type") if isinstance(self.body, dict) else None
        last = kind.rpartition("/")[2] if isinstance(kind, str) and "/problems/" in kind else ""
        return last if SLUG.fullmatch(last) else ""

    def __str__(self) -> str:
        """Return status and slug: none of the server's own words, which may be anything."""
        return f"{self.status} {self.slug}".rstrip() if self.status else f"no answer ({self.failure})"


class Client:
    """Send requests to one deployment. `base_url`: its public URL, without a trailing slash."""

    def __init__(self, base_url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.base_url = base_url
        self._prefix = urlsplit(base_url).path
        self._client = open_client(
            base_url, transport=transport, timeout=SECONDS, headers={"User-Agent": "oneinbox-broker doctor"}
        )
        self._room = asyncio.Semaphore(AT_ONCE)

    async def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
        content: bytes | None = None,
        *,
        chunked: bool = False,
        base_url: str | None = None,
    ) -> Answer:
        """Send one request, with `path` exactly as given. Never raises.

        `headers`: given as pairs, one may come twice. `chunked`: the body goes without its length. `base_url`: another
        one of the same host.
        """
        request = self._client.build_request(
            method,
            base_url or self.base_url,
            headers=[*ALWAYS, *(headers.items() if isinstance(headers, Mapping) else headers or ())],
            content=_chunks(content) if chunked and content else content,
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
            self._client.cookies.clear()  # no request depends on an earlier answer
        return Answer(response.status_code, response.headers, _json(raw))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()


async def _chunks(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 4096):
        yield content[start : start + 4096]


async def _read(response: httpx.Response) -> bytes:
    """Return the body undecoded, or its beginning."""
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
