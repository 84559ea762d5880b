"""Take the README's screenshots: `python -m tests.e2e.screenshots`. Look at them before you commit them.

Install Debian's fonts-inter and fonts-jetbrains-mono first: the page uses the system's fonts.
"""

from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, expect

from tests.e2e.conftest import chromium, running_sandbox

FOLDER = Path(__file__).parent / "screenshots"
PATIENCE = 30_000
"""Milliseconds; enough for a call to end and its transcript to appear."""


def take_demo(browser: Browser, url: str, scheme: Literal["light", "dark"], name: str) -> None:
    """Take the demo page after a call."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 960})
    page.goto(url)
    page.get_by_role("button", name="Talk").click()
    expect(page.locator("#transcript li")).to_have_count(4, timeout=PATIENCE)
    page.screenshot(path=FOLDER / name)
    page.close()


def take_explorer(browser: Browser, url: str, name: str) -> None:
    """Take the explorer after a call."""
    page = browser.new_page(viewport={"width": 1100, "height": 1490})
    page.goto(f"{url}/docs#/sessions/createSession")
    session = page.locator("#operations-sessions-createSession")
    session.get_by_role("button", name="Execute").click()
    expect(session.locator(".live-responses-table .response")).to_contain_text("201")
    session.scroll_into_view_if_needed()
    page.screenshot(path=FOLDER / name)
    page.close()


def main() -> None:
    """Take all screenshots."""
    FOLDER.mkdir(exist_ok=True)
    with running_sandbox() as (_, url), chromium() as browser:
        take_demo(browser, url, "light", "demo.png")
        take_demo(browser, url, "dark", "demo-dark.png")
        take_explorer(browser, url, "explorer.png")


if __name__ == "__main__":
    main()
