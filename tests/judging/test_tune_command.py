"""``merged-lora tune`` as its users type it, against a landscape that is known."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from landscape import TASKS, Landscape, examples, rows
from merged_lora.spec import parse
from running import Run, started

FEW = ("--strategy", "sum", "--trials", "4")


@pytest.fixture
def server() -> Iterator[Landscape]:
    made = Landscape()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with eight examples of each task in ``chat.jsonl`` and ``sql.jsonl``."""
    monkeypatch.chdir(tmp_path)
    for task, found in examples(8).items():
        lines = [json.dumps({"prompt": each.prompt, "answer": each.answers[0]}) for each in found]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
    return tmp_path


def asked(server: Landscape, *more: str) -> list[str]:
    """The arguments of a search on both tasks."""
    data = [part for task in TASKS for part in ("--data", f"{task}={task}.jsonl")]
    return ["tune", "--base-url", server.url, *data, *more]


def test_the_result_can_be_pasted(run: Run, server: Landscape) -> None:
    _, out, _ = run(*asked(server, *FEW))
    flag = next(line for line in out.splitlines() if "--merged-lora-modules" in line)
    _, _, spec = shlex.split(flag)[1].partition("=")
    assert parse(spec).strategy == "sum"
    body = next(line for line in out.splitlines() if "POST" in line).partition("{")[2]
    assert json.loads("{" + body)["spec"] == spec


def test_json_has_every_trial(run: Run, server: Landscape) -> None:
    _, out, err = run(*asked(server, *FEW, "--json"))
    found = json.loads(out)
    assert len(found["trials"]) == 4
    assert found["best"]["number"] in found["front"]
    assert "trial 0: 80.0%  sum(" in err


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_a_plot_is_drawn_for_any_number_of_tasks(
    run: Run, server: Landscape, folder: Path, tasks: int, ending: str
) -> None:
    several = [part for i in range(tasks - 2) for part in ("--data", f"t{i}=sql.jsonl")]
    several += [part for i in range(tasks - 2) for part in ("--source", f"t{i}=sql")]
    given = asked(server, *several) if tasks > 1 else [*asked(server)[:3], "--data", "sql=sql.jsonl"]
    code, _, err = run(*given, *FEW, "--plot", f"front.{ending}")
    assert (code, "error" in err) == (0, False)
    assert (folder / f"front.{ending}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--objective", "sql=two"), "--objective takes worst, mean, or weights of tasks"),
        (("--objective", "worst", "mean"), "--objective takes worst, mean, or weights of tasks"),
        (("--objective", "sql=1", "sql=2"), '"sql" is given twice'),
        (("--data", "sql=chat.jsonl"), '"sql" is given twice'),
        (("--data", "sql"), "'sql' is not of the form TASK=VALUE"),
        (("--data", "more=nosuch.jsonl"), "nosuch.jsonl: cannot be read"),
        (("--data", "more=empty.jsonl"), "empty.jsonl: holds no example"),
        (("--data", "more=unanswered.jsonl"), "unanswered.jsonl, line 1: it has no answer"),
        (("--strategy", "tise"), "ties"),
        (("--trials", "0"), "trials must be at least 1"),
        (("--minutes", "-1"), "minutes must be more than 0"),
        (("--plot", "front.gif"), ".png, .svg, .pdf"),
        (("--plot", "nosuch/front.png"), "cannot write nosuch/front.png"),
        (("--study", "/dev/full"), "/dev/full"),
        (("--study", "nosuch/study.jsonl"), "cannot write nosuch/study.jsonl"),
        (("--study", "sql.jsonl"), "no results of merged-lora"),
        (("--base-url", "http://127.0.0.1:9/v1"), "no server answers at http://127.0.0.1:9/v1"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(
    run: Run, server: Landscape, folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "unanswered.jsonl").write_text('{"prompt": "sql 1"}\n')
    code, out, err = run(*asked(server, *FEW, *arguments))
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("status", "words"), [(401, "OPENAI_API_KEY"), (429, "status 429"), (500, "status 500")]
)
def test_a_server_that_fails_in_the_middle_leaves_the_trials_before(
    run: Run, server: Landscape, folder: Path, status: int, words: str
) -> None:
    ordinary = server.fault
    server.fault = lambda path, body: (
        (status, {"error": {"message": "not now"}}, {})
        if body["model"].startswith("sum(") and '"auto"' not in body["model"]
        else ordinary(path, body)
    )
    code, _, err = run(*asked(server, *FEW, "--study", "study.jsonl"))
    assert code == 2
    assert words in err.splitlines()[-1]
    assert [row["trial"]["number"] for row in rows((folder / "study.jsonl").read_text())[1:]] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("study", [["--study", "study.jsonl"], []])
def test_ctrl_c_says_what_was_found_and_what_is_kept(server: Landscape, study: list[str]) -> None:
    reached, go_on = threading.Event(), threading.Event()
    ordinary = server.fault

    def held(path: str, body: Any) -> Any:
        if body["model"].startswith("sum(") and '"auto"' not in body["model"]:
            reached.set()
            go_on.wait(60)
        return ordinary(path, body)

    server.fault = held
    process = started("import sys", *asked(server, *FEW, *study))
    assert reached.wait(120)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    go_on.set()
    assert process.returncode == 130
    assert "Traceback" not in err
    kept = "the same command goes on from study.jsonl" if study else "--study FILE would have kept the rest"
    assert f'interrupted; best so far: sum(chat, sql, weights="auto") (80.0%); {kept}' in err
    assert Path("study.jsonl").exists() == bool(study)


def test_a_key_is_taken_from_the_environment_and_shown_to_nobody(
    run: Run, server: Landscape, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "OPENAI_API_KEY", "sk-secret")
    code, out, err = run(*asked(server, *FEW, "--study", "study.jsonl"))
    assert code == 0
    assert "sk-secret" not in out + err + (folder / "study.jsonl").read_text()
