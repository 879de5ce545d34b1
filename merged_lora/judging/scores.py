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


def worst_difference(
    better: Mapping[str, Sequence[float]],
    other: Mapping[str, Sequence[float]],
    alone: Mapping[str, Sequence[float]],
    without: Mapping[str, Sequence[float]] | None = None,
) -> Interval | None:
    """By how much one merge keeps more than another of the source of which each keeps least.

    In each resample, both merges and all sources have the same examples, and each merge its own worst task.
    None if no source has a score to keep.

    better, other: scores of the merges by task, example by example.
    alone:         scores of each task's source on the same examples.
    without:       scores of what has nothing to keep, which counts as 0; by default 0.
    """
    rng = np.random.default_rng(0)
    resampled: list[list[NDArray[np.float64]]] = [[], []]
    whole: list[list[float]] = [[], []]
    for task, own in alone.items():
        zero = np.asarray(without[task] if without else np.zeros(len(own)), dtype=np.float64)
        above = np.asarray(own, dtype=np.float64) - zero
        picked = rng.integers(0, len(own), (RESAMPLES, len(own)))
        if not above.sum() > 0:
            continue
        for i, merged in enumerate((better[task], other[task])):
            scores = np.asarray(merged, dtype=np.float64) - zero
            means = above[picked].mean(axis=1)
            resampled[i].append(scores[picked].mean(axis=1) / np.where(means > 0, means, np.nan))
            whole[i].append(float(scores.mean() / above.mean()))
    if not whole[0]:
        return None
    tail = (100.0 - SURE) / 2
    worst = [np.min(np.stack(each), axis=0) for each in resampled]
    low, high = np.nanpercentile(worst[0] - worst[1], (tail, 100.0 - tail))
    return Interval(min(whole[0]) - min(whole[1]), float(low), float(high))


def _interval(statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], count: int) -> Interval:
    """The percentile bootstrap (B. Efron, "Bootstrap Methods", Ann. Statist. 7, 1979), the same each time."""
    picked = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    tail = (100.0 - SURE) / 2
    low, high = np.nanpercentile(statistic(picked), (tail, 100.0 - tail))
    return Interval(float(statistic(np.arange(count)[None])[0]), float(low), float(high))
