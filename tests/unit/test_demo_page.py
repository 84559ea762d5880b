"""The demo page in process: what it serves, what it passes on, and its Content-Security-Policy."""

import re
import socket
from pathlib import Path
from typing import cast

import httpx
import pytest
from starlette.responses import PlainTextResponse

from app.cli.sandbox import network_url
from app.sandbox import demo
from app.sandbox.demo import ASSETS, LIVEKIT_CLIENT, LIVEKIT_CLIENT_INTEGRITY, DemoPage, content_security_policy
from app.sandbox.demo.qr import qr_svg


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
    assert f'data-livekit-client-integrity="{LIVEKIT_CLIENT_INTEGRITY}"' in answer.text
    assert "livekit.example: OneInbox is simulated" in answer.text


@pytest.mark.parametrize(
    ("agent", "serves_livekit", "says"),
    [
        (True, False, "its agent, on ws://127.0.0.1:7880, greets you"),
        (True, True, "its agent, on ws://127.0.0.1:7880, greets you"),
        (False, False, "No agent is in the room on ws://127.0.0.1:7880"),
    ],
)
async def test_page_says_who_answers(agent: bool, serves_livekit: bool, says: str) -> None:
    broker = PlainTextResponse("the broker")
    page = DemoPage(broker, "ws://127.0.0.1:7880", agent=agent, serves_livekit=serves_livekit)

    text = (await ask(page, "GET", "/")).text

    assert says in text
    assert (f'data-livekit-client="{LIVEKIT_CLIENT}"' in text) is not serves_livekit


async def test_page_for_other_devices_has_a_qr_code_of_its_address() -> None:
    page = DemoPage(PlainTextResponse("the broker"), phone_url="http://192.0.2.7:8000/")

    code = await ask(page, "GET", "/demo/phone.svg")

    assert code.headers["content-type"].startswith("image/svg+xml")
    assert code.text == qr_svg("http://192.0.2.7:8000/")
    assert "http://192.0.2.7:8000/" in (await ask(page, "GET", "/")).text


async def test_page_on_loopback_has_none(page: DemoPage) -> None:
    assert "phone" not in (await ask(page, "GET", "/")).text
    assert (await ask(page, "GET", "/demo/phone.svg")).text == "the broker"


def test_every_file_of_the_page_is_served() -> None:
    names = {path.name for path in Path(demo.__file__).parent.iterdir() if path.suffix in (".js", ".css", ".svg")}
    assert names == ASSETS.keys()


@pytest.mark.parametrize(
    "url", ["", "https://a.example", "wss://", "wss://a b", "wss://a;script-src *", "wss://[::1]:7880", "wss://a/b"]
)
def test_invalid_livekit_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="takes ws"):
        content_security_policy(url)


class Listener:
    """A listening socket, as far as its address is asked for."""

    def __init__(self, host: str) -> None:
        self.family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._host = host

    def getsockname(self) -> tuple[str, int]:
        return (self._host, 8000)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", None),
        ("::1", None),
        ("192.168.1.20", "http://192.168.1.20:8000/"),
        ("fd00::20", "http://[fd00::20]:8000/"),
    ],
)
def test_address_for_other_devices(host: str, url: str | None) -> None:
    assert network_url(cast("socket.socket", Listener(host))) == url


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_address_that_the_system_would_send_from(host: str) -> None:
    """What it is depends on the machine; loopback and the unspecified address would help no phone."""
    url = network_url(cast("socket.socket", Listener(host)))
    assert url is None or not re.search(r"127\.|//0\.0|\[::1?\]", url)
