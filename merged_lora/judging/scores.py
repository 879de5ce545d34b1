"""How right an answer is, and how sure a mean or a share of it is.  Knows nothing of servers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merged_lora.errors import EvaluationError

RESAMPLES = 2000
WORD = re.compile(r"[^\W_]+")
SURE = 95.0
"""Per cent of the resamples that an interval holds."""


@dataclass(frozen=True)
class Interval:
    """A value and the interval that resampling its examples gives.

    value: of all examples.
    low:   below it are 2.5 % of the resamples.
    high:  above it are 2.5 % of the resamples.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.0%} ({self.low:.0%} to {self.high:.0%})"

    @property
    def points(self) -> str:
        """A difference of shares, in percentage points."""
        return f"{100 * self.value:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def exact(given: str, right: Sequence[str]) -> float:
    """1 if an answer is one of the right ones, up to space around it, else 0."""
    return float(given.strip() in {each.strip() for each in right})


def contains(given: str, right: Sequence[str]) -> float:
    """1 if an answer holds one of the right ones, else 0."""
    return float(any(each.strip() in given for each in right))


def rouge_l(given: str, right: Sequence[str]) -> float:
    """The largest ROUGE-L F-measure with a right answer, from 0 to 1.

    C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004; computed by rouge-score on
    words in small letters, each of letters and digits of any script.

    Raises EvaluationError without rouge-score, of the extra ``eval``.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise EvaluationError(
            f"ROUGE-L needs rouge-score, which cannot be imported ({error}): "
            "pip install 'vllm-merged-lora[eval]'"
        ) from None
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return max(float(scorer.score(each, given)["rougeL"].fmeasure) for each in right)


class _Words:
    """The tokenizer of rouge-score without its limit to ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "contains": contains,
    "rouge-l": rouge_l,
}
"""Scores of an answer from 0 to 1, by name."""


def check_installed() -> None:
    """Raise EvaluationError if a library that a metric needs is not installed."""
    for score in METRICS.values():
        score("", ["a"])


def mean(values: Sequence[float]) -> Interval:
    """The mean of the scores of some examples."""
    scores = np.asarray(values, dtype=np.float64)
    return _interval(lambda picked: scores[picked].mean(axis=-1), len(scores))


def retention(merged: Sequence[float], alone: Sequence[float]) -> Interval | None:
    """The share of a specialist's score that a merge keeps, None if the specialist has none.

    Both are resampled together, example by example, so that hard examples count in both.

    merged: scores of the merge.
    alone:  scores of the specialist on the same examples.
    """
    own, other = np.asarray(alone, dtype=np.float64), np.asarray(merged, dtype=np.float64)
    if not own.sum():
        return None

    def share(picked: NDArray[np.int64]) -> NDArray[np.float64]:
        below = own[picked].mean(axis=-1)
        ratio: NDArray[np.float64] = other[picked].mean(axis=-1) / np.where(below > 0, below, np.nan)
        return ratio

    return _interval(share, len(own))


def difference(
    merged: Mapping[str, Sequence[float]],
    other: Mapping[str, Sequence[float]],
    alone: Mapping[str, Sequence[float]],
    value: Callable[[Mapping[str, NDArray[np.float64]]], NDArray[np.float64]],
    without: Mapping[str, Sequence[float]] | None = None,
) -> Interval | None:
    """By how much one merge keeps more of its sources than another, in a value of all tasks together.

    What a merge keeps of a source is its score above that of ``without``, divided by that of the source.  In
    each resample, all have the same examples.

    merged, other: scores of the merges by task, example by example.
    alone:         scores of each task's source on the same examples.
    value:         of what is kept by task; each holds one number for each resample.
    without:       scores of the base model; by default 0.

    Returns None if the source of a task that counts has no score to keep.
    """
    rng = np.random.default_rng(0)
    kept: tuple[dict[str, NDArray[np.float64]], ...] = ({}, {})
    for task, own in alone.items():
        zero = np.asarray(without[task] if without else np.zeros(len(own)), dtype=np.float64)
        above = np.asarray(own, dtype=np.float64) - zero
        drawn = rng.integers(0, len(own), (RESAMPLES, len(own)))
        drawn = np.concatenate([np.arange(len(own))[None], drawn])  # first all examples, each once
        below = above[drawn].mean(axis=1)
        for found, scores in zip(kept, (merged[task], other[task]), strict=True):
            gained = (np.asarray(scores, dtype=np.float64) - zero)[drawn].mean(axis=1)
            found[task] = gained / np.where(below > 0, below, np.nan)
    # Rounded: shares that are the same, computed of other examples, differ in their last bits.
    differences = np.round(value(kept[0]) - value(kept[1]), 9)
    if not np.isfinite(differences[0]):
        return None
    return _around(float(differences[0]), differences[1:])


def _interval(statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], count: int) -> Interval:
    """The percentile bootstrap (B. Efron, "Bootstrap Methods", Ann. Statist. 7, 1979), the same each time."""
    picked = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    return _around(float(statistic(np.arange(count)[None])[0]), statistic(picked))


def _around(value: float, resampled: NDArray[np.float64]) -> Interval:
    """The interval of resampled values, which holds the value: they may differ from it by rounding alone."""
    tail = (100.0 - SURE) / 2
    low, high = np.nanpercentile(resampled, (tail, 100.0 - tail))
    return Interval(value, min(float(low), value), max(float(high), value))
