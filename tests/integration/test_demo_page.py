"""The demo page as the sandbox process serves it, without a browser."""

import json
import re
from pathlib import Path

import httpx
import jwt
import pytest

from app.sandbox.demo import ASSETS, LIVEKIT_CLIENT
from tests.support.processes import run, running, serving
from tests.support.shapes import assert_problem, assert_session

pytestmark = pytest.mark.process

LIVEKIT = ("--livekit-url", "ws://127.0.0.1:17880", "--livekit-key", "key_of_mine")
SECRET = "livekit_planted_5b7e90c1d2f34a68"


def policy_of(response: httpx.Response) -> dict[str, list[str]]:
    """A Content-Security-Policy: the sources of each directive."""
    directives = [each.split() for each in response.headers["content-security-policy"].split("; ")]
    return {name: sources for name, *sources in directives}


def test_sandbox_serves_the_page_and_the_broker(tmp_path: Path) -> None:
    with running("sandbox", "--port", "0", cwd=tmp_path, environ={}) as process:
        url = process.wait_for("Open ").split()[1]
        assert url.endswith("/")
        with httpx.Client(base_url=url, timeout=10) as client:
            page = client.get("/")
            assert page.status_code == 200
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            assert page.headers["cache-control"] == "no-store"
            assert page.headers["x-content-type-options"] == "nosniff"
            assert "livekit.umd" not in page.text
            assert "jsdelivr" not in page.text
            assert policy_of(page) == {
                "default-src": ["'none'"],
                "script-src": ["'self'"],
                "style-src": ["'self'"],
                "img-src": ["'self'"],
                "connect-src": ["'self'"],
                "base-uri": ["'none'"],
                "form-action": ["'none'"],
                "frame-ancestors": ["'none'"],
            }
            for name, media_type in ASSETS.items():
                asset = client.get(f"/demo/{name}")
                assert asset.status_code == 200
                assert asset.headers["content-type"].startswith(media_type)
                assert asset.headers["x-content-type-options"] == "nosniff"
            assert set(re.findall(r'(?:src|href)="(/demo/[^"]*)"', page.text)) <= {f"/demo/{name}" for name in ASSETS}
            assert client.head("/").status_code == 200
            assert_session(client.post("/session"))
            for path in ("/demo", "/demo/", "/demo/index.html", "/demo/../cli.py", "/demo/__init__.py"):
                assert_problem(client.get(path), "not-found")
            assert_problem(client.post("/"), "not-found")
        assert process.terminate() == 0


HOSTS: dict[str, dict[str, str]] = {
    "loopback": {"Host": "localhost:{port}", "Origin": "http://localhost:{port}"},
    "every address": {"Host": "0.0.0.0:{port}", "Origin": "http://0.0.0.0:{port}"},
    "every IPv6 address": {"Host": "[::]:{port}", "Origin": "http://[::]:{port}"},
    "an address of the network": {"Host": "192.168.1.20:{port}", "Origin": "http://192.168.1.20:{port}"},
    "a link-local address": {"Host": "[fe80::1]:{port}", "Origin": "http://[fe80::1]:{port}"},
    "a name of the network": {"Host": "Laptop.local:{port}", "Origin": "http://laptop.local:{port}"},
    "a container's name": {"Host": "sandbox", "Origin": "http://sandbox"},
    "a tunnel that keeps the host": {"Host": "ab12.ngrok.example", "Origin": "https://ab12.ngrok.example"},
    "a tunnel that says the port": {"Host": "ab12.tunnel.example:443", "Origin": "https://ab12.tunnel.example"},
    "a forwarder that rewrites the host": {
        "Host": "localhost:{port}",
        "X-Forwarded-Host": "name-8000.app.github.example",
        "Origin": "https://name-8000.app.github.example",
    },
}
OTHER_SITES: dict[str, dict[str, str]] = {
    "another host": {"Host": "192.168.1.20:{port}", "Origin": "http://192.168.1.21:{port}"},
    "another port": {"Host": "192.168.1.20:{port}", "Origin": "http://192.168.1.20:1"},
    "no origin at all": {"Host": "192.168.1.20:{port}", "Origin": "null"},
    "another scheme": {"Host": "evil.example", "Origin": "chrome-extension://evil.example"},
    "a part of the name": {"Host": "voice.example", "Origin": "https://evil.voice.example"},
}


def asked_as(url: str, headers: dict[str, str]) -> httpx.Response:
    """A session that a page at some address asks for; `{port}` is the sandbox's."""
    port = str(httpx.URL(url).port)
    given = {name: value.replace("{port}", port) for name, value in headers.items()}
    return httpx.post(f"{url}session", headers=given, timeout=10)


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_the_page_works_under_any_host(host: str, tmp_path: Path) -> None:
    with running("sandbox", "--host", host, "--port", "0", cwd=tmp_path, environ={}) as process:
        url = process.wait_for("Open ").split()[1]
        assert url.startswith("http://127.0.0.1:")
        for name, headers in HOSTS.items():
            answer = asked_as(url, headers)
            assert answer.status_code == 201, name
            assert answer.headers["access-control-allow-origin"] == headers["Origin"].replace(
                "{port}", str(httpx.URL(url).port)
            )
        for name, headers in OTHER_SITES.items():
            assert asked_as(url, headers).status_code == 403, name


def test_a_broker_does_not_believe_its_host(tmp_path: Path) -> None:
    settings = {"ONEINBOX_API_KEY": "oi_sk_integration", "ONEINBOX_AGENT_ID": "agt_1"}
    with serving(tmp_path, settings) as (_, url):
        for name, headers in HOSTS.items():
            if name != "loopback":
                assert asked_as(f"{url}/", headers).status_code == 403, name


@pytest.mark.parametrize("command", ["sandbox", "emulator"])
@pytest.mark.parametrize(("host", "opens"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_what_is_printed_can_be_opened(command: str, host: str, opens: str, tmp_path: Path) -> None:
    with running(command, "--host", host, "--port", "0", cwd=tmp_path, environ={}) as process:
        line = process.wait_for("http://")
        url = re.search(r"http://[^/;. ]+(?:\.[0-9]+){0,3}(?::[0-9]+)?", line)
        assert url is not None
        assert url[0].startswith(f"http://{opens}:")
        path = "/" if command == "sandbox" else "/v1/usage"
        assert httpx.get(url[0] + path, timeout=10).status_code in (200, 401)


def test_broker_alone_has_no_demo_page(tmp_path: Path) -> None:
    settings = {"ONEINBOX_API_KEY": "oi_sk_integration", "ONEINBOX_AGENT_ID": "agt_1"}
    with serving(tmp_path, settings) as (_, url), httpx.Client(base_url=url, timeout=10) as client:
        for path in ("/", *(f"/demo/{name}" for name in ASSETS)):
            assert_problem(client.get(path), "not-found")


@pytest.mark.parametrize("given", ["option", "environment"])
def test_sandbox_signs_tokens_for_a_real_livekit_server(given: str, tmp_path: Path) -> None:
    arguments = (*LIVEKIT, "--livekit-secret", SECRET) if given == "option" else LIVEKIT
    environ = {} if given == "option" else {"LIVEKIT_API_SECRET": SECRET}
    with running("sandbox", "--port", "0", *arguments, cwd=tmp_path, environ=environ) as process:
        url = process.wait_for("Open ").split()[1]
        with httpx.Client(base_url=url, timeout=10) as client:
            page, answer = client.get("/"), client.post("/session")
        assert process.terminate() == 0

    assert_session(answer)
    session = answer.json()
    assert session["server_url"] == "ws://127.0.0.1:17880"
    claims = jwt.decode(session["participant_token"], SECRET, algorithms=["HS256"], issuer="key_of_mine")
    assert claims["video"].keys() == {"room", "roomJoin", "canPublish", "canSubscribe"}
    assert claims["video"]["roomJoin"] is True
    assert claims["sub"]
    policy = policy_of(page)
    assert policy["script-src"] == ["'self'", LIVEKIT_CLIENT]
    assert policy["connect-src"] == ["'self'", "ws://127.0.0.1:17880", "http://127.0.0.1:17880"]
    assert SECRET not in page.text + json.dumps(process.out + process.err)


WRONG = {
    "no-secret": LIVEKIT,
    "no-key": ("--livekit-url", "ws://127.0.0.1:7880", "--livekit-secret", SECRET),
    "no-url": ("--livekit-key", "devkey", "--livekit-secret", SECRET),
    **{
        f"url-{name}": ("--livekit-url", url, "--livekit-key", "devkey", "--livekit-secret", SECRET)
        for name, url in {
            "http": "http://127.0.0.1:7880",
            "no-host": "ws://",
            "path": "ws://127.0.0.1:7880/rtc",
            "second-directive": "ws://a.example;script-src *",
            "any-host": "ws://*",
            "quotes": 'ws://a.example"><script>',
        }.items()
    },
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
def test_invalid_livekit_options_are_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run("sandbox", "--port", "0", *arguments, cwd=tmp_path, environ={})

    assert done.code == 2
    assert done.err.startswith("--livekit-url")
    assert done.err.count("\n") == 1
    assert SECRET not in done.err + done.out
