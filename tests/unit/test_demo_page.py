"""The demo page in process: what it serves, what it passes on, and its Content-Security-Policy."""

import httpx
import pytest
from starlette.responses import PlainTextResponse

from app.sandbox.demo import ASSETS, LIVEKIT_CLIENT, LIVEKIT_CLIENT_INTEGRITY, DemoPage, content_security_policy


async def ask(page: DemoPage, method: str, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(page), base_url="http://sandbox") as client:
        return await client.request(method, path)


@pytest.fixture
def page() -> DemoPage:
    return DemoPage(PlainTextResponse("the broker"))


@pytest.mark.parametrize(("path", "media_type"), [("/", "text/html"), *((f"/demo/{n}", t) for n, t in ASSETS.items())])
async def test_page_and_its_files_are_served(page: DemoPage, path: str, media_type: str) -> None:
    answer = await ask(page, "GET", path)

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(media_type)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (await ask(page, "HEAD", path)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/"), ("GET", "/session"), ("GET", "/demo"), ("GET", "/demo/index.html"), ("GET", "/demo/..%2Fcli.py")],
)
async def test_other_requests_reach_the_broker(page: DemoPage, method: str, path: str) -> None:
    assert (await ask(page, method, path)).text == "the broker"


async def test_policy_allows_the_given_livekit_server_and_its_client() -> None:
    answer = await ask(DemoPage(PlainTextResponse("the broker"), "wss://livekit.example"), "GET", "/")

    policy = answer.headers["content-security-policy"]
    assert f"script-src 'self' {LIVEKIT_CLIENT};" in policy
    assert "connect-src 'self' wss://livekit.example https://livekit.example;" in policy
    assert LIVEKIT_CLIENT_INTEGRITY in answer.text


@pytest.mark.parametrize(
    "url", ["", "https://a.example", "wss://", "wss://a b", "wss://a;script-src *", "wss://[::1]:7880", "wss://a/b"]
)
def test_invalid_livekit_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="takes ws"):
        content_security_policy(url)
