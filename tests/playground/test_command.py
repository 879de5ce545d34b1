"""``merged-lora playground``: it says where the page is, serves it, and ends cleanly."""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from merged_lora import cli
from merged_lora.commands.playing import EXAMPLES
from playground_server import Stub
from running import Run, started

LINE = re.compile(r"(http://127\.0\.0\.1:\d+)/merged_lora/ asks (\S+); Ctrl-C ends it\n")


@contextmanager
def playing(*arguments: str) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """The addresses of the page and of the server that it asks, and the process."""
    with started("", "playground", *arguments, "--port", "0") as process:
        try:
            assert process.stdout is not None
            found = LINE.fullmatch(process.stdout.readline())
            assert found is not None
            yield found[1], found[2], process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [line.strip() for line in EXAMPLES.splitlines()[1:]], ids=lambda line: line[11:]
)
def test_an_example_of_the_help_serves_the_page(line: str) -> None:
    with playing(*shlex.split(line)[2:]) as (url, server, _):
        assert httpx.get(f"{url}/merged_lora/", trust_env=False).status_code == 200
        about = httpx.get(f"{url}/merged_lora/api/about", trust_env=False).json()
        assert about["server"] == server


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_passes_requests_on_until_it_is_ended(number: signal.Signals, code: int) -> None:
    with Stub().running() as site, playing("--base-url", site.url) as (url, _, process):
        models = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
        assert [model["id"] for model in models] == ["base", "sql", "chat", "tone"]
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (code, "")


def test_a_port_that_is_taken_is_an_error(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("playground", "--port", port)
    assert (code, out) == (2, "")
    assert err == (
        f"merged-lora: error: port {port} cannot be used (Address already in use); name another, --port N\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--port", "70000"), "--port must be a whole number from 0 to 65535, got 70000"),
        (("--port", "-1"), "--port must be a whole number from 0 to 65535, got -1"),
        (("--base-url", "localhost:8000", "--port", "0"), "'localhost:8000' is no address of a server"),
    ],
)
def test_wrong_arguments_are_errors(run: Run, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run("playground", *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_without_its_packages_it_says_which_extra_has_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run("playground")
    assert code == 2
    assert "pip install 'vllm-merged-lora[playground]'" in err


def test_the_parser_names_the_defaults() -> None:
    (added,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    defaults = added.choices["playground"].parse_args([])
    assert (defaults.base_url, defaults.port) == ("http://localhost:8000/v1", 8900)
