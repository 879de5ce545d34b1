"""What is taken from the page, before a stand-in for vLLM: copies, aliases, kept merges, comparisons."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import FilePayload, expect

from playground_page import NewPage, ask, drag, merge_card, ready, slider
from playground_server import Stub

pytestmark = pytest.mark.slow


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
    expect(page.get_by_text("reads as a merge; take another name")).to_be_visible()
    name.fill("my/mix ü")
    define.click()
    expect(page.get_by_text("my/mix ü is now ties(chat, sql)")).to_be_visible()
    assert stub.aliases == {"my/mix ü": "ties(chat, sql)"}


def test_where_aliases_are_fixed_the_button_says_so(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.changes = False
    page = ready(new_page, site)
    define = page.get_by_role("button", name="Define on the server")
    expect(define).to_be_disabled()
    expect(page.locator("#copies")).to_contain_text("--merged-lora-runtime-aliases")


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
    expect(rows.nth(0).locator("mark")).to_have_text(["0.5*sql)"])
    assert stub.asked == ["ties(chat, sql)", "ties(chat, 0.5*sql)"] * 2

    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as JSON").click()
    found = json.loads(saved.value.path().read_text(encoding="utf-8"))
    assert saved.value.suggested_filename == "comparison.json"
    assert found["models"] == ["ties(chat, sql)", "ties(chat, 0.5*sql)"]
    assert found["asked"] == {"chat": True, "temperature": 0, "max_tokens": 64}
    assert found["rows"][1]["prompt"] == "<b>two</b>\nlines"
    assert found["rows"][0] == {
        "prompt": "a | b",
        "chat": True,
        "answers": ["ties(chat, sql) a | b", "ties(chat, 0.5*sql) a | b"],
        "cut": [False, False],
        "differing": 1,
    }
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as Markdown").click()
    lines = saved.value.path().read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("As a chat, temperature 0, at most 64 tokens, http://127.0.0.1:")
    lines = lines[2:]
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
    expect(slider(page, "sql")).to_have_value("1")
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
    assert stub.asked[:4] == ["base", "sql", "base", "sql"]
    assert stub.beside_base == 0
    expect(merge_card(page).locator(".text")).to_have_text("ties(chat, 0.5*sql) hello")


def test_a_browser_that_keeps_nothing_works_all_the_same(browser: Any, site: str) -> None:
    context = browser.new_context()
    forbidden = "{ get() { throw new DOMException('', 'SecurityError'); } }"
    context.add_init_script(f"Object.defineProperty(window, 'localStorage', {forbidden})")
    page = context.new_page()
    page.goto(site)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, sql)")
    page.get_by_role("button", name="Keep this merge").click()
    expect(page.locator("#kept-list li")).to_have_count(1)
    expect(page.get_by_text("this browser forgets them with the page")).to_be_visible()
    context.close()


def test_a_comparison_of_prompts_that_are_none_says_which_line(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site, refused=True)
    page.get_by_text("Compare two on several prompts").click()
    page.locator("#prompts-text").fill("one\n{two")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#prompts-text-error")).to_contain_text("line 2: not a line of JSON")


def test_an_alias_is_not_redefined_by_one_click(new_page: NewPage, stub: Stub, site: str) -> None:
    stub.aliases["team"] = "slerp(sql, tone)"
    page = ready(new_page, f"{site}#spec=ties(sql,chat)")
    page.get_by_label("Alias", exact=True).fill("team")
    define = page.get_by_role("button", name="Define on the server")
    define.click()
    expect(page.get_by_text("team is slerp(sql, tone) now; press again to redefine it")).to_be_visible()
    assert stub.aliases == {"team": "slerp(sql, tone)"}
    drag(page, "sql", 0.5)
    expect(page.get_by_label("Spec", exact=True)).to_have_value("ties(chat, 0.5*sql)")
    define.click()  # this merge nobody was warned of
    expect(page.get_by_text("team is slerp(sql, tone) now; press again to redefine it")).to_be_visible()
    assert stub.aliases == {"team": "slerp(sql, tone)"}
    define.click()
    expect(page.get_by_text("team is now ties(chat, 0.5*sql)")).to_be_visible()
    assert stub.aliases == {"team": "ties(chat, 0.5*sql)"}


def test_a_key_that_is_being_typed_is_not_used_before_connecting(
    new_page: NewPage, stub: Stub, site: str
) -> None:
    stub.adapters = ("sql", "chat", "tone", "json")
    page = ready(new_page, site, refused=True)
    stub.key = "s3cret"
    page.locator("#access").evaluate("each => each.open = true")
    page.get_by_label("API key").fill("s3cret")
    page.get_by_role("button", name="Connect").click()
    expect(page.locator("#trouble")).to_be_hidden()
    page.get_by_label("API key").fill("s3")
    page.get_by_label("Add a source").select_option("json")
    page.get_by_label("Alias", exact=True).fill("mix")
    page.get_by_role("button", name="Define on the server").click()
    expect(page.get_by_text("mix is now ties(chat, sql)")).to_be_visible()
    ask(page)
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.get_by_label("Add a source")).to_have_value("json")


def test_pages_beside_each_other_keep_what_both_keep(browser: Any, site: str) -> None:
    context = browser.new_context()
    one, other = context.new_page(), context.new_page()
    for page, spec in ((one, "ties(sql, chat)"), (other, "slerp(sql, chat)")):
        page.goto(f"{site}#spec={spec}")
        expect(page.locator("#sources input").first).to_be_visible()
    for page in (one, other):
        page.get_by_role("button", name="Keep this merge").click()
        expect(other.locator("#kept-list li").last).to_contain_text("ties(chat, sql)")
    expect(one.locator("#kept-list li")).to_have_count(2)
    one.reload()
    expect(one.locator("#kept-list li")).to_have_count(2)
    context.close()


def test_a_file_that_is_no_text_is_refused(new_page: NewPage, site: str) -> None:
    page = ready(new_page, site)
    page.get_by_text("Compare two on several prompts").click()
    picture: FilePayload = {"name": "p.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\n\xff\xfe"}
    page.get_by_label("Read a file").set_input_files(picture)
    expect(page.get_by_text("p.png is not a text in UTF-8")).to_be_visible()
    expect(page.locator("#prompts-text")).to_have_value("")
