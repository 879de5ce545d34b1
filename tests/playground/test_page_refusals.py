"""What the page shows of what goes wrong, before a stand-in for vLLM."""

from __future__ import annotations

import json
import re
import time
from itertools import pairwise
from typing import Any

import pytest
from playwright.sync_api import expect
from starlette.responses import Response

from merged_lora.playground.pages import refusal
from playground_page import NewPage, ask, at, card, drag, merge_card, press_ask, ready, settled
from playground_server import Stub

pytestmark = pytest.mark.slow

MARKUP = "<img src=x onerror=alert(1)>"


@pytest.mark.parametrize(
    ("label", "text", "said"),
    [
        ("Temperature", "hot", "must be a number from 0"),
        ("Temperature", "-1", "must be a number from 0"),
        ("Tokens at most", "1,5", "must be a whole number above 0"),
        ("Tokens at most", "0", "must be a whole number above 0"),
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
    stub.pace, stub.words = 0.02, lambda model, prompt: ["on"] * 10_000
    message = "unknown adapter 'sql'"
    stub.fault = lambda path, body: (
        refusal(400, "BadRequestError", message) if body.get("model") == "ties(chat, sql)" else None
    )
    page = ready(new_page, site, refused=True)
    press_ask(page)
    field = page.get_by_label("sql", exact=True)
    expect(field).to_have_attribute("aria-invalid", "true")
    assert "base" not in stub.asked  # the sources have not ended: the refusal was shown before
    stub.words = lambda model, prompt: [model]
    drag(page, "sql", 0.5)
    settled(page)
    expect(field).not_to_have_attribute("aria-invalid", "true")


def test_asking_twice_shows_one_answer(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.pace = 0.3
    page = ready(new_page, site)
    page.get_by_label("Prompt", exact=True).fill("hello")
    page.get_by_role("button", name="Ask").dblclick()
    expect(merge_card(page).get_by_role("status")).to_have_text(re.compile("^(waiting|answering)$"))
    expect(merge_card(page).locator(".text")).to_have_attribute("aria-busy", "true")
    settled(page)
    expect(merge_card(page).locator(".text")).to_have_text("ties(chat, sql) hello")


def test_a_complete_answer_stays_though_nothing_is_known_of_its_merge(
    new_page: NewPage, stub: Stub, site: str
) -> None:
    stub.fault = lambda path, body: refusal(500, "InternalServerError", "no") if "/merges/" in path else None
    page = ready(new_page, site, refused=True)
    ask(page)
    expect(merge_card(page).locator("dl")).to_contain_text("new, made in 12 ms")


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
    press_ask(page)
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
    press_ask(page)
    expect(merge_card(page).get_by_role("status")).to_have_text("33 merges wait; asking again in 1 s")
    expect(merge_card(page).locator(".text")).to_have_text("ties(chat, sql) hello")
    assert [later - before >= 1 for before, later in pairwise(times)] == [True, True]


def test_why_a_source_is_waited_for_is_shown(new_page: NewPage, stub: Stub, site: str) -> None:
    message = "hf://us/sql needs huggingface_hub, which is not installed"

    def absent(path: str, body: Any) -> Any:
        if "ties" not in body.get("model", ""):
            return None
        reply = refusal(503, "ServiceUnavailableError", message)
        reply.headers["retry-after"] = "1"
        return reply

    stub.fault = absent
    page = ready(new_page, site, refused=True)
    press_ask(page)
    expect(merge_card(page).get_by_role("status")).to_have_text(f"{message}; asking again in 1 s")
    page.get_by_role("button", name="Stop").first.click()
    expect(merge_card(page).get_by_role("status")).to_have_text("given up")


def test_a_server_that_stops_in_the_middle_says_so_and_keeps_what_came(new_page: NewPage, stub: Stub) -> None:
    stub.words, stub.pace = lambda model, prompt: ["on"] * 10_000, 0.01
    running = stub.running()
    with running:
        page = ready(new_page, at(running.url), refused=True)
        press_ask(page)
        expect(merge_card(page).locator(".text")).to_contain_text("on on on")
    expect(merge_card(page).locator(".error").first).to_have_text(
        "the server stopped in the middle of this answer"
    )
    expect(merge_card(page).locator(".text")).to_contain_text("on on on")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#trouble")).to_have_text("the server does not answer; is it still running?")


def test_an_error_in_the_stream_is_shown(new_page: NewPage, stub: Stub, site: str) -> None:
    event = 'data: {"error": {"message": "the engine died", "code": 500}}\n\n'
    stub.fault = lambda path, body: Response(event) if "ties" in body.get("model", "") else None
    page = ready(new_page, site)
    press_ask(page)
    expect(merge_card(page).locator(".error").first).to_have_text("the server failed: the engine died")


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


def test_typing_goes_on_where_it_began_though_what_is_there_is_no_number_yet(
    new_page: NewPage, site: str
) -> None:
    page = ready(new_page, site, refused=True)
    ask(page)
    weight = page.get_by_label("sql", exact=True)
    weight.fill("")
    weight.press_sequentially("-0.5", delay=150)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, -0.5*sql)")
    expect(weight).to_have_value("-0.5")
    expect(weight).not_to_have_attribute("aria-invalid", "true")


def test_quick_typing_is_not_interrupted_by_what_is_wrong_meanwhile(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site, refused=True)
    page.clock.install(time=0)
    page.clock.pause_at(1_000)  # the controls rest only when the clock goes on
    page.evaluate(
        """() => {
          window.said = [];
          const field = document.querySelector("#spec-text-error");
          const note = () => field.textContent && window.said.push(field.textContent);
          new MutationObserver(note).observe(field, { childList: true });
        }"""
    )
    spec = page.get_by_label("Spec", exact=True)
    with page.expect_response("**/api/form"):
        spec.fill("")
    assert page.evaluate("window.said.length") == 0
    page.clock.run_for(100)
    expect(page.locator("#spec-text-error")).not_to_be_empty()
    for text in ("slerp(", "slerp(sql,", "slerp(sql, tone"):
        with page.expect_response("**/api/form"):
            spec.fill(text)
    with page.expect_response("**/api/form"):
        spec.fill("slerp(sql, tone)")
    expect(page.get_by_label("tone", exact=True)).to_be_visible()
    page.clock.run_for(100)
    assert page.evaluate("window.said.length") == 1


def test_what_was_refused_goes_with_the_next_time(new_page: NewPage, stub: Stub, site: str) -> None:
    message = "nothing of this is possible"
    stub.fault = lambda path, body: (
        refusal(400, "BadRequestError", message) if "ties" in body.get("model", "") else None
    )
    page = ready(new_page, site, refused=True)
    press_ask(page)
    expect(page.locator("#spec-text-error")).to_have_text(message)
    stub.fault = lambda path, body: None
    ask(page)
    expect(page.locator("#spec-text-error")).to_be_hidden()


def test_connecting_again_keeps_the_position(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site, refused=True)
    page.get_by_label("density", exact=True).fill("7")
    expect(page.get_by_label("density", exact=True)).to_have_attribute("aria-invalid", "true")
    stub.adapters += ("json",)
    page.locator("#access").evaluate("each => each.open = true")
    page.get_by_role("button", name="Connect").click()
    expect(page.get_by_label("Add a source").locator("option")).to_have_text(["tone", "json"])
    expect(page.get_by_label("density", exact=True)).to_have_value("7")


def test_a_replay_can_be_given_up_and_asked_again(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.checking = 30.0
    page = ready(new_page, site)
    ask(page)
    survive = page.get_by_role("button", name="What survives of each source?")
    survive.click()
    expect(page.locator(".merge .survived")).to_contain_text("asking the merge")
    page.get_by_role("button", name="Stop").first.click()
    expect(survive).to_be_visible()
    expect(page.get_by_role("button", name="Stop").first).to_be_disabled()
    stub.checking = 0.0
    survive.click()
    expect(page.locator(".survived li")).to_have_count(2)


def test_a_stream_of_something_else_is_an_error_and_ends(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.fault = lambda path, body: (
        Response("data: upstream error\n\n") if "ties" in body.get("model", "") else None
    )
    page = ready(new_page, site)
    press_ask(page)
    expect(merge_card(page).locator(".error").first).to_contain_text("not a part of an answer")
    expect(card(page, "base").locator(".text")).to_have_text("base hello")
    expect(page.get_by_role("button", name="Stop").first).to_be_disabled()


def test_a_wrong_value_of_one_source_is_shown_at_that_source(new_page: NewPage, site: str) -> None:
    page = ready(new_page, f"{site}#spec=ties(sql,chat,density=[0.25,0.75])", refused=True)
    page.get_by_label("density of sql", exact=True).fill("7")
    expect(page.get_by_label("density of sql", exact=True)).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("density of chat", exact=True)).not_to_have_attribute("aria-invalid", "true")


def test_a_question_with_a_mistake_keeps_only_what_needs_it_from_being_copied(
    new_page: NewPage, site: str
) -> None:
    page = ready(new_page, site)
    page.get_by_label("Tokens at most", exact=True).fill("0")
    for kind in ("spec", "flag"):
        page.get_by_role("button", name=f"Copy {kind}").click()
        expect(page.get_by_label("Copied text")).to_contain_text("ties(chat, sql)")
    page.get_by_role("button", name="Copy curl").click()
    expect(page.get_by_text("the question has a mistake")).to_be_visible()
    expect(page.get_by_label("Tokens at most", exact=True)).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Temperature", exact=True)).not_to_have_attribute("aria-invalid", "true")


def test_a_prompt_of_spaces_is_none(new_page: NewPage, stub: Stub, site: str) -> None:
    page = ready(new_page, site)
    page.get_by_label("Prompt", exact=True).fill("   ")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_text("type a prompt")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    assert stub.asked == []


def test_a_replay_that_waits_for_the_answers_is_given_up_with_them(
    new_page: NewPage, stub: Stub, site: str
) -> None:
    stub.words = lambda model, prompt: ["on"] * (10_000 if model == "base" else 2)
    stub.pace = 0.01
    page = ready(new_page, site)
    press_ask(page)
    expect(card(page, "base").locator(".text")).to_contain_text("on on")
    page.get_by_role("button", name="What survives of each source?").click()
    page.get_by_role("button", name="Stop").first.click()
    expect(page.get_by_role("button", name="What survives of each source?")).to_be_visible()
    page.wait_for_timeout(300)
    assert stub.checked == 0


def test_the_spec_is_blank_while_the_controls_make_no_merge(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site, refused=True)
    page.get_by_label("density", exact=True).fill("7")
    expect(page.get_by_label("Spec", exact=True)).to_have_value("")
    page.get_by_role("button", name="Copy spec").click()
    expect(page.get_by_text("the merge has a mistake")).to_be_visible()
    page.get_by_label("density", exact=True).fill("0.7")
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql, density=0.7)")
    expect(page.get_by_text("the merge has a mistake")).to_be_hidden()


def test_a_source_that_the_server_does_not_list_is_pointed_out(new_page: NewPage, site: str) -> None:
    page = ready(new_page, f"{site}#spec=ties(0.5sql,tone)")
    expect(page.get_by_label("0.5sql", exact=True)).to_be_visible()
    expect(page.get_by_text("not among the adapters that the server lists")).to_have_count(1)


def test_what_vllm_says_of_a_field_is_shown_there(new_page: NewPage, stub: Stub, site: str) -> None:
    message = "max_tokens=9 cannot be greater than 5 (parameter=max_tokens, value=9)"
    stub.fault = lambda path, body: (
        refusal(400, "BadRequestError", message) if "ties" in body.get("model", "") else None
    )
    page = ready(new_page, site, refused=True)
    press_ask(page)
    expect(page.get_by_label("Tokens at most", exact=True)).to_have_attribute("aria-invalid", "true")


def test_a_server_with_nothing_of_ours_says_what_was_asked(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.fault = lambda path, body: refusal(404, "NotFoundError", "Not Found")
    page = new_page(site, refused=True)
    expect(page.locator("#trouble")).to_contain_text("there is no API at http://127.0.0.1")
    press_ask(page)
    expect(page.locator("#trouble")).to_contain_text("not connected to http://127.0.0.1")
    stub.fault = lambda path, body: None
    page.get_by_role("button", name="Connect").click()
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
