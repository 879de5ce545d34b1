"""What the benchmark of servers makes of the times it measures."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from merged_lora.bench import serve, serve_report, serving, soak
from merged_lora.bench.__main__ import main
from merged_lora.bench.serve_report import (
    AGAIN,
    COLD,
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

TICKS = [0.0, 0.1, 0.2, 0.5, 0.6, 0.7, 0.9, 1.0]


def a_report(merged: float = 0.080, cost: float = 0.020, gap: float = 0.010) -> Report:
    """Of a plain token in 80 ms, a load from disk in 40 ms, and a merge in 15 ms."""
    report = Report({"cpu": "made up"})
    report.warm = {WARM: [0.080, 0.081, 0.082], AGAIN: [0.080, 0.081, 0.082], MERGED: [merged] * 3}
    report.first = {
        "ties, 2 sources": FirstUse("ties, 2 sources", [0.08 + cost] * 3, [0.08] * 3, [15.0] * 3),
        COLD: FirstUse(COLD, [0.12] * 3, [0.08] * 3),
    }
    report.gaps = {
        ON: Gaps([0.08], {SEEN: [0.16], LOST: [0.16], MEMORY: [0.16], NEW: [0.16 + gap]}, [15.0]),
        OFF: Gaps([0.08], {COLD: [0.16]}),
    }
    report.speed = {ON: [49.0, 50.0, 51.0], OFF: [49.0, 50.0, 51.0]}
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


def test_a_growth_is_a_difference_of_medians() -> None:
    gaps = Gaps(largest={NEW: [0.2, 0.3, 9.0], SEEN: [0.1, 0.1, 0.2]})
    assert gaps.grows_by(NEW, SEEN) == pytest.approx(0.2)


def test_what_a_first_use_costs_is_told_pair_by_pair() -> None:
    use = FirstUse("case", [0.3, 0.9], [0.1, 0.8])
    assert use.cost == pytest.approx([0.2, 0.1])


def test_quartiles_of_five_values_are_the_second_the_third_and_the_fourth() -> None:
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert spread([0.005, 0.001, 0.002, 0.004, 0.003]) == "3.0 (2.0-4.0)"
    assert spread([0.005]) == "5.0"


def test_the_interval_of_a_ratio_holds_it_and_is_the_same_every_time() -> None:
    slow, fast = [2.0, 2.1, 1.9, 2.2, 1.8], [1.0, 1.1, 0.9, 1.05, 0.95]
    low, high = serve_report.interval(slow, fast)
    assert low < statistics.median(slow) / statistics.median(fast) < high
    assert (low, high) == serve_report.interval(slow, fast)


def test_the_same_times_without_spread_are_without_noise() -> None:
    assert serve_report.noise([3.0] * 4, [3.0] * 4) == 0


def test_the_time_of_a_merge_is_read_from_the_log_by_its_spec() -> None:
    log = (
        "INFO [server.py:281] merged spec='ties(0.3*sql, tone)' digest=e8 backend=cpu rank=8 modules=210 "
        "kept_energy=1.0 ms=19.6\nINFO something else ms=7\n"
    )
    assert serve_report.merge_milliseconds(log) == {"ties(0.3*sql, tone)": 19.6}


@pytest.mark.parametrize(
    ("report", "missed"),
    [
        (a_report(), []),
        (a_report(merged=0.090), ["warm merge"]),
        (a_report(cost=0.050), ["what a new merge costs"]),
        (a_report(gap=0.020), ["gap with a new merge"]),
    ],
    ids=["all", "slow when warm", "costly when new", "stalling others"],
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
            *(use.line() for use in report.first.values()),
            *(line for gaps in report.gaps.values() for line in gaps.lines()),
            report.speed_line(),
            *(aim.line() for aim in report.aims()),
        ]
    )
    assert all(case in text for case in (WARM, AGAIN, MERGED, COLD, SEEN, LOST, MEMORY, NEW, ON, OFF))
    assert "ties, 2 sources" in text
    kept = json.loads(json.dumps(report.as_json()))
    assert kept["warm"][MERGED] == [0.080] * 3
    assert [aim["met"] for aim in kept["aims"]] == [True] * 3


@pytest.mark.parametrize("benchmark", ["serve", "soak"])
def test_without_the_model_the_way_to_it_is_told_and_no_server_started(
    benchmark: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(serving, "MODEL", tmp_path)
    for module in (serve, soak):
        monkeypatch.setattr(module, "Server", None)
    with pytest.raises(SystemExit) as caught:
        main([benchmark])
    assert caught.value.code == 2
    assert "`make model` makes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["serve", "--requests", "1"], ["soak", "--minutes", "0"], ["soak", "--minutes", "nan"]],
    ids=" ".join,
)
def test_a_number_that_measures_nothing_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("benchmark", ["serve", "soak"])
def test_a_folder_is_refused_as_the_file_to_write(benchmark: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main([benchmark, "--json", str(tmp_path)])
    assert caught.value.code == 2


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert (soak.percentile(values, 50), soak.percentile(values, 99)) == (50.0, 99.0)
    assert soak.percentile([7.0], 99) == 7.0


def test_what_was_counted_is_told_and_unexpected_errors_in_full() -> None:
    counted = soak.Counted(refused=2, unexpected=["new: it broke"], merges={"a", "b", "c"})
    counted.steps.update(plain=4, new=3)
    counted.seconds["new"] = [0.5, 0.25]
    text = "\n".join(counted.lines())
    assert "7: 3 new, 4 plain" in text
    assert "distinct merges 3" in text
    assert "2 expected refusals, 1 unexpected" in text
    assert "p50 0.250 s, p99 0.500 s of 2" in text
    assert "UNEXPECTED new: it broke" in text
