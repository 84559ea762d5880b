"""The sandbox's page in a real browser."""

import base64
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
from playwright.sync_api import Locator, Page, expect

from app.problems import KINDS
from app.sandbox.demo import LIVEKIT_CLIENT, LIVEKIT_CLIENT_INTEGRITY
from tests.e2e.conftest import OpenPage, control, running_sandbox, url_in
from tests.support.needs import NODE_MODULES, node, program
from tests.support.processes import Process

pytestmark = pytest.mark.browser

PATIENCE = 20_000
"""Milliseconds; enough on a busy machine."""
REFUSED = r"Failed to load resource: the server responded with a status of 4(03|04|22|29)"
AMBER = {"light": "rgb(138, 75, 0)", "dark": "rgb(240, 179, 90)"}
FAILING_MICROPHONE = "navigator.mediaDevices.getUserMedia = async () => {{ throw new DOMException('', '{}'); }};"

expect.set_options(timeout=PATIENCE)


@dataclass(frozen=True)
class Sandbox:
    """A running sandbox. `oneinbox`: the URL of its emulator."""

    process: Process
    url: str
    oneinbox: str

    def calls(self) -> list[dict[str, Any]]:
        """Return all calls at the emulator, newest first."""
        calls: list[dict[str, Any]] = control(self.oneinbox, "calls")
        return calls

    def change_call(self, call: dict[str, Any], **change: Any) -> None:
        """Change a call at the emulator."""
        control(self.oneinbox, f"calls/{call['id']}", change)

    def hold_call(self) -> dict[str, Any]:
        """Keep the newest call in progress, however slow this machine is; return it."""
        call = self.calls()[0]
        self.change_call(call, status="in_progress")
        return call


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A new sandbox, with all calls left. Request it before `open_page`, so that pages close first."""
    with running_sandbox() as (process, url):
        yield Sandbox(process, url, url_in(process.wait_for("OneInbox")))


@pytest.fixture(scope="module")
def livekit_sandbox() -> Iterator[str]:
    """The URL of a sandbox that signs tokens for a LiveKit server that does not run."""
    options = ("--livekit-url", "ws://127.0.0.1:1", "--livekit-key", "devkey", "--livekit-secret", "secret")
    with running_sandbox(*options) as (_, url):
        yield url


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core, the accessibility checker."""
    node("axe-core")
    return (NODE_MODULES / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


def assert_accessible(page: Page, axe: str) -> None:
    """Check that axe-core finds no violation and that the page does not scroll sideways."""
    page.evaluate(axe)
    report = page.evaluate("axe.run()")
    assert report["passes"]
    assert [(found["id"], [each["html"] for each in found["nodes"]]) for found in report["violations"]] == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def button(page: Page, name: str) -> Locator:
    """Return the button with exactly this name."""
    return page.get_by_role("button", name=name, exact=True)


def talk(page: Page, sandbox: Sandbox) -> dict[str, Any]:
    """Press Talk and keep the call in progress; return it."""
    button(page, "Talk").click()
    expect(button(page, "Hang up")).to_be_visible()
    return sandbox.hold_call()


@pytest.mark.parametrize("width", [280, 360, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_is_accessible_and_fits(
    scheme: str, width: int, sandbox: Sandbox, open_page: OpenPage, axe: str
) -> None:
    page = open_page(
        sandbox.url,
        complaints_expected=REFUSED,
        color_scheme=scheme,
        reduced_motion="reduce",  # axe would measure the contrast of a colour in transition
        viewport={"width": width, "height": 900 if width == 1440 else 800},
    )
    screens = {280: 2.5, 360: 2, 1440: 1}[width]

    def assert_good() -> None:
        assert_accessible(page, axe)
        assert page.evaluate("document.documentElement.scrollHeight / innerHeight") <= screens

    expect(button(page, "Talk")).to_be_visible()
    assert_good()

    talk(page, sandbox)
    expect(page.get_by_role("list", name="Transcript")).to_contain_text("How can I help you?")
    for tab in ("Token", "Events", "Code", "Request"):
        page.get_by_role("tab", name=tab).click()
        assert_good()

    button(page, "Hang up").click()
    expect(button(page, "Talk again")).to_be_visible()
    assert_good()

    button(page, "send a bad request").click()
    expect(page.locator("#provoked")).not_to_be_empty()
    assert_good()

    button(page, "ask too often").click()
    expect(page.get_by_role("meter")).to_have_attribute("aria-valuenow", "0")
    expect(button(page, "ask too often")).to_be_enabled()
    button(page, "Talk again").click()
    expect(page.get_by_text("You have called too often")).to_have_css("color", AMBER[scheme])
    assert_good()


def test_call_is_spoken_and_shown_on_the_wire(sandbox: Sandbox, open_page: OpenPage) -> None:
    page = open_page(sandbox.url)
    expect(page.locator("#page-knows")).to_have_text("the broker’s address")

    call = talk(page, sandbox)

    words = page.get_by_role("list", name="Transcript").get_by_role("listitem")
    expect(words).to_have_text([re.compile("^AgentHello, this is")])
    expect(page.locator("#request")).to_have_text(
        re.compile(r'^POST /session\n.*Idempotency-Key: [0-9a-f]{32}\n\n{"variables":{"customer_name":"Ada"}}$', re.S)
    )
    expect(page.locator("#answer")).to_contain_text('"server_url": "ws://127.0.0.1:7880"')
    expect(page.locator("#wire-broker")).to_have_text(re.compile(r"^POST /session201 · \d+ ms$"))
    expect(page.locator("#wire-oneinbox")).to_have_text("POST /v1/calls/web201")
    expect(page.locator("#page-knows")).to_contain_text("a token for one room")
    expect(page.locator("#oneinbox-knows")).to_have_text("the agent, and the call: in progress")
    expect(page.get_by_role("meter", name="Calls left")).to_have_attribute("aria-valuetext", "9 of 10 calls left")
    assert call["variables"] == {"customer_name": "Ada"}
    token = page.locator("#token").text_content()
    assert token is not None
    assert jwt.decode(token, options={"verify_signature": False})["video"]["room"] == call["room_name"]
    expect(page.locator("#claims")).to_contain_text(call["room_name"])

    button(page, "Hang up").click()

    expect(button(page, "Talk again")).to_be_visible()
    expect(page.locator("#request")).to_contain_text("/stop")
    expect(page.locator("#events")).to_contain_text('status: "completed"')
    expect(page.locator("#events")).to_contain_text("We open at nine.")  # the transcript, from OneInbox
    assert [each["running"] for each in sandbox.calls()] == [False]


def test_call_that_ends_by_itself_was_spoken_line_by_line(sandbox: Sandbox, open_page: OpenPage) -> None:
    page = open_page(sandbox.url)

    button(page, "Talk").click()

    expect(button(page, "Talk again")).to_be_visible()
    lines = ("AgentHello, this is the sandbox. How can I help you?", "YouWhen do you open tomorrow?")
    words = page.get_by_role("list", name="Transcript").get_by_role("listitem")
    expect(words).to_have_text([*lines, "AgentWe open at nine.", "YouThank you, goodbye."])
    expect(page.get_by_role("timer")).to_have_text(re.compile(r"^0:(09|1\d)$"))


CODE = {
    "Tag": ['<oneinbox-call agent="sales"', """variables='{"plan": "it&#39;s"}'"""],
    "JS": ['agent: "sales"', """variables: { plan: "it's" }""", "broker.talk("],
    "React": ["""start({ agent: "sales", variables: { plan: "it's" } })""", "useCall(broker)"],
    "curl": ["""-d '{"agent": "sales", "variables": {"plan": "it'\\''s"}}'""", "/session"],
}


@pytest.mark.parametrize("language", CODE)
def test_code_follows_the_inputs(sandbox: Sandbox, open_page: OpenPage, language: str) -> None:
    page = open_page(sandbox.url)
    button(page, language).click()

    page.get_by_label("Agent", exact=True).fill("sales")
    page.get_by_label("Variable", exact=True).fill("plan")
    page.get_by_label("Value", exact=True).fill("it's")

    for part in CODE[language]:
        expect(page.locator("#code")).to_contain_text(part)


@pytest.mark.parametrize("where", ["code", "request"])
def test_copied_curl_line_starts_a_call(sandbox: Sandbox, open_page: OpenPage, where: str) -> None:
    program("curl", "curl")
    page = open_page(sandbox.url, permissions=["clipboard-read", "clipboard-write", "microphone"])
    if where == "code":
        button(page, "curl").click()
        button(page, "Copy").click()
    else:
        talk(page, sandbox)
        button(page, "Copy as curl").click()
    expect(button(page, "Copied")).to_be_visible()

    line = page.evaluate("navigator.clipboard.readText()")

    done = subprocess.run(["bash", "-c", f"{line} --silent"], capture_output=True, text=True, timeout=30, check=True)
    assert "HTTP/1.1 201" in done.stdout
    assert sandbox.calls()[0]["variables"] == {"customer_name": "Ada"}


def test_the_demos_code_runs_on_a_page_of_its_own(sandbox: Sandbox, open_page: OpenPage) -> None:
    """What the Code tab shows as a tag is a whole page's script."""
    page = open_page(sandbox.url)
    tag = page.locator("#code").text_content()
    page.route(
        "**/mine", lambda route: route.fulfill(content_type="text/html", body=f"<link rel=icon href=data:,>{tag}")
    )

    page.goto(f"{sandbox.url}/mine")
    button(page, "Talk").click()

    expect(button(page, "Hang up")).to_be_visible()
    assert sandbox.calls()[0]["variables"] == {"customer_name": "Ada"}


REFUSALS = {
    "agent": ("Agent", "sales", "403", "agent-not-allowed"),
    "name": ("Variable", "two words", "422", "invalid-request"),
    "value": ("Value", "{{secret}}", "422", "invalid-request"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refused_talk_says_so_beside_its_button(sandbox: Sandbox, open_page: OpenPage, refusal: str) -> None:
    label, value, status, slug = REFUSALS[refusal]
    page = open_page(sandbox.url, complaints_expected=REFUSED, color_scheme="light")
    page.get_by_label(label, exact=True).fill(value)

    button(page, "Talk").click()

    error = page.locator("oneinbox-call").get_by_role("alert")
    expect(error).not_to_be_empty()
    expect(error).to_have_css("color", AMBER["light"])
    expect(button(page, "Talk")).to_be_enabled()
    expect(page.locator("#status")).to_have_text(status)
    expect(page.locator("#answer")).to_contain_text(f"/problems/{slug}")
    expect(page.locator("#wire-oneinbox")).to_contain_text("not asked")
    assert page.request.get(page.get_by_role("link", name=f"What {slug} means").evaluate("link => link.href")).ok
    assert sandbox.calls() == []


def test_provoked_refusals_are_told_beside_their_buttons(sandbox: Sandbox, open_page: OpenPage) -> None:
    page = open_page(complaints_expected=REFUSED)
    page.clock.install()
    page.goto(sandbox.url)
    provoked = page.locator("#provoked")

    button(page, "send a bad request").click()
    expect(provoked).to_have_text(f"{KINDS['invalid-request'].title}. The answer says what is wrong.")
    expect(page.locator("#status")).to_have_text("422")
    expect(page.locator("#answer")).to_contain_text("customer_name")

    button(page, "ask too often").click()
    expect(provoked).to_have_text(re.compile(rf"^{KINDS['rate-limited'].title}\. Try again in \d+ s\.$"))
    expect(page.locator("#status")).to_have_text("200")  # its calls are hung up
    expect(page.locator("#budget")).to_have_text(re.compile(r"^0 of 10 calls left · next one back in \d+ s$"))
    calls = sandbox.calls()
    assert len(calls) >= 10
    assert not [each for each in calls if each["running"]]

    page.clock.fast_forward(31_000)
    expect(page.locator("#budget")).to_have_text("10 of 10 calls left in any 30 s")
    expect(provoked).to_have_text("You can call again now.")


@pytest.mark.parametrize("failure", ["NotAllowedError", "NotFoundError"])
def test_without_a_microphone_the_second_press_listens(sandbox: Sandbox, open_page: OpenPage, failure: str) -> None:
    page = open_page()
    page.add_init_script(FAILING_MICROPHONE.format(failure))
    page.goto(sandbox.url)

    button(page, "Talk").click()

    expect(page.locator("oneinbox-call").get_by_role("alert")).to_contain_text("microphone")
    expect(page.locator("#trouble")).to_have_text("Talk again to listen without one.")
    assert sandbox.calls() == []

    button(page, "Talk").click()

    expect(button(page, "Hang up")).to_be_visible()
    assert len(sandbox.calls()) == 1


def test_lost_broker_is_said_and_the_call_may_be_ended_later(sandbox: Sandbox, open_page: OpenPage, axe: str) -> None:
    page = open_page(
        complaints_expected=r"net::ERR_(CONNECTION|INCOMPLETE|EMPTY)|status of 503", reduced_motion="reduce"
    )
    page.clock.install()
    page.goto(sandbox.url)
    talk(page, sandbox)

    sandbox.process.terminate()

    expect(page.locator("#trouble")).to_have_text(re.compile("does not answer. This call ends in"))
    page.clock.fast_forward(11_000)
    expect(page.locator("#trouble")).to_contain_text("The broker is gone")
    for _ in range(4):  # the client asks again before it gives up
        page.clock.fast_forward(10_000)
    expect(page.locator("oneinbox-call").get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.locator("#status")).to_have_text("lost")
    expect(button(page, "Hang up")).to_be_visible()
    assert_accessible(page, axe)


def test_call_that_the_broker_has_forgotten_is_said_and_ends(sandbox: Sandbox, open_page: OpenPage) -> None:
    page = open_page(complaints_expected=REFUSED)
    answer = {
        "status": 404,
        "content_type": "application/problem+json",
        "body": '{"type": "/problems/not-found", "title": "Not found"}',
    }
    page.route("**/events", lambda route: route.fulfill(**answer))
    page.goto(sandbox.url)

    button(page, "Talk").click()

    expect(button(page, "Talk again")).to_be_visible()


def test_reloaded_page_goes_back_to_its_call(sandbox: Sandbox, open_page: OpenPage) -> None:
    page = open_page(sandbox.url)
    call = talk(page, sandbox)
    expect(page.locator("#oneinbox-knows")).to_contain_text("in progress")

    page.reload()
    button(page, "Back to the call").click()

    expect(button(page, "Hang up")).to_be_visible()
    assert [each["id"] for each in sandbox.calls()] == [call["id"]]


def test_page_works_with_the_keyboard_alone(sandbox: Sandbox, open_page: OpenPage) -> None:
    page = open_page(sandbox.url, complaints_expected=REFUSED)

    def focused() -> Locator:
        return page.locator(":focus").last

    def tab_to(name: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            assert focused().evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
            if (focused().text_content() or "").strip() == name:
                return
        raise AssertionError(f"Tab does not lead to {name!r}")

    tab_to("Skip to the call")
    page.keyboard.press("Enter")
    tab_to("Talk")
    page.keyboard.press("Enter")
    expect(button(page, "Hang up")).to_be_focused()  # in place
    sandbox.hold_call()
    page.keyboard.press("Space")
    expect(button(page, "Talk again")).to_be_focused()
    tab_to("send a bad request")
    page.keyboard.press("Space")
    expect(page.locator("#provoked")).to_contain_text(KINDS["invalid-request"].title)
    page.keyboard.press("Tab")
    expect(page.get_by_role("tab", name="Request")).to_be_focused()  # the other tabs are a key of arrows away
    for key, name in (("End", "Events"), ("Home", "Code"), ("ArrowRight", "Request"), ("ArrowRight", "Token")):
        page.keyboard.press(key)
        expect(page.get_by_role("tab", name=name)).to_be_focused()
        expect(page.get_by_role("tabpanel", name=name)).to_be_visible()


def test_livekit_client_is_the_published_file() -> None:
    node("livekit-client")
    version = json.loads((NODE_MODULES / "livekit-client" / "package.json").read_text())["version"]
    digest = hashlib.sha384(livekit_client().read_bytes()).digest()

    assert f"/livekit-client@{version}/dist/" in LIVEKIT_CLIENT
    assert f"sha384-{base64.b64encode(digest).decode()}" == LIVEKIT_CLIENT_INTEGRITY


def test_call_joins_the_livekit_server(livekit_sandbox: str, open_page: OpenPage, axe: str) -> None:
    """Test up to the connection attempt: nothing listens there."""
    node("livekit-client")
    page = open_page(
        livekit_sandbox,
        complaints_expected=r"127\.0\.0\.1:1/|^Couldn't connect to server|livekit-client\.js",
        answered={LIVEKIT_CLIENT: livekit_client()},
        reduced_motion="reduce",
    )
    asked: list[str] = []
    page.on("websocket", lambda socket: asked.append(socket.url))

    button(page, "Talk").click()

    expect(page.get_by_text("The call could not be joined.")).to_be_visible()
    expect(button(page, "Talk")).to_be_enabled()
    assert any(address.startswith("ws://127.0.0.1:1/rtc") for address in asked)
    assert_accessible(page, axe)


@pytest.mark.parametrize("fault", ["offline", "altered"])
def test_livekit_client_that_is_not_the_published_file_costs_no_call(
    livekit_sandbox: str, open_page: OpenPage, tmp_path: Path, fault: str
) -> None:
    forged = tmp_path / "forged.js"
    forged.write_text("globalThis.forged = true;")
    page = open_page(
        livekit_sandbox,
        complaints_expected=r"ERR_INTERNET_DISCONNECTED|integrity|livekit-client\.js",
        answered={LIVEKIT_CLIENT: forged if fault == "altered" else None},
    )

    button(page, "Talk").click()

    expect(page.get_by_text("The audio software could not be loaded.")).to_be_visible()
    expect(page.get_by_text("npm install livekit-client")).to_be_visible()
    expect(page.locator("#wire-broker")).to_contain_text("not asked yet")
    assert page.evaluate("globalThis.forged") is None


def livekit_client() -> Path:
    """Return the file that the CDN serves, from npm."""
    return NODE_MODULES / "livekit-client" / "dist" / "livekit-client.umd.js"
