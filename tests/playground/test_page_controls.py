"""The controls of the page before a stand-in for vLLM: from the table, for everybody, at any size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from merged_lora.spec import parse
from merged_lora.strategies import TABLE
from playground_page import NewPage, ask, at, card, drag, merge_card, ready, serious, settled, slider, spec_of
from playground_server import Stub

pytestmark = pytest.mark.slow

# Controls come from the table


@pytest.mark.parametrize("name", TABLE)
def test_a_strategy_shows_its_options_with_help_range_and_default(page_of: Page, name: str) -> None:
    page, strategy = page_of, TABLE[name]
    page.get_by_label("Strategy", exact=True).select_option(name)
    page.locator("#more").evaluate("each => each.open = true")
    expect(page.locator("#strategy")).to_contain_text(strategy.summary)
    for option in strategy.options:
        control = page.get_by_label(option.name, exact=True)
        expect(control.locator("xpath=../..")).to_contain_text(option.help)
        schema = option.check.schema
        if "enum" in schema:
            assert control.locator("option").all_inner_texts() == schema["enum"]
            assert control.input_value() == option.default
        elif schema["type"] == "number":
            held = slider(page, option.name)
            low, high = float(held.get_attribute("min") or ""), float(held.get_attribute("max") or "")
            assert option.check(low) == low
            assert option.check(high) == high
            assert high == schema.get("maximum", 2)
            assert float(held.input_value()) == option.default
            assert control.get_attribute("placeholder") == f"{option.default:g}"
    taken = {option.name for option in strategy.options}
    foreign = {o.name for s in TABLE.values() for o in s.options} - taken
    for other in foreign:
        expect(page.get_by_label(other, exact=True)).to_have_count(0)


@pytest.fixture(scope="module")
def page_of(browser: Any) -> Iterator[Page]:
    """One page for all strategies."""
    with Stub().running() as running:
        page = browser.new_page()
        page.goto(at(running.url))
        expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
        yield page
        page.close()


def test_an_option_can_have_one_value_for_each_source(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site)
    page.get_by_label("one density for each source").check()
    drag(page, "density of sql", 0.25)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql, density=[0.5, 0.25])")
    page.get_by_label("one density for each source").uncheck()
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")


def test_sources_come_and_go(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    page.get_by_label("Add a source").select_option("tone")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql, tone)")
    expect(page.get_by_label("tone", exact=True)).to_be_focused()
    page.get_by_role("button", name="Remove chat").click()
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(sql, tone)")
    ask(page)
    assert sorted(stub.asked[1:3]) == ["sql", "tone"]
    expect(card(page, "chat")).to_have_count(0)


def test_the_focus_stays_near_a_source_that_is_removed(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.folders = ("folder",)
    page = ready(new_page, f"{site}#spec=ties(sql,chat,tone,folder)")
    page.get_by_role("button", name="Remove folder").click()
    expect(page.get_by_label("Add a source")).to_be_disabled()
    expect(page.get_by_label("Strategy", exact=True)).to_be_focused()
    page.get_by_role("button", name="Remove tone").click()
    expect(page.get_by_label("Add a source")).to_be_focused()


def test_names_with_commas_are_told_apart(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.adapters = ("a,b", "c", "a", "b,c")
    page = ready(new_page, site)
    spec = page.get_by_label("Spec", exact=True)
    for names in (["a,b", "c"], ["a", "b,c"]):
        quoted = ", ".join(json.dumps(name) for name in names)
        spec.fill(f"ties({quoted})")
        for name in names:
            expect(page.get_by_label(name, exact=True)).to_be_visible()


def test_a_spec_by_hand_moves_the_controls(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site)
    ask(page)
    page.get_by_label("Spec", exact=True).fill(
        "dare_ties(0.25 * sql + tone; density 0.125; seed 9223372036854775807)"
    )
    expect(merge_card(page).locator(".text")).to_contain_text("dare_ties(0.25*sql,")
    expect(page.get_by_label("Strategy", exact=True)).to_have_value("dare_ties")
    expect(slider(page, "sql")).to_have_value("0.25")
    expect(page.get_by_label("seed", exact=True)).to_have_value(str(2**63 - 1))
    drag(page, "tone", 0.5)
    text = "dare_ties(0.25*sql, 0.5*tone, density=0.125, seed=9223372036854775807)"
    expect(page.get_by_label("Spec", exact=True)).to_have_value(text)
    assert str(parse(text)) == text


def test_values_for_each_source_stay_with_their_sources(new_page: NewPage, site: str) -> None:
    page = ready(new_page, f"{site}#spec=ties(sql,chat,density=[0.25,0.75])")
    page.get_by_label("Add a source").select_option("tone")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.get_by_label("Spec", exact=True)).to_have_value(
        "ties(chat, sql, tone, density=[0.75, 0.25, 0.5])"
    )
    page.get_by_role("button", name="Remove chat").click()
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(sql, tone, density=[0.25, 0.5])")
    page.get_by_role("button", name="Remove tone").click()
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(sql, density=0.25)")


def test_a_blank_number_is_its_default(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, f"{site}#spec=ties(0.5*sql,chat)")
    page.get_by_label("sql", exact=True).fill("")
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    ask(page)
    assert (stub.bodies[0]["temperature"], stub.bodies[0]["max_tokens"]) == (0, 64)


def test_a_spec_by_hand_becomes_canonical_when_it_is_left(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site)
    page.get_by_label("Spec", exact=True).fill("0.5 * tone + sql")
    expect(page.get_by_label("tone", exact=True)).to_have_value("0.5")
    assert spec_of(page) == "0.5 * tone + sql"
    page.get_by_label("Prompt", exact=True).focus()
    assert spec_of(page) == "sum(sql, 0.5*tone)"


def test_asking_at_once_asks_what_was_typed(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site)
    page.get_by_label("ask anew as the merge changes").uncheck()
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_label("Spec", exact=True).fill("slerp(sql, tone)")
    page.keyboard.press("Control+Enter")
    expect(merge_card(page).locator(".text")).to_have_text("slerp(sql, tone) hello")
    settled(page)
    assert stub.asked[0] == "slerp(sql, tone)"
    assert sorted(stub.asked[1:]) == ["base", "sql", "tone"]


def test_a_changed_prompt_is_asked_with_the_next_position(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site)
    ask(page)
    page.get_by_label("Prompt", exact=True).fill("goodbye")
    drag(page, "sql", 0.3)
    expect(card(page, "base").locator(".text")).to_have_text("base goodbye")
    expect(merge_card(page).locator(".text")).to_have_text("ties(chat, 0.3*sql) goodbye")


def test_an_adapter_may_be_called_as_the_merge_is(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.adapters = ("merge", "the merge")
    page = ready(new_page, site)
    ask(page)
    expect(page.locator("article")).to_have_count(4)
    expect(card(page, "merge").locator(".text")).to_have_text("merge hello")
    expect(merge_card(page)).to_have_count(1)


def test_a_source_that_is_no_model_answers_as_its_own_merge(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.folders = ("folder",)
    page = ready(new_page, f"{site}#spec=ties(folder,sql)")
    ask(page)
    expect(card(page, "folder").locator(".text")).to_have_text('sum("folder") hello')


def test_the_name_of_an_alias_means_its_merge(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.aliases["team"] = "slerp(sql, tone, t=0.25)"
    page = ready(new_page, f"{site}#spec=0.5*chat")
    page.get_by_label("Spec", exact=True).fill("team")
    expect(page.get_by_label("tone", exact=True)).to_be_visible()
    page.get_by_label("Prompt", exact=True).focus()
    assert spec_of(page) == "slerp(sql, tone, t=0.25)"


# For everybody


@pytest.mark.parametrize(("scheme", "width"), [("light", 360), ("dark", 1280), ("light", 3840)])
def test_nothing_serious_is_in_the_way_at_any_size(
    new_page: NewPage, stub: Stub, site: str, scheme: str, width: int
) -> None:
    stub.words = lambda model, prompt: [model, "x" * 120, *["word"] * 60]
    page = ready(new_page, site, refused=True, color_scheme=scheme, viewport={"width": width, "height": 800})
    ask(page)
    page.get_by_label("show how sure").check()
    page.get_by_role("button", name="What survives of each source?").click()
    page.get_by_role("button", name="Keep this merge").click()
    page.get_by_role("button", name="Copy curl").click()
    for folded in page.locator("details").all():
        folded.evaluate("each => each.open = true")
    page.locator("#prompts-text").fill("one\ntwo")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#comparison tbody tr")).to_have_count(2)
    page.get_by_label("density", exact=True).fill("7")
    expect(page.get_by_label("density", exact=True)).to_have_attribute("aria-invalid", "true")
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_is_reached_and_moved_by_the_keyboard(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    for folded in page.locator("details").all():
        folded.evaluate("each => each.open = true")
    controls = "input, select, textarea, button, summary, a"
    all_of_them = page.locator(controls).evaluate_all(
        "all => all.filter(each => each.checkVisibility() && !each.disabled)"
        ".map((each, i) => each.dataset.number = i).length"
    )
    outline = (
        "getComputedStyle(document.activeElement.closest('.file') ?? document.activeElement).outlineStyle"
    )
    seen, outlines = set(), set()
    for _ in range(2 * all_of_them):
        page.keyboard.press("Tab")
        number = page.evaluate("document.activeElement?.dataset.number ?? null")
        if number is not None:
            seen.add(number)
            outlines.add(page.evaluate(outline))
    assert len(seen) == all_of_them
    assert outlines == {"solid"}

    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type("hello")
    page.keyboard.press("Control+Enter")
    settled(page)
    slider(page, "sql").focus()
    page.keyboard.press("ArrowLeft")
    expect(merge_card(page).locator(".text")).to_have_text("ties(chat, 0.95*sql) hello")
    page.get_by_label("Strategy", exact=True).focus()
    page.keyboard.type("slerp")
    expect(page.get_by_label("Spec", exact=True)).to_have_value("slerp(chat, 0.95*sql)")
    page.get_by_role("button", name="Copy spec").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Copied text")).to_have_text("slerp(chat, 0.95*sql)")
