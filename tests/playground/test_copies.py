"""What is copied from the page runs: the curl command, the Python program and the flag mean the merge."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from merged_lora.errors import SpecError
from merged_lora.playground.copies import Question, copies_of
from merged_lora.spec import MergeSpec, Source, parse
from merged_lora.vllm_plugin.settings import parse_alias
from openai_server import OpenAIServer

HOSTILE = """it's "$(touch x)" `id` \\ \n$HOME é 😀 {'a'} --flag"""
"""Text that a shell, Python or JSON would take for more than text."""
SPEC = MergeSpec("ties", (Source("it's $(id)"), Source('a"b', 0.5)))
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
    command = copies_of(SPEC, server.url, question, keyed=keyed)["curl"]
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
    program = copies_of(SPEC, server.url, question, keyed=keyed)["python"]
    environment = {"PATH": "/usr/bin:/bin", "OPENAI_API_KEY": "s3cret"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (json.loads(done.stdout), done.stderr) == ([str(SPEC), HOSTILE], "")
    assert server.keys == {"Bearer s3cret" if keyed else "Bearer none"}


@pytest.mark.parametrize("alias", ["", "my mix"])
def test_the_flag_defines_the_alias(alias: str) -> None:
    flag = copies_of(SPEC, "http://localhost:8000/v1", CHAT, alias)["flag"]
    name, value = shlex.split(flag)
    assert name == "--merged-lora-modules"
    assert parse_alias(value) == (alias or "mix", str(SPEC))


def test_the_spec_is_canonical() -> None:
    assert copies_of(parse("0.5*b + a"), "http://x/v1", CHAT)["spec"] == "sum(a, 0.5*b)"


@pytest.mark.parametrize("alias", ["a=b", "ties(a)", "a + b", "a\nb"])
def test_a_name_that_no_alias_can_have_is_refused(alias: str) -> None:
    with pytest.raises(SpecError):
        copies_of(SPEC, "http://x/v1", CHAT, alias)


@pytest.mark.parametrize(
    "body",
    [
        *(None, [], "x", {}, {"prompt": "x"}),
        {"prompt": 1, "chat": True, "temperature": 0, "max_tokens": 1},
        {"prompt": "x", "chat": "yes", "temperature": 0, "max_tokens": 1},
        {"prompt": "x", "chat": True, "temperature": "hot", "max_tokens": 1},
        {"prompt": "x", "chat": True, "temperature": 0, "max_tokens": 0},
        {"prompt": "x", "chat": True, "temperature": 0, "max_tokens": 1.5},
    ],
)
def test_what_is_no_question_is_refused(body: object) -> None:
    with pytest.raises(SpecError):
        Question.of(body)
