"""What the tests of the page do with it, on a stand-in and on a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect

from page import folder_of

NewPage = Callable[..., Page]
"""Opens the page at an address, with options of a browser's context."""
ROOT = Path(__file__).resolve().parents[1]
AXE = folder_of(ROOT / ".venv") / "node_modules" / "axe-core" / "axe.min.js"
ENDED = re.compile("^(complete|cut at the limit of tokens)")
"""How the status of an answer that has ended begins."""
SOON = 20_000
"""Milliseconds within which a page before a stand-in shows what it should, on a machine that is busy."""
LONG = 120_000
"""Milliseconds for an answer of a real model on a busy machine."""


def at(url: str) -> str:
    """The address of the page of a server."""
    return f"{url}/merged_lora/"


def ready(new_page: NewPage, url: str, **options: Any) -> Page:
    """The page at an address, once it shows a merge."""
    page = new_page(url, **options)
    expect(page.locator("#sources input").first).to_be_visible()
    return page


def press_ask(page: Page, prompt: str = "hello") -> None:
    """Ask."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Ask").click()


def ask(page: Page, prompt: str = "hello", patience: float = SOON) -> None:
    """Ask, and wait until all have answered."""
    press_ask(page, prompt)
    settled(page, patience)


def settled(page: Page, patience: float = SOON) -> None:
    """Wait until the merge that the page shows has answered, and nothing is under way.

    patience: milliseconds.
    """
    spec = page.get_by_label("Spec", exact=True)
    expect(spec).to_have_attribute("aria-busy", "false")
    expect(spec).not_to_have_value("")
    expect(merge_card(page).locator(".subject")).to_have_text(spec_of(page))
    expect(merge_card(page).get_by_role("status")).to_have_text(ENDED, timeout=patience)
    expect(page.get_by_role("button", name="Stop").first).to_be_disabled(timeout=patience)


def slider(page: Page, name: str) -> Locator:
    """The slider of a control."""
    return page.get_by_label(f"{name}, slider", exact=True)


def drag(page: Page, name: str, value: float) -> None:
    """Move a slider as a pointer does."""
    slider(page, name).fill(str(value))


def merge_card(page: Page) -> Locator:
    """The answer of the merge."""
    return page.locator("article.merge")


def card(page: Page, name: str) -> Locator:
    """The answer of another model."""
    return page.get_by_role("article").filter(has=page.get_by_role("heading", name=name, exact=True))


def spec_of(page: Page) -> str:
    """The spec that the page shows."""
    return page.get_by_label("Spec", exact=True).input_value()


def serious(page: Page) -> list[dict[str, Any]]:
    """What axe-core finds serious or critical."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("async () => JSON.stringify(await axe.run())")
    return [
        {"rule": each["id"], "nodes": [node["html"] for node in each["nodes"]]}
        for each in json.loads(found)["violations"]
        if each["impact"] in ("serious", "critical")
    ]
