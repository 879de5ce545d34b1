"""The system's Chromium for the tests of the page; without one, they are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from page import BROWSER_FLAGS, find_browser
from playground_page import SOON, NewPage, at
from playground_server import Stub

expect.set_options(timeout=SOON)

LOAD = "Failed to load resource: "
"""How a browser logs a reply with an error."""


@pytest.fixture(scope="module")  # not longer: while it lives, no other event loop runs in this thread
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    path = find_browser()
    if path is None:
        pytest.skip("there is no Chromium; make browser installs one for root, and a distribution has one")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        yield running
        running.close()


@pytest.fixture
def stub() -> Stub:
    """A stand-in for vLLM with three adapters."""
    return Stub()


@pytest.fixture
def site(stub: Stub) -> Iterator[str]:
    """The address of its page."""
    with stub.running() as running:
        yield at(running.url)


@pytest.fixture
def new_page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[NewPage]:
    """Opens the page at an address, and fails if it logged an error of its own.

    Keyword arguments are those of a browser's context, and ``refused``: whether replies with errors are
    expected, which browsers log.
    """
    if "site" in request.fixturenames:
        request.getfixturevalue("site")  # first, so that it is there as long as the page
    opened = []

    def open_page(url: str, refused: bool = False, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("response", lambda r: errors.append(f"{LOAD}{r.url} {r.status}") if r.status >= 400 else None)
        page.goto(url)
        opened.append((context, errors, refused))
        return page

    yield open_page
    for context, errors, refused in opened:
        context.close()
        assert [each for each in errors if not (refused and LOAD in each)] == []
