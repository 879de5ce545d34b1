"""What is copied from the page runs: the curl command, the Python program and the flag mean the merge."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from merged_lora.playground.copies import Question, flag_of, requests_of
from merged_lora.playground.forms import FieldError
from merged_lora.spec import MergeSpec, Source
from merged_lora.vllm_plugin.settings import parse_alias
from openai_server import OpenAIServer

HOSTILE = """it's "$(touch x)" `id` \\ \n$HOME é 😀 {'a'} --flag"""
"""Text that a shell, Python or JSON would take for more than text."""
SPEC = MergeSpec("ties", (Source("it's $(id)"), Source('a"b', 0.5)))
NO_QUESTIONS: list[object] = [None, [], "x", {}, {"prompt": "x"}]
CHAT = Question(HOSTILE, chat=True, temperature=0.5, max_tokens=7)
TEXT = Question(HOSTILE, chat=False, temperature=0, max_tokens=7)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    running = OpenAIServer(answers=lambda model, prompt: json.dumps([model, prompt]))
    yield running
    running.close()


@pytest.mark.parametrize("question", [CHAT, TEXT], ids=["chat", "text"])
@pytest.mark.parametrize("keyed", [False, True])
def test_the_curl_command_asks_the_merge(server: OpenAIServer, question: Question, keyed: bool) -> None:
    command = requests_of(SPEC, server.url, question, keyed=keyed)["curl"]
    environment = {"PATH": "/usr/bin:/bin", "OPENAI_API_KEY": "s3cret"}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=60
    )
    choice = json.loads(done.stdout)["choices"][0]
    assert json.loads(choice["message"]["content"] if question.chat else choice["text"]) == [
        str(SPEC),
        HOSTILE,
    ]
    assert server.keys == {"Bearer s3cret" if keyed else None}


@pytest.mark.slow
@pytest.mark.parametrize("question", [CHAT, TEXT], ids=["chat", "text"])
@pytest.mark.parametrize("keyed", [False, True])
def test_the_python_program_asks_the_merge(server: OpenAIServer, question: Question, keyed: bool) -> None:
    program = requests_of(SPEC, server.url, question, keyed=keyed)["python"]
    environment = {"PATH": "/usr/bin:/bin", "OPENAI_API_KEY": "s3cret"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (json.loads(done.stdout), done.stderr) == ([str(SPEC), HOSTILE], "")
    assert server.keys == {"Bearer s3cret" if keyed else "Bearer none"}


@pytest.mark.parametrize("alias", ["", "my mix"])
def test_the_flag_defines_the_alias(alias: str) -> None:
    name, value = shlex.split(flag_of(SPEC, alias))
    assert name == "--merged-lora-modules"
    assert parse_alias(value) == (alias or "mix", str(SPEC))


@pytest.mark.parametrize("alias", ["a=b", "ties(a)", "a + b", "a\nb"])
def test_a_name_that_no_alias_can_have_is_refused(alias: str) -> None:
    with pytest.raises(FieldError) as caught:
        flag_of(SPEC, alias)
    assert caught.value.field == "alias"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        *((body, "prompt") for body in NO_QUESTIONS),
        ({"prompt": 1, "chat": True, "temperature": 0, "max_tokens": 1}, "prompt"),
        ({"prompt": "x", "chat": "yes", "temperature": 0, "max_tokens": 1}, "prompt"),
        ({"prompt": "x", "chat": True, "temperature": "hot", "max_tokens": 1}, "temperature"),
        ({"prompt": "x", "chat": True, "temperature": 0, "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "chat": True, "temperature": 0, "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "x", "chat": True, "temperature": 0, "max_tokens": 2**30}, "max_tokens"),
    ],
)
def test_what_is_no_question_is_refused(body: object, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        Question.of(body)
    assert caught.value.field == field
