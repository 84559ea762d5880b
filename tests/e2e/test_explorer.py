"""The API explorer in a real browser."""

import json
import re
import subprocess
import time

import jwt
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.e2e.conftest import OpenPage, running_broker
from tests.support.needs import NODE_MODULES, node, program

pytestmark = pytest.mark.browser

SECRET = "a-secret-shared-with-the-sign-in-service"
EXAMPLES = ".opblock-section-request-body .examples-select select"
PATIENCE = 20_000
"""Milliseconds; enough on a busy machine."""

expect.set_options(timeout=PATIENCE)


def opened(page: Page, operation: str) -> Locator:
    """Expand an operation, ready to be tried out."""
    block = page.locator(f"[id$='-{operation}']")
    block.locator(".opblock-summary-control").click()
    expect(block.get_by_role("button", name="Execute")).to_be_visible()
    return block


def executed(block: Locator) -> Locator:
    """Execute an operation; return the answer shown."""
    block.get_by_role("button", name="Execute").click()
    answer = block.locator(".live-responses-table .response").first
    expect(answer).to_be_visible()
    return answer


def body(answer: Locator) -> dict[str, object]:
    """Return the JSON of an answer."""
    value: dict[str, object] = json.loads(answer.locator(".highlight-code code").first.inner_text())
    return value


def test_try_it_out_starts_a_call_and_follows_its_location(open_page: OpenPage, sandbox: str) -> None:
    page = open_page(f"{sandbox}/docs")

    started = executed(opened(page, "createSession"))

    expect(started.locator(".response-col_status")).to_contain_text("201")
    assert body(started).keys() == {"server_url", "participant_token"}
    location = re.search(r"location: (\S+)", started.inner_text())
    assert location is not None
    for operation in ("getCall", "followCall", "stopCall"):  # the call is filled in wherever one is needed
        expect(opened(page, operation).get_by_placeholder("call", exact=True)).to_have_value(
            location[1].removeprefix("/calls/")
        )
    read = executed(page.locator("[id$='-getCall']"))
    expect(read.locator(".response-col_status")).to_contain_text("200")
    assert body(read)["agent"] == "default"


def test_next_call_replaces_the_one_filled_in(open_page: OpenPage, sandbox: str) -> None:
    page = open_page(f"{sandbox}/docs")
    session = opened(page, "createSession")
    field = opened(page, "getCall").get_by_placeholder("call", exact=True)
    executed(session)
    expect(field).not_to_have_value("")
    first = field.input_value()

    session.get_by_role("button", name="Execute").click()

    expect(field).not_to_have_value(first)


def test_sandbox_has_a_way_back_and_a_broker_has_none(open_page: OpenPage, sandbox: str, oneinbox: str) -> None:
    page = open_page(f"{sandbox}/docs")
    page.get_by_role("link", name="Back to the call").click()
    expect(page.get_by_role("button", name="Talk")).to_be_visible()

    with running_broker(oneinbox) as (_, url):
        page = open_page(f"{url}/docs")
        expect(page.get_by_text("Start a call").first).to_be_visible()
        expect(page.get_by_role("link", name="Back to the call")).to_have_count(0)


@pytest.mark.parametrize("example", ["Values for the agent's prompt", "LiveKit's standard token request"])
def test_each_request_example_can_be_tried_out(open_page: OpenPage, sandbox: str, example: str) -> None:
    page = open_page(f"{sandbox}/docs")
    session = opened(page, "createSession")

    session.locator(EXAMPLES).select_option(example)

    expect(executed(session).locator(".response-col_status")).to_contain_text("201")


def test_curl_line_works_when_pasted(open_page: OpenPage, sandbox: str) -> None:
    program("curl", "curl")
    page = open_page(f"{sandbox}/docs", permissions=["clipboard-read", "clipboard-write"])
    session = opened(page, "createSession")
    session.locator(EXAMPLES).select_option("Values for the agent's prompt")
    executed(session)

    session.get_by_role("button", name="Copy as curl").click()
    expect(session.get_by_role("button", name="Copied")).to_be_visible()
    line = page.evaluate("navigator.clipboard.readText()")

    done = subprocess.run(["bash", "-c", f"{line} --silent"], capture_output=True, timeout=30, check=True)
    assert json.loads(done.stdout).keys() == {"server_url", "participant_token"}


def test_errors_are_collapsed_and_complete(open_page: OpenPage, sandbox: str) -> None:
    page = open_page(f"{sandbox}/docs")
    session = opened(page, "createSession")
    refused = session.locator(".response[data-code='403']")
    expect(refused).to_be_hidden()

    session.get_by_text("Errors: 400, 401").click()

    expect(refused).to_contain_text("override-not-allowed: An override is not allowed.")
    refused.locator(".examples-select select").select_option("blocked")
    expect(refused.locator(".highlight-code").first).to_contain_text("/problems/blocked")


CONTRAST = """axe.run({ runOnly: ["color-contrast"] }).then(({ violations }) =>
  violations.flatMap(({ nodes }) => nodes.map(({ html }) => html)))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_readable(open_page: OpenPage, oneinbox: str, scheme: str) -> None:
    """Light and dark, with all that can be opened and a login's dialog."""
    node("axe-core")
    axe = (NODE_MODULES / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    with running_broker(oneinbox, BROKER_AUTH="jwt", BROKER_JWT_SECRET=SECRET) as (_, url):
        page = open_page(f"{url}/docs", color_scheme=scheme, complaints_expected="status of 401")
        session = opened(page, "createSession")
        expect(executed(session).locator(".response-col_status")).to_contain_text("401")
        for each in ("listCalls", "getCall"):
            opened(page, each)
        for fold in page.locator(".folded > summary").all():
            if fold.is_visible():
                fold.click()
        page.locator("section.models h4").click()
        for schema in page.locator("section.models .json-schema-2020-12-accordion").all()[:3]:
            schema.click()

        page.evaluate(axe)
        assert page.evaluate(CONTRAST) == []

        page.locator(".scheme-container .authorize").click()
        expect(page.locator(".dialog-ux .modal-ux")).to_be_visible()
        assert page.evaluate(CONTRAST) == []
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", background))) < 128) == (scheme == "dark")


@pytest.mark.parametrize(
    ("settings", "offered"),
    [
        ({}, 0),
        ({"BROKER_AUTH": "jwt", "BROKER_JWT_SECRET": SECRET}, 1),
        ({"BROKER_AUTH": "header", "BROKER_TRUSTED_PROXIES": "127.0.0.1"}, 1),
    ],
    ids=["anonymous", "jwt", "header"],
)
def test_list_of_calls_is_offered_where_users_are_known(
    open_page: OpenPage, oneinbox: str, settings: dict[str, str], offered: int
) -> None:
    with running_broker(oneinbox, **settings) as (_, url):
        page = open_page(f"{url}/docs")
        expect(page.get_by_text("Start a call").first).to_be_visible()
        expect(page.locator("[id$='-listCalls']")).to_have_count(offered)


def test_explorer_works_under_a_prefix(oneinbox: str, open_page: OpenPage) -> None:
    with running_broker(oneinbox, BROKER_ROOT_PATH="/voice") as (_, url):
        page = open_page(f"{url}/voice/docs")

        started = executed(opened(page, "createSession"))

        expect(started.locator(".response-col_status")).to_contain_text("201")
        expect(started).to_contain_text("location: /voice/calls/")
        expect(page.locator(".curl-command")).to_contain_text(f"{url}/voice/session")


def test_authorize_sends_the_users_token(oneinbox: str, open_page: OpenPage) -> None:
    token = jwt.encode({"sub": "ada", "exp": time.time() + 600}, SECRET, "HS256")
    with running_broker(oneinbox, BROKER_AUTH="jwt", BROKER_JWT_SECRET=SECRET) as (_, url):
        # Chromium logs every error status.
        page = open_page(f"{url}/docs", complaints_expected="status of 401")
        session = opened(page, "createSession")
        expect(executed(session).locator(".response-col_status")).to_contain_text("401")

        page.locator(".scheme-container .authorize").click()
        dialog = page.locator(".dialog-ux")
        dialog.get_by_label("auth-bearer-value").fill(token)
        dialog.get_by_role("button", name="Apply credentials").click()
        dialog.get_by_role("button", name="Close").last.click()

        session.get_by_role("button", name="Execute").click()
        expect(session.locator(".live-responses-table .response")).to_contain_text("201")
        expect(session.locator(".curl-command")).to_contain_text(f"Authorization: Bearer {token}")


def test_anonymous_broker_has_no_authorize_button(open_page: OpenPage, sandbox: str) -> None:
    page = open_page(f"{sandbox}/docs")

    expect(page.get_by_text("Start a call").first).to_be_visible()

    expect(page.locator(".authorize")).to_have_count(0)
