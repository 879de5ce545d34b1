"""What a search makes large: how the gains of all tasks become one value.  Knows nothing of servers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from merged_lora.errors import EvaluationError, listed

Value = TypeVar("Value", float, NDArray[np.float64])


class Objective:
    """The smallest gain, their mean, or a mean with weights.

    given: ``worst``, ``mean``, or the weight of each task that counts.
    tasks: the names of all.

    Raises EvaluationError.
    """

    def __init__(self, given: str | Mapping[str, float], tasks: tuple[str, ...]) -> None:
        self.given = given if isinstance(given, str) else dict(given)
        self._weights: dict[str, float] | None = None
        if given == "worst":
            return
        if isinstance(given, str):
            if given != "mean":
                raise EvaluationError(f"the objective must be worst, mean or weights of tasks, got {given!r}")
            given = dict.fromkeys(tasks, 1.0)
        if unknown := sorted(given.keys() - set(tasks)):
            raise EvaluationError(f"the objective names {listed(unknown)}, which has no examples")
        whole = sum(given.values())
        if not all(0 <= weight < math.inf for weight in given.values()) or not whole > 0:
            raise EvaluationError("the weights of the objective must be at least 0, and one of them more")
        self._weights = {task: weight / whole for task, weight in given.items() if weight}

    @property
    def name(self) -> str:
        """What the value is of, in a sentence: worst-task, mean or weighted."""
        return {"worst": "worst-task", "mean": "mean"}.get(str(self.given), "weighted")

    def value(self, gains: Mapping[str, Value]) -> Value:
        """The value of gains by task, each a number or one for each of many draws."""
        if self._weights is None:
            found: Value = np.minimum.reduce(list(gains.values()))
            return found
        weighted = [weight * gains[task] for task, weight in self._weights.items()]
        return np.add.reduce(weighted)  # type: ignore[no-any-return]

    def counts(self, task: str) -> bool:
        """Whether the value depends on a task."""
        return self._weights is None or task in self._weights
