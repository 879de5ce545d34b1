"""The examples in the pages run, or are parsed by what would run them."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import merged_lora
from fences import KINDS, PAGES, ROOT, Block, all_blocks, commands_of, session_of
from merged_lora import cli
from merged_lora.calibration import CALIBRATION_NAME
from merged_lora.spec import MergeSpec, from_json, is_spec, parse
from merged_lora.vllm_plugin.settings import Settings

ROUTES = (
    r"/v1/(?:chat/completions|completions|models)",
    r"/v1/merged_lora(?:/[a-z]+)?",
)
"""Where the examples send their requests."""
ALIAS = "team"
UNCHECKED = ("jq", "lm-eval", "ray", "pip", "pre-commit")
"""Programs in examples that are not ours."""


def name(block: Block) -> str:
    """The id of a block's test."""
    return block.name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of an example: it has the adapters of the repository, without calibrations."""
    made = shutil.ignore_patterns(CALIBRATION_NAME, "__pycache__")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=made)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(spec: str) -> MergeSpec:
    """A merge that an example names; raises if it is not well formed."""
    return parse(spec)


def merges_in(body: object) -> Iterator[MergeSpec]:
    """The merges that a body in JSON names."""
    if isinstance(body, dict):
        if "merged_adapters" in body:
            yield from_json(body["merged_adapters"])
        if "spec" in body:
            yield parsed(body["spec"])
        if is_spec(str(body.get("model", ""))):
            yield parsed(body["model"])


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_checked(page: str) -> None:
    assert {block.kind for block in all_blocks() if block.page == page} <= set(KINDS)


def test_no_block_escapes() -> None:
    fences = sum((ROOT / page).read_text(encoding="utf-8").count("```") for page in PAGES)
    assert fences == 2 * len(all_blocks())
    assert not [page for page in PAGES if re.search(r"^ {4}\S", unlisted(page), re.MULTILINE)]


def unlisted(page: str) -> str:
    """A page without its fenced blocks, lists and settings of mkdocstrings: what is indented then is code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^:::.*\n(?: +.*\n)*", "", text, flags=re.MULTILINE)
    return re.sub(r"^ *(?:[-*]|\d\.) .*\n(?:  .*\n)*", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("block", all_blocks("spec"), ids=name)
def test_a_merge_is_well_formed(block: Block) -> None:
    assert [parsed(line) for line in block.text.splitlines()]


@pytest.mark.parametrize("block", all_blocks("json"), ids=name)
def test_a_body_is_json_that_names_a_merge(block: Block) -> None:
    assert list(merges_in(json.loads(block.text)))


def needs_a_server(program: ast.Module) -> bool:
    """Whether a program imports what only runs beside a server or a model."""
    imports = [node for node in ast.walk(program) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names}
    return any(node.module in ("openai", "vllm") for node in imports) or bool(
        names & {"calibrate", "check", "evaluate", "tune"}
    )


@pytest.mark.slow
@pytest.mark.parametrize("block", all_blocks("python"), ids=name)
def test_a_program_runs_and_prints_what_the_page_shows(block: Block, folder: Path) -> None:
    program = ast.parse(block.text)
    if needs_a_server(program):
        check_program(program)
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, block.name, "exec"), {})
    shown = [other for other in all_blocks("text") if other.before == block]
    assert printed.getvalue() == (shown[0].text if shown else "")


def check_program(program: ast.Module) -> None:
    """Check the merges, names and settings of a program that cannot run here."""
    checked = 0
    for node in ast.walk(program):
        if isinstance(node, ast.keyword) and node.arg == "model" and isinstance(node.value, ast.Constant):
            model = str(node.value.value)
            assert model == ALIAS or parsed(model)
            checked += 1
        if isinstance(node, ast.keyword) and node.arg == "additional_config":
            assert Settings.of(ast.literal_eval(node.value)).enable
            checked += 1
        if isinstance(node, ast.ImportFrom) and node.module == "merged_lora":
            assert {alias.name for alias in node.names} <= set(merged_lora.__all__)
            checked += 1
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("merged_lora"):
            file = ROOT / "merged_lora" / (str(node.module).replace(".", "/").partition("/")[2] + ".py")
            defined = {
                item.name for item in ast.parse(file.read_text()).body if isinstance(item, ast.FunctionDef)
            }
            assert {alias.name for alias in node.names} <= defined
            checked += 1
    assert checked


def comparable(output: str) -> str:
    """Output without the seconds that a run took."""
    return re.sub(r", [0-9]+\.[0-9] s$", ", ... s", output, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("block", all_blocks("console"), ids=name)
def test_a_session_of_the_command_prints_what_the_page_shows(
    block: Block, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, shown in session_of(block.text):
        assert command[0] == "merged-lora"
        code = cli.main(command[1:])
        printed = comparable("".join(capsys.readouterr()))
        assert code == (2 if ": error: " in shown else 0), printed
        expected, cut, _ = comparable(shown).partition("...\n")
        assert printed.startswith(expected)
        assert cut or printed == expected


@pytest.mark.parametrize("block", all_blocks("bash"), ids=name)
def test_a_command_names_what_exists(block: Block) -> None:
    for command in commands_of(block.text):
        program, *arguments = command
        program = program.removeprefix(".venv/bin/")
        if program == "make":
            targets = re.findall(
                r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
            )
            assert {word for word in arguments if "=" not in word} <= set(targets)
        elif program == "python":
            check_python(arguments)
        elif program == "curl":
            check_request(arguments)
        elif program == "merged-lora":
            cli.parser().parse_args(arguments)
        else:
            assert program in ("vllm", *UNCHECKED)


def check_python(arguments: list[str]) -> None:
    """Check that a module or a file exists and that its source knows the flags."""
    if arguments[0] == "-m" and arguments[1] in UNCHECKED:
        return
    if arguments[0] == "-m":
        path = ROOT / "/".join(arguments[1].split(".")[1:])
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    else:
        file = ROOT / arguments[0]
    source = file.read_text(encoding="utf-8")
    assert not [word for word in arguments if word.startswith("--") and f'"{word}"' not in source]


def check_request(arguments: list[str]) -> None:
    """Check the route of a request and the merge in its body."""
    (url,) = [word for word in arguments if word.startswith("localhost:8000/")]
    assert any(re.fullmatch(route, url.removeprefix("localhost:8000")) for route in ROUTES), url
    body = json.loads(arguments[arguments.index("-d") + 1])
    assert list(merges_in(body)) or body["model"] == ALIAS


PARSE = """
import json, sys
from merged_lora.vllm_plugin import register
register()
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
for line in json.load(sys.stdin):
    parser.parse_args(line)
    print("parsed")
"""


@pytest.mark.engine
def test_vllm_itself_takes_the_flags_of_every_server() -> None:
    servers = [c[2:] for block in all_blocks("bash") for c in commands_of(block.text) if c[0] == "vllm"]
    assert len(servers) > 5
    unknown = [["MODEL", "--enable-merged-lora", "--merged-lora-nonsense"]]
    command = [sys.executable, "-c", PARSE]
    done = subprocess.run(command, input=json.dumps(servers + unknown), capture_output=True, text=True)
    assert done.stdout.count("parsed") == len(servers), done.stderr
    assert "--merged-lora-nonsense" in done.stderr
