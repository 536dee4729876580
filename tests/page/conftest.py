"""A browser for the tests of the page."""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium; skips where there is none, or fails under PIPELINE_REQUIRE_KAFKA=1."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        (pytest.fail if os.environ.get("PIPELINE_REQUIRE_KAFKA") == "1" else pytest.skip)(
            "no Chromium: apt-get install chromium"
        )
    with sync_playwright() as playwright:
        expect.set_options(timeout=WAIT_MS)
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


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
