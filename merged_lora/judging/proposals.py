"""Which merges a search may try: how a suggestion of the optimiser becomes a spec, and where it begins.

Knows nothing of servers or of scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from merged_lora.recipe import SCALED, Strategy, Value
from merged_lora.spec import MergeSpec, Source
from merged_lora.strategies import find

from .advice import ADVISED

DEFAULTS: tuple[tuple[str, Mapping[str, Value]], ...] = (
    *ADVISED,
    ("sum", {"weights": "auto"}),
    ("sum", {}),
)
"""What a search begins with and has to beat."""
STRATEGIES = tuple(dict.fromkeys(name for name, _ in DEFAULTS))
"""What is tried unless strategies are named."""
WEIGHTS, SCALES = (0.25, 4.0), (0.5, 2.0)
"""Ranges of factors, which are tried on a logarithmic scale."""
SHARES = {"density": (0.05, 1.0), "shrink": (0.7, 1.0), "t": (0.0, 1.0)}
"""Ranges of options that are shares."""
AUTOMATIC = "automatic weights"
"""The choice whether weights are found for each module."""
LENGTHLESS = (*SCALED, "agreeing_mean")
"""Blends whose result does not become longer with the weights."""


class Suggests(Protocol):
    """What :func:`proposal` asks; a trial of Optuna is one."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


class Neutral:
    """Suggests a strategy and its own defaults, except for what is given.

    params: what was suggested, by name.
    """

    def __init__(self, strategy: str, given: Mapping[str, Value]) -> None:
        self._strategy, self._given = find(strategy), given
        self.params: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        if name == "strategy":
            chosen: Any = self._strategy.name
        elif _option(name) == AUTOMATIC:
            chosen = self._given.get("weights") == "auto"
        else:
            chosen = self._given.get(_option(name), choices[0])
        return self.params.setdefault(name, chosen)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        del low, high, log
        option = self._strategy.option(_option(name))
        own: Any = 1.0 if option is None else option.default
        return float(self.params.setdefault(name, self._given.get(_option(name), own)))


def proposal(
    trial: Suggests, sources: Sequence[str], strategies: Sequence[str], ranks: Sequence[int]
) -> MergeSpec:
    """A merge from what the optimiser suggests: a strategy, and what that strategy takes.

    ranks: that a result may have, beside what is the strategy's own.
    """
    strategy = find(trial.suggest_categorical("strategy", list(strategies)))
    recipe, options = strategy.recipe, dict[str, Value]()
    of = strategy.name  # each has choices of its own: a density that suits one says nothing of another
    automatic = not recipe.balances and trial.suggest_categorical(f"{of} {AUTOMATIC}", [False, True])
    weights = [1.0] * len(sources)
    if automatic:
        options["weights"] = "auto"
    else:
        weights = [trial.suggest_float(f"{of} weight of {name}", *WEIGHTS, log=True) for name in sources]
    for name, bounds in SHARES.items():
        if strategy.option(name):
            options[name] = round(trial.suggest_float(f"{of} {name}", *_within(strategy, name, bounds)), 2)
    if automatic or recipe.blend in LENGTHLESS:
        options["scale"] = round(trial.suggest_float(f"{of} scale", *SCALES, log=True), 2)
    if strategy.option("rank") and ranks:
        rank = trial.suggest_categorical(f"{of} rank", [None, *ranks])
        options |= {"rank": rank} if rank else {}
    named = tuple(Source(name, round(weight, 2)) for name, weight in zip(sources, weights, strict=True))
    return MergeSpec(strategy.name, named, tuple(options.items()))


def defaults(
    sources: Sequence[str], strategies: Sequence[str], ranks: Sequence[int]
) -> Iterator[tuple[MergeSpec, dict[str, Any]]]:
    """The merges that a search begins with, each with the suggestions that make it."""
    named = [name for name, _ in DEFAULTS]
    for strategy in strategies:
        for given in [given for name, given in DEFAULTS if name == strategy] if strategy in named else [{}]:
            neutral = Neutral(strategy, given)
            yield proposal(neutral, sources, strategies, ranks), neutral.params


def _within(strategy: Strategy, name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    """The range of an option; with a density that is spread, as DELLA's, what leaves room on both sides."""
    spread = strategy.option("epsilon")
    if name != "density" or spread is None:
        return bounds
    room: Any = spread.default
    return max(bounds[0], room + 0.01), min(bounds[1], 1.0 - room)


def _option(name: str) -> str:
    """The option that a choice is of."""
    return name.partition(" ")[2]
