"""The sandbox's page, driven through every button in a real browser."""

import base64
import hashlib
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from app.sandbox.demo import LIVEKIT_CLIENT, LIVEKIT_CLIENT_INTEGRITY
from tests.e2e.conftest import OpenPage, running_sandbox
from tests.support.needs import NODE_MODULES, node
from tests.support.processes import Process

PATIENCE = 20_000
"""Milliseconds for what the page does by itself; ample on a busy machine."""
REFUSED = r"Failed to load resource: the server responded with a status of 4(04|22|29)"

expect.set_options(timeout=PATIENCE)


@pytest.fixture
def house() -> Iterator[tuple[Process, str]]:
    """A sandbox with a fresh budget, and its URL. To be asked for before `open_page`: pages close first."""
    with running_sandbox() as running:
        yield running


@pytest.fixture(scope="module")
def livekit_house() -> Iterator[str]:
    """The URL of a sandbox that makes tokens for a LiveKit server, where nothing listens."""
    options = ("--livekit-url", "ws://127.0.0.1:1", "--livekit-key", "devkey", "--livekit-secret", "secret")
    with running_sandbox(*options) as (_, url):
        yield url


@pytest.fixture(scope="module")
def axe() -> str:
    """The accessibility checker's script."""
    node("axe-core")
    return (NODE_MODULES / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


def assert_accessible(page: Page, axe: str) -> None:
    """No violation that axe-core knows, and nothing that has to be scrolled sideways."""
    page.evaluate(axe)
    report = page.evaluate("axe.run()")
    assert report["passes"]
    assert [(found["id"], [each["html"] for each in found["nodes"]]) for found in report["violations"]] == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def emulator_of(process: Process) -> str:
    """Where the sandbox's OneInbox listens, as it prints it."""
    line = next((line for line in process.out if "emulated" in line), None) or process.wait_for("emulated")
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found is not None
    return found[0]


def hold_call(process: Process) -> Any:
    """Keep the sandbox's newest call running, however slow this machine is; its record at the emulator."""
    control = f"{emulator_of(process)}/_emulator/calls"
    call = ask(control)[0]
    return ask(f"{control}/{call['id']}", {"status": "in_progress"})


def ask(url: str, body: Any = None) -> Any:
    """Ask the emulator's control surface."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_button(scheme: str, width: int, house: tuple[Process, str], open_page: OpenPage, axe: str) -> None:
    process, url = house
    page = open_page(
        complaints_expected=REFUSED,
        color_scheme=scheme,
        reduced_motion="reduce",  # a colour in the middle of its change is nobody's contrast
        viewport={"width": width, "height": 800},
    )
    page.clock.install()
    page.goto(url)
    state, problem = page.locator("#call-state"), page.get_by_role("article")
    meter = page.get_by_role("meter", name="Your budget")
    talk, hang_up = page.get_by_role("button", name="Talk"), page.get_by_role("button", name="Hang up")

    expect(state).to_have_text("No call yet.")
    expect(talk).to_be_enabled()
    expect(hang_up).to_be_disabled()
    expect(problem).to_be_hidden()
    assert_accessible(page, axe)

    talk.click()
    expect(page.locator("#exchange")).to_be_visible()
    call = hold_call(process)
    expect(state).to_have_text("In conversation.")
    expect(page.get_by_role("button", name="On a call")).to_be_disabled()
    expect(page.locator("[aria-current=step]")).to_contain_text("In conversation")
    expect(page.locator("#request")).to_have_text(re.compile(r"^POST /session\s+Idempotency-Key: [0-9a-f]{32}$"))
    expect(page.locator("#response")).to_contain_text("201 Created")
    expect(page.locator("#server-url")).to_have_text("ws://127.0.0.1:7880")
    token = page.locator("#token").text_content()
    assert token is not None
    assert claims_of(token)["video"]["room"] == call["room_name"]
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

    page.get_by_role("button", name="Bad request").click()
    expect(problem).to_contain_text("422")
    expect(problem.get_by_role("heading")).to_have_text("The request is not valid")
    expect(problem.get_by_role("listitem")).to_have_count(2)
    expect(problem).to_contain_text("body › colour")
    expect(problem).to_contain_text("Mend the places")
    expect(problem.get_by_role("timer")).to_be_hidden()
    expect(meter).to_have_attribute("aria-valuemax", "10")  # not the budget of requests, which this answer names
    assert page.request.get(str(problem.get_by_role("link").evaluate("link => link.href"))).ok
    assert_accessible(page, axe)

    page.get_by_role("button", name="Ask too often").click()
    expect(problem.get_by_role("heading")).to_have_text("Too many requests")
    expect(problem).to_contain_text("429")
    expect(problem.get_by_role("timer")).to_have_text(re.compile(r"^Try again in \d+ s\.$"))
    expect(page.get_by_role("button", name="Ask too often")).to_be_enabled()  # it has hung up what it started
    expect(meter).to_have_attribute("aria-valuetext", "0 of 10 left")
    calls = ask(f"{emulator_of(process)}/_emulator/calls")
    assert len(calls) >= 10
    assert not [each for each in calls if each["running"]]
    assert_accessible(page, axe)

    talk.click()
    expect(problem.get_by_role("heading")).to_have_text("Too many requests")
    expect(talk).to_be_enabled()

    page.clock.fast_forward(31_000)
    expect(problem.get_by_role("timer")).to_have_text("You may try again now.")
    expect(meter).to_have_attribute("aria-valuetext", "10 of 10 left")


def test_a_call_that_ends_by_itself(house: tuple[Process, str], open_page: OpenPage) -> None:
    page = open_page(house[1])

    page.get_by_role("button", name="Talk").click()

    expect(page.locator("#call-state")).to_have_text("Ended after 8 seconds of talk.")
    for label in ("In conversation", "Ended"):  # the broker looks once a second or so: what is shorter may pass unseen
        expect(page.locator("#timeline .reached").filter(has_text=label)).to_have_count(1)
    expect(page.locator("#transcript li")).to_have_count(4)


def test_states_that_nobody_expected(house: tuple[Process, str], open_page: OpenPage) -> None:
    process, url = house
    page = open_page(url)
    page.get_by_role("button", name="Talk").click()
    expect(page.locator("#exchange")).to_be_visible()
    control = f"{emulator_of(process)}/_emulator/calls"
    [call] = ask(control)

    ask(f"{control}/{call['id']}", {"status": "ringing"})
    expect(page.locator("#call-state")).to_have_text("ringing.")
    expect(page.get_by_role("button", name="Hang up")).to_be_enabled()

    ask(f"{control}/{call['id']}", {"status": "failed"})
    expect(page.locator("#call-state")).to_have_text(re.compile("^failed after"))
    expect(page.locator("#timeline li").last).to_contain_text("failed")
    expect(page.get_by_role("button", name="Talk")).to_be_enabled()


def test_the_next_call_takes_the_page_over(house: tuple[Process, str], open_page: OpenPage) -> None:
    process, url = house
    page = open_page(url)
    page.get_by_role("button", name="Talk").click()
    expect(page.locator("#exchange")).to_be_visible()
    call = hold_call(process)
    ask(f"{emulator_of(process)}/_emulator/calls/{call['id']}", {"remove": ["transcript"]})  # it is waited for
    page.get_by_role("button", name="Hang up").click()
    expect(page.locator("#no-transcript")).to_have_text("It is being written …")

    with page.expect_event("requestfailed", lambda request: f"{call['id']}." in request.url):
        page.get_by_role("button", name="Talk").click()

    expect(page.locator("#no-transcript")).to_have_text("It comes with the end of the call.")


def test_a_call_that_is_lost(house: tuple[Process, str], open_page: OpenPage) -> None:
    page = open_page(complaints_expected=REFUSED)
    page.route("**/events", lambda route: route.fulfill(status=404, body=""))
    page.goto(house[1])

    page.get_by_role("button", name="Talk").click()

    expect(page.locator("#call-state")).to_have_text("The call can no longer be followed.")
    expect(page.get_by_role("button", name="Talk")).to_be_enabled()


def test_the_keyboard_alone_is_enough(house: tuple[Process, str], open_page: OpenPage) -> None:
    page = open_page(house[1], complaints_expected=REFUSED)

    def tab_to(name: str) -> None:
        for _ in range(10):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            assert focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
            if (focused.text_content() or "").strip() == name:
                return
        raise AssertionError(f"Tab does not lead to {name!r}")

    tab_to("Skip to the page")
    page.keyboard.press("Enter")
    tab_to("Talk")
    page.keyboard.press("Enter")
    expect(page.locator("#exchange")).to_be_visible()
    hold_call(house[0])
    expect(page.locator("#call-state")).to_have_text("In conversation.")
    expect(page.locator(":focus")).to_have_text("On a call")  # the focus stays where it was
    tab_to("Hang up")
    page.keyboard.press("Space")
    expect(page.locator("#call-state")).to_contain_text("Ended")
    tab_to("Bad request")
    page.keyboard.press("Space")
    expect(page.get_by_role("article")).to_contain_text("422")
    tab_to("What invalid-request means")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="The request is not valid")).to_be_visible()
    page.go_back()
    tab_to("Ask too often")
    page.keyboard.press("Enter")
    expect(page.get_by_role("article")).to_contain_text("429")
    expect(page.locator(":focus")).to_have_text("Ask too often")


def test_a_broker_that_is_gone(house: tuple[Process, str], open_page: OpenPage, axe: str) -> None:
    process, url = house
    page = open_page(
        url, complaints_expected=r"net::ERR_(CONNECTION|INCOMPLETE|EMPTY)|status of 503", reduced_motion="reduce"
    )
    page.get_by_role("button", name="Talk").click()
    expect(page.locator("#exchange")).to_be_visible()

    process.terminate()
    page.get_by_role("button", name="Bad request").click()

    expect(page.get_by_role("article")).to_contain_text("The broker does not answer")
    assert_accessible(page, axe)


def test_livekits_client_is_the_published_file() -> None:
    node("livekit-client")
    version = json.loads((NODE_MODULES / "livekit-client" / "package.json").read_text())["version"]
    digest = hashlib.sha384(livekit_client().read_bytes()).digest()

    assert f"/livekit-client@{version}/dist/" in LIVEKIT_CLIENT
    assert f"sha384-{base64.b64encode(digest).decode()}" == LIVEKIT_CLIENT_INTEGRITY


@pytest.mark.parametrize("width", [360, 1280])
def test_joining_a_livekit_server(width: int, livekit_house: str, open_page: OpenPage, axe: str) -> None:
    """Up to the connection: nothing listens there."""
    node("livekit-client")
    page = open_page(
        livekit_house,
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

    expect(state).to_contain_text("The room could not be joined")
    expect(join).to_be_enabled()
    assert any(address.startswith("ws://127.0.0.1:1/rtc") for address in asked)
    assert_accessible(page, axe)
    page.get_by_role("button", name="Hang up").click()
    expect(state).to_have_text("The call has ended.")
    expect(join).to_be_disabled()


def test_joining_without_a_network(livekit_house: str, open_page: OpenPage) -> None:
    page = open_page(livekit_house, complaints_expected="ERR_INTERNET_DISCONNECTED", answered={LIVEKIT_CLIENT: None})
    page.get_by_role("button", name="Talk").click()
    page.get_by_role("button", name="Join the room").click()

    expect(page.locator("#join-state")).to_contain_text("is there a network?")


def test_another_client_than_the_published_one_is_not_run(
    livekit_house: str, open_page: OpenPage, tmp_path: Path
) -> None:
    forged = tmp_path / "forged.js"
    forged.write_text("globalThis.forged = true;")
    page = open_page(livekit_house, complaints_expected="integrity", answered={LIVEKIT_CLIENT: forged})
    page.get_by_role("button", name="Talk").click()
    page.get_by_role("button", name="Join the room").click()

    expect(page.locator("#join-state")).to_contain_text("did not load")
    assert page.evaluate("globalThis.forged") is None


def livekit_client() -> Path:
    """The file that the CDN has, from npm."""
    return NODE_MODULES / "livekit-client" / "dist" / "livekit-client.umd.js"


def claims_of(token: str) -> Any:
    """A JWT's claims, unverified."""
    payload = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
