"""Take the documents' screenshots: `python -m tests.e2e.screenshots`. Look at them before you commit them.

Install Debian's fonts-inter and fonts-jetbrains-mono first: the page uses the system's fonts.
"""

from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, expect

from tests.e2e.conftest import chromium, running_sandbox

FOLDER = Path(__file__).parent / "screenshots"
PATIENCE = 30_000
"""Milliseconds; enough for a call to end."""
ELEMENT = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Parts</title><link rel="icon" href="data:,">
<style>
  body { margin: 24px; font: 15px/1.4 Inter, sans-serif; color: #1c1b18; background: #fff; }
  main { display: grid; grid-template-columns: 1fr 1fr 1.7fr; gap: 24px; align-items: start; }
  section { position: relative; min-height: 250px; padding: 16px 20px; border: 1px solid #dfdacf; border-radius: 12px; }
  h2 { margin: 0 0 16px; font-size: 13px; color: #5f5b53; }
  oneinbox-call { font-family: Inter, sans-serif; }
  #talking oneinbox-call { width: 300px; }
  .mark { position: absolute; z-index: 1; min-width: 18px; padding: 0 4px; border-radius: 9px; background: #5b3fa0;
    color: #fff; font: 600 11px/18px "JetBrains Mono", monospace; text-align: center; }
  ol { position: absolute; top: 44px; right: 20px; margin: 0; padding: 0; list-style: none; }
  li { font: 13px/1.7 "JetBrains Mono", monospace; }
  ol .mark { position: static; display: inline-block; margin-right: 8px; }
</style>
<script type="module" src="/client.js"></script>
<main>
  <section id="idle"><h2>Idle</h2><oneinbox-call></oneinbox-call></section>
  <section id="refused"><h2>Refused</h2><oneinbox-call agent="sales"></oneinbox-call></section>
  <section id="talking"><h2>Talking, with its parts</h2><oneinbox-call transcript></oneinbox-call></section>
</main></html>"""
MARK_PARTS = """() => {
  const section = document.querySelector("#talking");
  const corner = section.getBoundingClientRect();
  const list = document.createElement("ol");
  for (const part of section.querySelector("oneinbox-call").shadowRoot.querySelectorAll("[part]")) {
    const at = part.getBoundingClientRect();
    if (!at.width || !at.height) continue;
    const name = part.getAttribute("part");
    const textContent = list.childElementCount + 1;
    const mark = () => Object.assign(document.createElement("span"), { className: "mark", textContent });
    const placed = mark();
    const item = document.createElement("li");
    const corners = { orb: [-2, at.height], label: [at.width - 8, at.height - 2], box: [-16, 28], row: [-8, -14] };
    const [x, y] = corners[name] ?? [at.width - 12, -9];
    placed.style.left = `${at.left - corner.left + x}px`;
    placed.style.top = `${at.top - corner.top + y}px`;
    item.append(mark(), name);
    section.append(placed);
    list.append(item);
  }
  section.append(list);
}"""


def take_demo(browser: Browser, url: str, scheme: Literal["light", "dark"], name: str) -> None:
    """Take the sandbox's page during a call."""
    page = _page(browser, {"width": 1440, "height": 900}, scheme)
    page.goto(url)
    page.get_by_role("button", name="Talk").click()
    expect(page.locator("#words")).to_contain_text("We open at", timeout=PATIENCE)
    page.screenshot(path=FOLDER / name)
    page.close()


def take_element(browser: Browser, url: str, name: str) -> None:
    """Take the element in three states, with its parts numbered."""
    page = _page(browser, {"width": 1120, "height": 330}, "light")
    page.route("**/element", lambda route: route.fulfill(content_type="text/html", body=ELEMENT))
    page.goto(f"{url}/element")
    for state in ("refused", "talking"):
        page.locator(f"#{state}").get_by_role("button", name="Talk").click()
    expect(page.locator("#talking ol")).to_contain_text("When do you", timeout=PATIENCE)
    page.evaluate(MARK_PARTS)
    page.screenshot(path=FOLDER / name)
    page.close()


def take_explorer(browser: Browser, url: str, name: str) -> None:
    """Take the explorer after a call."""
    page = _page(browser, {"width": 1100, "height": 1490}, "light")
    page.goto(f"{url}/docs#/sessions/createSession")
    session = page.locator("#operations-sessions-createSession")
    session.get_by_role("button", name="Execute").click()
    expect(session.locator(".live-responses-table .response")).to_contain_text("201")
    session.scroll_into_view_if_needed()
    page.screenshot(path=FOLDER / name)
    page.close()


def _page(browser: Browser, viewport: dict[str, int], scheme: Literal["light", "dark"]) -> Page:
    # Without motion: a picture of a moving thing is another one each time.
    return browser.new_page(color_scheme=scheme, reduced_motion="reduce", viewport=viewport)  # type: ignore[arg-type]


def main() -> None:
    """Take all screenshots."""
    FOLDER.mkdir(exist_ok=True)
    with running_sandbox() as (_, url), chromium() as browser:
        take_demo(browser, url, "light", "demo.png")
        take_demo(browser, url, "dark", "demo-dark.png")
        take_element(browser, url, "element.png")
        take_explorer(browser, url, "explorer.png")


if __name__ == "__main__":
    main()
