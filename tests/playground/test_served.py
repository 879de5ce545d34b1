"""The page of a real server with the example adapters; what takes long is for ``make soak``."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from merged_lora.bench.launcher import VllmServer
from merged_lora.bench.playground import AIM, measure
from merged_lora.spec import parse
from playground_page import LONG, NewPage, ask, at, card, merge_card, ready, serious, settled, slider, spec_of
from smollm2 import MODEL_DIR
from tasks import TASKS, examples
from train import ADAPTERS_DIR

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("playground")]

MARKUP = "<img src=x onerror=alert(1)>"
PROMPT = examples(TASKS["sql"], "test", 1)[0].prompt
SLOTS = 5
NOTE_PARTS = """() => {
  window.parts = [];
  const text = document.querySelector("article.merge .text");
  const note = () => {
    const isNew = text.textContent !== (window.parts.at(-1) ?? "");
    if (text.getAttribute("aria-busy") === "true" && isNew) window.parts.push(text.textContent);
  };
  new MutationObserver(note).observe(text, { childList: true });
}"""
"""Notes the texts that an answer has while it is under way."""


def served(log: Path) -> VllmServer:
    """A server with the example adapters, one of them also under a name that is markup."""
    folders = {**{task: ADAPTERS_DIR / task for task in TASKS}, MARKUP: ADAPTERS_DIR / "tone"}
    modules = [json.dumps({"name": name, "path": str(folder)}) for name, folder in folders.items()]
    return VllmServer(
        MODEL_DIR,
        *("--dtype", "float32", "--max-num-seqs", "8", "--enforce-eager", "--max-model-len", "512"),
        *("--max-lora-rank", "8", "--max-loras", str(SLOTS), "--enable-merged-lora"),
        *("--merged-lora-playground", "--merged-lora-runtime-aliases", "--lora-modules", *modules),
        *("--merged-lora-modules", "team=ties(sql, json, tone)"),
        log=log,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with served(tmp_path_factory.mktemp("playground") / "server.log") as running:
        yield running


@pytest.fixture
def site(server: VllmServer) -> str:
    return at(server.url)


def ask_few(page: Page, prompt: str, tokens: int = 16) -> None:
    """Ask all for so many tokens, and wait until the last has answered."""
    page.get_by_label("Tokens at most", exact=True).fill(str(tokens))
    ask(page, prompt, LONG)


def direct(url: str, model: str, prompt: str, tokens: int = 16) -> str:
    """The answer of a model without the page."""
    body = {"model": model, "temperature": 0, "max_tokens": tokens}
    asked = {**body, "messages": [{"role": "user", "content": prompt}]}
    reply = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=120, trust_env=False)
    return str(reply.json()["choices"][0]["message"]["content"])


def test_choose_drag_stream_copy(new_page: NewPage, server: VllmServer, site: str) -> None:
    page = ready(new_page, site, permissions=["clipboard-read", "clipboard-write"])
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(json, sql, tone)")
    page.get_by_label("Strategy", exact=True).select_option("linear")
    page.get_by_role("button", name="Remove json").click()
    expect(page.get_by_label("Spec", exact=True)).to_have_value("linear(sql, tone)")
    ask_few(page, PROMPT)
    before = merge_card(page).locator(".text").inner_text()
    for name in ("sql", "tone", "base"):
        expect(card(page, name).locator(".text")).to_have_text(direct(server.url, name, PROMPT))

    page.evaluate(NOTE_PARTS)
    slider(page, "sql").fill("0.25")
    settled(page, LONG)
    parts = page.evaluate("window.parts")
    assert len(parts) > 2  # it came bit by bit
    assert all(len(earlier) < len(later) for earlier, later in pairwise(parts))
    spec = "linear(0.25*sql, tone)"
    assert spec_of(page) == spec
    after = merge_card(page).locator(".text").inner_text()
    assert before != after == direct(server.url, spec, PROMPT)
    facts = merge_card(page).locator("dl").inner_text()
    assert re.search(r"new, made in \d+ ms", facts)
    assert re.search(r"rank\s+8", facts)
    assert re.search(r"sure\s+\d+ %", facts)
    assert re.search(r"first token\s+\d+\.\d+ s", facts)

    page.get_by_role("button", name="Copy spec").click()
    expect(page.get_by_text("copied", exact=True)).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == spec
    page.get_by_label("Alias", exact=True).fill("polite-sql")
    page.get_by_role("button", name="Define on the server").click()
    expect(page.get_by_text(f"polite-sql is now {spec}")).to_be_visible(timeout=LONG)
    assert direct(server.url, "polite-sql", PROMPT) == after


def test_what_the_engine_refuses_is_shown_where_it_belongs(new_page: NewPage, site: str) -> None:
    page = ready(new_page, f"{site}#spec=cat(sql, json)", refused=True)
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#spec-text-error")).to_contain_text("rank 16", timeout=LONG)
    page.get_by_label("Spec", exact=True).fill("regmean(sql, absent)")
    expect(page.locator("#spec-text-error")).to_be_hidden()
    expect(page.get_by_label("absent", exact=True)).to_have_attribute("aria-invalid", "true", timeout=LONG)


@pytest.mark.soak
def test_fifty_quick_moves_leave_no_request_behind(new_page: NewPage, server: VllmServer, site: str) -> None:
    page = ready(new_page, site)
    ask_few(page, PROMPT, tokens=48)
    for i in range(50):
        slider(page, "sql").fill(str(round(0.05 * (i % 40) - 0.5, 2)))
        page.wait_for_timeout(30 if i % 10 else 700)
    settled(page, LONG)
    spec = spec_of(page)
    assert merge_card(page).locator(".text").inner_text() == direct(server.url, spec, PROMPT, 48)

    def under_way() -> float:
        metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
        counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", metrics, re.MULTILINE)
        report = httpx.get(f"{server.url}/v1/merged_lora", trust_env=False).json()
        return sum(map(float, counts)) + len(report["making"])

    deadline = time.monotonic() + 20
    while under_way() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert under_way() == 0


@pytest.mark.soak
def test_a_name_with_markup_is_a_name(new_page: NewPage, server: VllmServer, site: str) -> None:
    page = ready(new_page, f"{site}#spec=ties(json, sql, tone)")
    page.get_by_label("Add a source").select_option(MARKUP)
    page.get_by_role("button", name="Add", exact=True).click()
    ask_few(page, f"{MARKUP} Rewrite politely: We won't deliver your lamp by Monday.")
    expect(card(page, MARKUP).locator(".text")).not_to_be_empty()
    page.get_by_label("Alias", exact=True).fill("<b>bold</b>")
    page.get_by_role("button", name="Define on the server").click()
    expect(page.get_by_text("<b>bold</b> is now ties(")).to_be_visible(timeout=LONG)
    assert page.locator("img, b").count() == 0


@pytest.mark.soak
def test_a_server_that_is_killed_in_mid_stream(new_page: NewPage, tmp_path: Path) -> None:
    with served(tmp_path / "server.log") as server:
        page = ready(new_page, at(server.url), refused=True)
        page.get_by_label("Tokens at most", exact=True).fill("400")
        page.get_by_label("As", exact=True).select_option("a text to go on with")
        page.get_by_label("Prompt", exact=True).fill("Once upon a time")
        page.get_by_role("button", name="Ask").click()
        expect(merge_card(page).get_by_role("status")).to_have_text("answering", timeout=LONG)
        os.killpg(server.pid, signal.SIGKILL)
        expect(merge_card(page).locator(".error").first).to_contain_text("the server", timeout=LONG)
        expect(merge_card(page).locator(".text")).not_to_be_empty()
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#trouble")).to_contain_text("the server does not answer", timeout=LONG)


@pytest.mark.soak
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1920, 3840])
def test_nothing_serious_is_in_the_way(new_page: NewPage, site: str, scheme: str, width: int) -> None:
    page = ready(new_page, site, color_scheme=scheme, viewport={"width": width, "height": 900})
    ask_few(page, PROMPT)
    page.get_by_label("show how sure").check()
    for folded in page.locator("details").all():
        folded.evaluate("each => each.open = true")
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.soak
def test_a_new_position_begins_to_answer_soon(browser: Browser, server: VllmServer) -> None:
    plain, moved = measure(browser.new_page(), at(server.url), parse("ties(json, sql, tone)"), rounds=12)
    assert statistics.median(moved) - statistics.median(plain) < AIM
