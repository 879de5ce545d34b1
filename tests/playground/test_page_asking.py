"""The page before a stand-in for vLLM: who is asked what, and what is shown of the answers."""

from __future__ import annotations

import time
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Page, expect

from merged_lora.playground.proxy import application
from playground_page import (
    NewPage,
    ask,
    at,
    card,
    drag,
    merge_card,
    press_ask,
    ready,
    settled,
    slider,
    spec_of,
)
from playground_server import Running, Stub

pytestmark = pytest.mark.slow


def assert_nothing_under_way(page: Page, stub: Stub) -> None:
    """Assert that the stand-in soon answers nobody."""
    deadline = time.monotonic() + 5
    while stub.under_way and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert stub.under_way == 0


# What is asked


def test_the_page_begins_with_a_merge_of_what_is_there(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    expect(page.locator("#server")).to_contain_text("/v1")


def test_the_page_begins_with_the_first_alias(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.aliases["team"] = "slerp(sql, tone, t=0.25)"
    page = ready(new_page, site)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("slerp(sql, tone, t=0.25)")
    expect(slider(page, "t")).to_have_value("0.25")


def test_an_address_names_a_merge_and_a_prompt(new_page: NewPage, site: str) -> None:
    page = ready(new_page, f"{site}#{urlencode({'spec': '0.5*sql + tone', 'prompt': 'hi there'})}")
    expect(page.get_by_label("Spec", exact=True)).to_have_value("sum(0.5*sql, tone)")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("hi there")


def test_merge_sources_and_base_answer_and_the_base_by_itself(
    new_page: NewPage, stub: Stub, site: str
) -> None:
    stub.pace = 0.02
    page = ready(new_page, site)
    ask(page)
    assert stub.asked[0] == "ties(chat, sql)"
    assert sorted(stub.asked[1:3]) == ["chat", "sql"]
    assert stub.asked[3:] == ["base"]
    assert stub.beside_base == 0
    for name in ("chat", "sql", "base"):
        expect(card(page, name).locator(".text")).to_have_text(f"{name} hello")
    facts = merge_card(page).locator("dl")
    for fact in ("new, made in 12 ms", "98.7 %", "first token"):
        expect(facts).to_contain_text(fact)


def test_a_slider_asks_the_merge_anew_and_nobody_else(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site)
    ask(page)
    del stub.asked[:]
    drag(page, "sql", 0.3)
    expect(merge_card(page).locator(".text")).to_have_text("ties(chat, 0.3*sql) hello")
    settled(page)
    assert stub.asked == ["ties(chat, 0.3*sql)"]
    assert spec_of(page) == "ties(chat, 0.3*sql)"


def test_nothing_is_asked_before_the_first_time_nor_while_it_is_not_live(
    new_page: NewPage, stub: Stub, site: str
) -> None:
    page = ready(new_page, site)
    drag(page, "sql", 0.3)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, 0.3*sql)")
    page.wait_for_timeout(400)
    assert stub.asked == []
    ask(page)
    page.get_by_label("ask anew as the merge changes").uncheck()
    del stub.asked[:]
    drag(page, "sql", 0.4)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, 0.4*sql)")
    page.wait_for_timeout(400)
    assert stub.asked == []


def test_fifty_quick_moves_leave_no_request_behind(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.words, stub.pace = lambda model, prompt: ["on"] * 10_000, 0.01
    page = ready(new_page, site)
    press_ask(page)
    for i in range(49):
        drag(page, "sql", round(0.05 * (i % 40), 2))
        page.wait_for_timeout(40 if i % 5 else 200)
        assert stub.under_way <= 6  # three of this position, and those that the last one is giving up
    stub.words = lambda model, prompt: [model]
    drag(page, "sql", 0.5)
    settled(page)
    expect(merge_card(page).locator(".text")).to_have_text("ties(chat, 0.5*sql)")
    expect(card(page, "base").locator(".text")).to_have_text("base")
    assert_nothing_under_way(page, stub)


def test_stop_gives_up_what_is_under_way(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.words, stub.pace = lambda model, prompt: ["on"] * 10_000, 0.01
    page = ready(new_page, site)
    press_ask(page)
    expect(merge_card(page).locator(".text")).to_contain_text("on on on")
    page.get_by_role("button", name="Stop").first.click()
    expect(merge_card(page).get_by_role("status")).to_have_text("given up")
    assert_nothing_under_way(page, stub)


def test_a_text_to_go_on_with_is_asked_as_one(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site)
    page.get_by_label("As", exact=True).select_option("a text to go on with")
    page.get_by_label("Temperature", exact=True).fill("0.7")
    page.get_by_label("Tokens at most", exact=True).fill("12")
    ask(page, "once upon")
    body = stub.bodies[0]
    assert (body["prompt"], body["temperature"], body["max_tokens"]) == ("once upon", 0.7, 12)
    assert "messages" not in body


def test_the_page_of_the_command_asks_through_it(new_page: NewPage, stub: Stub) -> None:
    with (
        stub.running() as server,
        Running(lambda port: application(server.url, port)) as command,
    ):
        page = ready(new_page, at(command.url))
        expect(page.locator("#server")).to_contain_text(f"{server.url}/v1")
        ask(page)
        expect(card(page, "base").locator(".text")).to_have_text("base hello")
        expect(merge_card(page).locator("dl")).to_contain_text("new, made in 12 ms")
        page.get_by_role("button", name="Copy curl").click()
        expect(page.get_by_label("Copied text")).to_contain_text(f"{server.url}/v1/chat/completions")
        page.goto("about:blank")


# What is shown


def test_words_that_differ_are_marked(new_page: NewPage, stub: Stub, site: str) -> None:
    answers = {"chat": "a b c d", "sql": "a b c", "base": "x"}
    stub.words = lambda model, prompt: answers.get(model, "a q c d").split()
    page = ready(new_page, f"{site}#spec=ties(0.9*sql, chat)")
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, 0.9*sql)")
    ask(page)
    expect(page.get_by_label("Mark words that differ from")).to_have_value("chat")  # that of most weight
    expect(merge_card(page).locator("mark")).to_have_text(["q"])
    expect(merge_card(page).get_by_role("status")).to_have_text("complete; 1 word differs from chat")
    page.get_by_label("Mark words that differ from").select_option("sql")
    expect(merge_card(page).locator("mark")).to_have_text(["q", "d"])
    page.get_by_label("Mark words that differ from").select_option("base")
    expect(merge_card(page).locator("mark")).to_have_text(["a", "q", "c", "d"])


def test_how_sure_is_shown_on_demand(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site)
    ask(page)
    expect(merge_card(page).locator("dl")).to_contain_text("50 %")
    expect(page.locator("[data-unsure]")).to_have_count(0)
    page.get_by_label("show how sure").check()
    word = card(page, "sql").locator("[data-unsure]").first
    expect(word).to_have_attribute("data-unsure", "2")
    expect(word).to_have_attribute("title", "50 % sure")


def test_what_survives_is_asked_on_demand(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site, refused=True)
    ask(page)
    page.get_by_role("button", name="What survives of each source?").click()
    expect(page.locator(".survived li")).to_have_text(
        ["chat: 0 of 4 own answers, lost", "sql: 1 of 4 own answers, lost"]
    )
    stub.calibrated = False
    drag(page, "sql", 0.5)
    settled(page)
    expect(page.locator(".survived li")).to_have_count(0)
    page.get_by_role("button", name="What survives of each source?").click()
    expect(page.locator(".merge .survived")).to_have_text("source 'sql' has no calibration")


def test_what_survives_compares_no_other_answers(new_page: NewPage, site: str) -> None:
    page = ready(new_page, f"{site}#spec=ties(chat,0.9*sql)")
    ask(page)
    status = merge_card(page).get_by_role("status")
    expect(status).to_contain_text("differ from chat")
    page.get_by_label("ask anew as the merge changes").uncheck()
    page.get_by_label("Add a source").select_option("tone")
    page.get_by_role("button", name="Add", exact=True).click()
    drag(page, "tone", 2)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, 0.9*sql, 2*tone)")
    page.get_by_role("button", name="What survives of each source?").click()
    expect(page.locator(".survived li")).to_have_count(2)
    expect(status).to_contain_text("differ from chat")
    expect(page.get_by_label("Mark words that differ from")).to_have_value("chat")


def test_an_answer_that_the_limit_cut_says_so(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.cuts = True
    page = ready(new_page, site)
    press_ask(page)
    for name in ("chat", "base"):
        status = card(page, name).get_by_role("status")
        expect(status).to_have_text("cut at the limit of tokens")
    expect(merge_card(page).get_by_role("status")).to_contain_text("cut at the limit of tokens; ")


def test_the_nearest_of_the_sources_of_most_weight_is_compared_with(
    new_page: NewPage, stub: Stub, site: str
) -> None:
    answers = {"chat": "x y z", "sql": "a b x", "tone": "a b c", "base": "q"}
    stub.words = lambda model, prompt: answers.get(model, "a b c").split()
    page = ready(new_page, f"{site}#spec=ties(chat,sql,0.5*tone)")
    ask(page)
    expect(page.get_by_label("Mark words that differ from")).to_have_value("sql")
    expect(merge_card(page).locator("mark")).to_have_text(["c"])
