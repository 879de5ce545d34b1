"""What the tests of the page do with it, on a stand-in and on a real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from page import folder_of

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

NewPage = Callable[..., "Page"]
"""Opens the page at an address, with options of a browser's context."""
ROOT = Path(__file__).resolve().parents[1]
AXE = folder_of(ROOT / ".venv") / "node_modules" / "axe-core" / "axe.min.js"
LONG = 120_000
"""Milliseconds for an answer of a real model on a busy machine."""


def at(url: str) -> str:
    """The address of the page of a server."""
    return f"{url}/merged_lora/"


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
