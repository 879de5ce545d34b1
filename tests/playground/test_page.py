"""The page in a browser, before a stand-in for vLLM: what moves, what is asked, what is shown of errors."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from urllib.parse import urlencode

import pytest

from merged_lora.playground.pages import refusal
from merged_lora.spec import parse
from merged_lora.strategies import TABLE
from playground_page import NewPage, at, card, merge_card, serious, spec_of
from playground_server import Stub

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.slow

MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def site(stub: Stub) -> Iterator[str]:
    with stub.running() as running:
        yield at(running.url)


def ready(new_page: NewPage, url: str, **options: Any) -> Page:
    """The page at an address, once it shows a merge."""
    page: Page = new_page(url, **options)
    expect(page.locator("#sources input").first).to_be_visible()
    return page


def ask(page: Page, prompt: str = "hello") -> None:
    """Ask, and wait until all have answered."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Ask").click()
    settled(page)


def settled(page: Page) -> None:
    """Wait until the merge that the page shows has answered, and nothing is under way."""
    expect(page.get_by_label("Spec", exact=True)).not_to_have_value("")
    expect(merge_card(page).locator(".subject")).to_have_text(spec_of(page))
    expect(merge_card(page).get_by_role("status")).to_contain_text("complete")
    expect(page.get_by_role("button", name="Stop").first).to_be_disabled()


def slider(page: Page, name: str) -> Any:
    return page.get_by_label(f"{name}, slider", exact=True)


def drag(page: Page, name: str, value: float) -> None:
    """Move a slider as a pointer does."""
    slider(page, name).fill(str(value))


# What is asked


def test_the_page_begins_with_a_merge_of_what_is_there(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    assert "/v1" in page.locator("#server").inner_text()


def test_the_page_begins_with_the_first_alias(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.aliases["team"] = "slerp(sql, tone, t=0.25)"
    page = ready(new_page, site)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("slerp(sql, tone, t=0.25)")
    assert slider(page, "t").input_value() == "0.25"


def test_an_address_names_a_merge_and_a_prompt(new_page: NewPage, site: str) -> None:
    page = ready(new_page, f"{site}#{urlencode({'spec': '0.5*sql + tone', 'prompt': 'hi there'})}")
    expect(page.get_by_label("Spec", exact=True)).to_have_value("sum(0.5*sql, tone)")
    assert page.get_by_label("Prompt", exact=True).input_value() == "hi there"


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
    facts = merge_card(page).locator("dl").inner_text()
    assert "new, made in 12 ms" in facts
    assert "98.7 %" in facts
    assert "first token" in facts


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
    stub.words, stub.pace = lambda model, prompt: [model] * 40, 0.01
    page = ready(new_page, site)
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_role("button", name="Ask").click()
    for i in range(50):
        drag(page, "sql", round(0.05 * (i % 40), 2))
        page.wait_for_timeout(40 if i % 5 else 200)
        assert stub.under_way <= 3
    settled(page)
    last = spec_of(page)
    assert merge_card(page).locator(".text").inner_text().split()[-1] == last.split()[-1]
    assert stub.asked[-1] == "base"
    assert stub.under_way == 0


def test_stop_gives_up_what_is_under_way(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.words, stub.pace = lambda model, prompt: ["on"] * 10_000, 0.01
    page = ready(new_page, site)
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_role("button", name="Ask").click()
    expect(merge_card(page).locator(".text")).to_contain_text("on on on")
    page.get_by_role("button", name="Stop").first.click()
    expect(merge_card(page).get_by_role("status")).to_have_text("given up")
    deadline = time.monotonic() + 5
    while stub.under_way and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert stub.under_way == 0


def test_a_text_to_go_on_with_is_asked_as_one(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site)
    page.get_by_label("As", exact=True).select_option("a text to go on with")
    page.get_by_label("Temperature", exact=True).fill("0.7")
    page.get_by_label("Tokens at most", exact=True).fill("12")
    ask(page, "once upon")
    body = stub.bodies[0]
    assert (body["prompt"], body["temperature"], body["max_tokens"]) == ("once upon", 0.7, 12)
    assert "messages" not in body


# Controls come from the table


@pytest.mark.parametrize("name", TABLE)
def test_a_strategy_shows_its_options_with_help_range_and_default(page_of: Page, name: str) -> None:
    page, strategy = page_of, TABLE[name]
    page.get_by_label("Strategy", exact=True).select_option(name)
    page.locator("#more").evaluate("each => each.open = true")
    assert strategy.summary in page.locator("#strategy").inner_text()
    for option in strategy.options:
        control = page.get_by_label(option.name, exact=True)
        assert option.help in control.locator("xpath=../..").inner_text()
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
        assert page.get_by_label(other, exact=True).count() == 0


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
    page.get_by_label("one for each source").check()
    drag(page, "density of sql", 0.25)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql, density=[0.5, 0.25])")
    page.get_by_label("one for each source").uncheck()
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
    assert card(page, "chat").count() == 0


def test_a_spec_by_hand_moves_the_controls(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site)
    ask(page)
    page.get_by_label("Spec", exact=True).fill(
        "dare_ties(0.25 * sql + tone; density 0.125; seed 9223372036854775807)"
    )
    expect(merge_card(page).locator(".text")).to_contain_text("dare_ties(0.25*sql,")
    assert page.get_by_label("Strategy", exact=True).input_value() == "dare_ties"
    assert slider(page, "sql").input_value() == "0.25"
    assert page.get_by_label("seed", exact=True).input_value() == str(2**63 - 1)
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
    assert page.locator("article").count() == 4
    expect(card(page, "merge").locator(".text")).to_have_text("merge hello")
    assert merge_card(page).count() == 1


def test_a_source_that_is_no_model_answers_as_its_own_merge(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.folders = ("folder",)
    page = ready(new_page, f"{site}#spec=ties(folder,sql)")
    ask(page)
    expect(card(page, "folder").locator(".text")).to_have_text('sum("folder") hello')


# What goes wrong


@pytest.mark.parametrize(
    ("label", "text", "said"),
    [
        ("Temperature", "hot", "must be a number from 0"),
        ("Temperature", "-1", "must be a number from 0"),
        ("Tokens at most", "1,5", "must be a whole number from 1"),
        ("Tokens at most", "0", "must be a whole number from 1"),
    ],
)
def test_a_number_that_is_none_is_not_asked(
    new_page: NewPage, stub: Stub, site: str, label: str, text: str, said: str
) -> None:
    page = ready(new_page, site)
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_label(label, exact=True).fill(text)
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_text(said, exact=True)).to_be_visible()
    assert stub.asked == []


def test_a_refusal_is_not_shown_beside_the_next_position(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.pace, stub.words = 0.02, lambda model, prompt: [model] * 30
    message = "unknown adapter 'sql'"
    stub.fault = lambda path, body: (
        refusal(400, "BadRequestError", message) if body.get("model") == "ties(chat, sql)" else None
    )
    page = ready(new_page, site, refused=True)
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_role("button", name="Ask").click()
    field = page.get_by_label("sql", exact=True)
    expect(field).to_have_attribute("aria-invalid", "true")
    assert stub.under_way  # the sources have not ended: the refusal was shown before
    drag(page, "sql", 0.5)
    settled(page)
    expect(field).not_to_have_attribute("aria-invalid", "true")


def test_asking_twice_shows_one_answer(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.pace = 0.1
    page = ready(new_page, site)
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_role("button", name="Ask").dblclick()
    page.wait_for_timeout(50)
    assert merge_card(page).get_by_role("status").inner_text() in ("waiting", "answering")
    assert merge_card(page).get_attribute("aria-busy") == "true"
    settled(page)
    expect(merge_card(page).locator(".text")).to_have_text("ties(chat, sql) hello")


def test_a_complete_answer_stays_though_nothing_is_known_of_its_merge(
    new_page: NewPage, stub: Stub, site: str
) -> None:
    stub.fault = lambda path, body: refusal(500, "InternalServerError", "no") if "/merges/" in path else None
    page = ready(new_page, site, refused=True)
    ask(page)
    assert "new, made in 12 ms" in merge_card(page).locator("dl").inner_text()


@pytest.mark.parametrize(
    ("label", "text", "said"),
    [
        ("density", "7", "density must be over 0 and at most 1, got 7"),
        ("sql", "heavy", "the weight of 'sql' must be a number, got 'heavy'"),
        ("rank", "0", "rank must be a whole number from 1 to 65536, got 0"),
    ],
)
def test_a_mistake_is_shown_at_its_field(
    new_page: NewPage, site: str, label: str, text: str, said: str
) -> None:
    page = ready(new_page, f"{site}#spec=ties_svd(sql, chat)", refused=True)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties_svd(chat, sql)")
    page.locator("#more").evaluate("each => each.open = true")
    page.get_by_label(label, exact=True).fill(text)
    field = page.get_by_label(label, exact=True)
    expect(field).to_have_attribute("aria-invalid", "true")
    described = (field.get_attribute("aria-describedby") or "").split()[-1]
    expect(page.locator(f"#{described}")).to_contain_text(said)
    field.fill("1")
    expect(page.locator(f"#{described}")).to_be_hidden()
    expect(page.get_by_label("Spec", exact=True)).not_to_have_attribute("aria-invalid", "true")


def test_a_spec_that_is_none_says_where(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site, refused=True)
    page.get_by_label("Spec", exact=True).fill("ties(sql,, chat)")
    expect(page.locator("#spec-text-error")).to_contain_text("at character 10 of the spec")


@pytest.mark.parametrize(
    ("message", "param", "place"),
    [
        ("unknown adapter 'sql'; this server has chat", "model", "sql"),
        ("density=0.5 is too much for these sources", "model", "density"),
        ("nothing of this is possible", "model", "Spec"),
        ("max_tokens is over 512", "max_tokens", "Tokens at most"),
        ("temperature is too high", "temperature", "Temperature"),
    ],
)
def test_what_the_server_refuses_is_shown_where_it_belongs(
    new_page: NewPage, stub: Stub, site: str, message: str, param: str, place: str
) -> None:
    stub.fault = lambda path, body: (
        refusal(400, "BadRequestError", message, param) if "ties" in body.get("model", "") else None
    )
    page = ready(new_page, site, refused=True)
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_role("button", name="Ask").click()
    field = page.get_by_label(place, exact=True)
    expect(field).to_have_attribute("aria-invalid", "true")
    described = (field.get_attribute("aria-describedby") or "").split()[-1]
    expect(page.locator(f"#{described}")).to_have_text(message)
    expect(merge_card(page).locator(".error").first).to_have_text(message)
    expect(card(page, "sql").locator(".text")).to_have_text("sql hello")  # the others answer all the same


def test_a_busy_server_is_asked_again_by_itself(new_page: NewPage, stub: Stub, site: str) -> None:
    times: list[float] = []

    def busy(path: str, body: Any) -> Any:
        if "ties" not in body.get("model", ""):
            return None
        times.append(time.monotonic())
        reply = refusal(429, "TooManyRequestsError", "33 merges wait")
        reply.headers["retry-after"] = "1"
        return reply if len(times) < 3 else None

    stub.fault = busy
    page = ready(new_page, site, refused=True)
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_role("button", name="Ask").click()
    expect(merge_card(page).get_by_role("status")).to_have_text("the server is busy; asking again in 1 s")
    expect(merge_card(page).locator(".text")).to_have_text("ties(chat, sql) hello")
    assert [later - before >= 1 for before, later in pairwise(times)] == [True, True]


def test_a_server_that_stops_in_the_middle_says_so_and_keeps_what_came(new_page: NewPage, stub: Stub) -> None:
    stub.words, stub.pace = lambda model, prompt: ["on"] * 10_000, 0.01
    running = stub.running()
    with running:
        page = ready(new_page, at(running.url), refused=True)
        page.get_by_label("Prompt", exact=True).fill("hello")
        page.get_by_role("button", name="Ask").click()
        expect(merge_card(page).locator(".text")).to_contain_text("on on on")
    expect(merge_card(page).locator(".error").first).to_have_text(
        "the server stopped in the middle of this answer"
    )
    assert "on on on" in merge_card(page).locator(".text").inner_text()
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#trouble")).to_have_text("the server does not answer; is it still running?")


def test_an_error_in_the_stream_is_shown(new_page: NewPage, stub: Stub, site: str) -> None:
    from starlette.responses import Response

    event = 'data: {"error": {"message": "the engine died", "code": 500}}\n\n'
    stub.fault = lambda path, body: Response(event) if "ties" in body.get("model", "") else None
    page = ready(new_page, site)
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_role("button", name="Ask").click()
    expect(merge_card(page).locator(".error").first).to_have_text("the engine died")


def test_a_key_is_asked_for_and_sent(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.key = "s3cret"
    page = new_page(site, refused=True)
    expect(page.locator("#trouble")).to_have_text("the key is missing or wrong")
    page.get_by_label("API key").fill("s3cret")
    page.get_by_role("button", name="Connect").click()
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    expect(page.locator("#trouble")).to_be_hidden()
    ask(page)
    page.get_by_role("button", name="Copy curl").click()
    copied = page.get_by_label("Copied text")
    expect(copied).to_contain_text("Bearer $OPENAI_API_KEY")
    assert "s3cret" not in page.locator("body").inner_text()
    assert page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])") == "[{},{}]"


def test_a_server_without_merges_says_how_to_start_it(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.fault = lambda path, body: (
        refusal(404, "NotFoundError", "Not Found") if path == "/v1/merged_lora" else None
    )
    page = new_page(site, refused=True)
    expect(page.locator("#trouble")).to_contain_text("start it with --enable-merged-lora")


def test_names_and_answers_are_text_whatever_they_hold(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.adapters = (MARKUP, "sql")
    stub.words = lambda model, prompt: ["<script>alert(2)</script>", "&lt;b&gt;", model]
    page = ready(new_page, site)
    name = json.dumps(MARKUP)
    expect(page.get_by_label("Spec", exact=True)).to_have_value(f"ties({name}, sql)")
    ask(page, "<i>hello</i>")
    page.get_by_role("button", name="Keep this merge").click()
    for kind in ("spec", "curl", "Python", "flag"):
        page.get_by_role("button", name=f"Copy {kind}").click()
        expect(page.get_by_label("Copied text")).to_contain_text("onerror")
    expect(card(page, MARKUP).locator(".text")).to_contain_text("<script>alert(2)</script> &lt;b&gt;")
    assert page.locator("img, i, b, script:not([src])").count() == 0


# What is shown


def test_words_that_differ_are_marked(new_page: NewPage, stub: Stub, site: str) -> None:
    answers = {"chat": "a b c d", "sql": "a b c", "base": "x"}
    stub.words = lambda model, prompt: answers.get(model, "a q c d").split()
    page = ready(new_page, f"{site}#spec=ties(0.9*sql, chat)")
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, 0.9*sql)")
    ask(page)
    assert page.get_by_label("Mark words that differ from").input_value() == "chat"  # that of most weight
    assert merge_card(page).locator("mark").all_inner_texts() == ["q"]
    expect(merge_card(page).get_by_role("status")).to_have_text("complete; 1 word differs from chat")
    page.get_by_label("Mark words that differ from").select_option("sql")
    assert merge_card(page).locator("mark").all_inner_texts() == ["q", "d"]
    page.get_by_label("Mark words that differ from").select_option("base")
    assert merge_card(page).locator("mark").all_inner_texts() == ["a", "q", "c", "d"]


def test_how_sure_is_shown_on_demand(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site)
    ask(page)
    assert "50 %" in merge_card(page).locator("dl").inner_text()
    assert page.locator("[data-unsure]").count() == 0
    page.get_by_label("show how sure").check()
    word = card(page, "sql").locator("[data-unsure]").first
    assert (word.get_attribute("data-unsure"), word.get_attribute("title")) == ("2", "50 % sure")


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
    expect(page.locator(".survived li")).to_have_text(["source 'sql' has no calibration"])


# What is taken away


@pytest.mark.parametrize(
    ("kind", "begin"),
    [
        ("spec", "ties(chat, sql)"),
        ("curl", "curl -s "),
        ("Python", "from openai"),
        ("flag", "--merged-lora-m"),
    ],
)
def test_a_click_copies(new_page: NewPage, site: str, kind: str, begin: str) -> None:
    page = ready(new_page, site, permissions=["clipboard-read", "clipboard-write"])
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_role("button", name=f"Copy {kind}").click()
    expect(page.get_by_text("copied", exact=True)).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(begin)
    assert copied == page.get_by_label("Copied text").inner_text()


def test_without_a_clipboard_the_text_is_selected(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site)
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    page.get_by_role("button", name="Copy spec").click()
    expect(page.get_by_text("press Ctrl+C to copy")).to_be_visible()
    assert page.evaluate("getSelection().toString()") == "ties(chat, sql)"


def test_what_was_defined_is_named_though_a_slider_moved_meanwhile(
    new_page: NewPage, stub: Stub, site: str
) -> None:
    stub.defining = 0.4
    page = ready(new_page, site)
    page.get_by_label("Alias", exact=True).fill("mix")
    page.get_by_role("button", name="Define on the server").click()
    drag(page, "sql", 0.5)
    expect(page.get_by_text("mix is now ties(chat, sql)")).to_be_visible()
    assert stub.aliases == {"mix": "ties(chat, sql)"}


@pytest.mark.parametrize("name", ["check", "..", "a=b"])
def test_a_name_that_is_no_alias_says_so(new_page: NewPage, site: str, name: str) -> None:
    page = ready(new_page, site, refused=True)
    page.get_by_label("Alias", exact=True).fill(name)
    page.get_by_role("button", name="Copy flag" if "=" in name else "Define on the server").click()
    expect(page.get_by_label("Alias", exact=True)).to_have_attribute("aria-invalid", "true")


def test_an_alias_is_defined_on_the_server(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site, refused=True)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    define, name = (
        page.get_by_role("button", name="Define on the server"),
        page.get_by_label("Alias", exact=True),
    )
    define.click()
    expect(page.get_by_text("type the name of the alias")).to_be_visible()
    name.fill("a + b")
    define.click()
    expect(page.get_by_text("alias 'a + b' reads as a merge")).to_be_visible()
    name.fill("my/mix ü")
    define.click()
    expect(page.get_by_text("my/mix ü is now ties(chat, sql)")).to_be_visible()
    assert stub.aliases == {"my/mix ü": "ties(chat, sql)"}


def test_where_aliases_are_fixed_the_button_says_so(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.changes = False
    page = ready(new_page, site)
    define = page.get_by_role("button", name="Define on the server")
    expect(define).to_be_disabled()
    assert "--merged-lora-runtime-aliases" in page.locator("#copies").inner_text()


def test_kept_merges_stay_and_are_compared_and_saved(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    page.get_by_role("button", name="Keep this merge").click()
    drag(page, "sql", 0.5)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, 0.5*sql)")
    page.get_by_role("button", name="Keep this merge").click()
    page.reload()
    page.get_by_text("Compare two on several prompts").click()
    page.get_by_label("A", exact=True).select_option("ties(chat, sql)")
    page.get_by_label("B", exact=True).select_option("ties(chat, 0.5*sql)")
    text = 'a | b\n{"prompt": "<b>two</b>\\nlines"}\n'
    page.get_by_label("Read a file").set_input_files(
        {"name": "p.jsonl", "mimeType": "text/plain", "buffer": text.encode()}
    )
    expect(page.locator("#prompts-text")).to_have_value(text)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#compared")).to_have_text("0 of 2 answers are the same")
    rows = page.locator("#comparison tbody tr")
    expect(rows).to_have_count(2)
    assert rows.nth(0).locator("mark").all_inner_texts() == ["0.5*sql)"]
    assert stub.asked == ["ties(chat, sql)", "ties(chat, 0.5*sql)"] * 2

    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as JSON").click()
    found = json.loads(saved.value.path().read_text(encoding="utf-8"))
    assert saved.value.suggested_filename == "comparison.json"
    assert found["models"] == ["ties(chat, sql)", "ties(chat, 0.5*sql)"]
    assert found["rows"][1]["prompt"] == "<b>two</b>\nlines"
    assert found["rows"][0] == {
        "prompt": "a | b",
        "answers": ["ties(chat, sql) a | b", "ties(chat, 0.5*sql) a | b"],
        "differing": 1,
    }
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as Markdown").click()
    lines = saved.value.path().read_text(encoding="utf-8").splitlines()
    assert lines[0] == r"| prompt | ties(chat, sql) | ties(chat, 0.5\*sql) |"
    assert lines[2].startswith(r"| a \| b | ties(chat, sql) a \| b |")
    assert lines[3].startswith(r"| \<b\>two\</b\><br>lines |")


def test_a_kept_merge_comes_back_and_is_forgotten(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    page.get_by_role("button", name="Keep this merge").click()
    drag(page, "sql", 0.5)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, 0.5*sql)")
    page.get_by_role("button", name="ties(chat, sql)", exact=True).click()
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    assert slider(page, "sql").input_value() == "1"
    page.get_by_role("button", name="Forget ties(chat, sql)").click()
    expect(page.locator("#kept-list li")).to_have_count(0)
    page.reload()
    expect(page.locator("#kept-list li")).to_have_count(0)


def test_a_slider_does_not_disturb_a_comparison(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site)
    ask(page)
    stub.pace = 0.1
    page.get_by_text("Compare two on several prompts").click()
    page.get_by_label("A", exact=True).select_option("base")
    page.get_by_label("B", exact=True).select_option("sql")
    page.locator("#prompts-text").fill("one\ntwo")
    del stub.asked[:]
    page.get_by_role("button", name="Compare", exact=True).click()
    drag(page, "sql", 0.5)
    expect(page.locator("#compared")).to_have_text("0 of 2 answers are the same")
    assert stub.asked == ["base", "sql", "base", "sql"]
    assert stub.beside_base == 0


def test_a_browser_that_keeps_nothing_works_all_the_same(browser: Any, site: str) -> None:
    context = browser.new_context()
    forbidden = "{ get() { throw new DOMException('', 'SecurityError'); } }"
    context.add_init_script(f"Object.defineProperty(window, 'localStorage', {forbidden})")
    page = context.new_page()
    page.goto(site)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    page.get_by_role("button", name="Keep this merge").click()
    expect(page.locator("#kept-list li")).to_have_count(1)
    context.close()


def test_a_comparison_of_prompts_that_are_none_says_which_line(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site, refused=True)
    page.get_by_text("Compare two on several prompts").click()
    page.locator("#prompts-text").fill("one\n{two")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#prompts-text-error")).to_contain_text("line 2: not a line of JSON")


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
