"""What the benchmark of servers makes of the times it measures."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from openai import OpenAI

from merged_lora.bench import serve, serving
from merged_lora.bench.__main__ import main
from merged_lora.bench.resampling import interval, noise
from merged_lora.bench.serve_beside import COLD
from merged_lora.bench.serve_report import (
    AGAIN,
    LOST,
    MEMORY,
    MERGED,
    NEW,
    OFF,
    ON,
    SEEN,
    WARM,
    Arrival,
    FirstUse,
    Gaps,
    Report,
)
from merged_lora.bench.timing import quartiles, spread
from merged_lora.errors import MergeError
from merged_lora.spec import parse
from merged_lora.vllm_plugin import merge_log
from merged_lora.vllm_plugin.identity import MergeIdentity
from merged_lora.vllm_plugin.rpc import Facts

TICKS = [0.0, 0.1, 0.2, 0.5, 0.6, 0.7, 0.9, 1.0]


def a_report(merged: float = 0.080, cost: float = 0.020, gap: float = 0.010, speed: float = 50.0) -> Report:
    """A report of a plain token in 80 ms, a load from disk in 40 ms, and a merge in 15 ms."""
    report = Report({"cpu": "made up"})
    report.warm = {WARM: [0.080, 0.081, 0.082], AGAIN: [0.080, 0.081, 0.082], MERGED: [merged] * 3}
    report.first = {
        "ties, 2 sources": FirstUse([0.08 + cost] * 3, [0.08] * 3, [15.0] * 3),
        COLD: FirstUse([0.12] * 3, [0.08] * 3),
    }
    report.gaps = {
        ON: Gaps([0.08], {SEEN: [0.16], LOST: [0.16], MEMORY: [0.16], NEW: [0.16 + gap]}, [15.0]),
        OFF: Gaps([0.08], {COLD: [0.16]}),
    }
    report.speed = {ON: [speed - 1, speed, speed + 1], OFF: [49.0, 50.0, 51.0]}
    return report


def test_an_arrival_is_charged_with_the_largest_gap_that_it_touches() -> None:
    gaps = Gaps()
    gaps.add(TICKS, [Arrival(SEEN, 0.15, 0.45), Arrival(NEW, 0.65, 0.85)])
    assert gaps.largest == {SEEN: [pytest.approx(0.3)], NEW: [pytest.approx(0.2)]}


def test_gaps_that_no_arrival_touches_are_quiet() -> None:
    gaps = Gaps()
    gaps.add(TICKS, [Arrival(SEEN, 0.15, 0.45), Arrival(NEW, 0.65, 0.85)])
    assert gaps.quiet == pytest.approx([0.1, 0.1, 0.1])


def test_an_arrival_after_the_last_token_touches_no_gap() -> None:
    gaps = Gaps()
    gaps.add([0.0, 1.0], [Arrival(NEW, 1.5, 2.0)])
    assert gaps.largest == {}
    assert gaps.quiet == [1.0]


def test_streams_add_up() -> None:
    gaps = Gaps()
    for _ in range(2):
        gaps.add([0.0, 1.0, 3.0], [Arrival(NEW, 1.5, 2.0)])
    assert gaps.quiet == [1.0, 1.0]
    assert gaps.largest == {NEW: [2.0, 2.0]}


def test_what_a_first_use_costs_is_reported_pair_by_pair() -> None:
    use = FirstUse([0.3, 0.9], [0.1, 0.8])
    assert use.cost == pytest.approx([0.2, 0.1])


def test_quartiles_of_five_values_are_the_second_the_third_and_the_fourth() -> None:
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert spread([0.005, 0.001, 0.002, 0.004, 0.003]) == "3.0 (2.0-4.0)"
    assert spread([0.005]) == "5.0"


def test_the_interval_of_a_ratio_holds_it_and_is_the_same_every_time() -> None:
    slow, fast = [2.0, 2.1, 1.9, 2.2, 1.8], [1.0, 1.1, 0.9, 1.05, 0.95]
    low, high = interval(slow, fast)
    assert low < statistics.median(slow) / statistics.median(fast) < high
    assert (low, high) == interval(slow, fast)


def test_the_same_times_without_spread_are_without_noise() -> None:
    assert noise([3.0] * 4, [3.0] * 4) == 0


def test_the_time_of_a_merge_is_read_from_the_line_that_the_server_logs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = ["INFO something else ms=7"]
    monkeypatch.setattr(merge_log.logger, "info", lambda text, *given: lines.append(text % given))
    for spec, kept in (("ties(0.3*sql, tone)", {}), ('knots(json, sql, weights="auto")', {"m": 0.8})):
        identity = MergeIdentity(parse(spec), ("one", "other"))
        merge_log.log_merge(identity, Facts("cpu", 8, 210, 0.9, kept, 0.0196, 0.01, 1000))
    assert merge_log.merge_milliseconds("\n".join(lines)) == {
        "ties(0.3*sql, tone)": 19.6,
        'knots(json, sql, weights="auto")': 19.6,
    }


@pytest.mark.parametrize(
    ("report", "missed"),
    [
        (a_report(), []),
        (a_report(merged=0.090), ["warm merge"]),
        (a_report(cost=0.050), ["what a new merge costs"]),
        (a_report(gap=0.020), ["gap with a new merge"]),
        (a_report(speed=40.0), ["throughput of plain adapters"]),
        (a_report(speed=60.0), []),
    ],
    ids=["all", "slow when warm", "costly when new", "stalling others", "slow when idle", "fast when idle"],
)
def test_an_aim_is_missed_where_its_number_is(report: Report, missed: list[str]) -> None:
    found = [aim.what for aim in report.aims() if not aim.met]
    assert len(found) == len(missed)
    assert all(text in what for what, text in zip(found, missed, strict=True))


def test_tables_and_file_hold_every_case() -> None:
    report = a_report()
    text = "\n".join(
        [
            *report.warm_lines(),
            *(use.line(case) for case, use in report.first.items()),
            *(line for gaps in report.gaps.values() for line in gaps.lines()),
            report.speed_line(),
            *(aim.line() for aim in report.aims()),
        ]
    )
    assert all(case in text for case in (WARM, AGAIN, MERGED, COLD, SEEN, LOST, MEMORY, NEW, ON, OFF))
    assert "ties, 2 sources" in text
    kept = json.loads(json.dumps(report.as_json()))
    assert kept["warm"][MERGED] == [0.080] * 3
    assert [aim["met"] for aim in kept["aims"]] == [True] * 4


def test_a_page_gets_what_first_requests_add() -> None:
    rows = a_report().markdown()
    assert "| ties, 2 sources | 20.0 | 0.500 (0.500-0.500) | 15.0 |" in rows
    assert f"| {COLD} | 40.0 |  |  |" in rows


def test_without_the_model_the_error_says_how_to_make_it_and_no_server_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(serving, "MODEL", tmp_path)
    monkeypatch.setattr(serve, "VllmServer", None)
    with pytest.raises(SystemExit) as caught:
        main(["serve"])
    assert caught.value.code == 2
    assert "`make model` makes it" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--requests", "1"], ["--json", "/"]], ids=" ".join)
def test_a_measurement_without_a_result_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", *arguments])
    assert caught.value.code == 2


class Tokens:
    """A client whose stream has a token every hundredth of a second, and which completes in a thirtieth."""

    def __init__(self, tokens: int) -> None:
        self.completions = self
        self.models: list[str] = []
        self._tokens = tokens

    def create(self, model: str, stream: bool = False, **_: object) -> Any:
        if stream:
            return contextlib.nullcontext(self._stream())
        self.models.append(model)
        time.sleep(1 / 30)
        return None

    def _stream(self) -> Iterator[int]:
        for i in range(self._tokens):
            time.sleep(0.01)
            yield i


def test_requests_arrive_beside_a_stream_one_after_the_other() -> None:
    client = Tokens(100)
    times, arrivals = serve._stream(cast(OpenAI, client), [(NEW, "a"), (SEEN, "b")], apart=4)
    assert client.models == ["a", "b"]
    assert [arrival.case for arrival in arrivals] == [NEW, SEEN]
    assert times[3] <= arrivals[0].begin < arrivals[0].end < arrivals[1].begin < arrivals[1].end < times[-1]
    # At least four tokens came before each of them, and after the last.
    ends = [0.0, *(arrival.end for arrival in arrivals)]
    begins = [*(arrival.begin for arrival in arrivals), times[-1]]
    for end, begin in zip(ends, begins, strict=True):
        assert sum(end < t <= begin for t in times) >= 4


def test_a_stream_that_ends_too_early_is_an_error() -> None:
    with pytest.raises(MergeError, match="after 0 of 1 requests"):
        serve._stream(cast(OpenAI, Tokens(5)), [(NEW, "a")], apart=4)
