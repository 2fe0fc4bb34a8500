"""Pages in a headless Chromium without a network: what they ask for and complain of is kept.

Skipped, with the reason, where there is no Chromium or no ``playwright``.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from benchmarks.browser import FLAGS, NAMES, chromium_path

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

LOCAL: Final = ("file:", "data:", "blob:")


@contextmanager
def chromium() -> Generator[Browser, None, None]:
    """The Chromium of this machine; the test is skipped where there is none."""
    found = chromium_path()
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser: playwright is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=found, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page that was opened, and all that went wrong since."""

    def __init__(self, browser: Browser, file: Path, address: str = "", **context: Any) -> None:
        self.complaints: list[str] = []
        """Of the console, of the page, dialogs."""
        self.requests: list[str] = []
        self.context = browser.new_context(offline=True, **context)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", self._refuse)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri() + address)

    def _refuse(self, dialog: Dialog) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def ready(self) -> Page:
        """The page once all its figures are drawn."""
        self.page.wait_for_selector('html[data-ready="1"]', state="attached")
        return self.page

    def check_silent(self) -> None:
        """Nothing was complained of, and nothing asked for beyond the file itself."""
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith(LOCAL)] == []

    def close(self) -> None:
        self.context.close()


def until(page: Page, condition: str) -> None:
    """Wait for an expression to be true. ``Page.wait_for_function`` would need the page to allow eval."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {condition}")


def serious_faults(page: Page) -> list[str]:
    """What axe-core calls serious or critical: rule, what it is, the first element."""
    pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    axe = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{fault['id']}: {fault['help']}: {fault['nodes'][0]['html'][:200]} ({len(fault['nodes'])})"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
