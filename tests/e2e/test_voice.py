"""Calls that are heard: Chromium with a fake microphone, a real LiveKit server, and the emulator's agent."""

import os
import re
import subprocess
import time
import wave
from array import array
from collections.abc import Callable, Iterator
from math import pi, sin
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from app.sandbox.rooms import GREETING as AGENTS_WORDS
from tests.e2e.conftest import OpenPage, chromium, control, running_broker, running_sandbox, running_site
from tests.support.brokers import environ_of
from tests.support.livekit import LiveKit, livekit_server, running_oneinbox, running_server, signed
from tests.support.needs import NODE_MODULES, node
from tests.support.processes import ROOT, run
from tests.support.valkey import Valkey

pytestmark = [pytest.mark.voice, pytest.mark.timeout(180, func_only=True)]  # the first test builds the server

HERE = Path(__file__).parent / "voice"
PRINTED_BROKER = "http://127.0.0.1:8000"
GREETING = 784
"""Hz of the greeting's last note: on a busy machine the first may be over before the page listens."""
SPOKEN = 1200
"""Hz of the caller's tone."""
SILENCE = 0.01
"""RMS below which nothing is heard."""
EMPTY = 3
"""Seconds in which a room must be empty after its call has ended."""
LIVEKITS_OWN = (
    r"^could not createOffer with closed peer connection|^DataChannel error|status of 40[14]|^WebSocket|^Abort conn"
    r"|data channel '\w+' closed unexpectedly"
)
"""What livekit-client logs when a room is closed or refuses a token."""
SHORT_CALL = 6
PATIENCE = 30
RATE = 48_000
WORDS = {
    "by me": "The call has ended.",
    "operator": "The call was ended by the service.",
    "max-call-seconds": "The call has reached its longest time.",
}
CLIENTS = ("recipe", "hook", "element")
HTML = """<!doctype html><meta charset="utf-8"><title>{0}</title><link rel="icon" href="data:,">
<main>{1}</main><script type="module" src="{0}.js"></script>"""
BUTTONS = '<button id="talk">Talk</button><button id="end">Hang up</button><p id="state"></p>'
THE_ELEMENT = "document.querySelector('oneinbox-call')"
ELEMENT = "<oneinbox-call transcript></oneinbox-call>"


@pytest.fixture(scope="module")
def livekit() -> Iterator[LiveKit]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, whose microphone hears a tone that comes and goes: noise suppression eats a steady one."""
    tone = tmp_path_factory.mktemp("tone") / "tone.wav"
    with wave.open(str(tone), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        on = [int(12_000 * sin(2 * pi * SPOKEN * i / RATE)) for i in range(RATE // 4)]
        file.writeframes(array("h", (on + [0] * (RATE // 4)) * 4).tobytes())
    with chromium(
        f"--use-file-for-fake-audio-capture={tone}",
        "--allow-loopback-in-peer-connection",  # on a machine with no other network
        "--autoplay-policy=no-user-gesture-required",
    ) as launched:
        yield launched


@pytest.fixture(scope="module")
def oneinbox(livekit: LiveKit) -> Iterator[str]:
    with running_oneinbox(livekit.options()) as url:
        yield url


@pytest.fixture(scope="module")
def settings(shared_valkey: Valkey) -> dict[str, str]:
    """Settings of all brokers here: `calls stop` needs a shared store."""
    node("livekit-client")
    return {
        "BROKER_STORE_URL": shared_valkey.url,
        "BROKER_ALLOWED_ORIGINS": "http://127.0.0.1:*",
        "BROKER_LIVEKIT_CLIENT": str(NODE_MODULES / "livekit-client/dist/livekit-client.umd.js"),
    }


@pytest.fixture(scope="module")
def broker(oneinbox: str, settings: dict[str, str]) -> Iterator[str]:
    with running_broker(oneinbox, **settings) as (_, url):
        yield url


@pytest.fixture(scope="module")
def impatient_broker(oneinbox: str, settings: dict[str, str]) -> Iterator[str]:
    limits = {"BROKER_STORE_PREFIX": "impatient", "BROKER_MAX_CALL_SECONDS": str(SHORT_CALL)}
    with running_broker(oneinbox, **settings, **limits) as (_, url):
        yield url


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page for each of CLIENTS, at an origin of their own."""
    program = node("esbuild", "livekit-client", "react-dom")
    folder = tmp_path_factory.mktemp("site")
    client = ROOT / "app/client"
    for path in (*(client / "recipes").iterdir(), *client.glob("*.js"), *HERE.iterdir()):
        if path.name != "useCall.js":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "node_modules").symlink_to(NODE_MODULES)
    for name, source in (("recipe", "recipe.js"), ("hook", "hook.jsx")):
        options = ("--bundle", "--format=esm", "--jsx=automatic", "--log-level=warning", f"--outfile=out/{name}.js")
        command = [program, str(NODE_MODULES / "esbuild/bin/esbuild"), source, *options]
        subprocess.run(command, cwd=folder, check=True, timeout=120)
    out = folder / "out"
    (out / "recipe.html").write_text(HTML.format("recipe", BUTTONS))
    (out / "hook.html").write_text(HTML.format("hook", ""))
    (out / "element.js").write_text(f'import "{PRINTED_BROKER}/client.js";')
    (out / "element.html").write_text(HTML.format("element", ELEMENT))
    with running_site(out) as origin:
        yield origin


OpenClient = Callable[..., Page]


@pytest.fixture
def open_client(open_page: OpenPage, site: str) -> OpenClient:
    """Open a client's page, in front of a broker."""

    def opens(name: str, broker: str) -> Page:
        page = open_page(complaints_expected=LIVEKITS_OWN)

        def with_its_address(route: Route) -> None:
            answer = route.fetch()
            route.fulfill(response=answer, body=answer.text().replace(PRINTED_BROKER, broker))

        page.route(f"{site}/*.js", with_its_address)
        page.add_init_script(path=HERE / "measure.js")
        page.goto(f"{site}/{name}.html")
        return page

    return opens


def talk(page: Page) -> None:
    page.get_by_role("button", name="Talk").click()
    expect(page.get_by_text(re.compile(r"^(connected|You are connected\.)$"))).to_be_visible(timeout=PATIENCE * 1000)


def wait_until(page: Page, condition: str) -> None:
    """Wait until this expression is true. Playwright's own wait would need `unsafe-eval` of the page's policy."""
    deadline = time.monotonic() + PATIENCE
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, page.evaluate("JSON.stringify(heard.slice(-20))")
        page.wait_for_timeout(50)


def wait_to_hear(page: Page, hertz: float) -> None:
    """Wait until this tone is heard: a bin of the analyser is 6 Hz wide."""
    wait_until(page, f"heard.some(({{ rms, hertz }}) => rms > {SILENCE} && Math.abs(hertz - {hertz}) < 12)")


def room_of(oneinbox: str) -> str:
    """The newest call's room."""
    room: str = control(oneinbox, "calls")[0]["room_name"]
    return room


def assert_empty(livekit: LiveKit, room: str) -> None:
    deadline = time.monotonic() + EMPTY
    while who := livekit.participants(room):
        assert time.monotonic() < deadline, who
        time.sleep(0.05)  # between two questions


@pytest.mark.parametrize("client", CLIENTS)
def test_caller_hears_the_greeting_and_the_echo(
    client: str, open_client: OpenClient, broker: str, oneinbox: str
) -> None:
    page = open_client(client, broker)

    talk(page)

    wait_to_hear(page, GREETING)
    wait_to_hear(page, SPOKEN)
    assert control(oneinbox, "calls")[0]["status"] == "in_progress"
    assert page.evaluate("Math.max(...heard.map(({ rms }) => rms))") > 10 * SILENCE
    if client == "element":
        expect(page.locator("oneinbox-call li").first).to_contain_text("Hello, this is the sandbox.")
    page.get_by_role("button", name="Hang up").click()


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("by", "why"),
    [("page", "by me"), ("operator", "operator"), ("time", "max-call-seconds")],
    ids=["page", "operator", "time"],
)
def test_hang_up_empties_the_room(  # noqa: PLR0917 - fixtures
    client: str,
    by: str,
    why: str,
    open_client: OpenClient,
    broker: str,
    impatient_broker: str,
    oneinbox: str,
    livekit: LiveKit,
    settings: dict[str, str],
    tmp_path: Path,
) -> None:
    page = open_client(client, impatient_broker if by == "time" else broker)
    talk(page)
    wait_to_hear(page, GREETING)
    room = room_of(oneinbox)
    assert len(livekit.participants(room) or []) == 2

    match by:
        case "page":
            page.get_by_role("button", name="Hang up").click()
        case "operator":
            stopped = run("calls", "stop", "--all", cwd=tmp_path, environ=environ_of(oneinbox, settings))
            assert stopped.code == 0, stopped
        case "time":
            page.wait_for_timeout(SHORT_CALL * 1000 - 2000)

    said = WORDS[why] if client == "element" else f"ended: {why}"
    expect(page.locator("body")).to_contain_text(said, timeout=PATIENCE * 1000)
    assert_empty(livekit, room)


def expired(started: dict[str, Any]) -> dict[str, Any]:
    """The answer with a token that was good a minute ago."""
    claims = jwt.decode(started["participant_token"], options={"verify_signature": False})
    return {**started, "participant_token": signed(claims | {"nbf": 0, "exp": int(time.time()) - 60})}


def ended(started: dict[str, Any], call: str, livekit: LiveKit) -> dict[str, Any]:
    """The same answer, once the call has ended."""
    httpx.post(f"{call}/stop", timeout=PATIENCE).raise_for_status()
    room = jwt.decode(started["participant_token"], options={"verify_signature": False})["video"]["room"]
    deadline = time.monotonic() + EMPTY
    while livekit.participants(room) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)  # between two questions
    return started


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("token", ["expired", "ended"])
def test_refused_token_is_told_in_words(  # noqa: PLR0917 - fixtures
    client: str, token: str, open_client: OpenClient, broker: str, oneinbox: str, livekit: LiveKit
) -> None:
    page = open_client(client, broker)
    given: list[str] = []

    def spoiled(route: Route) -> None:
        answer = route.fetch()
        started = answer.json()
        call = broker + answer.headers["location"]
        started = expired(started) if token == "expired" else ended(started, call, livekit)
        given.append(started["participant_token"])
        route.fulfill(response=answer, json=started)

    page.route(f"{broker}/session", spoiled)
    page.get_by_role("button", name="Talk").click()

    expect(page.get_by_text("The call could not be joined.")).to_be_visible(timeout=PATIENCE * 1000)
    assert given[0] not in page.content()
    if client == "element":
        told = page.evaluate(f"(({{ error }}) => [error.message, error.detail, String(error.cause)])({THE_ELEMENT})")
        assert "eyJ" not in "".join(told)
    assert_empty(livekit, room_of(oneinbox))


def test_token_used_twice_is_told_in_words(open_client: OpenClient, broker: str, oneinbox: str) -> None:
    first, second = open_client("element", broker), open_client("recipe", broker)
    talk(first)
    call = first.evaluate(f"(({{ call }}) => ({{ url: call.serverUrl, token: call.participantToken }}))({THE_ELEMENT})")

    second.evaluate("({ url, token }) => join(url, token)", call)

    expect(first.get_by_text("This call goes on in another window.")).to_be_visible(timeout=PATIENCE * 1000)
    wait_to_hear(second, SPOKEN)
    assert call["token"] not in first.content()
    assert control(oneinbox, "calls")[0]["status"] == "in_progress"


@pytest.fixture
def talking_sandbox(tmp_path: Path, settings: dict[str, str]) -> Iterator[str]:
    """`sandbox --livekit`, as a newcomer runs it, without a network."""
    (tmp_path / "livekit-server").symlink_to(livekit_server())
    environ = {
        "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]),
        "BROKER_LIVEKIT_CLIENT": settings["BROKER_LIVEKIT_CLIENT"],
    }
    with running_sandbox("--livekit", **environ) as (process, url):
        yield url
        assert process.terminate() == 0


def test_sandbox_page_talks(talking_sandbox: str, open_page: OpenPage) -> None:
    page = open_page(complaints_expected=LIVEKITS_OWN)
    page.add_init_script(path=HERE / "measure.js")
    page.goto(talking_sandbox)
    words = page.locator("#words li")

    page.get_by_role("button", name="Talk").click()

    expect(words.first).to_have_text(
        re.compile(r"^Agent\s*Hello,( this| $)"), timeout=PATIENCE * 1000
    )  # while it speaks
    expect(words.first).to_contain_text(AGENTS_WORDS)
    wait_to_hear(page, SPOKEN)
    expect(words.nth(1)).to_contain_text("You")
    page.get_by_role("button", name="Mute").click()
    wait_until(page, f"heard.slice(-25).every(({{ rms }}) => rms < {SILENCE})")  # the last echo is over
    page.get_by_role("button", name="Mute").click()
    page.evaluate("heard.length = 0")
    wait_to_hear(page, SPOKEN)
    page.get_by_role("button", name="Hang up").click()
    expect(page.locator("oneinbox-call")).to_contain_text("The call has ended.")
