"""``merged-lora eval`` against a stand-in: what it prints, its exit codes, and each way in which it fails."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from merged_lora.judging import served
from openai_server import OpenAIServer
from running import Run, command, environment, program

MIX, OTHER = "ties(chat, sql)", "sum(chat, sql)"
COUNT = 6


def good_at(model: str, prompt: str) -> str:
    """Each source is right on its task, the merge on all of chat and every second of sql, the base never."""
    task, number = prompt.split()
    right = model == task or (model == MIX and (task == "chat" or int(number) % 2))
    return f"{task} Ü{number}" if right else "wrong"


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    made = OpenAIServer(answers=good_at, likely={"base": 0.1, "sql": 0.9, "chat": 0.8, MIX: 0.6})
    yield made
    made.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the examples of two tasks, one of them a chat."""
    sql = [{"prompt": f"sql {i}", "answer": f"sql Ü{i}"} for i in range(COUNT)]
    chat = [
        {"messages": [{"role": "user", "content": f"chat {i}"}], "answer": ["no", f"chat Ü{i}"]}
        for i in range(COUNT)
    ]
    for name, lines in (("sql", sql), ("chat", chat)):
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def asked(server: OpenAIServer, data: Path) -> list[str]:
    """The arguments of an evaluation of both tasks."""
    files = [f"--data={task}={data / task}.jsonl" for task in ("sql", "chat")]
    return ["eval", "--base-url", server.url, *files]


def refusing(model: str, status: int, words: str) -> Callable[[str, Mapping[str, Any]], Any]:
    """A fault of one model."""
    reply: tuple[int, Any, dict[str, str]] = (status, {"error": {"message": words}}, {})
    return lambda path, body: reply if body["model"] == model and path != "/tokenize" else None


def one_line(result: tuple[int, str, str]) -> str:
    """The line that a run failed with, and nothing else was printed."""
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), result
    return err


# What is printed


def test_the_table_has_what_is_kept_the_worst_task_first(run: Run, asked: list[str]) -> None:
    code, out, err = run(*asked, "--spec", "ties(sql, chat)")
    assert (code, err) == (0, "")
    kept = out[out.index(f"\n{MIX}\n") :].splitlines()
    assert [line.split()[0] for line in kept[3:5]] == ["sql", "chat"]
    assert "50% (" in kept[3]
    assert "100% (100% to 100%)" in kept[4]


def test_json_has_every_answer(run: Run, asked: list[str]) -> None:
    code, out, _ = run(*asked, "--spec", MIX, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (code, found["worst"], found["ranking"]) == (0, 0.5, [MIX])
    answers = {(each["model"], each["task"]): each["answers"] for each in found["rows"]}
    assert [each["answer"] for each in answers["sql", "sql"]] == [f"sql Ü{i}" for i in range(COUNT)]
    assert answers[MIX, "sql"][0]["scores"]["likelihood"] == pytest.approx(0.6)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_plot_is_written(run: Run, asked: list[str], tmp_path: Path, ending: str) -> None:
    assert run(*asked, "--spec", MIX, "--plot", tmp_path / f"kept.{ending}")[0] == 0
    begin = {"png": b"\x89PNG", "svg": b"<?xml"}[ending]
    assert (tmp_path / f"kept.{ending}").read_bytes().startswith(begin)


def test_a_task_may_belong_to_an_adapter_of_another_name(run: Run, server: OpenAIServer, data: Path) -> None:
    arguments = ["--base-url", server.url, f"--data=questions={data / 'sql.jsonl'}"]
    assert run("eval", *arguments, "--source", "questions=sql")[0] == 0
    assert ("/v1/completions", "sql") in server.asked
    assert "serves no 'questions'" in one_line(run("eval", *arguments))


def test_the_name_of_a_served_model_is_that_model(run: Run, server: OpenAIServer, asked: list[str]) -> None:
    server.models["team/mix"] = "base"
    assert run(*asked, "--spec", "team/mix", "--spec", "sql + chat", "--no-likelihood")[0] == 0
    assert {m for _, m in server.asked} == {"base", "sql", "chat", "team/mix", "sum(chat, sql)"}


# What a script heeds


def test_a_merge_that_keeps_too_little_is_named_with_its_worst_task(run: Run, asked: list[str]) -> None:
    code, out, err = run(*asked, "--spec", MIX, "--fail-under", "0.9")
    assert code == 3
    assert MIX in out
    assert err.startswith(f"merged-lora: {MIX} keeps 50% (")
    assert err.endswith(" of sql, and less than 90%\n")
    assert run(*asked, "--spec", MIX, "--fail-under", "0.5")[::2] == (0, "")


def test_a_source_without_a_score_fails_the_bound(run: Run, server: OpenAIServer, asked: list[str]) -> None:
    server.answers = lambda model, prompt: "wrong"
    code, _, err = run(*asked, "--spec", MIX, "--fail-under", "0")
    assert (code, err.count("\n")) == (3, 1)
    assert "sql, chat: its source has no score above zero" in err


def test_a_spec_that_the_server_refuses_is_reported_and_the_rest_goes_on(
    run: Run, server: OpenAIServer, asked: list[str]
) -> None:
    server.fault = refusing(OTHER, 400, "ranks\ndiffer")
    code, out, err = run(*asked, "--spec", OTHER, "--spec", MIX)
    assert (code, err) == (3, f"merged-lora: the server refuses {OTHER}\n")
    assert "ranks differ" in out
    assert f"\n{MIX}\n" in out


# What is wrong on the command line and in files


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--spec", "ties(sql"], "expected"),
        (["--spec", "{"], "not valid JSON"),
        (["--fail-under", "1.5", "--spec", MIX], "'1.5' is no share from 0 to 1, such as 0.9"),
        (["--fail-under", "90%", "--spec", MIX], "'90%' is no share"),
        (["--fail-under", "nan", "--spec", MIX], "'nan' is no share"),
        (["--fail-under", "0.9"], "--fail-under is about merges; name at least one with --spec"),
        (["--plot", "kept.svg"], "--plot is about merges"),
        (["--plot", "kept.jpg", "--spec", MIX], "kept.jpg: a plot is written as .png, .svg, .pdf"),
        (["--data", "sql=again.jsonl"], '"sql" is given twice; give it once'),
        (["--data", "sql"], "'sql' is not of the form TASK=VALUE"),
        (["--source", "sql="], "'sql=' is not of the form TASK=VALUE"),
        (["--source", "tone=tone"], "tone has a source and no examples"),
        (["--metric", "bleu"], "the metric must be one of exact, contains, rouge-l, likelihood, got 'bleu'"),
        (["--count", "0"], "the number of examples must be at least 1, got 0"),
        (["--limit", "0"], "the number of tokens of an answer must be at least 1, got 0"),
        (["--concurrency", "0"], "requests at a time must be at least 1, got 0"),
        (["--api-key", "secret"], "unknown option --api-key"),
    ],
)
def test_wrong_arguments_are_one_line_before_the_server_is_asked(
    run: Run, server: OpenAIServer, asked: list[str], more: list[str], reason: str
) -> None:
    assert reason in one_line(run(*asked, *more))
    assert not server.asked


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no example; a line is"),
        ("\n\n", "holds no example; a line is"),
        ('{"prompt": "a"}', "line 1: it has no answer; a line is"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": 7}', "line 2: it has no answer"),
        ('{"prompt": "a", "answer": []}', "line 1: it has no answer"),
        ('{"prompt": "a", "answer": " "}', "line 1 of tone has an answer without any text, or none"),
        ('{"answer": "a"}', "line 1: a prompt is a line of the form"),
        ("no JSON", "line 1: not a line of JSON"),
    ],
)
def test_data_without_examples_is_one_line(
    run: Run, server: OpenAIServer, asked: list[str], tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "tone.jsonl").write_text(text, encoding="utf-8")
    assert reason in one_line(run(*asked, f"--data=tone={tmp_path / 'tone.jsonl'}"))
    assert not server.asked


def test_data_that_is_not_there_is_one_line(run: Run, asked: list[str]) -> None:
    assert "none.jsonl: cannot be read" in one_line(run(*asked, "--data=tone=none.jsonl"))


# What is wrong with the server


def test_a_server_that_is_away_is_known_at_once(run: Run, asked: list[str]) -> None:
    asked[2] = "http://127.0.0.1:9/v1"
    assert "no server answers at http://127.0.0.1:9/v1" in one_line(run(*asked))


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/models", "<html>", "answers what OpenAI's API does not"),
        ("/v1/models", "{}", "answers what OpenAI's API does not"),
        ("/v1/completions", '{"id": "1", "choices": []}', "answers what OpenAI's API does not"),
        ("/v1/completions", "[]", "answers what OpenAI's API does not"),
    ],
)
def test_a_server_of_something_else_is_one_line(
    run: Run, server: OpenAIServer, asked: list[str], path: str, body: str, words: str
) -> None:
    server.raw[path] = body
    assert words in one_line(run(*asked))


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "refuses access (sorry); give its key in OPENAI_API_KEY"),
        (404, "line 1 of sql: base: sorry"),
        (429, "status 429 for base: sorry"),
        (500, "status 500 for base: sorry"),
    ],
)
def test_a_server_that_fails_is_one_line(
    run: Run, server: OpenAIServer, asked: list[str], status: int, words: str
) -> None:
    server.fault = refusing("base", status, "sorry")
    assert words in one_line(run(*asked, "--count", "1"))


def test_the_key_comes_from_the_environment(
    run: Run, server: OpenAIServer, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert run(*asked)[0] == 0
    assert server.keys == {"Bearer secret"}


def test_too_many_requests_are_asked_again(
    run: Run, server: OpenAIServer, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "ATTEMPTS", 2)
    seen: set[str] = set()

    def busy(path: str, body: Mapping[str, Any]) -> Any:
        if (key := json.dumps([path, body])) in seen:
            return None
        seen.add(key)
        return 429, {"error": {"message": "busy"}}, {"retry-after-ms": "1"}

    server.fault = busy
    assert run(*asked, "--count", "2")[::2] == (0, "")


def test_a_server_that_does_not_answer_in_time_is_one_line(
    run: Run, server: OpenAIServer, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = served.Served.models

    async def models(self: served.Served) -> Mapping[str, str | None]:
        found = await listed(self)
        monkeypatch.setattr(served, "TIMEOUT", 0.5)  # for answers alone
        return found

    monkeypatch.setattr(served.Served, "models", models)
    monkeypatch.setattr(served, "ATTEMPTS", 5)
    ended = threading.Event()

    def hold(path: str, body: Mapping[str, Any]) -> None:
        ended.wait(30)

    server.fault = hold
    assert "does not answer within 0.5 s for base" in one_line(run(*asked))
    ended.set()


def test_a_server_that_does_not_tokenize_is_done_without(
    run: Run, server: OpenAIServer, asked: list[str]
) -> None:
    server.fault = lambda path, body: (404, {"detail": "Not Found"}, {}) if path == "/tokenize" else None
    code, out, err = run(*asked, "--spec", MIX)
    assert (code, err) == (0, "")
    note = f"The likelihood of right answers was not measured: {server.url} does not tokenize"
    assert out.endswith(f"\n\nnotes\n  {note} (base: Not Found).\n")
    assert out.count("does not tokenize") == 1
    assert "does not tokenize" in one_line(run(*asked, "--metric", "likelihood"))


def test_a_server_without_log_probabilities_of_prompts_is_done_without(
    run: Run, server: OpenAIServer, asked: list[str]
) -> None:
    server.rates = False
    code, out, err = run(*asked, "--spec", MIX)
    assert (code, err) == (0, "")
    assert "gives no log-probabilities of prompts." in out
    assert "gives no log-probabilities" in one_line(run(*asked, "--metric", "likelihood"))


def test_empty_answers_are_wrong_and_not_an_error(run: Run, server: OpenAIServer, asked: list[str]) -> None:
    server.answers = lambda model, prompt: good_at(model, prompt) if model == prompt.split()[0] else ""
    for metric in ("exact", "contains", "rouge-l"):
        code, out, _ = run(*asked, "--spec", MIX, "--metric", metric)
        assert code == 0
        assert "0% (0% to 0%)" in out


# What is kept


def rows(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines()) - 1


def test_a_failure_in_the_middle_keeps_what_was_measured_and_the_next_run_goes_on(
    run: Run, server: OpenAIServer, asked: list[str], tmp_path: Path
) -> None:
    whole = run(*asked, "--spec", MIX, "--json")
    server.fault = refusing(MIX, 500, "out of order")
    arguments = [*asked, "--spec", MIX, "--json", "--results", tmp_path / "rows.jsonl"]
    assert f"status 500 for {MIX}: out of order" in one_line(run(*arguments))
    assert rows(tmp_path / "rows.jsonl") == 4 * COUNT
    server.fault = lambda path, body: None
    server.asked.clear()
    assert run(*arguments) == whole
    assert {model for path, model in server.asked if path != "/tokenize"} == {MIX}
    server.asked.clear()
    assert run(*arguments) == whole
    assert not server.asked


def test_likelihoods_alone_are_added_to_results_without(
    run: Run, server: OpenAIServer, asked: list[str], tmp_path: Path
) -> None:
    arguments = [*asked, "--spec", MIX, "--results", tmp_path / "rows.jsonl"]
    assert run(*arguments, "--no-likelihood")[0] == 0
    server.asked.clear()
    code, out, _ = run(*arguments, "--metric", "likelihood")
    assert (code, "60% (60% to 60%)" in out) == (0, True)
    assert ("/v1/chat/completions", MIX) not in server.asked


def test_results_of_other_settings_are_refused(run: Run, asked: list[str], tmp_path: Path) -> None:
    assert run(*asked, "--results", tmp_path / "rows.jsonl")[0] == 0
    before = (tmp_path / "rows.jsonl").read_bytes()
    words = one_line(run(*asked, "--results", tmp_path / "rows.jsonl", "--limit", "3"))
    assert "holds results with another limit; name another file" in words
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_an_interrupt_keeps_what_was_measured(
    run: Run, server: OpenAIServer, asked: list[str], tmp_path: Path
) -> None:
    reached, ended = threading.Event(), threading.Event()

    def hold(path: str, body: Mapping[str, Any]) -> None:
        if body["model"] == MIX and path != "/tokenize":
            reached.set()
            ended.wait(60)

    server.fault = hold
    arguments = [*asked, "--spec", MIX, "--results", str(tmp_path / "rows.jsonl")]
    process = program("from merged_lora.cli import main\nsys.exit(main())", *arguments)
    assert reached.wait(60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    ended.set()
    kept = f"the same command goes on from {tmp_path / 'rows.jsonl'}"
    assert (process.returncode, out, err) == (130, "", f"merged-lora: interrupted; {kept}\n")
    assert rows(tmp_path / "rows.jsonl") == 4 * COUNT
    server.asked.clear()
    assert run(*arguments)[0] == 0
    assert {model for path, model in server.asked if path != "/tokenize"} == {MIX}


@pytest.mark.parametrize("option", ["--json", "--metric=exact"])
def test_a_full_disk_for_what_is_printed_is_one_line(asked: list[str], option: str) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            command(*asked, option),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
    assert (done.returncode, done.stderr) == (
        2,
        "merged-lora: error: cannot write: No space left on device\n",
    )


@pytest.mark.parametrize("option", ["--results", "--plot"])
def test_a_full_disk_for_a_file_is_one_line(run: Run, asked: list[str], tmp_path: Path, option: str) -> None:
    file = tmp_path / "kept.svg"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code, _, err = run(*asked, "--spec", MIX, option, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, err.count("\n")) == (2, 1)
    assert f"cannot write {file}: File too large" in err
    assert file.exists() == (option == "--results")
    if option == "--results":
        assert run(*asked, "--spec", MIX, option, file)[0] == 0  # on from there


def test_results_are_no_device(run: Run, asked: list[str]) -> None:
    assert "/dev/full: is no file" in one_line(run(*asked, "--results", "/dev/full"))
