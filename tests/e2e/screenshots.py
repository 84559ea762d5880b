"""Takes the README's pictures: `python -m tests.e2e.screenshots`. Look at them before they are committed.

The letters are the system's: with Debian's fonts-inter and fonts-jetbrains-mono they look as they are meant to.
"""

from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, expect

from tests.e2e.conftest import chromium, running_sandbox

FOLDER = Path(__file__).parent / "screenshots"
PATIENCE = 30_000
"""Milliseconds until a call has ended and its transcript is there."""


def take_demo(browser: Browser, url: str, scheme: Literal["light", "dark"], name: str) -> None:
    """The sandbox's page after a call."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 960})
    page.goto(url)
    page.get_by_role("button", name="Talk").click()
    expect(page.locator("#transcript li")).to_have_count(4, timeout=PATIENCE)
    page.screenshot(path=FOLDER / name)
    page.close()


def main() -> None:
    """Write them all."""
    FOLDER.mkdir(exist_ok=True)
    with running_sandbox() as (_, url), chromium() as browser:
        take_demo(browser, url, "light", "demo.png")
        take_demo(browser, url, "dark", "demo-dark.png")


if __name__ == "__main__":
    main()
