"""The page's own routes: its files, the table of strategies, forms, copies and prompts."""

from __future__ import annotations

import json
import re

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from merged_lora import __version__, catalog
from merged_lora.playground.pages import FILES, HEADERS, MAX_BODY, MAX_PROMPTS, PATH, pages

QUESTION = {"prompt": "hi", "chat": True, "temperature": 0, "max_tokens": 4}


def client(server: str | None = None) -> TestClient:
    """A client of an application that has the page where vLLM has it."""
    app = Starlette()
    app.mount(PATH, pages(server))
    return TestClient(app, base_url="http://localhost:8000")


def test_every_file_is_served_with_its_type_and_a_policy() -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    files = [path for path in FILES.rglob("*") if path.suffix in types]
    assert len(files) > 10
    for path in files:
        reply = client().get(f"{PATH}/{path.relative_to(FILES)}")
        assert reply.status_code == 200
        assert reply.headers["content-type"].partition(";")[0] == types[path.suffix]
        assert {name: reply.headers[name] for name in HEADERS} == HEADERS


def test_the_page_is_at_its_folder() -> None:
    for path in (PATH, f"{PATH}/"):
        reply = client().get(path)
        assert reply.status_code == 200
        assert "<title>merged-lora playground</title>" in reply.text


def test_the_page_loads_nothing_from_elsewhere_and_has_no_script_or_style_of_its_own() -> None:
    page = (FILES / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?![^>]* src=)", page)
    for path in FILES.rglob("*"):
        if path.suffix in (".html", ".css", ".js"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"""(src|href|from|import|url)[ \t]*[=(]?[ \t]*["']?(https?:)?//""", text), (
                path
            )
            assert "innerHTML" not in text


@pytest.mark.parametrize(
    "path", ["../pages.py", "..%2fpages.py", "%2e%2e/pages.py", "nothing.js", "api/nothing"]
)
def test_nothing_else_is_served(path: str) -> None:
    reply = client().get(f"{PATH}/{path}")
    assert reply.status_code in (404, 405)
    assert "import" not in reply.text


def test_the_table_of_strategies_is_that_of_the_code() -> None:
    found = client("http://gpu:8000/v1").get(f"{PATH}/api/about").json()
    expected = json.loads(json.dumps(catalog.as_json()))
    assert found == {"version": __version__, "server": "http://gpu:8000/v1", "strategies": expected}
    assert client().get(f"{PATH}/api/about").json()["server"] is None


def test_a_text_and_a_form_mean_the_same_merge() -> None:
    by_text = client().post(f"{PATH}/api/form", json={"spec": "0.5 * b + a"}).json()
    assert by_text["spec"] == "sum(a, 0.5*b)"
    assert client().post(f"{PATH}/api/form", json=by_text["form"]).json() == by_text


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"spec": "ties(a,"}, "spec", "at character"),
        ({"spec": 5}, "spec", "a spec is a text"),
        ({"spec": "a" * 70_000}, "spec", "at most"),
        (
            {"strategy": "ties", "sources": [{"name": "a", "weight": "1"}], "options": {"density": "7"}},
            "options.density",
            "must be over 0",
        ),
    ],
)
def test_a_mistake_names_its_field(body: object, param: str, said: str) -> None:
    reply = client().post(f"{PATH}/api/form", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert said in error["message"]


@pytest.mark.parametrize("route", ["form", "copies", "flag"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b" " * (MAX_BODY + 1), b"\xff", b"7", b'{"spec": "\\ud800"}']
)
def test_a_body_that_is_none_is_refused(route: str, body: bytes) -> None:
    reply = client().post(f"{PATH}/api/{route}", content=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "BadRequestError"


def test_copies_name_the_server_that_the_page_asks() -> None:
    body = {"spec": "a + b", "question": QUESTION, "server": "https://own/llm/v1", "keyed": False}
    found = client("https://gpu.example/v1").post(f"{PATH}/api/copies", json=body).json()
    assert "https://gpu.example/v1/chat/completions" in found["curl"]
    own = client().post(f"{PATH}/api/copies", json=body).json()
    assert "https://own/llm/v1/chat/completions" in own["curl"]


def test_the_flag_needs_no_question() -> None:
    reply = client().post(f"{PATH}/api/flag", json={"spec": "a + b", "alias": "two"})
    assert reply.json() == {"flag": "--merged-lora-modules 'two=sum(a, b)'"}
    refused = client().post(f"{PATH}/api/flag", json={"spec": "a + b", "alias": "a=b"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "alias")


def test_prompts_are_lines_or_json_lines() -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    text = f'one\n\n  two  \n{{"prompt": "a\\nb"}}\n{json.dumps({"messages": chat})}\n"three"\n'
    found = client().post(f"{PATH}/api/prompts", content=text).json()
    assert found == {"prompts": ["one", "two", "a\nb", chat, "three"]}


@pytest.mark.parametrize("inner", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_the_end_of_a_line_ends_a_prompt(inner: str) -> None:
    text = f'{{"prompt": "a{inner if inner > "~" else " "}b"}}\r\none{inner}two\r\n'
    found = client().post(f"{PATH}/api/prompts", content=text.encode()).json()["prompts"]
    assert found == [f"a{inner if inner > '~' else ' '}b", f"one{inner}two"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("one\n{broken", "line 2: not a line of JSON"),
        ('{"other": 1}', "line 1: a prompt is a line of the form"),
        (" \n", "there is no prompt"),
        ("a\n" * (MAX_PROMPTS + 1), f"not {MAX_PROMPTS + 1}"),
    ],
)
def test_prompts_that_are_none_are_refused(text: str, said: str) -> None:
    reply = client().post(f"{PATH}/api/prompts", content=text)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]
