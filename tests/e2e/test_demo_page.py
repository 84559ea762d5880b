"""The sandbox's demo page in a real browser."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
from playwright.sync_api import Page, expect

from app.problems import KINDS
from app.sandbox.demo import LIVEKIT_CLIENT, LIVEKIT_CLIENT_INTEGRITY
from tests.e2e.conftest import OpenPage, control, running_sandbox, url_in
from tests.support.needs import NODE_MODULES, node
from tests.support.processes import Process

pytestmark = pytest.mark.browser

PATIENCE = 20_000
"""Milliseconds; enough on a busy machine."""
REFUSED = r"Failed to load resource: the server responded with a status of 4(04|22|29)"

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


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_button_works(scheme: str, width: int, sandbox: Sandbox, open_page: OpenPage, axe: str) -> None:
    page = open_page(
        complaints_expected=REFUSED,
        color_scheme=scheme,
        reduced_motion="reduce",  # axe would measure the contrast of a colour in transition
        viewport={"width": width, "height": 800},
    )
    page.clock.install()
    page.goto(sandbox.url)
    state, problem = page.locator("#call-state"), page.get_by_role("article")
    meter = page.get_by_role("meter", name="Your call limit")
    talk, hang_up = page.get_by_role("button", name="Talk"), page.get_by_role("button", name="Hang up")

    expect(state).to_have_text("No call yet.")
    expect(talk).to_be_enabled()
    expect(hang_up).to_be_disabled()
    expect(problem).to_be_hidden()
    assert_accessible(page, axe)

    talk.click()
    expect(page.locator("#exchange")).to_be_visible()
    call = sandbox.hold_call()
    expect(state).to_have_text("In conversation.")
    expect(page.get_by_role("button", name="On a call")).to_be_disabled()
    expect(page.locator("[aria-current=step]")).to_contain_text("In conversation")
    expect(page.locator("#request")).to_have_text(re.compile(r"^POST /session\s+Idempotency-Key: [0-9a-f]{32}$"))
    expect(page.locator("#response")).to_contain_text("201 Created")
    expect(page.locator("#server-url")).to_have_text("ws://127.0.0.1:7880")
    token = page.locator("#token").text_content()
    assert token is not None
    assert jwt.decode(token, options={"verify_signature": False})["video"]["room"] == call["room_name"]
    expect(page.locator("#claims")).to_contain_text(call["room_name"])
    expect(page.locator("#claims")).to_contain_text("HS256")
    expect(page.locator("#expiry")).to_have_text(re.compile(r"^expires in 14:\d\d$"))
    expect(meter).to_have_attribute("aria-valuetext", "9 of 10 left")
    assert_accessible(page, axe)

    hang_up.click()
    expect(state).to_have_text(re.compile(r"^Ended after \d+ seconds? of talk\.$"))
    expect(page.locator("#transcript li")).to_have_count(4)
    expect(page.locator("#transcript")).to_contain_text("We open at nine.")
    expect(talk).to_be_enabled()
    expect(hang_up).to_be_disabled()
    assert_accessible(page, axe)

    page.get_by_role("button", name="Send a bad request").click()
    expect(problem).to_contain_text("422")
    expect(problem.get_by_role("heading")).to_have_text(KINDS["invalid-request"].title)
    expect(problem.get_by_role("listitem")).to_have_count(2)
    expect(problem).to_contain_text("body › colour")
    expect(problem).to_contain_text(KINDS["invalid-request"].remedy.replace("`", ""))
    expect(problem.get_by_role("timer")).to_be_hidden()
    expect(meter).to_have_attribute("aria-valuemax", "10")  # not the limit of requests, which this answer names
    assert page.request.get(str(problem.get_by_role("link").evaluate("link => link.href"))).ok
    assert_accessible(page, axe)

    page.get_by_role("button", name="Exceed the limit").click()
    expect(problem.get_by_role("heading")).to_have_text(KINDS["rate-limited"].title)
    expect(problem).to_contain_text("429")
    expect(problem.get_by_role("timer")).to_have_text(re.compile(r"^Try again in \d+ s\.$"))
    expect(page.get_by_role("button", name="Exceed the limit")).to_be_enabled()  # its calls are hung up
    expect(meter).to_have_attribute("aria-valuetext", "0 of 10 left")
    calls = sandbox.calls()
    assert len(calls) >= 10
    assert not [each for each in calls if each["running"]]
    assert_accessible(page, axe)

    talk.click()
    expect(problem.get_by_role("heading")).to_have_text(KINDS["rate-limited"].title)
    expect(talk).to_be_enabled()

    page.clock.fast_forward(31_000)
    expect(problem.get_by_role("timer")).to_have_text("You can try again now.")
    expect(meter).to_have_attribute("aria-valuetext", "10 of 10 left")


def test_ended_call_shows_its_transcript(sandbox: Sandbox, open_page: OpenPage) -> None:
    page = open_page(sandbox.url)

    page.get_by_role("button", name="Talk").click()

    expect(page.locator("#call-state")).to_have_text("Ended after 8 seconds of talk.")
    for label in ("In conversation", "Ended"):  # the broker polls about once a second and may miss shorter states
        expect(page.locator("#timeline .reached").filter(has_text=label)).to_have_count(1)
    expect(page.locator("#transcript li")).to_have_count(4)


def test_unknown_states_are_shown(sandbox: Sandbox, open_page: OpenPage) -> None:
    page = open_page(sandbox.url)
    page.get_by_role("button", name="Talk").click()
    expect(page.locator("#exchange")).to_be_visible()
    [call] = sandbox.calls()

    sandbox.change_call(call, status="ringing")
    expect(page.locator("#call-state")).to_have_text("ringing.")
    expect(page.get_by_role("button", name="Hang up")).to_be_enabled()

    sandbox.change_call(call, status="failed")
    expect(page.locator("#call-state")).to_have_text(re.compile("^failed after"))
    expect(page.locator("#timeline li").last).to_contain_text("failed")
    expect(page.get_by_role("button", name="Talk")).to_be_enabled()


def test_next_call_replaces_the_previous_one(sandbox: Sandbox, open_page: OpenPage) -> None:
    page = open_page(sandbox.url)
    page.get_by_role("button", name="Talk").click()
    expect(page.locator("#exchange")).to_be_visible()
    call = sandbox.hold_call()
    sandbox.change_call(call, remove=["transcript"])  # the page waits for it
    page.get_by_role("button", name="Hang up").click()
    expect(page.locator("#no-transcript")).to_have_text("The transcript is being written …")

    with page.expect_event("requestfailed", lambda request: f"{call['id']}." in request.url):
        page.get_by_role("button", name="Talk").click()

    expect(page.locator("#no-transcript")).to_have_text("It appears when the call has ended.")


def test_user_can_talk_again_after_a_lost_call(sandbox: Sandbox, open_page: OpenPage) -> None:
    page = open_page(complaints_expected=REFUSED)
    page.route("**/events", lambda route: route.fulfill(status=404, body=""))
    page.goto(sandbox.url)

    page.get_by_role("button", name="Talk").click()

    expect(page.locator("#call-state")).to_have_text("The call’s state is no longer available.")
    expect(page.get_by_role("button", name="Talk")).to_be_enabled()


def test_page_works_with_the_keyboard_alone(sandbox: Sandbox, open_page: OpenPage) -> None:
    page = open_page(sandbox.url, complaints_expected=REFUSED)

    def tab_to(name: str) -> None:
        for _ in range(10):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            assert focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
            if (focused.text_content() or "").strip() == name:
                return
        raise AssertionError(f"Tab does not lead to {name!r}")

    tab_to("Skip to content")
    page.keyboard.press("Enter")
    tab_to("Talk")
    page.keyboard.press("Enter")
    expect(page.locator("#exchange")).to_be_visible()
    sandbox.hold_call()
    expect(page.locator("#call-state")).to_have_text("In conversation.")
    expect(page.locator(":focus")).to_have_text("On a call")  # keeps the focus
    tab_to("Hang up")
    page.keyboard.press("Space")
    expect(page.locator("#call-state")).to_contain_text("Ended")
    tab_to("Send a bad request")
    page.keyboard.press("Space")
    expect(page.get_by_role("article")).to_contain_text("422")
    tab_to("What invalid-request means")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=KINDS["invalid-request"].title)).to_be_visible()
    page.go_back()
    tab_to("Exceed the limit")
    page.keyboard.press("Enter")
    expect(page.get_by_role("article")).to_contain_text("429")
    expect(page.locator(":focus")).to_have_text("Exceed the limit")


def test_stopped_broker_is_reported(sandbox: Sandbox, open_page: OpenPage, axe: str) -> None:
    page = open_page(
        sandbox.url,
        complaints_expected=r"net::ERR_(CONNECTION|INCOMPLETE|EMPTY)|status of 503",
        reduced_motion="reduce",
    )
    page.get_by_role("button", name="Talk").click()
    expect(page.locator("#exchange")).to_be_visible()

    sandbox.process.terminate()
    page.get_by_role("button", name="Send a bad request").click()

    expect(page.get_by_role("article")).to_contain_text("The broker does not answer")
    assert_accessible(page, axe)


def test_livekit_client_is_the_published_file() -> None:
    node("livekit-client")
    version = json.loads((NODE_MODULES / "livekit-client" / "package.json").read_text())["version"]
    digest = hashlib.sha384(livekit_client().read_bytes()).digest()

    assert f"/livekit-client@{version}/dist/" in LIVEKIT_CLIENT
    assert f"sha384-{base64.b64encode(digest).decode()}" == LIVEKIT_CLIENT_INTEGRITY


@pytest.mark.parametrize("width", [360, 1280])
def test_join_connects_to_the_livekit_server(width: int, livekit_sandbox: str, open_page: OpenPage, axe: str) -> None:
    """Test up to the connection attempt: nothing listens there."""
    node("livekit-client")
    page = open_page(
        livekit_sandbox,
        complaints_expected=r"127\.0\.0\.1:1/|^Couldn't connect to server",
        answered={LIVEKIT_CLIENT: livekit_client()},
        reduced_motion="reduce",
        viewport={"width": width, "height": 800},
    )
    asked: list[str] = []
    page.on("websocket", lambda socket: asked.append(socket.url))
    join, state = page.get_by_role("button", name="Join the room"), page.locator("#join-state")
    expect(join).to_be_disabled()
    page.get_by_role("button", name="Talk").click()
    expect(join).to_be_enabled()

    join.click()

    expect(state).to_contain_text("Could not join the room")
    expect(join).to_be_enabled()
    assert any(address.startswith("ws://127.0.0.1:1/rtc") for address in asked)
    assert_accessible(page, axe)
    page.get_by_role("button", name="Hang up").click()
    expect(state).to_have_text("The call has ended.")
    expect(join).to_be_disabled()


def test_join_reports_a_missing_network(livekit_sandbox: str, open_page: OpenPage) -> None:
    page = open_page(livekit_sandbox, complaints_expected="ERR_INTERNET_DISCONNECTED", answered={LIVEKIT_CLIENT: None})
    page.get_by_role("button", name="Talk").click()
    page.get_by_role("button", name="Join the room").click()

    expect(page.locator("#join-state")).to_contain_text("Are you online?")


def test_altered_livekit_client_is_not_run(livekit_sandbox: str, open_page: OpenPage, tmp_path: Path) -> None:
    forged = tmp_path / "forged.js"
    forged.write_text("globalThis.forged = true;")
    page = open_page(livekit_sandbox, complaints_expected="integrity", answered={LIVEKIT_CLIENT: forged})
    page.get_by_role("button", name="Talk").click()
    page.get_by_role("button", name="Join the room").click()

    expect(page.locator("#join-state")).to_contain_text("did not load")
    assert page.evaluate("globalThis.forged") is None


def livekit_client() -> Path:
    """Return the file that the CDN serves, from npm."""
    return NODE_MODULES / "livekit-client" / "dist" / "livekit-client.umd.js"
