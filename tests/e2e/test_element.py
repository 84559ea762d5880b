"""`<oneinbox-call>` in Chromium: one tag on a page of another origin, no script of its own, a strict policy."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.e2e.conftest import OpenPage, control, running_broker, running_sandbox, running_site, url_in
from tests.support.needs import NODE_MODULES, node
from tests.support.processes import ROOT

pytestmark = pytest.mark.browser

PATIENCE = 20_000
"""Milliseconds; enough on a busy machine."""
PAGE = """<!doctype html>
<html lang="en" dir="{direction}">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>A shop</title>
<link rel="icon" href="data:,">
<main><h1>Shop</h1>{element}</main>
<script type="module" src="{broker}/client.js"></script>
"""
TAG = "<oneinbox-call transcript></oneinbox-call>"
GREETING = "Agent: Hello, this is the sandbox. How can I help you?"
REFUSED = "the server responded with a status of 4"

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core, the accessibility checker."""
    node("axe-core")
    return (NODE_MODULES / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


OpenShop = Callable[..., Page]


@pytest.fixture
def shop(open_page: OpenPage, tmp_path: Path) -> Iterator[OpenShop]:
    """Open a page of one tag for a broker."""
    with ExitStack() as stack:

        def opens(broker: str, element: str = TAG, *, script: str = "", direction: str = "ltr", **options: Any) -> Page:
            text = PAGE.format(broker=broker, element=element, direction=direction)
            (tmp_path / "index.html").write_text(text, encoding="utf-8")
            policy = (
                f"default-src 'none'; script-src {broker}; connect-src {broker}; img-src data:; base-uri 'none'; "
                "form-action 'none'; require-trusted-types-for 'script'"
            )
            url = stack.enter_context(running_site(tmp_path, policy))
            page = open_page(**{"permissions": ["microphone"], **options})
            if script:
                page.add_init_script(script)
            page.goto(url)
            return page

        yield opens


@pytest.fixture(scope="module")
def broker(oneinbox: str) -> Iterator[str]:
    """A broker for pages of any loopback origin, with a stand-in for livekit-client."""
    with running_broker(oneinbox, **SETTINGS) as (_, url):
        yield url


NOT_FOUND = {"type": "/problems/not-found", "title": "Not found", "status": 404}
READABLE = {"Access-Control-Allow-Origin": "*", "Content-Type": "application/problem+json"}
SETTINGS = {
    "BROKER_ALLOWED_ORIGINS": "http://127.0.0.1:*",
    "BROKER_LIVEKIT_CLIENT": str(ROOT / "app/sandbox/livekit-client.js"),
}


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def assert_accessible(page: Page, axe: str) -> None:
    """Check that axe-core finds no violation and that the page does not scroll sideways."""
    page.evaluate(axe)
    report = page.evaluate("axe.run()")
    assert report["passes"]
    assert [(found["id"], [each["html"] for each in found["nodes"]]) for found in report["violations"]] == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def hold_last_call(oneinbox: str) -> None:
    """Keep the newest call in progress, however slow this machine is."""
    control(oneinbox, f"calls/{control(oneinbox, 'calls')[0]['id']}", {"status": "in_progress"})


@pytest.mark.parametrize("width", [280, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_of_one_tag(scheme: str, width: int, shop: OpenShop, axe: str, tmp_path: Path) -> None:
    """Talk, mute, reload and go back, hang up, be refused: as a visitor sees it."""
    with running_sandbox() as (process, sandbox):
        oneinbox = url_in(process.wait_for("OneInbox"))
        page = shop(
            sandbox,
            complaints_expected=f"{REFUSED}29",
            color_scheme=scheme,
            reduced_motion="reduce",  # axe would measure the contrast of a colour in transition
            viewport={"width": width, "height": 600},
        )
        status, error = page.get_by_role("status"), page.get_by_role("alert")

        def is_fine(name: str) -> None:
            assert_accessible(page, axe)
            page.screenshot(path=tmp_path / f"{name}-{width}-{scheme}.png")

        expect(button(page, "Talk")).to_be_visible()
        is_fine("idle")

        button(page, "Talk").click()
        expect(status).to_have_text("You are connected.")
        hold_last_call(oneinbox)
        expect(page.get_by_role("listitem").first).to_have_text(GREETING)
        is_fine("talking")
        button(page, "Mute").click()
        expect(status).to_have_text("You are muted.")
        expect(button(page, "Mute")).to_have_attribute("aria-pressed", "true")
        is_fine("muted")

        page.reload()
        expect(status).to_have_text("Your call is still running.")
        is_fine("resumable")
        button(page, "Back to the call").click()
        expect(status).to_have_text("You are connected.")
        while not page.evaluate("document.querySelector('oneinbox-call').call.level('user')"):
            page.wait_for_timeout(50)

        button(page, "Hang up").click()
        expect(status).to_have_text("The call has ended.")
        expect(page.get_by_role("listitem")).to_have_count(4)
        is_fine("ended")

        while httpx.post(f"{sandbox}/session").status_code == 201:
            pass
        button(page, "Talk again").click()
        expect(error).to_have_text("You have called too often for now.")
        expect(page.get_by_text(re.compile(r"^You can try again in \d+ s\.$"))).to_be_visible()
        expect(button(page, "Talk")).to_be_enabled()
        is_fine("refused")
        assert len(control(oneinbox, "calls")) <= 10
        page.goto("about:blank")


DENIED = "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotAllowedError'); };"
ABSENT = "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotFoundError'); };"
FREE_FAILURES = {
    "denied": (DENIED, TAG, "The microphone is blocked."),
    "no microphone": (ABSENT, TAG, "No microphone was found."),
    "plain http": ("delete Navigator.prototype.mediaDevices;", TAG, "This page may not use the microphone"),
    "no livekit-client": ("", '<oneinbox-call livekit="/absent.js"></oneinbox-call>', "could not be loaded"),
    "no broker": ("", '<oneinbox-call broker="ftp://x"></oneinbox-call>', "url is not an http(s) address"),
}


@pytest.mark.parametrize(("script", "element", "words"), FREE_FAILURES.values(), ids=FREE_FAILURES.keys())
def test_what_stops_a_call_before_it_starts_costs_nothing(
    shop: OpenShop, broker: str, script: str, element: str, words: str
) -> None:
    page = shop(broker, element, script=script, complaints_expected="status of 404|MIME type|Content Security Policy")
    posts: list[str] = []
    page.on("request", lambda request: posts.append(request.url) if request.method == "POST" else None)

    button(page, "Talk").click()

    expect(page.get_by_role("alert")).to_contain_text(words)
    expect(button(page, "Talk")).to_be_enabled()
    assert posts == []


@pytest.mark.parametrize("clicks", ["dblclick", "two"])
def test_two_clicks_are_one_call(shop: OpenShop, broker: str, clicks: str) -> None:
    page = shop(broker)
    posts: list[str] = []
    page.on("request", lambda request: posts.append(request.url) if request.url.endswith("/session") else None)

    if clicks == "dblclick":
        button(page, "Talk").dblclick()
    else:
        expect(button(page, "Talk")).to_be_visible()  # then its class is there
        page.evaluate("for (const _ of [1, 2]) document.querySelector('oneinbox-call').start()")

    expect(page.get_by_role("status")).to_have_text("You are connected.")
    assert len(posts) == 1
    button(page, "Hang up").click()
    expect(button(page, "Talk again")).to_be_visible()


def test_the_keyboard_is_enough_and_keeps_its_place(shop: OpenShop, broker: str) -> None:
    page = shop(broker)
    expect(button(page, "Talk")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(button(page, "Hang up")).to_be_focused()
    page.keyboard.press("Tab")
    expect(button(page, "Mute")).to_be_focused()
    page.keyboard.press("Space")
    expect(page.get_by_role("status")).to_have_text("You are muted.")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(button(page, "Talk again")).to_be_focused()


def test_a_call_can_be_cancelled_while_it_is_asked_for(shop: OpenShop, broker: str) -> None:
    page = shop(broker, script="navigator.mediaDevices.getUserMedia = () => new Promise(() => {});")
    button(page, "Talk").click()
    expect(page.get_by_role("status")).to_have_text("Allow the microphone …")
    button(page, "Cancel").click()
    expect(button(page, "Talk")).to_be_visible()


def test_the_end_is_announced(shop: OpenShop, oneinbox: str) -> None:
    with running_broker(oneinbox, **SETTINGS, BROKER_MAX_CALL_SECONDS="50") as (_, url):
        page = shop(url)
        button(page, "Talk").click()
        expect(page.get_by_role("status")).to_have_text(re.compile(r"^The call ends in [45]\d s\.$"))
        expect(page.get_by_text(re.compile(r"^[45]\d s left$"))).to_be_visible()
        button(page, "Hang up").click()
        expect(button(page, "Talk again")).to_be_visible()
        page.goto("about:blank")  # before the broker goes: no stream is cut


def test_a_call_that_ends_elsewhere_ends_here(shop: OpenShop, broker: str, oneinbox: str) -> None:
    page = shop(broker)
    button(page, "Talk").click()
    expect(page.get_by_role("status")).to_have_text("You are connected.")
    control(oneinbox, f"calls/{control(oneinbox, 'calls')[0]['id']}", {"status": "completed"})
    expect(page.get_by_role("status")).to_have_text("The call has ended.")


def test_it_hangs_up_when_it_is_taken_off_the_page_and_not_when_moved(
    shop: OpenShop, broker: str, oneinbox: str
) -> None:
    page = shop(broker)
    button(page, "Talk").click()
    expect(page.get_by_role("status")).to_have_text("You are connected.")
    hold_last_call(oneinbox)
    page.evaluate("document.body.append(document.querySelector('oneinbox-call'))")
    page.wait_for_timeout(200)
    expect(button(page, "Hang up")).to_be_visible()
    with page.expect_response(re.compile("/stop$")):
        page.evaluate("document.querySelector('oneinbox-call').remove()")
    assert control(oneinbox, "calls")[0]["status"] == "completed"


GERMAN = '{"talk": "Sprechen", "talking": "Du bist verbunden.", "hangUp": "Auflegen", "again": "Noch einmal"}'


@pytest.mark.parametrize("how", ["attribute", "property", "json-property", "before-the-class"])
def test_its_words_can_be_replaced(shop: OpenShop, broker: str, how: str) -> None:
    given = f"strings='{GERMAN}'" if how == "attribute" else ""
    script = f"addEventListener('DOMContentLoaded', () => (document.querySelector('oneinbox-call').strings = {GERMAN}))"
    page = shop(broker, f"<oneinbox-call {given}></oneinbox-call>", script=script if how == "before-the-class" else "")
    if how.endswith("property"):
        words = json.dumps(GERMAN) if how == "json-property" else GERMAN
        expect(button(page, "Talk")).to_be_visible()
        page.evaluate(f"document.querySelector('oneinbox-call').strings = {words}")
    button(page, "Sprechen").click()
    expect(page.get_by_role("status")).to_have_text("Du bist verbunden.")
    button(page, "Auflegen").click()
    expect(button(page, "Noch einmal")).to_be_visible()


def test_frameworks_may_set_the_address_as_a_property(shop: OpenShop, broker: str) -> None:
    """React 19, Vue and Svelte set the property where an element has one of the attribute's name."""
    page = shop(broker, "<oneinbox-call></oneinbox-call>")
    page.evaluate(f"document.querySelector('oneinbox-call').broker = '{broker}/'")
    button(page, "Talk").click()
    expect(page.get_by_role("status")).to_have_text("You are connected.")
    button(page, "Hang up").click()
    expect(button(page, "Talk again")).to_be_visible()


@pytest.mark.parametrize(
    "give", ["element.broker = new Broker({ url })", "element.broker = url", "element.setAttribute('broker', url)"]
)
def test_a_broker_that_is_given_late_offers_the_running_call(
    shop: OpenShop, broker: str, oneinbox: str, give: str
) -> None:
    """As in a bundle, which imports the element first."""
    page = shop(broker, "<oneinbox-call></oneinbox-call>", complaints_expected="ERR_ABORTED")
    button(page, "Talk").click()
    expect(page.get_by_role("status")).to_have_text("You are connected.")
    hold_last_call(oneinbox)
    page.add_init_script("addEventListener('DOMContentLoaded', () => document.querySelector('oneinbox-call').remove())")
    page.reload()
    page.evaluate(
        f"""
        async (url) => {{
          const {{ Broker }} = await import(url + "/client.js");
          const element = document.createElement("oneinbox-call");
          element.setAttribute("broker", "/another");
          document.body.append(element);
          await new Promise((resolve) => setTimeout(resolve));
          {give};
        }}
        """,
        broker,
    )
    expect(page.get_by_role("status")).to_have_text("Your call is still running.")
    button(page, "Hang up").click()
    expect(button(page, "Talk again")).to_be_visible()


def test_a_hang_up_that_is_lost_can_be_repeated(shop: OpenShop, broker: str, oneinbox: str) -> None:
    page = shop(broker, "<oneinbox-call></oneinbox-call>", complaints_expected="ERR_FAILED")
    page.evaluate("addEventListener('oneinbox-error', ({ detail }) => (document.title = detail.slug))")
    button(page, "Talk").click()
    expect(page.get_by_role("status")).to_have_text("You are connected.")
    hold_last_call(oneinbox)
    page.route("**/stop", lambda route: route.abort())
    button(page, "Hang up").click()
    expect(page.get_by_role("status")).to_have_text("Your call is still running.")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page).to_have_title("unreachable")
    page.unroute_all()
    button(page, "Hang up").click()
    expect(page.get_by_role("status")).to_have_text("The call has ended.")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert control(oneinbox, "calls")[0]["status"] == "completed"


def test_options_may_watch_and_end_an_attempt(shop: OpenShop, broker: str) -> None:
    page = shop(broker, "<oneinbox-call></oneinbox-call>")
    page.evaluate(
        """
        () => {
          const stop = new AbortController();
          const progress = (step) => {
            document.title = step;
            stop.abort();
          };
          document.querySelector("oneinbox-call").options = { progress, signal: stop.signal };
        }
        """
    )
    button(page, "Talk").click()
    expect(page).to_have_title("asking")
    expect(button(page, "Talk")).to_be_visible()


def test_a_calls_own_error_is_sent_as_an_event(shop: OpenShop, broker: str) -> None:
    page = shop(broker, "<oneinbox-call></oneinbox-call>", complaints_expected=f"{REFUSED}04")
    page.evaluate("addEventListener('oneinbox-error', ({ detail }) => (document.title = detail.slug))")
    page.route("**/calls/*/events", lambda route: route.fulfill(status=404, json=NOT_FOUND, headers=READABLE))
    button(page, "Talk").click()
    expect(page).to_have_title("not-found")


def test_what_the_attributes_ask_for_reaches_oneinbox(shop: OpenShop, broker: str, oneinbox: str) -> None:
    element = """<oneinbox-call agent="default" variables='{"customer_name": "Ada"}' metadata='{"page": "/"}'
      label="Call us"></oneinbox-call>"""
    page = shop(broker, element)
    button(page, "Call us").click()
    expect(page.get_by_role("status")).to_have_text("You are connected.")
    asked = [each["json"] for each in control(oneinbox, "requests") if each["path"] == "/v1/calls/web"][-1]
    assert asked["variables"] == {"customer_name": "Ada"}
    assert asked["metadata"]["page"] == "/"
    button(page, "Hang up").click()
    expect(button(page, "Talk again")).to_be_visible()


@pytest.mark.parametrize("name", ["variables", "metadata"])
def test_an_attribute_that_is_not_json_starts_no_call(shop: OpenShop, broker: str, oneinbox: str, name: str) -> None:
    page = shop(broker, f"""<oneinbox-call {name}="{{'customer_name': 'Ada'}}"></oneinbox-call>""")
    before = len(control(oneinbox, "calls"))
    button(page, "Talk").click()
    expect(page.get_by_role("alert")).to_contain_text(f"{name} is not JSON")
    assert len(control(oneinbox, "calls")) == before


def test_from_right_to_left(shop: OpenShop, broker: str, axe: str) -> None:
    page = shop(broker, direction="rtl", reduced_motion="reduce", viewport={"width": 280, "height": 600})
    button(page, "Talk").click()
    expect(page.get_by_role("status")).to_have_text("You are connected.")
    assert_accessible(page, axe)
    main, mute = button(page, "Hang up").bounding_box(), button(page, "Mute").bounding_box()
    assert main is not None
    assert mute is not None
    assert main["x"] > mute["x"] or main["y"] < mute["y"]
    button(page, "Hang up").click()
    expect(button(page, "Talk again")).to_be_visible()
