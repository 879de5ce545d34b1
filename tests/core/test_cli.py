"""The command ``merged-lora``: what it writes, what it prints, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from making import SMALL, random_adapter
from merged_lora import __version__, backends, catalog
from merged_lora.adapters import Adapter
from merged_lora.cli import main
from merged_lora.engine import Merged, merge
from merged_lora.engine import run as engine_run
from merged_lora.files import parts
from merged_lora.files.layout import Header
from merged_lora.plan import MergePlan
from merged_lora.spec import MergeSpec
from running import Run, command, environment, started

LAST = list(SMALL)[-1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: adapters ``a`` and ``b``, ``r3`` of rank 3, and ``less``, a module short."""
    monkeypatch.chdir(tmp_path)
    random_adapter(SMALL, seed=1, header=Header("org/base")).save("a")
    random_adapter(SMALL, seed=2, header=Header("org/base")).save("b")
    random_adapter(SMALL, rank=3, seed=3).save("r3")
    less = {name: shape for name, shape in SMALL.items() if name != LAST}
    random_adapter(less, seed=4, header=Header("org/other")).save("less")
    return tmp_path


AB = ("--adapter", "a=a", "--adapter", "b=b")


def test_merge_writes_what_the_engine_merges_and_says_so_in_one_line(run: Run, folder: Path) -> None:
    code, out, err = run("merge", "ties(b, 0.5*a, density=0.3)", *AB, "--output", "new/out")
    assert (code, err) == (0, "")
    expected = merge("ties(b, 0.5*a, density=0.3)", {"a": "a", "b": "b"})
    assert Adapter.load("new/out").digest == expected.digest
    assert Adapter.load("new/out").metadata["merged_lora.spec"] == "ties(0.5*a, b, density=0.3)"
    assert re.fullmatch(r"new/out: ties\(0.5\*a, b, density=0.3\), rank 4, 4 modules, [0-9]+\.[0-9] s\n", out)


@pytest.mark.parametrize(
    "spec",
    [
        '{"ids": ["a", "b"], "weights": [0.5, 1], "merge_strategy": "sum"}',
        "  0.5*a + b",
        "-0.5*a + b",
        "sum(0.5 a + b; scale 2)",
        "b",
    ],
)
def test_merge_takes_every_form_of_a_spec(run: Run, folder: Path, spec: str) -> None:
    adapters = AB if "a" in spec else AB[2:]
    code, _, err = run("merge", spec, *adapters, "--output", "out")
    assert (code, err) == (0, "")
    assert (folder / "out").is_dir()


def test_merge_with_json_is_merge_with_the_text_it_means(run: Run, folder: Path) -> None:
    run("merge", "ties(a, b, density=0.3)", *AB, "--output", "text")
    body = {"ids": ["b", "a"], "merge_strategy": "ties", "density": 0.3}
    run("merge", json.dumps(body), *AB, "--output", "json")
    assert Adapter.load("json").digest == Adapter.load("text").digest


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_merge_uses_the_backend_that_is_named(run: Run, folder: Path, backend: str) -> None:
    assert run("merge", "linear(a, b)", *AB, "--output", "out", "--backend", backend)[0] == 0
    assert Adapter.load("out").metadata["merged_lora.backend"] == backend


def test_a_cut_rank_is_reported_with_the_share_of_the_norm_that_is_kept(run: Run, folder: Path) -> None:
    code, out, _ = run("merge", "a + b", *AB, "--output", "out", "--rank", 5)
    assert code == 0
    assert Adapter.load("out").rank == 5
    a, b = Adapter.load("a"), Adapter.load("b")
    values = [torch.linalg.svdvals(a.modules[m].delta() + b.modules[m].delta()) for m in SMALL]
    shares = [float((v[:5] ** 2).sum() / (v**2).sum()) for v in values]
    kept = sum(float((v[:5] ** 2).sum()) for v in values) / sum(float((v**2).sum()) for v in values)
    by_module = f" ({min(shares):.2%} to {max(shares):.2%} by module)"
    assert f", rank 5, 4 modules, {kept:.2%} of the squared norm kept{by_module}, " in out
    metadata = Adapter.load("out").metadata
    stored = json.loads(metadata["merged_lora.kept_energy_by_module"])
    assert stored == pytest.approx(dict(zip(SMALL, shares, strict=True)), abs=1e-6)
    assert "kept" not in run("merge", "a + b", *AB, "--output", "whole", "--rank", 8)[1]


def test_what_the_user_should_know_is_a_line_each_on_stderr(run: Run, folder: Path) -> None:
    code, out, err = run("merge", "a + less", *AB[:2], "--adapter", "less=less", "--output", "out")
    assert code == 0
    assert len(out.splitlines()) == 1
    assert err.splitlines() == [
        "merged-lora: warning: sum(a, less): the sources name different base models: org/base, org/other; "
        "the result takes org/base, base_model (--base-model) chooses another",
        "merged-lora: warning: sum(a, less): 1 of 4 modules are not in less; "
        "they are merged from the other sources",
    ]


def test_overwrite_replaces_an_adapter_and_may_be_one_of_the_sources(run: Run, folder: Path) -> None:
    expected = merge("a - b", {"a": "a", "b": "b"}).digest
    assert run("merge", "a - b", *AB, "--output", "a", "--overwrite")[0] == 0
    assert Adapter.load("a").digest == expected


def test_an_existing_output_is_found_before_anything_is_read(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Adapter.load("b").digest
    monkeypatch.setattr(Adapter, "load", None)
    code, _, err = run("merge", "a + b", *AB, "--output", "b")
    monkeypatch.undo()
    assert code == 2
    way_out = "choose another folder or overwrite it (overwrite=True, --overwrite)"
    assert err == f"merged-lora: error: b exists; {way_out}\n"
    assert Adapter.load(folder / "b").digest == before


def test_an_output_that_appears_while_merging_is_not_replaced(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = random_adapter(SMALL, seed=5)

    def overtaken(plan: MergePlan, *_: object) -> Merged:
        other.save("out")
        return engine_run(plan)

    monkeypatch.setattr("merged_lora.engine.run", overtaken)
    code, _, err = run("merge", "a + b", *AB, "--output", "out")
    assert code == 2
    assert "out exists" in err
    assert Adapter.load("out").digest == other.digest


def test_drop_leaves_out_what_cannot_be_merged(run: Run, folder: Path) -> None:
    expected = merge("a + b", {"a": "a", "b": "b"}).digest
    file = folder / "a" / "adapter_model.safetensors"
    extra = {f"base_model.model.{name}": torch.ones(2) for name in ("lm_head.weight", "q_proj.lora_B.bias")}
    save_file(load_file(file) | extra, file)
    code, _, err = run("merge", "a + b", *AB, "--output", "out")
    assert (code, (folder / "out").exists()) == (2, False)
    assert "can be left out with --drop heads lora_bias" in err
    code, _, _ = run("merge", "a + b", *AB, "--output", "out", "--drop", "lora_bias", "heads")
    assert code == 0
    assert Adapter.load("out").digest == expected


def test_a_head_is_taken_from_one_source_and_names_get_a_new_beginning(run: Run, folder: Path) -> None:
    for name in "ab":
        file = folder / name / "adapter_model.safetensors"
        tensors = {key.replace("model.layers", "layers"): value for key, value in load_file(file).items()}
        head = {"base_model.model.score.weight": torch.full((2, 3), float(ord(name)))}
        save_file(tensors | head, file)
    options = ["--take", "heads=b", "--rename", "layers.=model.layers."]
    code, _, err = run("merge", "a + b", *AB, "--output", "out", *options)
    assert (code, err) == (0, "")
    out = load_file(folder / "out" / "adapter_model.safetensors")
    assert out["base_model.model.score.weight"].tolist() == [[98.0] * 3] * 2
    assert all(key.startswith("base_model.model.model.layers.") for key in out if "lora_" in key)


def test_pickled_weights_are_read_if_that_is_allowed(run: Run, folder: Path) -> None:
    expected = merge("a + b", {"a": "a", "b": "b"}).digest
    file = folder / "a" / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "a" / "adapter_model.bin")
    file.unlink()
    assert "--allow-pickle" in run("merge", "a + b", *AB, "--output", "out")[2]
    assert run("merge", "a + b", *AB, "--output", "out", "--allow-pickle")[0] == 0
    assert Adapter.load("out").digest == expected


def test_the_base_model_that_is_chosen_is_written(run: Run, folder: Path) -> None:
    arguments = ("merge", "a + less", *AB[:2], "--adapter", "less=less", "--without", LAST, "--output", "out")
    code, _, err = run(*arguments, "--base-model", "org/third")
    assert (code, err) == (0, "")
    assert (
        json.loads((folder / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "org/third"
    )


def test_only_and_without_choose_the_modules_as_the_spec_does(run: Run, folder: Path) -> None:
    flags = ("--only", "layers.0", "self_attn", "--without", "k_proj")
    code, out, err = run("merge", "ties(a, b)", *AB, "--output", "flags", *flags)
    assert (code, err) == (0, "")
    assert 'ties(a, b, modules="layers.0 self_attn", without="k_proj"), rank 4, 3 modules' in out
    run("merge", 'ties(a, b, modules="self_attn layers.0", without=k_proj)', *AB, "--output", "spec")
    assert Adapter.load("flags").digest == Adapter.load("spec").digest
    assert Adapter.load("flags").modules.keys() == {name for name in SMALL if "k_proj" not in name}


def test_a_check_is_of_the_chosen_modules(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def check(spec: MergeSpec, *_: object, **__: object) -> list[object]:
        asked.append(str(spec))
        return []

    monkeypatch.setattr("merged_lora.checking.check", check)
    assert (
        run("check", "a + b", *AB, "--model", "m", "--only", "mlp", "q_proj", "--without", "layers.1")[0] == 0
    )
    assert asked == ['sum(a, b, modules="mlp q_proj", without="layers.1")']


def test_the_command_merges_more_sources_than_a_server_does_by_default(run: Run, folder: Path) -> None:
    names = [f"adapter-number-{i}" for i in range(100)]
    flags = [part for i, name in enumerate(names) for part in ("--adapter", f"{name}={'ab'[i % 2]}")]
    spec = " + ".join(f"0.012345*{name}" for name in names)
    code, out, err = run("merge", spec, *flags, "--output", "out", "--rank", 8)
    assert (code, err) == (0, "")
    assert "rank 8, 4 modules" in out
    made, sources = Adapter.load("out"), [Adapter.load(name) for name in "ab"]
    for module in SMALL:
        deltas = [source.modules[module].delta() for source in sources]
        expected = 50 * 0.012345 * torch.stack(deltas).sum(0)
        assert torch.allclose(made.modules[module].delta(), expected, rtol=1e-5, atol=1e-6)


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no command": ([], "the following arguments are required: COMMAND"),
    "no such command": (["nosuch"], "invalid choice: 'nosuch'"),
    "no spec": (["merge", "--output", "out"], "say what to merge: a SPEC, or folders and --strategy"),
    "no output": (["merge", "a + b", *AB], "the following arguments are required: --output"),
    "no such flag": (
        ["merge", "a + b", *AB, "--nosuch"],
        "unknown option --nosuch (see merged-lora merge --help)",
    ),
    "a misspelt flag": (
        ["merge", "a + b", *AB, "--ouptut", "x"],
        "unknown option --ouptut; did you mean --output?",
    ),
    "an abbreviated flag": (
        ["merge", "a + b", *AB, "--out", "out"],
        "unknown option --out; did you mean --output?",
    ),
    "two sources in one flag": (
        ["merge", "a + b", "--adapter", "a=a", "b=b", "--output", "out"],
        "unrecognized arguments: b=b; each source has an --adapter of its own",
    ),
    "two forms": (["strategies", "--json", "--markdown"], "not allowed with argument --json"),
    "a rank in words": (["--rank", "two"], "argument --rank: invalid int value: 'two'"),
    "rank 0": (["--rank", "0"], "the rank limit must be at least 1, got 0"),
    "no such backend": (["--backend", "tpu"], "unknown backend 'tpu'; there are: auto, triton, cpu, numpy"),
    "no such drop": (
        ["--drop", "dora"],
        "no module that is called 'dora'; parts are heads",
    ),
    "no such part to take": (["--take", "biases=a"], "cannot take 'biases' from a source"),
    "a part of nobody": (["--take", "heads=c"], "cannot take heads from 'c', which is no source"),
    "a part twice": (["--take", "heads=a", "--take", "heads=b"], '"heads" is given twice; give it once'),
    "an empty pattern": (["--only", ""], "1 to 64 patterns of module names"),
    "half a name": (["--rename", "layers"], "argument --rename: 'layers' is not of the form FROM=TO"),
    "half a part": (["--take", "heads"], "argument --take: 'heads' is not of the form PART=NAME"),
    "a minus without spaces": (
        ["merge", "a-b", *AB, "--output", "out"],
        "unknown adapter 'a-b'; did you mean a - b? Otherwise, say where it is with --adapter a-b=PATH",
    ),
    "a misspelt source": (
        ["merge", "base + tone", "--adapter", "base=a", "--adapter", "tonne=b", "--output", "out"],
        "unknown adapter 'tone'; did you mean tonne? Otherwise, say where it is with --adapter tone=PATH",
    ),
    "a weight without a star": (
        ["merge", "0.5a + 0.5b", *AB, "--output", "out"],
        "unknown adapter '0.5a'; did you mean 0.5*a? Otherwise, say where it is with --adapter 0.5a=PATH",
    ),
    "a blank base model": (["--base-model", " "], "the base model must be a name that is not blank, got ' '"),
    "a pattern of no module": (
        ["--only", "q_prj"],
        "modules (--only): no module of the sources matches 'q_prj'",
    ),
    "patterns with a comma": (["--without", "a,b"], "with a space between them, and no comma, got 'a,b'"),
    "modules twice": (
        ["merge", "sum(a, b, modules=mlp)", *AB, "--only", "mlp", "--output", "out"],
        "--only and modules=... in the spec say the same; give one of them",
    ),
    "an adapter without a name": (["--adapter", "b"], "argument --adapter: 'b' is not of the form NAME=PATH"),
    "an adapter called like a merge": (
        ["--adapter", "sum(b)=b"],
        "'sum(b)' reads as a merge; take another name",
    ),
    "an adapter without a path": (["--adapter", "b="], "'b=' is not of the form NAME=PATH"),
    "an adapter twice": (["--adapter", "a=b"], "--adapter a=... is given more than once; give it once"),
    "an adapter too many": (["--adapter", "c=b"], "--adapter c=... is not used by sum(a, b)"),
    "an adapter too many for a long spec": (
        ["merge", f"sum({'a' * 200})", "--adapter", f"{'a' * 200}=a", "--adapter", "c=b", "--output", "out"],
        f"--adapter c=... is not used by sum({'a' * 57}...",
    ),
    "an adapter too few": (
        ["merge", "a + b", *AB[:2], "--output", "out"],
        "unknown adapter 'b'; say where it is with --adapter b=PATH",
    ),
    "a folder that is not there": (
        ["merge", "a", "--adapter", "a=nowhere", "--output", "out"],
        "nowhere: no such adapter folder",
    ),
    "a path with a line end": (
        ["merge", "a", "--adapter", "a=x\n\x1b[31my", "--output", "out"],
        r"x\n\x1b[31my: no such adapter folder",
    ),
    "a spec that is none": (["merge", "ties(a, b", *AB, "--output", "out"], "at character 10 of the spec"),
    "a long spec": (["merge", "a" * 100_000, *AB, "--output", "out"], "the spec has 100000 characters"),
    "broken JSON": (["merge", '{"ids": ', *AB, "--output", "out"], "starts with '{' but is not valid JSON"),
    "a key twice": (
        ["merge", '{"ids": ["a"], "ids": ["b"]}', *AB, "--output", "out"],
        '"ids" is given twice',
    ),
    "a source missing and one too many": (
        ["merge", "c", *AB, "--output", "out"],
        "unknown adapter 'c'; say where",
    ),
    "deep JSON": (["merge", '{"ids":' + "[" * 100_000, *AB, "--output", "out"], "is not valid JSON"),
    "JSON that is no merge": (["merge", "{}", *AB, "--output", "out"], '"ids" must be a list'),
    "ranks that differ": (
        ["merge", "ties(a, r3)", *AB[:2], "--adapter", "r3=r3", "--output", "out"],
        "ties needs equal ranks, but model.layers.0.mlp.down_proj has 4 in a, 3 in r3",
    ),
    "a rank over the limit": (["merge", "cat(a, b)", *AB, "--rank", "7", "--output", "out"], "needs rank 8"),
    "an output that is a file": (
        ["merge", "a + b", *AB, "--output", "a/adapter_config.json"],
        "not a folder",
    ),
    "an output under a file": (
        ["merge", "a + b", *AB, "--output", "a/adapter_config.json/x"],
        "cannot write",
    ),
    "a long output": (["merge", "a + b", *AB, "--output", "n" * 300], "File name too long"),
    "an output with other files": (["merge", "a + b", *AB, "--output", ".", "--overwrite"], "it also holds"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_nothing_is_written(run: Run, folder: Path, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    if arguments and arguments[0].startswith("-"):
        arguments = ["merge", "a + b", *AB, "--output", "out", *arguments]
    before = sorted(folder.rglob("*"))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"merged-lora: error: [^\n]+\n", err)
    assert message in err
    assert sorted(folder.rglob("*")) == before


@given(
    st.lists(st.text(max_size=20) | st.sampled_from(["merge", "strategies", "--json", "--adapter", "--rank"]))
)
def test_arguments_without_a_value_end_in_an_exit_code(arguments: list[str]) -> None:
    assert exit_code([*arguments, "--output"]) in (0, 2)


def exit_code(arguments: list[str]) -> object:
    """What the process would exit with; --help and --version exit on their own."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


@pytest.mark.slow
def test_a_mistake_of_ours_keeps_its_traceback_and_exits_1(folder: Path) -> None:
    process = started(
        "import merged_lora.engine\nmerged_lora.engine.run = lambda *_: 1 / 0",
        *("merge", "a + b", *AB, "--output", "out"),
    )
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: division by zero\n")
    assert not (folder / "out").exists()


# Everything is written, nothing is in its place yet: the worst moment to stop.
STALL = "import os, time\nos.fsync = lambda _: (print('writing', flush=True), time.sleep(100))"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)],
    ids=["KILL", "TERM", "INT"],
)
def test_a_run_that_is_stopped_leaves_no_half_adapter(
    folder: Path, number: signal.Signals, code: int
) -> None:
    before = set(folder.iterdir())
    process = started(STALL, "merge", "a + b", *AB, "--output", "out")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (code, "", "")
    left = set(folder.iterdir()) - before
    if number == signal.SIGKILL:  # nobody is left to clean up, but what is left has no name that anyone uses
        assert [path.name[:5] for path in left] == [".out."]
    else:
        assert not left


@pytest.mark.slow
def test_overwriting_that_is_terminated_leaves_the_old_adapter(folder: Path) -> None:
    before = Adapter.load("a").digest
    process = started(STALL, "merge", "a + b", *AB, "--output", "a", "--overwrite")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.terminate()
    process.communicate()
    assert Adapter.load("a").digest == before
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "less", "r3"]


def test_main_gives_the_signal_handler_back(run: Run, folder: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run("merge", "a + b", *AB, "--output", "out")[0] == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_pipe_sees_no_progress_bar(folder: Path) -> None:
    arguments = command("merge", "ties(a, b)", *AB, "--output", "out")
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.slow
def test_a_terminal_sees_the_modules_being_merged_and_warnings_on_lines_of_their_own(folder: Path) -> None:
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    termios.tcsetwinsize(theirs, (24, 200))
    arguments = command("merge", "ties(a, less)", *AB[:2], "--adapter", "less=less", "--output", "out")
    subprocess.run(arguments, stdout=subprocess.PIPE, stderr=theirs, env=environment(), check=True)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    os.close(theirs)
    assert re.search(r"0/4 \[.*module", seen)
    assert len(re.findall(r"(?:^|\r|\n)merged-lora: warning: [^\r]+\r\n", seen)) == 2


def test_a_reader_that_leaves_early_is_no_error() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(command("strategies"), stdout=theirs, stderr=subprocess.PIPE, env=environment())
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, b"")


def test_strategies_shows_the_table_in_three_forms(run: Run) -> None:
    assert run("strategies") == (0, catalog.as_text(), "")
    assert run("strategies", "--markdown") == (0, catalog.as_markdown(), "")
    code, out, _ = run("strategies", "--json")
    assert (code, json.loads(out)) == (0, catalog.as_json())


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["strategies", "--help"]])
def test_help_exits_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: merged-lora")


def test_the_help_of_merge_names_every_backend_and_every_key_to_drop(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(["merge", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for word in (*backends.MODULES, *parts.KINDS):
        assert word in out


def test_version_is_the_packages_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"merged-lora {__version__}\n"


def test_the_command_starts_without_what_only_merging_needs() -> None:
    code = "import sys, merged_lora.cli as c; c.main(['strategies']); print('HEAVY', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    loaded = done.stdout.split("HEAVY")[1].split()
    assert "merged_lora.spec" in loaded
    assert not {"torch", "numpy", "safetensors", "numba", "tqdm"} & set(loaded)
