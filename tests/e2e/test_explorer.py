"""The API explorer in a real browser."""

import json
import re
import subprocess
import time

import jwt
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.e2e.conftest import OpenPage, running_broker
from tests.support.needs import program

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
    reading = opened(page, "getCall")
    reading.get_by_placeholder("call", exact=True).fill(location[1].removeprefix("/calls/"))
    read = executed(reading)
    expect(read.locator(".response-col_status")).to_contain_text("200")
    assert body(read)["agent"] == "default"


@pytest.mark.parametrize("example", ["Values for the agent's prompt", "LiveKit's standard token request"])
def test_each_request_example_can_be_tried_out(open_page: OpenPage, sandbox: str, example: str) -> None:
    page = open_page(f"{sandbox}/docs")
    session = opened(page, "createSession")

    session.locator(EXAMPLES).select_option(example)

    expect(executed(session).locator(".response-col_status")).to_contain_text("201")


def test_curl_line_works_when_pasted(open_page: OpenPage, sandbox: str) -> None:
    program("curl", "curl")
    page = open_page(f"{sandbox}/docs")
    session = opened(page, "createSession")
    session.locator(EXAMPLES).select_option("Values for the agent's prompt")
    executed(session)

    line = session.locator(".curl-command .curl").inner_text()

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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_explorer_follows_the_colour_scheme(open_page: OpenPage, sandbox: str, scheme: str) -> None:
    page = open_page(f"{sandbox}/docs", color_scheme=scheme)

    expect(page.get_by_text("Start a call").first).to_be_visible()

    letters = page.evaluate("getComputedStyle(document.querySelector('.swagger-ui')).color")
    assert (min(map(int, re.findall(r"\d+", letters))) > 128) == (scheme == "dark")


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
