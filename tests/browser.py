# SPDX-License-Identifier: Apache-2.0
"""Pages as people see them, on a phone and on a desk, in Debian's Chromium; `make browser` installs it as root."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

PHONE, DESK = 390, 1280
_AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window; one per test, because an event loop runs as long as it does."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.fail("This test looks at pages in Chromium, which is not installed: `make browser` installs it as root.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


def faults(page: Page) -> list[str]:
    """What keeps people from reading the page: more than the window's width, and what axe calls serious or critical."""
    needed, width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    found = [f"needs {needed} of {width} pixels"] if needed > width else []
    page.evaluate(_AXE)
    for violation in page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]:
        if violation["impact"] in ("serious", "critical"):
            found += [f"{violation['id']}: {node['html'][:200]}" for node in violation["nodes"]]
    return found
