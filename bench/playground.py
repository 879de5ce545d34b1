"""How soon a new position on the playground begins to answer, beside a plain adapter: in Chromium.

It asks a server that is running, such as that of ``make playground``, and nobody else may ask it meanwhile.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from merged_lora.errors import EvaluationError
from merged_lora.spec import MergeSpec, parse

from . import machine, timing
from .recording import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Page

AIM = 1.5
"""Seconds by which a new position may begin to answer later than a plain adapter."""
PROMPT = "Write SQL: How many guitar orders were returned in 2009?"
PATIENCE = 120_000
"""Milliseconds for an answer."""

MOVE = """([slider, value, patience]) => new Promise((resolve, reject) => {
  const text = document.querySelector("article.merge .text");
  const begin = performance.now();
  let cleared = false;
  const observer = new MutationObserver(() => {
    cleared ||= text.textContent === "";
    if (!cleared || text.textContent === "") return;
    observer.disconnect();
    resolve((performance.now() - begin) / 1000);
  });
  observer.observe(text, { childList: true });
  setTimeout(() => reject(new Error("no answer to a new position")), patience);
  slider.value = value;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
})"""
"""Moves a slider; the seconds until the first word of the merge's answer to that is shown."""
PLAIN = """async ([model, prompt]) => {
  const begin = performance.now();
  const body = { model, messages: [{ role: "user", content: prompt }], temperature: 0, max_tokens: 1 };
  const reply = await fetch("../v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, logprobs: true }),
  });
  if (!reply.ok) throw new Error(await reply.text());
  await reply.json();
  return (performance.now() - begin) / 1000;
}"""
"""The seconds until the first token of a plain adapter, asked by the same browser."""


def run(url: str, specs: Sequence[str], rounds: int, program: str, file: Path | None) -> int:
    """Print and write what each merge takes; returns 1 if one misses the aim.

    url:     of the page.
    specs:   merges, of whose first source the slider moves.
    rounds:  positions of each.
    program: a Chromium.

    Raises EvaluationError without Chromium or Playwright.
    """
    browser = shutil.which(program)
    if browser is None:
        raise EvaluationError(f"there is no program {program} here; name a Chromium with --browser")
    from playwright.sync_api import sync_playwright

    facts = machine.facts("vllm", "torch", "numba")
    machine.show(facts)
    found, aims = [], []
    with sync_playwright() as playwright:
        # Its sandbox does not work for root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = playwright.chromium.launch(executable_path=browser, args=arguments)
        for text in specs:
            spec = parse(text)
            plain, moved = measure(running.new_page(), url, spec, rounds)
            later = statistics.median(moved) - statistics.median(plain)
            aims.append(timing.Aim(f"{spec}: seconds after a plain adapter", later, AIM))
            print(
                f"{spec}: plain {timing.spread(plain, 1, 2)} s, new position {timing.spread(moved, 1, 2)} s"
            )
            found.append({"spec": str(spec), "plain": plain, "moved": moved})
        running.close()
    print(*(aim.line() for aim in aims), sep="\n")
    write_report(file, machine=facts, rounds=found, aims=[aim.as_json() for aim in aims])
    return int(not all(aim.met for aim in aims))


def measure(page: Page, url: str, spec: MergeSpec, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds to the first token: of the first source by itself and of each new position, in turn.

    Neither prompts of the plain adapter nor merges come twice, so that none of them is in a cache.
    """
    from playwright.sync_api import expect

    name = spec.names[0]
    page.goto(f"{url.partition('#')[0]}#{urlencode({'spec': str(spec), 'prompt': PROMPT})}")
    slider = page.get_by_label(f"{name}, slider", exact=True)
    expect(slider).to_be_visible(timeout=PATIENCE)
    page.get_by_label("Tokens at most", exact=True).fill("4")
    stop = page.get_by_role("button", name="Stop").first
    page.get_by_role("button", name="Ask").click()
    expect(stop).to_be_enabled()
    expect(stop).to_be_disabled(timeout=PATIENCE)
    plain, moved = [], []
    for i in range(rounds):
        plain.append(page.evaluate(PLAIN, [name, f"{time.time()}: {PROMPT}"]))
        value = f"{0.3 + 0.05 * i + time.time() % 1 / 1000:.5f}"
        slider.evaluate("each => each.step = 'any'")
        moved.append(page.evaluate(MOVE, [slider.element_handle(), value, PATIENCE]))
        expect(stop).to_be_disabled(timeout=PATIENCE)
    page.close()
    return plain, moved
