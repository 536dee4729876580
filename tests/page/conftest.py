"""A browser for the tests of the page."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from tests.chromium import WAIT_MS, chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for the tests of a module."""
    with chromium() as started:
        yield started


@pytest.fixture
def said() -> list[str]:
    """Messages that the page has written to the console, and its errors."""
    return []


@pytest.fixture
def page(browser: Browser, said: list[str]) -> Iterator[Page]:
    """An empty page, whose messages are noted in `said`."""
    context = browser.new_context(viewport={"width": 1200, "height": 850})
    made = context.new_page()
    made.set_default_timeout(WAIT_MS)
    made.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    made.on("pageerror", lambda error: said.append(str(error)))
    made.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    yield made
    context.close()
