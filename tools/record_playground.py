"""Records the playground: a picture, and a short film of weights that are dragged and answers that follow.

    python tools/record_playground.py URL [--folder docs]

URL is what `make playground` prints. Writes `playground.png` and `playground.gif`. Waits are shortened in the
film, so that it shows what happens and not how fast.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, ViewportSize, expect, sync_playwright

from install import ROOT
from page import BROWSER_FLAGS, find_browser

SIZE: ViewportSize = {"width": 1440, "height": 900}
COLORS = 48
"""Number of colors of the film: enough for text."""
SCALE = 0.65
LONG = 180_000
WEIGHTS = (0.25, 0.0, 1.0)
"""Where the slider of the adapter `sql` goes, one after the other."""
STILL = 0.3
"""Seconds for which a frame is shown at most, except the last of each position."""


class Film:
    """Frames with the seconds for which each is shown."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._frames: list[Image.Image] = []
        self._times: list[float] = []
        self._still: list[float] = []

    def shoot(self, still: float = STILL) -> None:
        """Take a frame now, to be shown for so many seconds at most."""
        shot = Image.open(io.BytesIO(self._page.screenshot())).convert("RGB")
        width, height = (round(SCALE * each) for each in shot.size)
        self._frames.append(shot.resize((width, height), Image.Resampling.LANCZOS))
        self._times.append(time.monotonic())
        self._still.append(still)

    def write(self, file: Path) -> None:
        """Write the film."""
        palette = self._frames[-1].quantize(COLORS)
        frames = [frame.quantize(COLORS, palette=palette, dither=Image.Dither.NONE) for frame in self._frames]
        gaps = [end - begin for begin, end in pairwise([*self._times, math.inf])]
        shown = [round(1000 * min(gap, still)) for gap, still in zip(gaps, self._still, strict=True)]
        frames[0].save(file, save_all=True, append_images=frames[1:], duration=shown, loop=0, optimize=True)


def settled(page: Page, film: Film | None = None) -> None:
    """Wait until nothing is under way; film it meanwhile."""
    stop = page.get_by_role("button", name="Stop").first
    deadline = time.monotonic() + LONG / 1000
    page.wait_for_timeout(300)
    while stop.is_enabled() and time.monotonic() < deadline:
        if film is not None:
            film.shoot()
        page.wait_for_timeout(150)
    expect(stop).to_be_disabled()


def record(page: Page, url: str, folder: Path) -> None:
    """Ask, drag one weight, and write what was seen."""
    page.goto(url)
    expect(page.locator("#sources input").first).to_be_visible(timeout=LONG)
    page.get_by_role("button", name="Ask").click()
    settled(page)
    page.get_by_label("Tokens at most", exact=True).fill("40")
    page.get_by_role("button", name="Ask").click()
    settled(page)
    page.screenshot(path=folder / "playground.png")
    film = Film(page)
    film.shoot(2.0)
    for weight in WEIGHTS:
        page.wait_for_timeout(2000)
        slider = page.get_by_label("sql, slider", exact=True)
        slider.focus()
        while abs((now := float(slider.input_value())) - weight) > 0.02:
            page.keyboard.press("ArrowLeft" if now > weight else "ArrowRight")
            page.wait_for_timeout(30)
            film.shoot()
        settled(page, film)
        film.shoot(2.0)
    film.write(folder / "playground.gif")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Record the playground.")
    parser.add_argument("url", help="what make playground prints")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="default: %(default)s")
    options = parser.parse_args(arguments)
    browser = find_browser()
    if browser is None:
        parser.error("there is no Chromium on this machine")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=browser, args=BROWSER_FLAGS)
        record(running.new_page(viewport=SIZE), options.url, options.folder)
        running.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
