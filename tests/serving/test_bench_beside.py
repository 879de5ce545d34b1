"""What is made of one client's stream while others request what is new, and how it is watched."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from openai import APIError, OpenAI

from made_up_streams import Tokens
from merged_lora.bench import serve, serve_beside
from merged_lora.bench.__main__ import main
from merged_lora.bench.serve import Bench, Work
from merged_lora.bench.serve_beside import COLD, CROWD, QUIET_LONG, Watch
from merged_lora.bench.serve_report import Report
from merged_lora.errors import MergeError

WATCH = Watch([-3.0, -2.0, -1.0, 1.0, 2.0, 7.0, 8.0, 30.0], ["m"], first_token=[6.0], end=6.0)


def a_watch(gap: float, served: int = 1) -> Watch:
    """A stream of one token a second with one longer gap, while ``served`` of as many requests are served."""
    return Watch([-2.0, -1.0, gap - 1.0, gap], ["m"] * served, [gap] * served, gap, merged=[7.0])


def a_report(cores: int, gap: float, served: int = 10) -> Report:
    """A report of a gap of two seconds with a plain adapter, and of another one with merges."""
    report = Report({"cores": cores})
    crowd = a_watch(gap, 10)
    crowd.first_token = crowd.first_token[:served]
    report.beside = {
        COLD: [replace(a_watch(2.0), merged=[])] * 3,
        QUIET_LONG: [replace(a_watch(9.0), first_token=[], merged=[])],
        "knots, 3 sources": [a_watch(gap)] * 3,
        CROWD: [a_watch(gap, 10), crowd],
    }
    return report


def test_the_longest_gap_is_searched_until_the_request_is_served() -> None:
    assert WATCH.longest == 5.0


def test_a_gap_that_begins_before_the_request_counts() -> None:
    assert replace(WATCH, end=0.5).longest == 2.0


def test_gaps_before_the_request_count_apart() -> None:
    assert WATCH.longest_before == 1.0


def test_the_pace_is_that_of_the_gaps_that_count_over_that_before() -> None:
    assert WATCH.pace == pytest.approx((3 / 8) / (2 / 2))


def test_tokens_that_arrive_together_count_one_by_one_in_the_pace() -> None:
    watch = Watch([-2.0, -1.0, 3.0, 3.0, 3.0, 3.0, 4.0], ["m"], [3.5], 3.5)
    assert watch.longest == 4.0
    assert watch.pace == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("cores", "gap", "met"),
    [(2, 3.9, True), (2, 4.1, False), (16, 2.3, True), (16, 2.5, False)],
    ids=str,
)
def test_the_gap_has_an_aim_that_depends_on_cores_to_spare(cores: int, gap: float, met: bool) -> None:
    aims = [aim for aim in a_report(cores, gap).aims() if "longest gap" in aim.what]
    assert [aim.what.partition(":")[0] for aim in aims] == ["knots, 3 sources", CROWD]
    assert [aim.met for aim in aims] == [met, met]
    assert all(aim.measured == pytest.approx(gap / 2.0) for aim in aims)
    assert all(("MET" if met else "MISSED") in aim.line() for aim in aims)


@pytest.mark.parametrize(("served", "met"), [(10, True), (9, False)])
def test_all_clients_must_be_served_in_every_round(served: int, met: bool) -> None:
    aim = a_report(2, 3.0, served).aims()[-1]
    assert (aim.measured, aim.aim, aim.met) == (served, 10, met)


def test_every_row_of_the_table_has_its_numbers() -> None:
    nothing, cold, quiet, knots, crowd = serve_beside.lines(a_report(2, 3.0).beside)[1:]
    assert nothing.split() == ["nothing", "9", "1000.0", "1000.0"]
    assert cold.removeprefix(f"  {COLD}").split() == ["3", "2000.0", "2000.0", "0.67", "2000.0"]
    assert quiet.removeprefix(f"  {QUIET_LONG}").split()[:3] == ["1", "9000.0", "9000.0"]
    expected = ["3", "3000.0", "3000.0", "1.500", "(1.500-1.500)", "0.50", "3000.0", "7.0"]
    assert knots.removeprefix("  knots, 3 sources").split() == expected
    assert crowd.removeprefix(f"  {CROWD}").split() == ["2", *expected[1:]]


def test_a_page_gets_the_same_rows_and_every_aim() -> None:
    rows = a_report(2, 5.0).markdown()
    assert "| knots, 3 sources | 3 | 5000.0 | 5000.0 | 2.500 (2.500-2.500) | 0.33 | 5000.0 | 7.0 |" in rows
    assert f"| {CROWD}: served in the worst round | 10 | at least 10 | MET |" in rows
    assert sum(row.endswith("| at most 2 | MISSED |") for row in rows) == 2


def test_the_file_holds_the_time_of_every_token() -> None:
    kept = json.loads(json.dumps(a_report(2, 3.0).as_json()))
    assert kept["beside"]["knots, 3 sources"][0]["times"] == [-2.0, -1.0, 2.0, 3.0]
    assert kept["longest gaps"][COLD] == [2.0] * 3


def watch(client: Tokens, *models: str) -> Watch:
    return serve._watch(cast(OpenAI, client), models, before=6, after=3)


def test_clients_request_at_once_while_one_streams() -> None:
    client = Tokens(together=3)
    seen = watch(client, "a", "b", "c")
    assert sorted(request["model"] for request in client.requests) == ["a", "b", "c", "sql"]
    assert seen.models == ["a", "b", "c"]
    assert seen.failed == {}
    assert min(seen.first_token) >= 0.03
    assert seen.end == pytest.approx(max(seen.first_token), abs=1e-5)
    assert sum(token < 0 for token in seen.times) >= 6
    assert sum(token > seen.end for token in seen.times) >= 3
    assert seen.times == sorted(seen.times)


def test_a_stream_is_watched_alone() -> None:
    seen = serve._watch_nothing(cast(OpenAI, Tokens()), 0.05, before=6, after=3)
    assert not seen.models
    assert not seen.first_token
    assert seen.end >= 0.05
    assert seen.times[-1] > seen.end


def test_a_client_that_is_not_served_is_counted_if_others_are() -> None:
    seen = watch(Tokens(), "a", "broken")
    assert seen.failed == {"broken": "no such merge"}
    assert len(seen.first_token) == 1


def test_the_only_request_must_be_served() -> None:
    with pytest.raises(APIError, match="no such merge"):
        watch(Tokens(), "broken")


def test_a_stream_that_ends_early_is_an_error() -> None:
    with pytest.raises(MergeError, match="after 8 of 400 tokens"):
        watch(Tokens(ends=8), "a")


def rounds(work: Work, **seconds: list[float]) -> dict[str, list[float]]:
    """The times that count of cases that take so long, one after the other."""
    server = cast(Any, SimpleNamespace(url="http://made.up", log=Path("no log")))
    bench = Bench(work, server, server, {})

    def case(times: list[float]) -> Callable[[], Watch]:
        left = iter(times)
        return lambda: a_watch(next(left))

    bench._rounds({name: case(times) for name, times in seconds.items()})
    return {name: [watch.end for watch in found] for name, found in bench.report.beside.items()}


def test_a_first_round_does_not_count_unless_it_is_slow() -> None:
    found = rounds(Work(2, seconds=100.0), fast=[1.0, 1.1, 1.2], slow=[10.0, 11.0])
    assert found == {"fast": [1.1, 1.2], "slow": [10.0, 11.0]}


def test_what_is_slow_has_fewer_rounds_but_at_least_two() -> None:
    found = rounds(Work(4, seconds=25.0), fast=[1.0] * 5, slow=[10.0] * 3, slower=[30.0] * 2)
    assert {name: len(times) for name, times in found.items()} == {"fast": 4, "slow": 3, "slower": 2}


def test_ten_clients_request_mostly_what_is_fast() -> None:
    assert len(serve.MIXED) == 10
    strategies = [strategy for strategy, _ in serve.MIXED]
    counts = {name: len(list(same)) for name, same in itertools.groupby(sorted(strategies))}
    assert counts == {"linear": 4, "ties": 4, "knots": 1, "ties_svd": 1}


def test_parts_are_chosen_by_name() -> None:
    assert serve.work(20, False, "clients,gaps").parts == ("clients", "gaps")
    assert serve.work(20, True, None) == Work(3, speeds=2, seconds=serve.SLOW, least=1)


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--only", "gaps,stalls"])
    assert caught.value.code == 2
    assert "--only gaps,stalls: the parts are speed,first,gaps,clients" in capsys.readouterr().err
