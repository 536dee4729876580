"""Debian's Chromium for tests in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

WAIT_MS = 30_000


@contextmanager
def chromium(*arguments: str) -> Iterator[Browser]:
    """Yield a browser; skip the test where there is none, or fail it under PIPELINE_REQUIRE_KAFKA=1."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        (pytest.fail if os.environ.get("PIPELINE_REQUIRE_KAFKA") == "1" else pytest.skip)(
            "no Chromium: apt-get install chromium"
        )
    with sync_playwright() as playwright:
        expect.set_options(timeout=WAIT_MS)
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", *arguments])
        try:
            yield started
        finally:
            started.close()
