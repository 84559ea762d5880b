"""The explorer in a real browser."""

from playwright.sync_api import expect

from tests.e2e.conftest import OpenPage


def test_the_explorer_opens_without_internet(open_page: OpenPage, sandbox: str) -> None:
    page = open_page(f"{sandbox}/docs")

    expect(page.get_by_text("Start a call").first).to_be_visible()
